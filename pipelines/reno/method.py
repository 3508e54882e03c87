"""ReNO: reward-based noise optimization of one-step models."""

import dataclasses
from typing import Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import GradientOptimizer
from ..noise_math import ChiPrior, clip_per_sample, per_image, per_sample_norm, rate_unit
from ..objective import on_released_pixels
from ..problem import NoiseProblem
from ..registry import register_method
from .objective import ViewedRewards

RENO_PRIOR = 0.01
RENO_VIEWS = 4


@dataclasses.dataclass
class ReNOState:
    """Momentum `(B, C, H, W)`, and the norms `(B,)` of the base noise."""

    velocity: torch.Tensor
    radius: torch.Tensor


@register_method("reno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReNO(GradientOptimizer):
    """Gradient ascent on rewards with momentum; returns the noise of the best image.

    "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring et al., NeurIPS
    2024, https://arxiv.org/abs/2406.04312.

    `mode="parity"` follows the released loop step by step: SGD with Nesterov momentum 0.9, the summed gradient of
    rewards and χ prior clipped to 0.1, `steps` evaluations and `steps − 1` updates, the best image by the rewards
    without the prior, and rewards that see un-clamped bicubic pixels. Two differences: clip, prior and best are per
    image; noise, momentum and norms are float32.

    `mode="default"` keeps the update and changes three things. The gradient is the mean over several slightly shifted
    and noisy views of the image, which suppresses patterns that please one exact pixel grid; scores, losses and the
    choice of the best remain those of the image itself. The norm of the noise is kept by projection instead of a prior.
    Saturated pixels keep their gradient.

    In both modes the learning rate is in units of √(H·W) / 64, with H × W the size of the noise. So the
    default takes the steps of the released code on all its models: 5 at 512 px (SD-Turbo, SDXL-Turbo, PixArt-α DMD,
    FLUX.1-schnell), 10 at 1024 px (Hyper-SDXL).

    Args:
        steps: Evaluations, the baseline included. The paper: 50.
        mode: "default" or "parity".
        learning_rate: η, in units of √(H·W) / 64.
        momentum: The coefficient of Nesterov momentum.
        max_grad_norm: The L2 norm to which the gradient of each image is clipped; with η it sets the step length.
        regularization: λ_reg, the weight of the χ prior; `None` is 0.01 for parity, and projection otherwise.
        views: The number of views that give the gradient, each one more pass of the rewards; 0 is the image itself;
            `None` is 0 for parity and 4 otherwise.
        gradient: "full" differentiates the whole chain; "frozen" holds the model outputs constant.
        preview: Reward the x0 estimate of one model call instead of the whole chain.
    """

    mode: Literal["default", "parity"] = "default"
    learning_rate: float = checked(5.0, "[0, inf)")
    momentum: float = checked(0.9, "[0, 1)")
    max_grad_norm: float = checked(0.1, "(0, inf)")
    regularization: float | None = checked(None, "[0, inf)")
    views: int | None = checked(None, "[0, 1000]")
    gradient: Literal["full", "frozen"] = "full"
    preview: bool = False

    @property
    def prior(self) -> ChiPrior | None:
        """The χ prior, or `None` where the norm is kept by projection."""
        if self.regularization is None and self.mode == "default":
            return None
        return ChiPrior(RENO_PRIOR if self.regularization is None else self.regularization)

    def objective(self, pipe) -> ViewedRewards:
        rewards, views = self.differentiable_rewards(pipe, self.rewards), self.views
        if self.mode == "parity":
            return ViewedRewards(on_released_pixels(rewards), views or 0)
        return ViewedRewards(rewards, RENO_VIEWS if views is None else views)

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        return self.prior(noise) if self.prior else 0.0

    def start(self, problem: NoiseProblem) -> ReNOState:
        return ReNOState(torch.zeros_like(problem.noise), per_sample_norm(problem.noise))

    def step(self, run: NoiseState, gradient: torch.Tensor, state: ReNOState) -> torch.Tensor:
        gradient = clip_per_sample(gradient, self.max_grad_norm)
        state.velocity = self.momentum * state.velocity + gradient
        rate = self.learning_rate * rate_unit(run.noise)
        moved = run.noise - rate * (gradient + self.momentum * state.velocity)
        return moved if self.prior else moved * per_image(state.radius / per_sample_norm(moved), moved)
