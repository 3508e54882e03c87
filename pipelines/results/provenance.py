"""Provenance of a noise: the record that makes a result reproducible."""

import functools
import importlib.metadata
import platform
import re
from typing import Any

from ...callbacks.noise_state import NoiseState
from ...private_names import name_or_path
from ...schedulers.noise_samplers import describe_noise_sampler
from ..memory.tiny_decoder import describe_decoder
from ..objective import Objective
from ..problem import NoiseProblem


def provenance_of(problem: NoiseProblem, objective: Objective, state: NoiseState) -> dict[str, Any]:
    """Return the provenance of a result as JSON values, without the method and its settings."""
    pipe, scheduler, sampler = problem.pipe, problem.pipe.scheduler, problem.sampler
    arguments = {name: value for name, value in problem.request.items() if name not in ("prompt", "latents")}
    return {
        "objective": objective.describe(),
        "prompts": problem.prompts,
        "reward_prompts": problem.reward_prompts,
        "seeds": sampler.random_state.seeds,
        "generators": "list" if sampler.random_state.several else "single",
        "noise_sampler": describe_noise_sampler(problem.space.noise_sampler),
        "model": name_or_path(pipe),
        "revision": revision_of(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(scheduler).__name__, **plain(dict(scheduler.config))},
        "dtype": str(problem.dtype).removeprefix("torch."),
        "arguments": plain(arguments),
        "decoder": describe_decoder(sampler.decoder),
        "checkpointing": sampler.checkpoints.policy,
        "stopped": state.stopped,
        "seconds": round(state.elapsed, 3),
        "versions": dict(versions()),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute the images."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"python": platform.python_version(), **libraries}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are JSON scalars or lists of them; tuples become lists."""
    scalar = (bool, int, float, str, type(None))
    flat = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(item, scalar) for item in value))
    }


def revision_of(pipe) -> str | None:
    """Return the commit of the Hub snapshot that the modules were loaded from, if any."""
    for component in pipe.components.values():
        if match := re.search(r"snapshots[/\\]([0-9a-f]{40})", name_or_path(component) or ""):
            return match[1]
    return None
