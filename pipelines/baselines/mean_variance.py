"""Mean and variance of the noise, adjusted for a reward: InitNO's update, as a row to compare with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ..memory.checkpointing import Checkpointing
from ..method import NoiseOptimizer
from ..objective import RewardObjective, differentiable_rewards
from ..problem import NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Gradient


@register_noise_optimizer("mean_variance")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanVariance(NoiseOptimizer):
    """Learns a mean and a variance for each entry of the noise, held close to 0 and 1: `z = z₀·exp(ρ/2) + μ`.

    InitNO's update (https://arxiv.org/abs/2404.04650) on a scalar reward instead of attention maps, as the row
    "mean/variance adjustment" of Noise Diffusion (https://arxiv.org/abs/2411.16503): Adam on μ and ρ = ln σ², each step
    of which is scaled back until `KL(N(μ, σ²) ‖ N(0, 1))`, averaged over the entries, is at most `max_kl`. (InitNO goes
    back by further steps of Adam, as many as it takes.) That bounds how far the noise goes, and what is gained.

    Args:
        rewards: What `RewardSum` takes.
        steps: Evaluations, the plain result included.
        learning_rate: Of Adam, above 0. InitNO: 0.01.
        max_kl: The divergence allowed for each entry, above 0. InitNO: 0.001.
        stop_gradient: Hold the outputs of the denoiser constant; `False` back-propagates through the whole chain.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 51
    learning_rate: float = 1e-2
    max_kl: float = 1e-3
    stop_gradient: bool = True
    reward_prompt: str | Sequence[str] | None = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None

    @property
    def gradient(self) -> Gradient:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "frozen" if self.stop_gradient else "full"

    def check(self) -> None:
        super().check()
        for name in ("learning_rate", "max_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected `{name}` to be a number above 0, but got {getattr(self, name)!r}.")

    def objective(self, pipe) -> RewardObjective:
        return RewardObjective(differentiable_rewards(self.rewards, self.device_of_rewards(pipe)), self.reward_prompt)

    def start(self, problem: NoiseProblem) -> "Moments":
        return Moments(problem.noise, self.learning_rate)

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: "Moments") -> torch.Tensor:
        memory.descend(gradient)
        memory.hold(self.max_kl)
        return memory.noise()


class Moments:
    """Mean and log-variance of each entry of `base` (B, C, H, W), and their optimisers, one for each image."""

    def __init__(self, base: torch.Tensor, learning_rate: float) -> None:
        self.base = base
        self.parts = [torch.zeros_like(image).expand(2, *image.shape).clone().requires_grad_() for image in base]
        self.adams = [torch.optim.Adam([part], lr=learning_rate, eps=1e-3) for part in self.parts]

    def noise(self) -> torch.Tensor:
        mean, log_variance = torch.stack([part.detach() for part in self.parts]).unbind(1)
        return self.base * (log_variance / 2).exp() + mean

    def descend(self, gradient: torch.Tensor) -> None:
        """A step of each image down the gradient with respect to the noise."""
        for base, part, adam, down in zip(self.base, self.parts, self.adams, gradient, strict=True):
            part.grad = torch.stack((down, down * base * (part[1].detach() / 2).exp() / 2))
            adam.step()

    def hold(self, max_kl: float) -> None:
        """Scale mean and log-variance of each image towards 0 until its divergence is at most `max_kl`."""
        for part in self.parts:
            low, high = 0.0, 1.0
            if divergence(part.detach()) <= max_kl:
                continue
            for _ in range(30):  # the divergence grows along the way, from 0
                middle = (low + high) / 2
                low, high = (middle, high) if divergence(middle * part.detach()) <= max_kl else (low, middle)
            part.data.mul_(low)


def divergence(part: torch.Tensor) -> float:
    """KL(N(μ, e^ρ) ‖ N(0, 1)), averaged over the entries, of mean and log-variance `(2, ...)`."""
    mean, log_variance = part
    return float((mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2)
