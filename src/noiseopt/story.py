"""The subject of a demo: the method and model that were chosen, and the record of the run."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import shapes_world
from .evaluation.instruments import load_reward
from .evaluation.metrics import layout_spread
from .evaluation.plan import MethodChoice, ModelChoice, SteeringChoice
from .pipelines import NoiseOptimizer, NoiseResult, list_methods
from .pipelines.registry import METHODS
from .shapes_world.embedded import EmbeddedModel
from .shapes_world.judge import Verdict

SET = 4  # images of each prompt, for methods that compare the images of a set
STEPS, STEPS_OF_CHAINS = 50, 20  # keep eight prompts under a minute on two cores


def first_of_each(prompts: Iterable[str], counts: dict[str, int]) -> list[str]:
    """Return the first `counts[category]` prompts of each category, grouped by category."""
    groups: dict[str, list[str]] = {name: [] for name in counts}
    for prompt in prompts:
        groups.get(shapes_world.category(prompt), []).append(prompt)
    return [prompt for name, count in counts.items() for prompt in groups[name][:count]]


SCORE_RANGE = (0.0, 16.0)  # typical scores of wrong and right images under the embedded reward
# The first prompts of a list with a fixed shuffle, not picked by their results.
DEFAULT_PROMPTS = first_of_each(shapes_world.VALIDATION_PROMPTS, {"position": 4, "binding": 2, "counting": 2})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model, settings and note with which a method is shown.

    Attributes:
        model: The embedded model of the kind that the method is made for.
        settings: Settings that suit the 8 × 8 latents of the embedded models, where the method's own do not.
        note: A note about the outcome, or an empty string.
    """

    model: str = "turbo"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


LENGTH = ("steps", "budget")  # settings that are told apart from the others

