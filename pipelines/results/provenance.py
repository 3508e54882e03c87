"""Where a noise came from: the record that makes a result replayable."""

import importlib.metadata
import platform
import re
from typing import Any

from ...callbacks.noise_state import NoiseState
from ...schedulers.noise_samplers import describe_noise_sampler
from ..memory.tiny_decoder import describe_decoder
from ..objective import Objective
from ..problem import NoiseProblem
from ..sampling.internals import name_or_path


def provenance_of(problem: NoiseProblem, objective: Objective, state: NoiseState) -> dict[str, Any]:
    """Where a result came from, in plain values that JSON takes. The method adds itself."""
    pipe, scheduler = problem.pipe, problem.pipe.scheduler
    arguments = {name: value for name, value in problem.request.items() if name not in ("prompt", "latents")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "objective": objective.describe(),
        "prompts": problem.prompts,
        "seeds": problem.sampler.random_state.seeds,
        "generators": "list" if problem.sampler.random_state.several else "single",
        "noise_sampler": describe_noise_sampler(problem.space.noise_sampler),
        "model": name_or_path(pipe),
        "revision": revision_of(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(scheduler).__name__, **plain(dict(scheduler.config))},
        "dtype": str(problem.dtype).removeprefix("torch."),
        "arguments": plain(arguments),
        "decoder": describe_decoder(problem.sampler.decoder),
        "checkpointing": problem.sampler.checkpoints.policy,
        "stopped": state.stopped,
        "seconds": round(state.elapsed, 3),
        "versions": {"python": platform.python_version(), **versions},
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that JSON takes as they are."""
    kept = (bool, int, float, str, type(None))
    flat = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, kept) or isinstance(value, list) and all(isinstance(item, kept) for item in value)
    }


def revision_of(pipe) -> str | None:
    """The commit of the Hub snapshot that the modules were loaded from, if they were."""
    for part in pipe.components.values():
        if match := re.search(r"snapshots[/\\]([0-9a-f]{40})", name_or_path(part) or ""):
            return match[1]
    return None
