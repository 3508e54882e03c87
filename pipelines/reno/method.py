"""ReNO: reward-based noise optimization of one-step models."""

import dataclasses
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import GradientOptimizer
from ..noise_math import ChiPrior, clip_per_sample, per_image, per_sample_norm, rate_unit
from ..objective import on_released_pixels
from ..problem import NoiseProblem
from ..registry import register_method
from ..white_noise import WHITE_RATE, WhiteNoiseSteps
from .objective import ViewedRewards
from .stopping import Stop, StoppingRewards, check_stopping

Geometry = Literal["white", "sphere", "prior"]
RENO_PRIOR = 0.01
RENO_VIEWS = 1
RENO_RATE = 5.0


@dataclasses.dataclass
class NesterovState:
    """Momentum `(B, C, H, W)`, and the norms `(B,)` of the base noise."""

    velocity: torch.Tensor
    radius: torch.Tensor


@register_method("reno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReNO(GradientOptimizer):
    """Gradient ascent on rewards; returns the noise of the best image.

    "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring et al., NeurIPS
    2024, https://arxiv.org/abs/2406.04312.

    `mode="parity"` follows the released loop step by step: SGD with Nesterov momentum 0.9, the summed gradient of
    rewards and χ prior clipped to 0.1, `steps` evaluations and `steps − 1` updates, the best image by the rewards
    without the prior, and rewards that see un-clamped bicubic pixels. Two differences: clip, prior and best are per
    image; noise, momentum and norms are float32.

    `mode="default"` moves differently: gradients are projected on white noise, their mean moves the noise, and that
    is projected too, see `WhiteNoiseSteps`. So no frequency of the noise outruns the others, a step has the same
    length on all models, and the noise keeps the norm and the spectrum of Gaussian noise. The gradient is that of a
    slightly shifted and noisy view of the image, another in each step, which suppresses patterns that please one exact
    pixel grid; scores, losses and the choice of the best remain those of the image itself. Saturated pixels keep their
    gradient. On one-step models the steps begin at the best of a few noises.

    Args:
        steps: Evaluations, the baseline included. The paper: 50.
        search: The number of noises to choose from before the first step, see `GradientOptimizer`: "auto", which is 0
            for parity, or a number.
        mode: "default" or "parity".
        geometry: "white" is the step above; for noise that a noise sampler draws in another color, the gradient is
            projected and the noise keeps its norm. "sphere" is the released step, followed by a projection on the norm
            of the base noise; "prior" the released step with the χ prior. `None` is "prior" for parity and where
            `regularization` is given, and "white" otherwise.
        learning_rate: η. For "white" the size of a step in standard deviations of the noise, 0.1 by default. For the
            released step in units of √(H·W) / 64, with H × W the size of the noise, 5 by default: 5 at 512 px, as in
            the released code (SD-Turbo, SDXL-Turbo, PixArt-α DMD, FLUX.1-schnell), and 10 at 1024 px (Hyper-SDXL).
        momentum: The weight of earlier gradients: in their mean for "white", else the coefficient of Nesterov momentum.
        max_grad_norm: The L2 norm to which the released step clips the gradient of each image; with η it sets the
            length of the step.
        regularization: λ_reg, the weight of the χ prior: 0.01 by default.
        views: The number of views whose mean gives the gradient, each one more pass of the rewards; 0 is the image
            itself; `None` is 0 for parity and 1 otherwise.
        gradient: "full" differentiates the whole chain; "frozen" holds the model outputs constant.
        preview: Reward the x0 estimate of one model call instead of the whole chain.
        stop: What ends the run of an image before it over-optimizes: "views" once the mean reward over its views has
            not risen for 10 evaluations, "held_out" once the held-out reward has not. Then losses and the choice of
            the best are by the mean over the views of the gradient, for "views" and `views=0` over 4. `None` makes all
            steps.
        held_out: Rewards that are not optimized, as `RewardSum` takes them, for `stop="held_out"`.

    Raises:
        ValueError: For `regularization` with a geometry that has no prior; for one of `held_out` and
            `stop="held_out"` without the other.
    """

    search: int | Literal["auto"] = checked("auto", "[0, inf)")
    mode: Literal["default", "parity"] = "default"
    geometry: Geometry | None = None
    learning_rate: float | None = checked(None, "[0, inf)")
    momentum: float = checked(0.9, "[0, 1)")
    max_grad_norm: float = checked(0.1, "(0, inf)")
    regularization: float | None = checked(None, "[0, inf)")
    views: int | None = checked(None, "[0, 1000]")
    gradient: Literal["full", "frozen"] = "full"
    preview: bool = False
    stop: Stop | None = None
    held_out: Any = None

    @property
    def views_used(self) -> int:
        """The number of views."""
        default = 0 if self.mode == "parity" else RENO_VIEWS
        return default if self.views is None else self.views

    @property
    def geometry_used(self) -> Geometry:
        """The geometry, by name where it is `None`."""
        has_prior = self.mode == "parity" or self.regularization is not None
        return self.geometry or ("prior" if has_prior else "white")

    def searched(self, problem: NoiseProblem) -> int:
        return 0 if self.search == "auto" and self.mode == "parity" else super().searched(problem)

    def check(self) -> None:
        super().check()
        check_stopping(self.stop, self.rewards, self.held_out)
        if self.regularization is not None and self.geometry_used != "prior":
            raise ValueError(
                f'Expected `regularization` with `geometry="prior"`, but got {self.geometry!r}, which keeps the norm '
                "of the noise by itself. Leave one of the two out."
            )

    def objective(self, pipe) -> ViewedRewards:
        rewards = self.differentiable_rewards(pipe, self.rewards)
        if self.mode == "parity":
            rewards = on_released_pixels(rewards)
        if self.stop is None:
            return ViewedRewards(rewards, self.views_used)
        held_out = None if self.held_out is None else self.load_rewards(pipe, self.held_out)
        return StoppingRewards(rewards, self.views_used, held_out)

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        if self.geometry_used != "prior":
            return 0.0
        return ChiPrior(RENO_PRIOR if self.regularization is None else self.regularization)(noise)

    def rate_or(self, default: float) -> float:
        """Return the learning rate, or a default where it is `None`."""
        return default if self.learning_rate is None else self.learning_rate

    def start(self, problem: NoiseProblem) -> NesterovState | WhiteNoiseSteps:
        if self.geometry_used == "white":
            return WhiteNoiseSteps(problem, self.rate_or(WHITE_RATE), self.momentum)
        return NesterovState(torch.zeros_like(problem.noise), per_sample_norm(problem.noise))

    def step(self, run: NoiseState, gradient: torch.Tensor, state: NesterovState | WhiteNoiseSteps) -> torch.Tensor:
        if isinstance(state, WhiteNoiseSteps):
            return state.moved(run.noise, gradient)
        gradient = clip_per_sample(gradient, self.max_grad_norm)
        state.velocity = self.momentum * state.velocity + gradient
        rate = self.rate_or(RENO_RATE) * rate_unit(run.noise)
        moved = run.noise - rate * (gradient + self.momentum * state.velocity)
        if self.geometry_used == "prior":
            return moved
        return moved * per_image(state.radius / per_sample_norm(moved), moved)
