"""Views are small changes, differentiable, and each image's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import generator

from noiseopt.pipelines.reno.objective import ViewedRewards
from noiseopt.pipelines.reno.views import random_views


def smooth_image(count: int = 2) -> torch.Tensor:
    line = torch.linspace(0, 1, 64)
    channels = (line.expand(64, 64), line[:, None].expand(64, 64), torch.full((64, 64), 0.5))
    return torch.stack(channels).repeat(count, 1, 1, 1)


def test_views_differ_a_little_from_the_image_and_from_one_another():
    images = smooth_image()
    views = list(random_views(images, 6, seeds=[1, 2]))
    assert len(views) == 6 and all(view.shape == images.shape for view in views)
    for view in views:
        assert view.min() >= 0 and view.max() <= 1
        assert 0.01 < (view - images).abs().mean() < 0.08
    assert not torch.equal(views[0], views[1])


def test_an_image_is_moved_by_at_most_a_twentieth_of_its_side():
    line = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    moves = [(view - line)[..., 16:48].mean().abs() for view in random_views(line.contiguous(), 50, seeds=[3])]
    assert 0.02 < max(moves) < 0.05 + 0.05 * 0.25 + 0.01


def test_views_depend_on_the_seed_of_their_own_image_alone():
    images = smooth_image()
    both = next(random_views(images, 1, seeds=[1, 2]))
    alone = next(random_views(images[1:], 1, seeds=[2]))
    assert torch.equal(both[1:], alone)


def test_the_gradient_reaches_every_pixel_inside():
    images = smooth_image().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(view.square().sum() for view in random_views(images, 2, [1, 2])), images)
    assert gradient[..., 8:-8, 8:-8].ne(0).float().mean() > 0.99


def sharpness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Reward whose gradient differs from view to view."""
    return images.diff(dim=-1).square().mean((1, 2, 3)) * 100


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_value_and_gradient_are_the_mean_over_the_views(chunk_size):
    images, seeds = torch.rand(3, 3, 16, 16, generator=generator()), [5, 6, 7]
    objective = ViewedRewards({sharpness: 2.0}, views=4)
    sample: Any = SimpleNamespace(images=images, prompts=["a"] * 3, seeds=seeds, chunk_size=chunk_size)
    mean, gradient = objective.mean_of_views(sample, 4)
    leaf = images.requires_grad_()
    views = list(random_views(leaf, 4, seeds))
    torch.testing.assert_close(mean, torch.stack([2 * sharpness(view, []) for view in views]).mean(0))
    expected = [torch.autograd.grad(2 * sharpness(view, []).sum(), leaf)[0] for view in views]
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)
    torch.testing.assert_close(gradient, torch.stack(expected).mean(0))
