"""The objective of ReNO: its gradient, and if asked also its value, is the mean over several views of the image."""

import functools
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

    Attributes:
        valued_by_views: Whether the value is the mean over the views too.
    """

    valued_by_views: bool = False

    def __init__(self, rewards: Any, views: int) -> None:
        super().__init__(rewards)
        self.views = views

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = sample.images
        if self.views == 0 or not (images.requires_grad or self.valued_by_views):
            return super().evaluate(sample)
        output = self.rewards(images.detach(), sample.prompts, chunk_size=sample.chunk_size)
        mean, gradient = self.mean_of_views(sample, self.views)
        total: Any = mean if self.valued_by_views else output.total
        if images.requires_grad:
            total = AttachedGradient.apply(images, total, gradient)
        return -total, output.components

    def mean_of_views(self, sample: Sample, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over some views, `(B,)`, and its gradient in the pixels, chunk by chunk."""
        images = sample.images.detach()
        means, gradient, chunk_size = [], torch.zeros_like(images), sample.chunk_size or len(images)
        for start in range(0, len(images), chunk_size):
            rows = slice(start, start + chunk_size)
            leaf, texts = images[rows].detach().requires_grad_(), prompts_of_rows(sample.prompts, rows)
            views = random_views(leaf, count, sample.seeds[rows])
            mean = torch.stack([self.weighted(view, texts).total for view in views]).mean(0)
            if mean.requires_grad:
                (gradient[rows],) = torch.autograd.grad(mean.sum(), leaf)
            means.append(mean.detach())
        return torch.cat(means), gradient

    @functools.cached_property
    def weighted(self) -> RewardSum:
        """The rewards whose weight is not 0."""
        return self.rewards.optimized()
