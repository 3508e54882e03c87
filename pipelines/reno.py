"""ReNO: reward-based noise optimisation."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..rewards.reward_sum import RewardSum
from .methods import register_noise_optimizer
from .noise_optimizer import NoiseOptimizer
from .noise_problem import NoiseProblem
from .objectives import RewardObjective
from .regularizers import ChiPrior, clip_per_sample, per_image, per_sample_norm
from .sampling import Gradient


@register_noise_optimizer("reno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReNO(NoiseOptimizer):
    rewards: Any
    steps: int = 50
    mode: Literal["default", "parity"] = "default"
    learning_rate: float = 5.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularization: float = 0.01
    reward_prompt: str | Sequence[str] | None = None
    gradient: Gradient = "full"
    preview: bool = False
    clamp: Literal["straight_through", "hard"] = "straight_through"
    normalize: bool = False
    sphere: bool = False
    scaled: bool = False

    def objective(self, pipe) -> RewardObjective:
        rewards = RewardSum(self.rewards, device=pipe._execution_device)
        rewards.check_differentiable()
        return RewardObjective(rewards, self.reward_prompt)

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        return ChiPrior(self.regularization)(noise)

    def start(self, problem: NoiseProblem) -> dict[str, torch.Tensor]:
        return {"radius": per_sample_norm(problem.noise)}

    def step(self, noise, gradient, memory):
        g = gradient / per_sample_norm(gradient).view(-1,1,1,1) * self.max_grad_norm if self.normalize else clip_per_sample(gradient, self.max_grad_norm)
        lr = self.learning_rate * ((noise[0].numel() / 16384) ** .5 if self.scaled else 1)
        m = memory.get("m"); m = g.clone() if m is None else self.momentum * m + g
        memory["m"] = m
        noise = noise - lr * (g + self.momentum * m)
        if self.sphere:
            noise = noise * (memory["radius"] / per_sample_norm(noise)).view(-1,1,1,1)
        return noise
