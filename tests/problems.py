"""Random streams, a reward, a clock, and the noise problem of a pipeline call, for tests of methods."""

import time

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


class Clock:
    """A clock that stands still unless it is told to go on; `monkeypatch` puts it in the place of the real one."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def after(self, seconds: float):
        """Return a hook of a module, each of whose calls takes these seconds."""

        def hook(*_) -> None:
            self.now += seconds

        return hook
