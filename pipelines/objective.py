"""Objectives: what a noise optimization minimizes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..callbacks.noise_callback import NoiseCallback
from ..rewards.contract.reward import check_gradient
from ..rewards.contract.reward_sum import RewardSum
from .sampling.sample import Sample


class Objective:
    """A loss of samples: `objective(sample) -> (B,)`, lower is better.

    Attributes:
        requires_prompt: Whether the objective reads the prompts.
        continues: Names of attributes, tensors and numbers, with which the objective goes on in a resumed run; `None`
            if it cannot.
        callbacks: Callbacks that belong to the method, called in each step before those of the user.
    """

    requires_prompt: bool = False
    callbacks: Sequence[NoiseCallback] = ()
    continues: ClassVar[tuple[str, ...] | None] = ()

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss `(B,)` with its graph, and the raw scores `(B,)` by name without a graph."""
        raise NotImplementedError(f"{type(self).__name__} must define `evaluate(sample)`.")

    def __call__(self, sample: Sample) -> torch.Tensor:
        return self.evaluate(sample)[0]

    def check_groups(self, groups: Sequence[int]) -> None:
        """Raise `ValueError` for a batch that cannot be compared, before any model runs. See `Sample.groups`."""

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Raise an error for user code that fails on images of this size, before any model runs."""

    def describe(self) -> Any:
        """Return plain values for the provenance of a result."""
        return type(self).__name__


class FunctionObjective(Objective):
    """An objective from a function `(sample) -> (B,)`."""

    def __init__(self, function: Callable[[Sample], torch.Tensor]) -> None:
        self.function = function

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.function(sample), {}

    def describe(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


class RewardObjective(Objective):
    """The negative weighted sum of rewards of the images: `−Σᵢ λᵢ·rewardᵢ(images, prompts)`.

    Args:
        rewards: A `RewardSum`, or anything that it takes.
    """

    def __init__(self, rewards: Any) -> None:
        self.rewards = rewards if isinstance(rewards, RewardSum) else RewardSum(rewards)
        self.requires_prompt = self.rewards.requires_prompt

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = self.rewards(sample.images, sample.prompts, chunk_size=sample.chunk_size)
        return -output.total, output.components

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Score one random image with each plain callable, and check shape, values and, if needed, the gradient.

        The rewards of this package meet the contract; they are only asked whether they take images of this size.
        """
        for name, reward in zip(self.rewards.names, self.rewards.rewards, strict=True):
            if not hasattr(reward, "function"):
                reward.check_size(prompt, height, width)  # pyright: ignore[reportCallIssue]
                continue
            try:
                if gradient and self.rewards.weights[name]:
                    check_gradient(reward, prompt, height, width)  # pyright: ignore[reportArgumentType]
                else:
                    reward(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)), prompt)
            except Exception as error:
                if not hasattr(error, "raised_by_reward"):
                    raise
                raise ValueError(
                    f"Expected reward '{name}' to score a random image (1, 3, {height}, {width}), but it raised "
                    f"{type(error).__name__}: {error}. Compute it with torch, or set `differentiable = False` on it "
                    "and use a method without gradients, such as `BestOfN`."
                ) from error

    def describe(self) -> dict[str, Any]:
        return self.rewards.describe()


def on_released_pixels(rewards: RewardSum) -> RewardSum:
    """Return copies of the rewards, sharing their weights, with the preprocessing of ReNO's released loop.

    That loop, which It's Never Too Late shares, preprocesses the image once for all rewards, HPSv2 included, which
    otherwise pads: it resizes the shorter side to the model's size in one bicubic pass without clamping, then crops the
    center. Rewards whose transform has no such variant keep their own.
    """
    twins = {}
    for name, reward in zip(rewards.names, rewards.rewards, strict=True):
        twin = copy.copy(reward)
        if as_in_reno := getattr(getattr(reward, "image_transform", None), "as_in_reno", None):
            twin.image_transform = as_in_reno()
        twins[name] = twin
    return rewards.like(twins)
