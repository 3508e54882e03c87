"""The recipes of the demo: the model, reward, settings and words with which each method is shown, and their cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .shapes_world.embedded import EmbeddedModel

SET = 4  # images of each prompt, for methods that compare the images of a set
CATEGORIES = {"position": 4, "binding": 2, "counting": 2}  # of the default prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices with which a method is shown.

    Attributes:
        model: The embedded model of the kind that the method is made for.
        reward: The embedded reward, for methods that take one.
        settings: Settings that the demo changes.
        unit: The word for one of its evaluations.
        plan: The words after their number: what they are for.
        note: A note about the method, or an empty string.
        following: The method that the demo proposes next, or an empty string.
    """

    model: str = "turbo"
    reward: str = "clip"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unit: str = "step"
    plan: str = ""
    note: str = ""
    following: str = ""


RECIPES = {
    "reno": Recipe(plan="up the reward", following="cno"),
    "cno": Recipe(
        model="guided",
        settings={"window_size": 8, "learning_rate": 0.04},
        plan="that push the images of a prompt apart",
        following="never_too_late",
    ),
    "never_too_late": Recipe(
        settings={
            "steps": 36,
            "search": 26,
            "geometry": "white",
            "diversity": {"pairwise": ("tiny_image", 26.0)},
            "guard": {"clip": {"threshold": 11.0}},  # about where the embedded reward begins to be sure
        },
        plan="toward images that differ",
        following="noise_diffusion",
    ),
    "noise_diffusion": Recipe(
        model="guided",
        reward="vqa",
        settings={"steps": 20},
        unit="round",
        plan="toward the yes of a vision-language model",
    ),
    "noise_pgd": Recipe(
        model="guided",
        reward="vqa",
        settings={"steps": 20},
        plan="up P(yes)",
        note="A baseline of Noise Diffusion's paper, whose noise is Gaussian no more.",
    ),
    "mean_variance": Recipe(
        model="guided",
        reward="vqa",
        settings={"steps": 20},
        plan="up P(yes)",
        note="A baseline of Noise Diffusion's paper, which moves only the mean and variance of the noise.",
    ),
}

# Processor seconds for one image: a call of the denoiser, decoding, and the look of a reward. A gradient doubles each.
CALL, DECODE, LOOK = 0.008, 0.010, 0.005
MOST = 60.0  # processor seconds of a demo, which with loading and drawing is under a minute on two cores
PROMPTS = {1: (8, 4, 2), SET: (4, 2)}  # numbers of prompts to choose from, by the images of each
ENOUGH = 12  # evaluations; with fewer prompts before fewer evaluations than that


def calls(model: EmbeddedModel) -> int:
    """Return the calls of the denoiser for one image, two in each step with guidance."""
    return model.call["num_inference_steps"] * (2 if model.call["guidance_scale"] > 1 else 1)


def cost(model: EmbeddedModel, gradient: str | None, previews: bool) -> float:
    """Return the processor seconds of an evaluation of one noise, its picture included.

    Args:
        model: The embedded pipeline.
        gradient: "full" through the denoiser, "frozen" through decoder and reward alone, or `None`.
        previews: Whether one model call is evaluated, and the picture drawn beside it.
    """
    chain, denoised = calls(model) * CALL, 2 if gradient == "full" else 1
    if previews:
        return chain / model.call["num_inference_steps"] * denoised + chain + DECODE
    return chain * denoised + (DECODE + LOOK) * (2 if gradient else 1)


def fitting(evaluation: float, images: int, own: int) -> int:
    """Return as many of a method's own evaluations as fit, with the most prompts that leave `ENOUGH`."""
    fit = [int(MOST / (evaluation * images * prompts)) for prompts in PROMPTS[images]]
    return max(2, min(own, next((steps for steps in fit if steps >= min(own, ENOUGH)), fit[-1])))


def searched(recipe: Recipe, evaluations: int) -> int:
    """Return the share of evaluations that the search of a recipe has, and at most its own."""
    return min(recipe.settings["search"], evaluations * recipe.settings["search"] // recipe.settings["steps"])


def prompts_fitting(evaluation: float, images: int, steps: int) -> int:
    """Return the most prompts whose evaluations fit."""
    fit = (count for count in PROMPTS[images] if count * images * steps * evaluation <= MOST)
    return next(fit, PROMPTS[images][-1])


def seconds(evaluation: float, noises: int, steps: int) -> int:
    """Return about how long a demo takes on two idle cores, in steps of 5 seconds."""
    loading, speedup = 8, 1.7
    return 5 * round((loading + evaluation * noises * steps / speedup) / 5)
