"""What a method gets from a pipeline call."""

import torch

from noiseopt import optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.noise_problem import NoiseProblem


def problem_of(pipe, prompt="a", *, clamp="straight_through", **call) -> NoiseProblem:
    """The problem of a call, for use after its run; its random draws are of seed 0 unless given one by one."""
    if not isinstance(call.get("generator"), list):
        call["generator"] = torch.Generator().manual_seed(0)
    seen = []
    optimize_noise(pipe, prompt, Looking(seen.append, clamp=clamp), **call)
    return seen[0]
