"""Say what happens to each pipeline class of diffusers: `python tests/conformance/all_pipelines.py --write`.

A class that draws Gaussian latents and returns images is built at tiny size and run: the first evaluation is the plain
result, `latents=result.latents` draws the best, and the loss falls, or it is refused by name.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import pytest
import torch
from conformance.builders import BROKEN_IN_DIFFUSERS, arguments_of, can_build, tiny_pipeline_of
from conformance.checks import on_white
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from noiseopt import NoiseOptimizationMixin, ReNO, optimize_noise
from noiseopt.pipelines.request import check_pipeline_class, check_takes_latents
from noiseopt.pipelines.sampling.first_call import stock_call
from noiseopt.pipelines.sampling.pixel_range import mentions, words_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
Kind = Literal["works", "class", "refused", "not built", "out of scope"]
HEADINGS: dict[Kind, tuple[str, str]] = {
    "works": (
        "Works",
        "`optimize_noise` and a class with the mixin: the first evaluation is the plain result bit by bit, "
        "`pipe(prompt, latents=result.latents, generator=result.generator(), ...)` draws the best, the loss falls.",
    ),
    "class": (
        "Works in the same call",
        "A plain call cannot draw the image of a noise again, so `optimize_noise` refuses them by name before a step. "
        "A class with the mixin, `class Ours(NoiseOptimizationMixin, <the class>)`, returns the best image itself.",
    ),
    "refused": ("Refused by name", "By both, before any step is made, with the reason in the error."),
    "not built": ("Not built here", "Their stock calls fail, or no tiny pipeline of them is in the tests."),
    "out of scope": ("Out of scope", "No images of this package's kind, or not importable here."),
}


class Outcome(NamedTuple):
    """The outcome of a class, and its reason."""

    kind: Kind
    reason: str = ""


@functools.cache
def all_classes() -> dict[str, type]:
    """Return the concrete pipeline classes that diffusers exports, by name; those of missing packages included."""
    named = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return {name: cls for name, cls in named.items() if is_concrete(cls)}


def is_concrete(cls: Any) -> bool:
    if not isinstance(cls, type) or hasattr(cls, "_backends"):
        return isinstance(cls, type)
    return issubclass(cls, DiffusionPipeline) and any("__call__" in vars(base) for base in cls.__mro__)


def out_of_scope(cls: Any) -> str | None:
    """Return the reason why a class is out of scope, by rule."""
    if hasattr(cls, "_backends"):
        return f"needs {', '.join(cls._backends)}"
    fields = output_fields(cls)
    if is_video(cls):
        return None
    if fields and not fields & {"images", "image"}:
        return f"returns {', '.join(sorted(fields))}"
    if "video_length" in inspect.signature(stock_call(cls)).parameters:
        return "returns frames"
    return None


def is_video(cls: type) -> bool:
    """Return whether a class returns the frames of videos of a prompt, and nothing beside them."""
    return output_fields(cls) == {"frames"} and mentions(cls, "postprocess_video")


def output_fields(cls: type) -> set[str]:
    """Return the fields of the output classes that the stock call names."""
    call = stock_call(cls)
    named = [call.__globals__.get(word) for word in words_of(call.__code__)]
    outputs = [each for each in named if isinstance(each, type) and issubclass(each, BaseOutput)]
    return {field.name for each in outputs for field in dataclasses.fields(each)}


def by_rule(name: str) -> Outcome | None:
    """Return what happens to a class if its code alone says so."""
    cls = all_classes()[name]
    if reason := out_of_scope(cls):
        return Outcome("out of scope", reason)
    try:
        check_pipeline_class(cls)
    except TypeError as error:
        return Outcome("refused", short(error, cls))
    if is_video(cls) and not can_build(cls):
        return Outcome("not built", "from text to video, not tried yet")
    return None


def outcome_of(name: str) -> Outcome:
    cls = all_classes()[name]
    if found := by_rule(name):
        return found
    if not can_build(cls):
        return Outcome("not built", "no recipe yet")
    if name in BROKEN_IN_DIFFUSERS:
        with pytest.raises((AttributeError, TypeError)) as failed:
            plain_images(tiny_pipeline_of(cls), **arguments_of(cls))
        return Outcome("not built", f"its stock call fails: {failed.value}")
    calls = {1.0: run(cls, 1.0)}
    if "strength" in inspect.signature(stock_call(cls)).parameters:
        calls[0.6] = run(cls, 0.6)
    kinds = {strength: each.kind for strength, each in calls.items()}
    if len(set(kinds.values())) == 1:
        return calls[1.0]
    found = calls[1.0]
    return Outcome(found.kind, f"with `strength=1`; with less: {HEADINGS[calls[0.6].kind][0].lower()}")


def run(cls: type, strength: float) -> Outcome:
    """Run a class with `optimize_noise`, and if that refuses it, with the mixin."""
    pipe, arguments = tiny_pipeline_of(cls), arguments_of(cls, strength)
    prompt = arguments.pop("prompt")
    plain = in_unit_range(plain_images(pipe, prompt, **arguments))
    steps: list[Any] = []
    try:
        check_takes_latents(pipe)
        text = {} if prompt is not None else {"reward_prompt": "a b"}
        with one_global_stream():
            result = optimize_noise(pipe, prompt, METHOD, generator=seed(), callbacks=steps.append, **text, **arguments)
    except (TypeError, ValueError) as error:
        assert not steps, f"{cls.__name__} was refused after {len(steps)} steps"
        return same_call(cls, prompt, arguments, plain, error)
    again = plain_images(pipe, prompt, **{**arguments, "latents": result.latents, "generator": result.generator()})
    check(cls, "the first evaluation is the plain result", result.initial_images, plain)
    check(cls, "a redraw is the best", in_unit_range(again), result.images)
    assert (result.best_loss < result.losses[0]).all(), f"{cls.__name__}: the loss does not fall"
    check_class(cls, prompt, arguments, plain)
    return Outcome("works")


def same_call(cls: type, prompt: Any, arguments: dict[str, Any], plain: torch.Tensor, refusal: Exception) -> Outcome:
    """Run a class that `optimize_noise` refused with the mixin, if the refusal says so."""
    reason = short(refusal, cls)
    if "NoiseOptimizationMixin" not in str(refusal):
        return Outcome("refused", reason)
    check_class(cls, prompt, arguments, plain)
    return Outcome("class", "takes no `latents`" if "takes none" in reason else "draws other numbers with `latents`")


def check_class(cls: type, prompt: Any, arguments: dict[str, Any], plain: torch.Tensor) -> None:
    """Run a class with the mixin, which generates the image in the same call."""
    stock = tiny_pipeline_of(cls)
    pipe = copy.copy(stock)
    pipe.__class__ = type(cls.__name__, (NoiseOptimizationMixin, type(stock)), {"__module__": cls.__module__})
    text = {} if prompt is not None else {"reward_prompt": "a b"}
    with one_global_stream():
        output = pipe(prompt=prompt, method=METHOD, output_type="pt", generator=seed(), **text, **arguments)
    result = output.noise_result
    check(cls, "the first evaluation is the plain result", result.initial_images, plain)
    check(cls, "the output is the best", in_unit_range(next(iter(output.values()))), result.images)
    assert (result.best_loss < result.losses[0]).all(), f"{cls.__name__}: the loss does not fall"


def check(cls: type, claim: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    distance = (found - expected).abs().max() if found.shape == expected.shape else torch.inf
    assert distance == 0, f"{cls.__name__}: not true that {claim}, by {distance:.3g}"


class Redness:
    """Reward: how much redder than blue an image is."""

    def __call__(self, images, prompts):
        return (images[:, 0] - images[:, 2]).mean((1, 2))


METHOD = ReNO(rewards=Redness(), steps=3, frames="all")


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def plain_images(pipe, prompt: Any, **arguments: Any) -> Any:
    """Return the images of a stock call; global draws start from one seed."""
    given = {"generator": seed(), "output_type": "pt", "return_dict": False, **arguments}
    with one_global_stream():
        output = pipe(prompt=prompt, **given)
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def one_global_stream() -> Iterator[None]:
    """Start torch's global stream from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def in_unit_range(images: Any) -> Any:
    """Convert images in [-1, 1], as some pipelines return them for "pt", to [0, 1], and put transparent on white."""
    if not (isinstance(images, torch.Tensor) and images.ndim == 4):
        return images
    centered = images.min() < -0.01
    return on_white((images * 0.5 + 0.5).clamp(0, 1) if centered else images)


