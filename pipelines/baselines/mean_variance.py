"""Mean and variance of the noise, adjusted for a reward: InitNO's update; a baseline of Noise Diffusion."""

import dataclasses
from typing import Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import GradientOptimizer
from ..problem import NoiseProblem
from ..registry import register_method


@register_method("mean_variance")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanVariance(GradientOptimizer):
    """Learns a mean and a variance for each entry of the noise, held close to 0 and 1: `z = z₀·exp(ρ/2) + μ`.

    InitNO's update (https://arxiv.org/abs/2404.04650) on a scalar reward instead of attention maps, as the row
    "mean/variance adjustment" of Noise Diffusion (https://arxiv.org/abs/2411.16503): Adam on μ and ρ = ln σ². Each step
    is scaled back until `KL(N(μ, σ²) ‖ N(0, 1))`, averaged over the entries, is at most `max_kl`. (InitNO goes back by
    further steps of Adam.) This bounds the distance of the noise, and the gain.

    Args:
        steps: Evaluations, the baseline included.
        learning_rate: The learning rate of Adam. InitNO: 0.01.
        max_kl: The largest divergence per entry. InitNO: 0.001.
        gradient: "frozen" holds the outputs of the denoiser constant; "full" differentiates the whole chain.
    """

    steps: int = checked(51, "[1, inf)")
    learning_rate: float = checked(1e-2, "(0, inf)")
    max_kl: float = checked(1e-3, "(0, inf)")
    gradient: Literal["full", "frozen"] = "frozen"

    def start(self, problem: NoiseProblem) -> "MeanVarianceState":
        return MeanVarianceState(problem.noise, self.learning_rate)

    def step(self, run: NoiseState, gradient: torch.Tensor, state: "MeanVarianceState") -> torch.Tensor:
        state.descend(gradient)
        state.project(self.max_kl)
        return state.noise()


class MeanVarianceState:
    """Mean and log-variance of each entry of `base` `(B, C, H, W)`, with one Adam optimizer per image."""

    def __init__(self, base: torch.Tensor, learning_rate: float) -> None:
        self.base = base
        self.parts = [torch.zeros_like(image).expand(2, *image.shape).clone().requires_grad_() for image in base]
        self.adams = [torch.optim.Adam([part], lr=learning_rate, eps=1e-3) for part in self.parts]

    def noise(self) -> torch.Tensor:
        mean, log_variance = torch.stack([part.detach() for part in self.parts]).unbind(1)
        return self.base * (log_variance / 2).exp() + mean

    def descend(self, gradient: torch.Tensor) -> None:
        """Step down the gradient with respect to the noise."""
        for base, part, adam, down in zip(self.base, self.parts, self.adams, gradient, strict=True):
            part.grad = torch.stack((down, down * base * (part[1].detach() / 2).exp() / 2))
            adam.step()

    def project(self, max_kl: float) -> None:
        """Scale mean and log-variance of each image towards 0 until the divergence is at most `max_kl`."""
        for part in self.parts:
            low, high = 0.0, 1.0
            if divergence(part.detach()) <= max_kl:
                continue
            for _ in range(30):  # the divergence grows monotonically from 0
                middle = (low + high) / 2
                low, high = (middle, high) if divergence(middle * part.detach()) <= max_kl else (low, middle)
            part.data.mul_(low)


def divergence(part: torch.Tensor) -> float:
    """Return KL(N(μ, e^ρ) ‖ N(0, 1)), averaged over the entries, of mean and log-variance `(2, ...)`."""
    mean, log_variance = part
    return float((mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2)
