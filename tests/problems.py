"""What tests of methods begin with: random streams, a reward, and what a method gets from a pipeline call."""

import torch

from noiseopt import optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def redness(images, prompts):
    """A reward that differs between images, with a gradient everywhere."""
    return (images[:, 0] - images[:, 1]).mean((1, 2)) * 10


def problem_of(pipe, prompt="a", *, clamp="straight_through", **call) -> NoiseProblem:
    """The problem of a call, for use after its run; its random draws are of seed 0 unless given one by one."""
    if not isinstance(call.get("generator"), list):
        call["generator"] = generator()
    seen = []
    optimize_noise(pipe, prompt, Looking(seen.append, clamp=clamp), **call)
    return seen[0]
