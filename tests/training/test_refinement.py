"""Refinement of the reward: which images are compared, by which losses, and the ascents that it is to withstand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from training.refinement import ascend, pairs
from training.reward_losses import ranked


def linear(direction: torch.Tensor) -> SimpleNamespace:
    """A reward that is linear in the image, with threshold 10."""
    return SimpleNamespace(
        bias=torch.tensor(10.0),
        embed_images=lambda images: images.flatten(1) @ direction[:, None],
        embed_texts=lambda prompts: torch.ones(len(prompts), 1),
    )


def test_only_prompts_with_right_and_wrong_images_are_compared():
    right = torch.tensor([True, True, False, True, False, False])
    ((yes, no),) = pairs(["both", "right", "both", "right", "wrong", "both"], right)
    assert yes.tolist() == [0] and no.tolist() == [2, 5]


def test_right_images_are_raised_above_wrong_ones_and_the_threshold():
    reward, images = linear(torch.ones(1)), torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)  # scores 20 and 0
    apart, swapped = ranked(reward, images, ["a"]), ranked(reward, images.flip(0), ["a"])
    assert apart["pair"] == apart["order"] == pytest.approx(math.log1p(math.exp(-19)))
    assert apart["side"] == pytest.approx(0.5 * math.log1p(math.exp(-10)))
    assert swapped["pair"] == swapped["order"] == pytest.approx(21)
    assert swapped["side"] == pytest.approx(0.5 * (10 + math.log1p(math.exp(-10))), rel=1e-5)


def test_ascents_turn_the_noise_towards_the_gradient_and_keep_its_norm():
    direction, noise = F.normalize(torch.randn(64), dim=0), torch.randn(3, 1, 8, 8)
    path = list(ascend(lambda z: z, linear(direction), noise, ["a"] * 3, steps=30))
    assert len(path) == 31 and torch.equal(path[0][0], noise)
    assert all(z.flatten(1).norm(dim=1).tolist() == pytest.approx([8.0] * 3) for z, _, _ in path[1:])
    assert (path[-1][2] > 0.99 * 20 * 8).all(), "the highest score of a noise of this norm"
