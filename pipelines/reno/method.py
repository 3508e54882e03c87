"""ReNO: reward-based noise optimisation of one-step models."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward_sum import RewardSum
from ..memory.checkpointing import Checkpointing
from ..memory.graph_size import ChunkSetting
from ..method import NoiseOptimizer
from ..noise_math import ChiPrior, clip_per_sample, per_image, per_sample_norm
from ..objective import RewardObjective, differentiable_rewards
from ..problem import NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Clamp, Gradient

RENO_PRIOR = 0.01
RENO_VIEWS = 4
RENO_SIZE = 4 * 64 * 64  # entries of the noise that the paper's learning rate was chosen for


@register_noise_optimizer("reno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReNO(NoiseOptimizer):
    """Gradient ascent on rewards with momentum; returns the noise of the best image.

    "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring et al., NeurIPS
    2024, https://arxiv.org/abs/2406.04312.

    `mode="parity"` is the released loop step by step: SGD with Nesterov momentum 0.9, the summed gradient of rewards
    and χ prior clipped to 0.1, `steps` evaluations and `steps − 1` updates, the best image by the rewards without the
    prior, and rewards that see un-clamped bicubic pixels. It differs in that clip, prior and best are per image, and
    that noise, momentum and norms are float32.

    `mode="default"` keeps the update and changes four things. The gradient is that of several slightly moved and noisy
    views of the image, which leaves out what only one exact grid of pixels shows; scores, losses and the choice of the
    best are still those of the image itself. The norm of the noise stays what it was, by projection instead of a prior.
    The learning rate is in units of √(d / 16384), so that the same value suits any latent size: the paper's 5 at 512
    px, and its 10 at 1024 px. Saturated pixels keep their gradient.

    Args:
        rewards: What `RewardSum` takes: a name, a callable, a dict to weights, or a list of (reward, weight).
        steps: Evaluations, the plain result included. The paper: 50.
        mode: "default" or "parity".
        learning_rate: η, at least 0.
        momentum: Of Nesterov's method, in [0, 1).
        max_grad_norm: The gradient of each image is clipped to this L2 norm; with η it sets the length of a step.
        regularization: λ_reg, the weight of the χ prior; `None` is 0.01 for parity, and the projection otherwise.
        views: How many views give the gradient; each costs one more pass of the rewards. 0 is the image itself, `None`
            0 for parity and 4 otherwise.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        gradient: "full" through the whole chain; "frozen" holds the model's outputs constant.
        preview: Reward the x0 estimate of one model call instead of the whole chain.
        chunk_size: Take the gradient of at most so many images at a time: the same images and gradients in the memory
            of so many, whatever the batch, for one more forward pass a step. "auto" finds out in the first step how
            many fit into half of the free memory, and cuts nothing where all do; `None` never cuts.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 50
    mode: Literal["default", "parity"] = "default"
    learning_rate: float = 5.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularization: float | None = None
    views: int | None = None
    reward_prompt: str | Sequence[str] | None = None
    gradient: Gradient = "full"
    preview: bool = False
    chunk_size: ChunkSetting = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None

    @property
    def clamp(self) -> Clamp:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "hard" if self.mode == "parity" else "straight_through"

    @property
    def prior(self) -> ChiPrior | None:
        """The χ prior, or `None` where the norm is kept by projection."""
        if self.regularization is None and self.mode == "default":
            return None
        return ChiPrior(RENO_PRIOR if self.regularization is None else self.regularization)

    def check(self) -> None:
        super().check()
        if self.mode not in ("default", "parity"):
            raise ValueError(f'Expected `mode` to be "default" or "parity", but got {self.mode!r}.')
        if self.gradient is None:
            raise ValueError('Expected `gradient` to be "full" or "frozen" for ReNO. Without one, use `BestOfN`.')
        if not (self.learning_rate >= 0 and self.max_grad_norm > 0 and 0 <= self.momentum < 1):
            raise ValueError(
                "Expected learning_rate >= 0, max_grad_norm > 0 and momentum in [0, 1), but got "
                f"{self.learning_rate}, {self.max_grad_norm} and {self.momentum}."
            )
        if self.views is not None and not (isinstance(self.views, int) and self.views >= 0):
            raise ValueError(f"Expected `views` to be an integer of 0 or more, but got {self.views!r}.")
        _ = self.prior

    def objective(self, pipe) -> RewardObjective:
        rewards = differentiable_rewards(self.rewards, self.device_of_rewards(pipe))
        if self.mode == "parity":
            rewards = on_released_pixels(rewards)
        views = self.views if self.views is not None else 0 if self.mode == "parity" else RENO_VIEWS
        return RewardObjective(rewards, self.reward_prompt, views)

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        return self.prior(noise) if self.prior else 0.0

    def start(self, problem: NoiseProblem) -> dict[str, torch.Tensor]:
        return {"velocity": torch.zeros_like(problem.noise), "radius": per_sample_norm(problem.noise)}

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
        gradient = clip_per_sample(gradient, self.max_grad_norm)
        memory["velocity"] = self.momentum * memory["velocity"] + gradient
        moved = state.noise - self.step_size(state.noise) * (gradient + self.momentum * memory["velocity"])
        return moved if self.prior else moved * per_image(memory["radius"] / per_sample_norm(moved), moved)

    def step_size(self, noise: torch.Tensor) -> float:
        """η, in units that suit the size of the noise unless the released loop is followed."""
        scale = 1.0 if self.mode == "parity" else math.sqrt(noise[0].numel() / RENO_SIZE)
        return self.learning_rate * scale


def on_released_pixels(rewards: RewardSum) -> RewardSum:
    """The same rewards, weights shared, on pixels as the released loop makes them once for all rewards.

    The shorter side to the model's size in one bicubic pass, not clamped, and the centre of that: also for HPSv2, which
    pads otherwise. A reward without a transform that knows its form in ReNO stays as it is.
    """
    twins = {}
    for name, reward in zip(rewards.names, rewards.rewards, strict=True):
        twin = copy.copy(reward)
        if as_in_reno := getattr(getattr(reward, "image_transform", None), "as_in_reno", None):
            twin.image_transform = as_in_reno()
        twins[name] = twin
    return rewards.like(twins)
