"""Provenance of a noise: the record that makes a result reproducible."""

import functools
import importlib.metadata
import platform
from typing import Any

from ...callbacks.noise_state import NoiseState
from ...schedulers.noise_samplers import describe_noise_sampler
from ..memory.tiny_decoder import describe_decoder
from ..objective import Objective
from ..problem import NoiseProblem
from .pipeline_description import PIPELINE_FACTS, describe_pipeline, plain, portable

NOT_ARGUMENTS = ("prompt", "latents", "generator")  # recorded as prompts, noise and states


def provenance_of(problem: NoiseProblem, objective: Objective, state: NoiseState) -> dict[str, Any]:
    """Return the provenance of a result as JSON values, without the method and its settings.

    `arguments` has those of the call that are JSON values, `unrecorded` the names of the others, such as images and
    embeddings. Models and rewards are named without their place on this machine, see `portable_name`.
    """
    pipe, sampler = problem.pipe, problem.sampler
    given = {name: value for name, value in problem.request.items() if name not in NOT_ARGUMENTS}
    arguments = plain(given)
    described = {name: problem.call[name] for name in PIPELINE_FACTS} if problem.call else describe_pipeline(pipe)
    return {
        "objective": portable(objective.describe()),
        "prompts": problem.prompts,
        "reward_prompts": problem.reward_prompts,
        "seeds": sampler.random_state.seeds,
        "generators": "list" if sampler.random_state.several else "single",
        "noise_sampler": describe_noise_sampler(problem.space.noise_sampler),
        **described,
        "pipeline": type(pipe).__name__,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "arguments": arguments,
        "unrecorded": [name for name, value in given.items() if name not in arguments and value is not None],
        "decoder": portable(describe_decoder(sampler.decoder)),
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
