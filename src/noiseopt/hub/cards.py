"""The cards of the pipeline classes, as data, and the text of their README files.

Arguments, settings, defaults and rewards are read from the classes and registries, so that a card cannot disagree with
the code. A new card is one more entry in `CARDS`; the first card of a room also needs the texts `templates/<room>.md`.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from .. import pipelines
from ..pipelines.registry import METHODS
from ..rewards.contract.registry import REWARDS
from ..shapes_world.embedded import MODELS
from ..story import Choice
from .before_after import PICTURE, BeforeAfter
from .markdown import code, described, sections, table, template

REQUIREMENTS = ("torch>=2.6", "diffusers>=0.41", "transformers>=5.18", "accelerate>=1.1")
CLEAR_DIFFERENCE = 6  # verdicts that change to one side and none to the other: p < .05 by a two-sided sign test
VISIBLE = 0.1  # relative change of a diversity


@dataclasses.dataclass(frozen=True)
class Card:
    """One Hub repository.

    Attributes:
        name: Its folder here and its name on the Hub.
        cls: The pipeline class: a mixin, then the stock class.
        base_model: Hub id of the weights that the example loads.
        model: The common name of that model.
        shown_on: The embedded model of its picture.
        weights: Arguments of the example that the paper chose for this model, `$weights` in the template.
    """

    name: str
    cls: type[Any]
    base_model: str
    model: str
    shown_on: str
    weights: str = ""

    @property
    def room(self) -> str:
        """The folder of the class, which is the registered name of its method."""
        return self.cls.__module__.split(".")[-2]

    @property
    def method(self) -> type[Any]:
        return METHODS.find(self.room)

    @property
    def stock(self) -> type[Any]:
        return self.cls.__bases__[-1]

    @property
    def title(self) -> str:
        return f"{self.method.__name__} for {self.model}"


SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", "guided")
SDXL = ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL", "sdxl")
SD35 = ("stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3.5", "sd3")
FLUX_DEV = ("black-forest-labs/FLUX.1-dev", "FLUX.1", "sd3")
FLUX_SCHNELL = ("black-forest-labs/FLUX.1-schnell", "FLUX.1-schnell", "sd3")
SD_TURBO = ("stabilityai/sd-turbo", "SD-Turbo", "turbo")
SDXL_TURBO = ("stabilityai/sdxl-turbo", "SDXL-Turbo", "sdxl-turbo")
SET_OF_TURBO = """diversity={"dpp": 150.0},
    rewards={"hpsv2.1": 3.0},
    guard={"sharpness": {"keep": 0.8}},
    noise_sampler="pink","""
SET_OF_FLUX = """diversity={"dpp": 1.5},
    guard={"hpsv2.1": {"threshold": 0.31}},"""
CARDS = (
    Card("reno-turbo", pipelines.ReNOTurboPipeline, *SDXL_TURBO),
    Card("reno-stable-diffusion", pipelines.ReNOStableDiffusionPipeline, *SD_TURBO),
    Card("cno-stable-diffusion", pipelines.CNOStableDiffusionPipeline, *SD15),
    Card("cno-stable-diffusion-xl", pipelines.CNOStableDiffusionXLPipeline, *SDXL),
    Card("cno-stable-diffusion-3", pipelines.CNOStableDiffusion3Pipeline, *SD35),
    Card("cno-flux", pipelines.CNOFluxPipeline, *FLUX_DEV),
    Card("noise-diffusion-stable-diffusion", pipelines.NoiseDiffusionStableDiffusionPipeline, *SD15),
    Card("noise-diffusion-stable-diffusion-xl", pipelines.NoiseDiffusionStableDiffusionXLPipeline, *SDXL),
    Card("noise-diffusion-stable-diffusion-3", pipelines.NoiseDiffusionStableDiffusion3Pipeline, *SD35),
    Card("noise-diffusion-flux", pipelines.NoiseDiffusionFluxPipeline, *FLUX_DEV),
    Card("never-too-late-turbo", pipelines.NeverTooLateTurboPipeline, *SDXL_TURBO, SET_OF_TURBO),
    Card("never-too-late-stable-diffusion", pipelines.NeverTooLateStableDiffusionPipeline, *SD_TURBO, SET_OF_TURBO),
    Card("never-too-late-flux", pipelines.NeverTooLateFluxPipeline, *FLUX_SCHNELL, SET_OF_FLUX),
)


def readme(card: Card, namespace: str, version: str, bundle: str, shown: BeforeAfter | None) -> str:
    """Return the README of a card.

    Args:
        card: The card.
        namespace: The account on the Hub.
        version: The version of the package that the bundle is made from.
        bundle: The name of the bundle's file.
        shown: The facts of its picture, if there is one.
    """
    names = {"model": card.model, "stock": card.stock.__name__, "weights": card.weights}
    texts = {title: text.safe_substitute(names) for title, text in sections(card.room).items()}
    arguments = list(call_arguments(card))
    takes_rewards = any(name == code("rewards") for name, *_ in arguments)
    return template("pipeline").substitute(
        texts,
        name=card.name,
        title=card.title,
        base_model=card.base_model,
        stock=card.stock.__name__,
        namespace=namespace,
        version=version,
        bundle=bundle,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        module=card.cls.__module__,
        class_name=card.cls.__name__,
        arguments=table(("Argument", "Default", "Meaning"), arguments),
        settings=table(("Setting", "Default", "Meaning"), settings(card.method)),
        shown=shown_section(card, shown) if shown else "",
        rewards=rewards_section() if takes_rewards else "",
        checkpoints="Model and reward checkpoints" if takes_rewards else "Model checkpoints",
    )


def call_arguments(card: Card) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and description of the arguments that a pipeline class adds to its stock class."""
    stock, text = inspect.signature(card.stock.__call__).parameters, described(inspect.getdoc(card.cls.__call__))
    for parameter in inspect.signature(card.cls.__call__).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in stock:
            yield code(parameter.name), code(repr(parameter.default)), text.get(parameter.name, "")


