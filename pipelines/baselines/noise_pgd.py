"""PGD on the noise: the plain gradient ascent that leaves the Gaussian, as a row to compare with."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ..memory.checkpointing import Checkpointing
from ..method import NoiseOptimizer
from ..noise_diffusion.candidate_choice import unit
from ..noise_math import per_image, per_sample_norm
from ..objective import RewardObjective, differentiable_rewards
from ..problem import NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Gradient


@register_noise_optimizer("noise_pgd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisePGD(NoiseOptimizer):
    """Projected gradient ascent: steps of one length along the gradient, kept within a ball around the first noise.

    The row "PGD" of Noise Diffusion (https://arxiv.org/abs/2411.16503): `z + η∇` is no longer Gaussian, which is what
    that paper avoids. Use it to compare, not to draw.

    Args:
        rewards: What `RewardSum` takes.
        steps: Evaluations, the plain result included.
        step_size: Length of a step for each entry of the noise (root mean square), above 0.
        radius: How far the noise may go from where it began, in the same unit; `None` for anywhere.
        stop_gradient: Hold the outputs of the denoiser constant; `False` back-propagates through the whole chain.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 51
    step_size: float = 0.1
    radius: float | None = None
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
        for name in ("step_size", "radius"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` to be a number above 0, but got {value!r}.")

    def objective(self, pipe) -> RewardObjective:
        return RewardObjective(differentiable_rewards(self.rewards, self.device_of_rewards(pipe)), self.reward_prompt)

    def start(self, problem: NoiseProblem) -> torch.Tensor:
        return problem.noise

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        length = math.sqrt(state.noise[0].numel())
        moved = state.noise - self.step_size * length * unit(gradient)
        if self.radius is None:
            return moved
        way = moved - memory
        return memory + way * per_image((self.radius * length / per_sample_norm(way)).clamp(max=1), way)