# Learning rates are in units of the height and width of the noise alone: these are for latents of 8 channels, twice
# those of SD, and of benchmarks/never_too_late.py.
RECIPES = {
    "reno": Recipe(model="sdxl-turbo"),  # where plain sampling leaves most to repair
    "cno": Recipe(
        model="guided",
        settings={"learning_rate": 0.057, "window_size": 2},
        note="learning_rate=0.057 moves these 8 × 8 latents as far as the paper's 0.01 moves 64 × 64. CNO is told "
        "nothing about the prompt: what is wrong mostly stays wrong.",
    ),
    "never_too_late": Recipe(
        settings={"steps": 10, "learning_rate": 35.0, "diversity": {"dpp": 72.0}, "guard": {"clip": 0.5}},
        note="The guard takes back a step after which the reward of an image is more than 0.5 below its start.",
    ),
    "noise_diffusion": Recipe(
        model="guided",
        settings={"score_range": SCORE_RANGE},
        note="Made for the yes of a large vision-language model. The embedded one knows too little, so the reward here "
        "is a CLIP, and random noises (--method best_of_n) do as well.",
    ),
    "noise_pgd": Recipe(
        model="guided",
        note="A baseline of Noise Diffusion's paper: it raises the reward most, by leaving the Gaussian, and ruins "
        "the images.",
    ),
    "mean_variance": Recipe(
        model="guided",
        note="A baseline of Noise Diffusion's paper: mean and variance hardly change an image.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered method on an embedded model.

    Attributes:
        method: A name in `list_methods()`.
        model: An embedded pipeline.
        settings: Settings of the method, with its `steps`, the evaluations of each noise.
    """

    method: str
    model: EmbeddedModel
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, method: str = "reno", model: str | None = None, steps: int | None = None) -> "Choice":
        """Look up a method, such as "reno" or "reno:views=4", and a model.

        Args:
            method: The method, with settings that replace those of its `Recipe`.
            model: An embedded pipeline. Defaults to that of the recipe.
            steps: Evaluations of each noise. Defaults to the method's own number, capped to suit the model.

        Raises:
            ValueError: For an unknown name or setting.
        """
        asked = MethodChoice.parse(method)
        if isinstance(asked, SteeringChoice):
            raise ValueError(
                f"Expected a method that optimizes noise, one of {', '.join(list_methods())}, but got {asked.name!r}. "
                "`noiseopt evaluate` compares what steers it."
            )
        recipe = RECIPES.get(asked.name, Recipe())
        embedded = ModelChoice.parse(model or recipe.model, {})
        if not embedded.embedded:
            raise ValueError(f"Expected an embedded model, but got {model!r}. `noiseopt generate` runs others.")
        known = shapes_world.MODELS[embedded.name]
        limit = STEPS if known.call["num_inference_steps"] == 1 else STEPS_OF_CHAINS
        settings = {"steps": min(METHODS[asked.name].steps, limit), **recipe.settings, **asked.settings}
        return cls(asked.name, known, settings | ({"steps": steps, "budget": None} if steps else {}))

    @property
    def steps(self) -> int | None:
        """The planned evaluations of each noise; `None` for as many as a time budget allows."""
        budget = self.settings.get("budget")
        return self.settings["steps"] if budget is None else None if isinstance(budget, str) else budget

    @property
    def noise_sampler(self) -> Any:
        """The distribution of the initial noise; `None` for that of the pipeline."""
        return self.settings.get("noise_sampler")

    @property
    def note(self) -> str:
        """A note about the outcome, or an empty string."""
        return RECIPES.get(self.method, Recipe()).note

    @property
    def asked(self) -> MethodChoice:
        """The method as other commands name it."""
        return MethodChoice(self.method, self.method, self.settings)

    @property
    def single(self) -> bool:
        """Return whether each image is optimized for its own reward, rather than as part of a diverse set."""
        return self.asked.takes_rewards and self.asked.diversity is None and self.asked.features is None

    @property
    def count(self) -> int:
        """Images per prompt: 1, or `SET` for methods that optimize a set."""
        return 1 if self.single else SET

    @property
    def prompts(self) -> list[str]:
        """The default prompts."""
        return DEFAULT_PROMPTS if self.count == 1 else DEFAULT_PROMPTS[::2]

    @property
    def keeps_best(self) -> bool:
        """Return whether the method returns its best step rather than its last."""
        return METHODS[self.method].returns == "best"

    def build(self) -> NoiseOptimizer:
        """Build the method with the embedded reward and features that it needs."""
        device = torch.device("cpu")
        rewards = load_reward("clip", device) if self.asked.takes_rewards else None
        return self.asked.build(rewards, device)

    @property
    def instruments(self) -> list[str]:
        """Names of the embedded models that the method evaluates with."""
        names = self.asked.towers | ({"clip"} if self.asked.takes_rewards else set())
        return [name for name in shapes_world.MODELS if name in names]

    def weights(self) -> list[str]:
        """Return the folders of all required weights. Raises `FileNotFoundError` if some are unavailable."""
        return [shapes_world.path(name) for name in (self.model.name, *self.instruments)]

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value!r}" for name, value in self.settings.items() if name not in LENGTH)
        method = METHODS[self.method].__name__ + f"({changed})" * bool(changed)
        return f"{method} on {self.model.name}, the {self.model.title}"


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """The record of optimizing `B` noises step by step.

    Attributes:
        choice: The method and the model.
        prompts: The prompt of each noise; the noises of one set are consecutive.
        results: The `NoiseResult`s: one for all prompts, or one per set.
        images: `(steps, B, 3, 64, 64)` in [0, 1].
        verdicts: The judge's verdict on each image, by step and sample.
    """

    choice: Choice
    prompts: Sequence[str]
    results: Sequence[NoiseResult]
    images: torch.Tensor
    verdicts: list[list[Verdict]]

    @property
    def sets(self) -> list[range]:
        """The noises of each row: one for methods of single images, or those of a prompt."""
        count = self.choice.count
        return [range(first, first + count) for first in range(0, len(self.prompts), count)]

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """`(steps, sets)`, higher is better: the reward of each image, or how far apart the images of a set are.

        That is the `layout_spread` in pixels, which no method optimizes; NaN where the judge finds no two images with
        the objects of the prompt.
        """
        if self.choice.single:
            return -torch.cat([result.losses for result in self.results], dim=1)
        return torch.tensor([[self.spread(images, rows) for rows in self.sets] for images in self.images])

    def spread(self, images: torch.Tensor, rows: range) -> float:
        """Return the `layout_spread` of a set of the images `(B, 3, 64, 64)`."""
        return layout_spread(images[rows.start : rows.stop], self.prompts[rows.start])

    @property
    def measure(self) -> str:
        """The name of `values`."""
        return "reward" if self.choice.single else "layout"

    def value(self, row: int, end: int) -> float:
        """Return the value of a row before (`end=0`) or after (`end=1`)."""
        rows = self.sets[row]
        if self.choice.single:
            return float(self.values[self.ends(row)[end], row])
        return self.spread(self.end_images(end), rows)

    def right(self, row: int, end: int) -> int:
        """Count the right images of a row before or after."""
        return sum(self.verdicts[self.ends(sample)[end]][sample].correct for sample in self.sets[row])

    def reward(self, row: int, end: int) -> float | None:
        """Return the mean reward of a set before or after; `None` for methods without rewards."""
        result = self.results[row]
        scores = result.initial_scores if end == 0 else result.best_scores
        return float(scores["clip"].mean()) if "clip" in scores else None

    @property
    def seconds(self) -> float:
        return sum(result.provenance["seconds"] for result in self.results)

    @property
    def steps(self) -> int:
        """The steps that were taken; a last evaluation of what they chose, as in group selection, is none."""
        return min(len(self.images), self.choice.steps or len(self.images))

    def best(self, sample: int) -> int:
        """Return the step whose image is returned."""
        return int(torch.cat([result.best_step for result in self.results])[sample])

    def first_right(self, sample: int) -> int | None:
        """Return the first step whose image is correct according to the judge, or `None`."""
        return next((step for step, row in enumerate(self.verdicts) if row[sample].correct), None)

    def ends(self, sample: int) -> tuple[int, int]:
        """Return the steps to compare: the baseline and the returned image."""
        return 0, self.best(sample)

    def end_images(self, end: int) -> torch.Tensor:
        """Return the baselines (`end=0`) or the returned images (`end=1`), `(B, 3, 64, 64)`."""
        return torch.stack([self.images[self.ends(sample)[end], sample] for sample in range(len(self.prompts))])
