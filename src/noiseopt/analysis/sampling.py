"""Sampling the images of saved noises, with a model that the user names.

Result files may come from anyone. A file chooses no model, no revision and no code: it names its model, and the user
loads the one of that name with `--model`. Of the recorded arguments, those of the stock call that are numbers or
prompts are used, and of the scheduler the settings that are numbers or short texts.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .. import pipelines
from ..evaluation.looking import Looking
from ..pipelines.hook import optimize_noise
from ..pipelines.problem import NoiseProblem
from ..pipelines.results.noise_result import NoiseResult
from ..pipelines.results.pipeline_description import describe_pipeline
from ..pipelines.results.settings_diff import settings_diff
from ..pipelines.sampling.first_call import stock_call
from ..private_names import execution_device
from ..quiet import quiet_libraries
from ..shapes_world.embedded import WEIGHTS
from ..shown_text import shown
from .groups import CannotAnalyze, Group, embedded_name, pooled

TEXTS = re.compile(r"prompt|prompt_[234]|negative_prompt|negative_prompt_[234]|complex_human_instruction")
CHOSEN = ("num_images_per_prompt", "latents", "generator", "output_type", "return_dict")  # for every result
CALLBACKS = re.compile("callback.*")
LARGEST_NUMBER = 10_000  # of an argument or an entry: a side, a number of steps, a timestep
MOST_NUMBERS = 1000  # in a list
LARGEST_SETTING = 1_000_000  # of a scheduler


def sample_latents(group: Group, models: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """Sample the latents of a group's initial and optimized noises, `(B, C, H, W)` each.

    Args:
        group: The results.
        models: Hub ids or folders, with `@revision` if it is not the main one: the models that may be loaded. Those of
            the shapes world that are in this package always are.

    Raises:
        CannotAnalyze: If the model of a result is none of these, cannot be loaded, or rejects the arguments.
    """
    pipes: dict[tuple, Any] = {}
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path, result in zip(group.paths, group.results, strict=True):
        try:
            key = (source_of(result, models), *(result.provenance.get(name) for name in ("pipeline", "dtype")))
            if key not in pipes:
                pipes = {key: load_pipeline(*key)}  # keep one in memory
            pipe = pipes[key]
            set_scheduler(pipe, result)
            check_agrees(pipe, result)
            for latents, noise in zip(drawn, (result.initial_noise, result.noise), strict=True):
                assert noise is not None
                latents.append(final_latents(pipe, result, noise))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise CannotAnalyze(
                f"Cannot sample the images of {path}: {reason}. Leave out --draw to get the other rows."
            ) from error
    return pooled(drawn[0]), pooled(drawn[1])


def source_of(result: NoiseResult, models: Sequence[str]) -> str:
    """Return what the user named for the model of a result, or the folder of an embedded model in this package.

    Raises:
        ValueError: If there is none.
    """
    recorded = result.provenance.get("model")
    if not recorded:
        raise ValueError("Expected a result that names its model, but its pipeline had no name.")
    for model in models:
        if Path(model_and_revision(model)[0]).name == Path(recorded).name:
            return model
    name = embedded_name(result)
    if name and (WEIGHTS / name).is_dir():
        return str(WEIGHTS / name)
    given = f"--model {shown(', '.join(models))}" if models else "no --model"
    raise ValueError(
        f"Expected `--model` with the Hub id or folder of {shown(repr(recorded))}, which the file names, but got "
        f"{given}. A file does not choose what is loaded: pass it if you trust that model"
    )


def model_and_revision(source: str) -> tuple[str, str | None]:
    """Split what a user named into the Hub id or folder, and the revision after "@"."""
    model, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    return model, revision or None


def load_pipeline(source: str, pipeline: str | None, dtype: str | None) -> Any:
    """Load a pipeline in the recorded dtype.

    Raises:
        ValueError: If it is of another class than the recorded one and that is no class of this package for it.
    """
    model, revision = model_and_revision(source)
    options = {} if Path(model).is_dir() else {"revision": revision}
    ours: Any = getattr(pipelines, pipeline or "", None)
    is_ours = isinstance(ours, type) and issubclass(ours, DiffusionPipeline)
    with quiet_libraries():
        loader: Any = ours if is_ours else DiffusionPipeline
        pipe = loader.from_pretrained(model, dtype=getattr(torch, dtype or "float32"), **options)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if pipeline not in (None, type(pipe).__name__):
        raise ValueError(
            f"Expected a {shown(pipeline)}, which the file names, but {shown(model)} is a {type(pipe).__name__}"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_scheduler(pipe: Any, result: NoiseResult) -> None:
    """Give the pipeline the scheduler of a result, which may differ from the one saved with the model.

    Raises:
        ValueError: For anything but a scheduler of diffusers with numbers and short texts as settings.
    """
    settings = dict(result.provenance["scheduler"])
    name = settings.pop("class", None)
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"Expected a scheduler of diffusers, but the file names {shown(repr(name))}")
    known = inspect.signature(cls.__init__).parameters
    kept = {key: value for key, value in settings.items() if key in known}
    if strange := [key for key, value in kept.items() if not is_setting(value)]:
        raise ValueError(
            f"Expected numbers and short texts as settings of the scheduler, but got others: {shown(strange)}"
        )
    pipe.scheduler = cls.from_config({**pipe.scheduler.config, **kept})  # pyright: ignore[reportAttributeAccessIssue]


def check_agrees(pipe: Any, result: NoiseResult) -> None:
    """Raise `ValueError` if a result was found with something that the loaded pipeline lacks, such as adapters."""
    if unrecorded := result.provenance.get("unrecorded"):
        raise ValueError(
            f"Expected a call of prompts and numbers, but it had {shown(unrecorded)}, which are not stored"
        )
    given = describe_pipeline(pipe)
    names = ["adapters", "fused_adapters", "ip_adapter_scale", *(["revision"] if given["revision"] else [])]
    known = {name: result.provenance[name] for name in names if result.provenance.get(name)}
    if differences := settings_diff(known, {name: given[name] for name in known}):
        raise ValueError(
            f"Expected the pipeline of the run, but the loaded one differs: {'; '.join(differences[:3])}. "
            "`--model ID@REVISION` chooses a revision; adapters cannot be loaded here"
        )


def final_latents(pipe: Any, result: NoiseResult, noise: Tensor) -> Tensor:
    """Sample noise of the shape of a result's, with its call's arguments: `(B, C, H, W)` on the CPU."""
    prompts = result.provenance["prompts"]
    if not any(prompts):
        raise ValueError(
            "Expected a result with prompts, but its call was given embeddings, which results do not store."
        )
    device, dtype = execution_device(pipe), getattr(torch, result.provenance["dtype"])
    ours = {"num_images_per_prompt": 1, "latents": noise.to(device, dtype), "generator": result.generator()}
    found: list[Tensor] = []

    def draw(problem: NoiseProblem) -> None:
        latents = problem.sampler.run(problem.noise, None, False, "latent")
        found.append(problem.space.unpack(problem.sampler.twin, latents).float().cpu())

    arguments = recorded_arguments(pipe, result.provenance["arguments"], len(prompts))
    optimize_noise(pipe, prompts, Looking(draw), **{**arguments, **ours})
    return found[0]


def recorded_arguments(pipe: Any, recorded: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the recorded arguments of a call for `count` prompts, of which only numbers and prompts are accepted.

    Raises:
        ValueError: For a name that is no parameter of the stock call, and for any other value.
    """
    ours = inspect.signature(optimize_noise).parameters
    known = inspect.signature(stock_call(type(pipe))).parameters.keys() - ours.keys()
    if strange := [name for name in recorded if name not in known]:
        raise ValueError(f"Expected arguments of {type(pipe).__name__}, but the file has others: {shown(strange)}")
    used = {
        name: value
        for name, value in recorded.items()
        if name not in CHOSEN and not CALLBACKS.fullmatch(name) and value is not None
    }
    texts = {name: repeated(value, count) for name, value in used.items() if TEXTS.fullmatch(name) and is_text(value)}
    if wrong := [name for name, value in used.items() if name not in texts and not is_number(value)]:
        raise ValueError(
            f"Expected numbers up to {LARGEST_NUMBER:,} and prompts as arguments, but the file has others: "
            f"{shown(wrong)}"
        )
    return {**used, **texts}


def is_text(value: Any) -> bool:
    """Return whether a value is a text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def is_number(value: Any, largest: float = LARGEST_NUMBER) -> bool:
    """Return whether a value is a finite number of limited size, or a flat list of such."""
    if isinstance(value, list):
        return len(value) <= MOST_NUMBERS and all(isinstance(v, int | float) and is_number(v, largest) for v in value)
    return isinstance(value, int | float) and abs(value) <= largest


def is_setting(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 100) or is_number(value, LARGEST_SETTING)


def repeated(text: str | list[str], count: int) -> list[str]:
    """Expand one text, or one per prompt, to one per image. Raises `ValueError` for another number of texts."""
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or count % len(texts):
        raise ValueError(f"Expected a text for each of {count} images, but got {len(texts)}.")
    return [each for each in texts for _ in range(count // len(texts))]
