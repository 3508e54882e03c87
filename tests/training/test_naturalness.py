"""Measures of naturalness in closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from noiseopt import shapes_world
from training import naturalness

PROMPTS = ["a red circle", "a blue star left of a green cross"]


class Linear:
    """A stand-in for a pipeline: the denoiser doubles the noise and adds its channel means."""

    def __init__(self) -> None:
        self.unet = nn.Identity()
        self.unet.forward = lambda x: x + x.mean((2, 3), keepdim=True)

    def __call__(self, prompt, latents, output_type, **call):
        return SimpleNamespace(images=latents + self.unet.forward(latents))


def test_shares_of_the_gradient_in_closed_form():
    pipe = Linear()
    z = torch.randn(3, 4, 8, 8)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    full, frozen = naturalness.gradients(pipe, pipe.unet, PROMPTS, z, lambda images, _: (images * left).sum((1, 2, 3)))
    found = naturalness.gradient_shares(full, frozen)
    # frozen: `left`, half of whose squared norm is in its mean; true: twice `left` plus its mean
    assert found["frozen"] == pytest.approx(0.5)
    full = 2 * left + left.mean()
    assert found["full"] == pytest.approx(float(64 * full.mean() ** 2 / full.square().sum()), abs=1e-4)
    assert found["cosine"] == pytest.approx(float((full * left).sum() / full.norm() / left.norm()), abs=1e-4)


def test_spread_is_in_pixels():
    scenes = [shapes_world.Scene((shapes_world.Shape("square", "red", x, 32, 10),)) for x in (28, 36)]
    images = shapes_world.render(scenes, torch.Generator().manual_seed(0), size=128)
    assert naturalness.spread(images, 1) == pytest.approx(8.0)


def test_only_pairs_of_chosen_images_count():
    features = torch.tensor(
        [[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]
    )
    chosen = torch.tensor([[True, True, True, False], [True, True, False, False]])
    expected = (1 + 0 + 0 + 0.5**0.5) / 4
    assert naturalness.similarity_among(features, chosen) == pytest.approx(expected, abs=1e-6)
