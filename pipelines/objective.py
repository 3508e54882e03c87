"""What a noise optimisation minimises."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..rewards.contract.reward import check_gradient
from ..rewards.contract.reward_sum import AttachedGradient, RewardSum, part_of_prompts
from .reno.views import random_views
from .sampling.sample import Sample


class Objective:
    """`objective(sample) -> (B,)`, lower is better. `evaluate` also reports what it is made of.

    Attributes:
        requires_prompt: Whether the prompts are looked at.
    """

    requires_prompt: bool = False

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss `(B,)` with its graph, and named raw scores `(B,)` without."""
        raise NotImplementedError(f"{type(self).__name__} must define `evaluate(sample)`.")

    def __call__(self, sample: Sample) -> torch.Tensor:
        return self.evaluate(sample)[0]

    def check_groups(self, groups: Sequence[int]) -> None:
        """Raise `ValueError` for a batch that cannot be compared, before any model runs; see `Sample.groups`."""

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Raise for user code that cannot work on images of this size, before any model runs."""

    def describe(self) -> Any:
        """What goes into the provenance of a result: plain values."""
        return type(self).__name__


class FunctionObjective(Objective):
    """A plain function `(sample) -> (B,)` as an objective."""

    def __init__(self, function: Callable[[Sample], torch.Tensor]) -> None:
        self.function = function

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.function(sample), {}

    def describe(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def differentiable_rewards(rewards: Any, device: torch.device) -> RewardSum:
    """A `RewardSum` that loads names onto `device`. Raises `NonDifferentiableReward` where one that counts has none."""
    total = RewardSum(rewards, device=device)
    total.check_differentiable()
    return total


class RewardObjective(Objective):
    """The negative weighted sum of rewards of the images: `−Σᵢ λᵢ·rewardᵢ(images, prompts)`.

    Args:
        rewards: Anything that `RewardSum` takes, or a `RewardSum`.
        prompts: Ask the rewards about these instead of the pipeline's prompts: one, or one for each image.
        views: The value stays that of the image itself, but the gradient is the mean of so many random views of it; see
            `random_views`. 0 for the gradient of the image itself.
    """

    def __init__(self, rewards: Any, prompts: str | Sequence[str] | None = None, views: int = 0) -> None:
        self.rewards = rewards if isinstance(rewards, RewardSum) else RewardSum(rewards)
        self.prompts = prompts
        self.requires_prompt = self.rewards.requires_prompt and prompts is None
        self.views = views

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        prompts = self.prompts if self.prompts is not None else sample.prompts
        images = sample.images
        by_views = self.views > 0 and images.requires_grad
        output = self.rewards(images.detach() if by_views else images, prompts, chunk_size=sample.chunk_size)
        if not by_views:
            return -output.total, output.components
        gradient = self.gradient_by_views(images, prompts, sample.seeds, sample.chunk_size or len(images))
        return -AttachedGradient.apply(images, output.total, gradient), output.components  # pyright: ignore

    def gradient_by_views(
        self, images: torch.Tensor, prompts: Any, seeds: Sequence[int], chunk_size: int
    ) -> torch.Tensor:
        """The mean gradient `(B, 3, H, W)` of random views with respect to the pixels, a few images at a time."""
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            rows = slice(start, start + chunk_size)
            leaf, texts = images[rows].detach().requires_grad_(), part_of_prompts(prompts, rows)
            views = random_views(leaf, self.views, seeds[rows])
            total = torch.stack([self.optimised(view, texts).total.sum() for view in views]).mean()
            gradient[rows] = torch.autograd.grad(total, leaf)[0] if total.requires_grad else 0
        return gradient

    @functools.cached_property
    def optimised(self) -> RewardSum:
        """The rewards that have a weight."""
        return self.rewards.optimised()

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Score one random image with each plain callable: its shape, its numbers and, if asked for, its gradient.

        The project's own rewards are tested to meet the contract: they only say whether they take images of this size.
        """
        prompt = self.first_prompt(prompt)
        for name, reward in zip(self.rewards.names, self.rewards.rewards, strict=True):
            if not hasattr(reward, "function"):
                reward.check_size(prompt, height, width)  # pyright: ignore[reportCallIssue]
                continue
            if gradient and self.rewards.weights[name]:
                check_gradient(reward, prompt, height, width)  # pyright: ignore[reportArgumentType]
            else:
                reward(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)), prompt)

    def first_prompt(self, prompt: str) -> str:
        """What the first image is scored by: its own prompt, unless the rewards are asked about others."""
        asked = prompt if self.prompts is None else self.prompts
        return asked if isinstance(asked, str) else asked[0]

    def describe(self) -> dict[str, Any]:
        return self.rewards.describe()
