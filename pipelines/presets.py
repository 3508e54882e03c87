"""Presets: the method and settings for a goal, picked by the pipeline's class, checkpoint and call."""

import dataclasses
import functools
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

from ..callbacks.noise_callback import NoiseCallback, as_callbacks
from ..callbacks.noise_state import NoiseState
from ..private_names import name_or_path
from ..registry import did_you_mean
from ..schedulers.noise_samplers import as_noise_sampler, describe_noise_sampler
from .method import NoiseOptimizer
from .modular import as_standard
from .preset_table import (
    FALLBACKS,
    MODEL_PRESETS,
    EmbeddedReward,
    Goal,
    Length,
    Preset,
    PresetModel,
    length_of,
    letters,
)
from .registry import METHODS, as_method, list_methods
from .request import check_argument_names, check_pipeline, check_types, images_per_prompt
from .results.pipeline_description import portable, portable_name
from .sampling.first_call import stock_call

GOALS: tuple[Goal, ...] = get_args(Goal)


def list_presets() -> list[Preset]:
    """Return the presets of all models, and at the end those of any other by the length of its chain."""
    return [*MODEL_PRESETS, *(preset for presets in FALLBACKS.values() for preset in presets)]


def find_preset(pipe, goal: str, **call_kwargs: Any) -> Preset:
    """Return the method and settings for a goal on a pipeline.

    The model is told by the name of the checkpoint of the pipeline or its denoiser, else by the pipeline's class with
    its configuration and the number of steps of the call, as for a folder of another name. A model that no preset is
    for has that of any model with as many steps. LoRAs are not seen: of a model that a LoRA makes one of few steps, the
    steps of the call tell it, unless its checkpoint has a name that is known.

    Args:
        pipe: A loaded pipeline.
        goal: "diverse": the images of a prompt differ; "faithful": each shows its prompt; "best": each has a high
            reward for the seconds that it takes.
        call_kwargs: The arguments of the call, of which the number of steps counts.

    Raises:
        ValueError: For an unknown goal.
        TypeError: For anything but a loaded pipeline, and for an argument that its call does not take.
    """
    check_pipeline(pipe)
    standard = as_standard(pipe)
    check_argument_names(standard, call_kwargs)
    check_types(standard, call_kwargs)
    if goal not in GOALS:
        raise ValueError(f"Expected a goal out of {list(GOALS)}, but got {goal!r}.{did_you_mean(str(goal), GOALS)}")
    return preset_of_call(pipe, goal, call_kwargs)


def preset_of_call(pipe, goal: str, call: Mapping[str, Any]) -> Preset:
    """Return the preset for a goal and a call of a pipeline."""
    length = length_of_call(pipe, call)
    ranks = [(fit(preset.model, pipe, length), preset) for preset in MODEL_PRESETS if preset.goal == goal]
    best = max(rank for rank, _ in ranks)
    fallback = next(preset for preset in FALLBACKS[length] if preset.goal == goal)
    found = next(preset for rank, preset in ranks if rank == best) if any(best) else fallback
    return dataclasses.replace(found, settings=loadable(found.settings, name_or_path(pipe) or ""))


def fit(model: PresetModel, pipe, length: Length) -> tuple[int, int, int, bool]:
    """Return how well a model fits: the letters of its name in that of the denoiser and of the pipeline, hints, steps.

    A denoiser of another checkpoint counts more than the pipeline around it.
    """
    names = {cls.__name__.replace("ModularPipeline", "Pipeline") for cls in type(pipe).__mro__}
    if not names.intersection(model.pipelines):
        return 0, 0, 0, False
    of_pipe, of_denoiser = (named(model, part) for part in parts_of(pipe))
    known = [(config_value(pipe, name), value) for name, value in model.hints.items()]
    agrees = all(found in (None, value) for found, value in known)
    if not (of_denoiser or of_pipe) and (model.by_name_only or not agrees):
        return 0, 0, 0, False
    return of_denoiser, of_pipe, agrees * sum(found is not None for found, _ in known), model.length == length


