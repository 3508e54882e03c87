"""PGD on the noise: plain gradient ascent, which leaves the Gaussian; a baseline of Noise Diffusion."""

import dataclasses
import math
from typing import Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import GradientOptimizer
from ..noise_math import per_image, per_sample_norm, unit
from ..problem import NoiseProblem
from ..registry import register_method


@register_method("noise_pgd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisePGD(GradientOptimizer):
    """Projected gradient ascent: steps of one length along the gradient, within a ball around the first noise.

    The row "PGD" of Noise Diffusion (https://arxiv.org/abs/2411.16503): `z + η∇` is no longer Gaussian, which that
    paper avoids. Use it for comparison only.

    Args:
        steps: Evaluations, the baseline included.
        step_size: The root mean square of a step.
        radius: The root mean square of the largest distance from the first noise; `None` for no limit.
        gradient: "frozen" holds the outputs of the denoiser constant; "full" differentiates the whole chain.
    """

    steps: int = checked(51, "[1, inf)")
    step_size: float = checked(0.1, "(0, inf)")
    radius: float | None = checked(None, "(0, inf)")
    gradient: Literal["full", "frozen"] = "frozen"

    def start(self, problem: NoiseProblem) -> torch.Tensor:
        return problem.noise

    def step(self, run: NoiseState, gradient: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        length = math.sqrt(run.noise[0].numel())
        moved = run.noise - self.step_size * length * unit(gradient)
        if self.radius is None:
            return moved
        way = moved - state
        return state + way * per_image((self.radius * length / per_sample_norm(way)).clamp(max=1), way)
