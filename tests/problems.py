"""Random streams, a reward, a clock, and the noise problem of a pipeline call or without one, for tests of methods."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from noiseopt import optimize_noise
from noiseopt.callbacks import NoiseState
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem, seed_from


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


@dataclasses.dataclass
class Walk:
    """A method on noise alone: its steps under scores and gradients that a test makes up."""

    method: Any
    noise: torch.Tensor

    def __post_init__(self):
        seeds = [seed_from(image) for image in self.noise]
        space = SimpleNamespace(further_draw=lambda drawn: randn_tensor)
        problem = SimpleNamespace(noise=self.noise, seeds=seeds, space=space, is_single_step=False)
        self.memory = self.method.start(problem)

    def step(self, score: float | torch.Tensor, gradient: torch.Tensor) -> None:
        """Make a step from a noise with a score, one number or `(B,)`, and a gradient of the loss, its negative."""
        state = NoiseState(None, [""] * len(self.noise), 60, self.noise)
        state.loss = -torch.as_tensor(score, dtype=self.noise.dtype).expand(len(self.noise))
        self.noise = self.method.step(state, gradient, self.memory)


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