def named(model: PresetModel, part: Any) -> int:
    """Return how many letters of a model's name are in that of the checkpoint of a pipeline or a part of it."""
    source = re.sub(r"[/\\](unet|transformer)$", "", name_or_path(part) or "")
    name = letters(portable_name(source) or "")
    return max((len(each) for each in model.checkpoints if each in name), default=0)


def parts_of(pipe) -> tuple[Any, Any]:
    """Return the pipeline and its denoiser."""
    return pipe, getattr(pipe, "transformer", getattr(pipe, "unet", None))


def config_value(pipe, name: str) -> Any:
    """Return a setting in the configuration of a pipeline or its denoiser, or `None`."""
    configs = (getattr(part, "config", None) for part in parts_of(pipe))
    found = (config.get(name) for config in configs if isinstance(config, Mapping))
    return next((value for value in found if value is not None), None)


def length_of_call(pipe, call: Mapping[str, Any]) -> Length:
    """Return the length of the chain of a call, by its arguments or their defaults."""
    for name in ("timesteps", "sigmas"):
        if isinstance(call.get(name), Sequence) and call[name]:
            return length_of(len(call[name]))
    steps = call.get("num_inference_steps", default_of(pipe, "num_inference_steps"))
    return length_of(int(steps)) if isinstance(steps, Integral) else "many"


def default_of(pipe, name: str) -> Any:
    """Return the default of an argument of the stock call of a pipeline; `inspect.Parameter.empty` without one."""
    parameter = inspect.signature(stock_call(type(pipe))).parameters.get(name)
    return inspect.Parameter.empty if parameter is None else parameter.default


def loadable(value: Any, source: str) -> Any:
    """Return settings with the folder or Hub id of each embedded reward, for a pipeline from the folder `source`."""
    if isinstance(value, Mapping):
        return {name: loadable(each, source) for name, each in value.items()}
    return embedded_reward_path(value.name, source) if isinstance(value, EmbeddedReward) else value


def embedded_reward_path(name: str, source: str) -> str:
    """Return the folder of an embedded reward beside that of a pipeline, or its Hub id."""
    beside = [Path(source).parent / each for each in (name, f"shapes-{name}")]
    if Path(source).is_dir() and (folders := [folder for folder in beside if folder.is_dir()]):
        return str(folders[0])
    hub = re.fullmatch(r"(\w[\w.-]*)/[\w.-]+", portable_name(source) or "")
    return f"{hub[1] if hub else 'noiseopt'}/shapes-{name}"


def is_goal(method: Any) -> bool:
    """Return whether a method is given as a goal. Raises `ValueError` for a name of neither."""
    if not isinstance(method, str) or method in METHODS:
        return False
    if method not in GOALS:
        known = [*list_methods(), *GOALS]
        raise ValueError(
            f"Expected a method out of {list_methods()} or a goal out of {list(GOALS)}, but got {method!r}."
            f"{did_you_mean(method, known)}"
        )
    return True


def class_of_method(pipe, method: Any, call: Mapping[str, Any]) -> Any:
    """Return the class of a method given by name or by goal, and a method object as it is."""
    name = preset_of_call(pipe, method, call).method if is_goal(method) else method
    return METHODS.entries.get(name) if isinstance(name, str) else name


def chosen_method(
    pipe,
    method: Any,
    settings: Mapping[str, Any] | None,
    noise_sampler: Any,
    callbacks: Any,
    call: Mapping[str, Any],
    each_alone: bool = False,
) -> tuple[NoiseOptimizer, Any, list[NoiseCallback]]:
    """Return the method, noise sampler and callbacks of a call, and say what was picked for a goal.

    Args:
        pipe: The pipeline.
        method: The method as an object, by name or by goal.
        settings: The settings of a method given by name; of a goal those that differ from its preset.
        noise_sampler: The distribution of the noise; `None` for that of the preset.
        callbacks: The callbacks, to which one is added that records the preset.
        call: The arguments of the pipeline's call by name.
        each_alone: Whether each prompt of the call is run by itself.

    Raises:
        ValueError, TypeError: As `as_method` does, and for single images with the goal "diverse".
    """
    if not is_goal(method):
        return as_method(method, settings), noise_sampler, as_callbacks(callbacks)
    preset = preset_of_call(pipe, method, call)
    own = {**preset.settings, **settings} if isinstance(settings, Mapping) else settings
    found = as_method(preset.method, preset.settings if own is None else own)
    if preset.goal == "diverse" and getattr(found, "references", None) is None:
        check_makes_sets(call, each_alone)
    if noise_sampler is None and call.get("latents") is None:
        noise_sampler = preset.noise_sampler
    shown_sampler = described(noise_sampler)
    chosen = dataclasses.replace(preset, settings=own or preset.settings, noise_sampler=shown_sampler)
    changed = [*(settings or {}), *["noise_sampler"] * (shown_sampler != preset.noise_sampler)]
    say_once(notice(chosen, changed, pipe, call))
    return found, noise_sampler, [PresetRecord(chosen, changed), *as_callbacks(callbacks)]


