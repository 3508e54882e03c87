"""Tiny images against their formula."""

import torch
import torch.nn.functional as F

from noiseopt.rewards import PairwiseDistance, TinyImage


def test_black_and_white_are_one_apart():
    images = torch.stack([torch.zeros(3, 50, 70), torch.ones(3, 50, 70), torch.full((3, 50, 70), 0.25)])
    found = PairwiseDistance(TinyImage())(images)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.0, 0.25]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1, 2], torch.tensor(0.75), rtol=1e-4, atol=1e-6)


def test_distance_is_that_of_the_published_formula_where_nothing_is_resized():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.norm(images.flatten(1)[:, None] - images.flatten(1)[None], p=2, dim=2) / 3072**0.5
    torch.testing.assert_close(PairwiseDistance(TinyImage())(images), expected, rtol=1e-4, atol=1e-6)


def test_every_pixel_of_a_large_picture_counts():
    """Antialiased: 16 × 16 pixels to one. Without, only four of them have a gradient."""
    images = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(TinyImage()(images).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.99
    plain = F.interpolate(images, (32, 32), mode="bilinear")
    released = TinyImage().as_released()(images)
    torch.testing.assert_close(released, plain.flatten(1) / 3072**0.5)
    (gradient,) = torch.autograd.grad(released.square().sum(), images)
    assert 0 < (gradient != 0).float().mean() < 0.02