def settings(method: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and description of the fields of a method that have a default."""
    text: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        text |= described(inspect.cleandoc(cls.__doc__ or ""))
    for field in dataclasses.fields(method):
        if field.default is not dataclasses.MISSING:
            yield code(field.name), code(repr(field.default)), text.get(field.name, "")


def rewards_section() -> str:
    """Return the section with names, default checkpoint and its license of the registered rewards."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for name in REWARDS.names():
        attributes = ("default_checkpoint", "published_at", "license")
        checkpoint, published_at, license = (getattr(REWARDS.find(name), each, None) for each in attributes)
        source = f"a folder with the file from {published_at}" if published_at else "none needed"
        sharing.setdefault((code(checkpoint) if checkpoint else source, license or ""), []).append(code(name))
    rows = [(", ".join(names), *shared) for shared, names in sharing.items()]
    return template("rewards").substitute(table=table(("Names", "Checkpoint", "License of the checkpoint"), rows))


def shown_section(card: Card, shown: BeforeAfter) -> str:
    """Return the section about the picture of a card."""
    paragraphs = {"origin": origin(card, shown), "finding": finding(card, shown)}
    filled = {name: textwrap.fill(text, 119, break_on_hyphens=False) for name, text in paragraphs.items()}
    return template("before_after").substitute(filled, picture=PICTURE, name=card.name)


def origin(card: Card, shown: BeforeAfter) -> str:
    model = MODELS[shown.model]
    no_flux = "There is no embedded model of the FLUX kind: this is the closest, also trained by flow matching. "
    return (
        f"{card.model} is too large for pictures that anyone can reproduce. These are by the embedded model "
        f"[`{model.hub_id}`](https://huggingface.co/{model.hub_id}), a {model.title}. "
        f"{no_flux if card.stock is FluxPipeline else ''}Pictures of other models do not show how much the method does "
        f"for {card.model}. In a checkout of the repository the command below generates them."
    )


def finding(card: Card, shown: BeforeAfter) -> str:
    several = shown.images > 1
    baseline = f"{shown.images} baseline images of a prompt" if several else "the baseline image"
    through = " and ".join(code(f"shapes-{name}") for name in shown.instruments)
    through = f", which sees images through {through}" if through else ""
    return (
        f"Left of an arrow: {baseline}. Right of it: the same seed{'s' * several} after {shown.steps} steps of "
        f"{card.method.__name__}{changed_settings(shown)}{through}. ✓ and ✗ are the verdicts "
        "of a judge that reads the pixels; it is no model, and nothing optimizes it. "
        f"{shown.right[0]} of {shown.count} images are right before, {shown.right[1]} of {shown.count} after"
        f"{doubt(shown.right)}. {effect(shown)} "
        f"The prompts are the first of the validation split, and the seeds count from {shown.seed}: nothing was chosen "
        "by its outcome."
    )


def changed_settings(shown: BeforeAfter) -> str:
    """Return what the picture has other than by default."""
    settings = Choice.of(shown.method, shown.model).settings
    changed = [code(f"{name}={value!r}") for name, value in settings.items() if name != "steps"]
    return f" with {', '.join(changed)}" if changed else ""


def doubt(right: list[int]) -> str:
    """Return a caveat if the numbers of right images before and after differ by too few for a sign test."""
    difference = abs(right[1] - right[0])
    return ", a difference that may be chance in so few" if 0 < difference < CLEAR_DIFFERENCE else ""


def effect(shown: BeforeAfter) -> str:
    """Return a sentence about the numbers in the picture."""
    before, after = shown.values
    if shown.layout is None:
        named = "the probability of a yes" if shown.measure == "P(yes)" else f"the {shown.measure}"
        return f"The numbers are {named}, which is optimized: {before:g} in the mean before, {after:g} after."
    kind, ruler = "optimizes" if shown.ruler in shown.instruments else "does not use", code(f"shapes-{shown.ruler}")
    text = (
        f"The diversity, 1 − the mean cosine of two images of a prompt in the features of {ruler}, "
        f"which the method {kind}, is {before:g} before, {after:g} after"
    )
    change = (after - before) / max(before, 1e-3)
    if abs(change) < VISIBLE:
        text += ": on this model, with these settings, the images do not visibly differ more from one another"
    first, last = shown.layout
    return f"{text}. The same objects are {first:.1f} pixels from their mean position before, {last:.1f} after."
