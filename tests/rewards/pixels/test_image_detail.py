"""Sharpness and complexity: closed forms of waves and cells, and the failures that they are floors for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.rewards import AutoReward, Complexity, Sharpness

PLAIN = 4e-4


def wave(u: float, v: float, amplitude: float = 0.3, side: int = 256) -> Tensor:
    """(1, 3, side, side): a wave of u cycles per pixel across and v down."""
    across, down = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    return (0.5 + amplitude * (2 * math.pi * (u * across + v * down) + 0.7).cos()).expand(1, 3, -1, -1)


def textured(seed: int = 0, side: int = 96) -> Tensor:
    """(1, 3, side, side): noise with the spectrum of photographs, 1 / f."""
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    radius = torch.fft.fftfreq(side)[:, None].hypot(torch.fft.rfftfreq(side)).clamp_min(1 / side)
    image = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, s=(side, side))
    return (0.5 + 0.12 * image / image.std()).clamp(0, 1)


def blurred(images: Tensor, times: int) -> Tensor:
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images


@pytest.mark.parametrize(("u", "v"), [(1 / 64, 0), (0, 1 / 16), (1 / 8, 1 / 4), (3 / 8, 3 / 8), (0.5, 0.5)])
def test_a_wave_counts_by_its_frequency(u: float, v: float):
    weight = (math.sin(math.pi * u) ** 2 + math.sin(math.pi * v) ** 2) / 2
    variance = wave(u, v).var(correction=0).item()
    expected = weight * variance / (variance + PLAIN)
    # Of 256 pixels there are 255 differences.
    assert Sharpness().score(wave(u, v), [""]).item() == pytest.approx(expected, rel=0.02)


def test_the_formula_pixel_by_pixel():
    image = torch.rand(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differences = sum(
        (image[c, i + a, j + b] - image[c, i, j]).item() ** 2
        for c in range(3)
        for a, b in ((0, 1), (1, 0))
        for i in range(5 - a)
        for j in range(4 - b)
    )
    spread = sum((channel - channel.mean()).square().sum().item() for channel in image) + PLAIN * 60
    assert Sharpness().score(image[None], [""]).item() == pytest.approx(differences / (8 * spread), rel=1e-9)


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_sharpness_stays_below_1_at_any_size(side: int):
    checkerboard = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    images = checkerboard.float().expand(1, 3, -1, -1)
    assert 0 <= Sharpness()(images).item() < 1
    assert 0 <= Complexity()(images).item() < 1


def test_blur_takes_sharpness_away_and_contrast_does_not():
    for seed in range(3):
        image = textured(seed)
        scores = [Sharpness()(blurred(image, times)).item() for times in range(4)]
        assert scores == sorted(scores, reverse=True) and scores[3] < 0.3 * scores[0]
        assert Sharpness()(0.5 + 0.5 * (image - 0.5)).item() == pytest.approx(scores[0], rel=0.15)
        kept = [(reward(blurred(image, 1)) / reward(image)).item() for reward in (Sharpness(), Complexity())]
        assert kept[0] < 0.6 and kept[1] > 0.8


@pytest.mark.parametrize("amplitude", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("columns", [0, 4, 8, 16])
def test_complexity_is_the_area_that_is_not_plain(amplitude: float, columns: int):
    """A checkerboard of variance a² on some of the 16 columns of cells, before a plain background."""
    checkerboard = 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float() - 1
    checkerboard[:, 4 * columns :] = 0
    images = (0.5 + amplitude * checkerboard).expand(1, 3, -1, -1)
    expected = columns / 16 * amplitude**2 / (amplitude**2 + PLAIN)
    assert Complexity()(images).item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_complexity_of_a_picture_is_that_of_its_enlargement():
    image = blurred(textured(side=128), 1)
    enlarged = F.interpolate(image, scale_factor=2, mode="nearest")
    torch.testing.assert_close(Complexity()(enlarged), Complexity()(image), rtol=1e-3, atol=0)


def test_a_plain_background_is_neither_sharp_nor_complex():
    plain = torch.full((1, 3, 64, 64), 0.8)
    hardly_seen = plain + 1e-3 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for reward in (Sharpness(), Complexity()):
        assert reward(plain).item() < 1e-6
        assert reward(hardly_seen).item() < 0.01
        assert reward(textured(side=64)).item() > 10 * reward(hardly_seen).item()


@pytest.mark.parametrize("name", ["sharpness", "complexity"])
def test_gradient_in_float64_and_at_a_plain_image(name: str):
    reward = AutoReward.from_pretrained(name)
    images = torch.rand(1, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.score(x, [""]), images)
    plain = torch.full((1, 3, 32, 32), 0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(plain).sum(), plain)
    assert gradient.isfinite().all()