def short(error: Exception, cls: type) -> str:
    """Return what an error says was got, which names the class."""
    text = str(error)
    assert text.startswith("Expected ") and cls.__name__ in text, f"{cls.__name__}: {type(error).__name__}: {text}"
    reason = text.partition(", but ")[2].partition(". ")[0]
    return reason.replace(f"that of {cls.__name__}", "its call").replace(cls.__name__, "it")


def row(name: str, outcome: Outcome) -> str:
    return f"| `{name}` | {outcome.reason} |\n"


def document(outcomes: dict[str, Outcome]) -> str:
    """Return the text of `docs/pipelines.md`."""
    counts = [sum(each.kind == kind for each in outcomes.values()) for kind in HEADINGS]
    words = ("work", "work in the same call", "are refused by name", "are not built here", "are out of scope")
    summary = ", ".join(f"{count} {word}" for count, word in zip(counts, words, strict=True))
    text = (
        "# Pipeline classes of diffusers\n\nGenerated by `python tests/conformance/all_pipelines.py --write` with "
        f"diffusers {diffusers.__version__}; a test compares it. Each class is built at tiny size and run with `ReNO` "
        f"in three steps. Of {len(outcomes)} classes {summary}.\n"
    )
    for kind, (heading, meaning) in HEADINGS.items():
        rows = "".join(row(name, each) for name, each in sorted(outcomes.items()) if each.kind == kind)
        text += f"\n## {heading}\n\n{meaning}\n\n| class | note |\n| --- | --- |\n{rows}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/pipelines.md")
    parser.add_argument("names", nargs="*", help="classes, all by default")
    options = parser.parse_args()
    outcomes = {}
    for name in options.names or all_classes():
        try:
            outcomes[name] = outcome_of(name)
        except Exception as error:
            print(f"{name}: BROKEN {type(error).__name__} {str(error)[:300]}", flush=True)
            if len(options.names) == 1:
                raise
            continue
        print(f"{name}: {' '.join(outcomes[name])}", flush=True)
    if options.write:
        DOCUMENT.write_text(document(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
