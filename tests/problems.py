"""Random streams, a reward, and the noise problem of a pipeline call, for tests of methods."""

import torch

from noiseopt import optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def redness(images, prompts):
    """Reward that differs between images and has a gradient everywhere."""
    return (images[:, 0] - images[:, 1]).mean((1, 2)) * 10


def problem_of(pipe, prompt="a", *, clamp="straight_through", **call) -> NoiseProblem:
    """Return the problem of a call after its run. Without a list of generators, the seed is 0."""
    if not isinstance(call.get("generator"), list):
        call["generator"] = generator()
    seen = []
    optimize_noise(pipe, prompt, Looking(seen.append, clamp=clamp), **call)
    return seen[0]