def described(noise_sampler: Any) -> Any:
    """Return a noise sampler as plain values, by its name alone if that says all."""
    if noise_sampler is None or isinstance(noise_sampler, str):
        return noise_sampler
    return describe_noise_sampler(as_noise_sampler(noise_sampler))


def check_makes_sets(call: Mapping[str, Any], each_alone: bool) -> None:
    """Raise `ValueError` for a call with a single image of a prompt. Prompts that are none are refused later."""
    prompt, images = call.get("prompt"), images_per_prompt(call)
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if images == 1 and (alone := [text for text in texts if each_alone or texts.count(text) == 1]):
        raise ValueError(
            f'Expected at least 2 images of each prompt for "diverse", but got 1 of {alone[0]!r:.200}: alone it has '
            "nothing to differ from. Pass `num_images_per_prompt=4`."
        )


def notice(preset: Preset, changed: Sequence[str], pipe, call: Mapping[str, Any]) -> str:
    """Return what was picked, why, what is known of it, and the recommended arguments that the call lacks.

    Args:
        preset: The preset, with the settings of this call.
        changed: The names of those settings that are not of the preset.
        pipe: The pipeline.
        call: The arguments of its call.
    """
    known = "the preset of" if preset.model.pipelines else "no preset for this model; that of"
    text = (
        f'"{preset.goal}" on {type(pipe).__name__}: {known} {preset.model.title}, {shown_method(preset)}. '
        f"Reason: {preset.reason}. Evidence: {preset.evidence}."
    )
    if changed:
        text += f" Reason and evidence are without your {', '.join(changed)}."
    missing = {name: value for name, value in preset.call.items() if differs(pipe, call, name, value)}
    if missing and preset.model.pipelines:
        asked = ", ".join(f"{name}={value!r}" for name, value in missing.items())
        text += f" It is made for calls with `{asked}`, which this call does not have, and nothing adds: pass it."
    return text


def differs(pipe, call: Mapping[str, Any], name: str, value: Any) -> bool:
    """Return whether a call has another value of an argument that the pipeline takes."""
    default = default_of(pipe, name)
    return default is not inspect.Parameter.empty and call.get(name, default) != value


def shown_method(preset: Preset) -> str:
    """Return the method, settings and noise sampler of a preset as they are written on the command line."""
    sampler = {} if preset.noise_sampler is None else {"noise_sampler": preset.noise_sampler}
    settings = {**preset.settings, **sampler}
    values = ",".join(f"{name}={portable(value)!r}" for name, value in settings.items())
    return f"{preset.method}:{values}" if values else preset.method


@functools.cache
def say_once(text: str) -> None:
    """Log a text the first time, at the lowest level that is shown unless the logger "noiseopt" is told otherwise."""
    logging.getLogger("noiseopt").warning(text)


class PresetRecord(NoiseCallback):
    """Records in `result.reports["preset"]` what was picked, and the names of settings that the call changes."""

    def __init__(self, preset: Preset, changed: Sequence[str]) -> None:
        self.report = {
            "goal": preset.goal,
            "model": preset.model.title,
            "method": shown_method(preset),
            "changed": list(changed),
            "reason": preset.reason,
            "evidence": f"not with these settings; without them: {preset.evidence}" if changed else preset.evidence,
        }

    def on_run_start(self, state: NoiseState) -> None:
        state.reports["preset"] = dict(self.report)
