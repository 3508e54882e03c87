"""The objective of ReNO: the loss is that of the image, its gradient may be the mean over several views of it."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...rewards.contract.reward_sum import AttachedGradient, RewardSum, prompts_of_rows
from ..objective import RewardObjective
from ..sampling.sample import Sample
from .views import random_views


class ViewedRewards(RewardObjective):
    """`RewardObjective` whose gradient is the mean over random views of each image, and whose value is its own.

    Args:
        rewards: A `RewardSum`, or anything that it takes.
        views: The number of views; 0 for the gradient of the image itself. See `random_views`.
    """

    def __init__(self, rewards: Any, views: int) -> None:
        super().__init__(rewards)
        self.views = views

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = sample.images
        if self.views == 0 or not images.requires_grad:
            return super().evaluate(sample)
        output = self.rewards(images.detach(), sample.prompts, chunk_size=sample.chunk_size)
        gradient = self.gradient_by_views(images, sample.prompts, sample.seeds, sample.chunk_size or len(images))
        total: Any = AttachedGradient.apply(images, output.total, gradient)
        return -total, output.components

    def gradient_by_views(
        self, images: torch.Tensor, prompts: Any, seeds: Sequence[int], chunk_size: int
    ) -> torch.Tensor:
        """Return the mean gradient `(B, 3, H, W)` of the views with respect to the pixels, a chunk at a time."""
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            rows = slice(start, start + chunk_size)
            leaf, texts = images[rows].detach().requires_grad_(), prompts_of_rows(prompts, rows)
            views = random_views(leaf, self.views, seeds[rows])
            total = torch.stack([self.weighted(view, texts).total.sum() for view in views]).mean()
            gradient[rows] = torch.autograd.grad(total, leaf)[0] if total.requires_grad else 0
        return gradient

    @functools.cached_property
    def weighted(self) -> RewardSum:
        """The rewards whose weight is not 0."""
        return self.rewards.optimized()
