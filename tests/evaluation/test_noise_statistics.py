"""Noise statistics against plain Python sums, the limits of Gaussian noise, and noise with known flaws."""

import cmath
import dataclasses
import math

import pytest
import torch

from noiseopt.evaluation.noise_statistics import NoiseStatistics, frequencies, gaussian_limits, noise_statistics


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(statistics: NoiseStatistics) -> torch.Tensor:
    """All numbers as a flat list."""
    values = dataclasses.asdict(statistics)
    return torch.tensor([*values.pop("spectrum"), *values.values()], dtype=torch.float64)


def test_moments_are_plain_sums():
    noise = white(3, 2, 4, 5) ** 2
    values = noise.double().flatten().tolist()
    n, mean = len(values), sum(values) / len(values)
    variance, third, fourth = (sum((value - mean) ** power for value in values) / n for power in (2, 3, 4))
    found = noise_statistics(noise)
    norms = [math.sqrt(sum(value**2 for value in each.double().flatten().tolist()) / 40) for each in noise]
    assert found.norm == pytest.approx(sum(norms) / 3)
    assert (found.mean, found.variance) == pytest.approx((mean, variance))
    assert found.skewness == pytest.approx(third / variance**1.5)
    assert found.excess_kurtosis == pytest.approx(fourth / variance**2 - 3)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (3, 6)])
def test_spectrum_is_the_mean_power_of_each_ring(height, width):
    noise = white(1, 1, height, width).double()
    rings: dict[int, list[float]] = {}
    for u in range(height):
        for v in range(width):
            waves = (
                noise[0, 0, y, x].item() * cmath.exp(-2j * math.pi * (u * y / height + v * x / width))
                for y in range(height)
                for x in range(width)
            )
            ring = math.floor(0.5 + math.hypot(min(u, height - u), min(v, width - v)))
            rings.setdefault(ring, []).append(abs(sum(waves)) ** 2 / (height * width))
    assert sorted(rings) == list(range(len(rings)))
    expected = [sum(rings[ring]) / len(rings[ring]) for ring in sorted(rings)]
    assert noise_statistics(noise).spectrum == pytest.approx(expected)


def test_spectrum_of_one_wave_is_in_its_ring():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    wave = torch.cos(2 * math.pi * (3 * x + 4 * y) / 16).double()
    spectrum = noise_statistics(wave.expand(1, 1, 16, 16)).spectrum
    assert spectrum[5] > 1 and all(abs(power) < 1e-12 for ring, power in enumerate(spectrum) if ring != 5)


@pytest.mark.parametrize("shape", [(4, 4, 32, 32), (1, 16, 8, 8), (6, 8, 8, 12)])
def test_white_noise_is_within_its_limits(shape):
    scores = flat(gaussian_limits(shape).z_scores(noise_statistics(white(*shape))))
    assert scores.abs().max() < 4


def test_limits_are_the_mean_and_spread_over_many_noises():
    """Over 800 draws, the mean is within 4 standard errors, and the spread within 12%."""
    shape = (2, 2, 8, 8)
    draws = torch.stack([flat(noise_statistics(white(*shape, seed=seed))) for seed in range(800)])
    limits = gaussian_limits(shape)
    expected, error = flat(limits.expected), flat(limits.standard_error)
    # the log of a mean is biased for rings with few frequencies: the slope is exact to first order only
    slack = torch.full_like(expected, 4 / 800**0.5)
    slack[-1] = 0.25
    assert ((draws.mean(0) - expected).abs() < slack * error).all()
    assert draws[:, :-1].std(0) == pytest.approx(error[:-1], rel=0.12)
    assert float(draws[:, -1].std()) == pytest.approx(float(error[-1]), rel=0.2)


@pytest.mark.parametrize("d", [4, 36, 400])
def test_norm_is_that_of_the_chi_distribution(d):
    mean = math.sqrt(2 / d) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    side = math.isqrt(d)
    limits = gaussian_limits((9, 1, side, side))
    assert limits.expected.norm == pytest.approx(mean, rel=1e-4)
    assert limits.standard_error.norm == pytest.approx(math.sqrt(1 - mean**2) / 3, rel=2e-3)


def pink(alpha: float, *shape: int) -> torch.Tensor:
    """White noise with amplitudes times (1 + f)^-α."""
    spectrum = torch.fft.fft2(white(*shape).double()) * (1 + frequencies(*shape[-2:])).pow(-alpha)
    return torch.fft.ifft2(spectrum).real


@pytest.mark.parametrize("alpha", [-0.3, 0.2, 0.5, 1.0])
def test_pink_noise_has_its_slope(alpha):
    shape = (8, 4, 32, 32)
    slope = noise_statistics(pink(alpha, *shape)).spectral_slope
    assert slope == pytest.approx(-2 * alpha, abs=4 * gaussian_limits(shape).standard_error.spectral_slope)


def test_spectrum_of_pink_noise_is_the_filter():
    spectrum = noise_statistics(pink(0.2, 8, 4, 32, 32)).spectrum
    for ring in (1, 5, 12, 20):
        assert spectrum[ring] == pytest.approx((1 + ring) ** -0.4, rel=0.15)


def test_pink_noise_without_a_mean_still_has_a_slope():
    noise = pink(0.2, 2, 4, 16, 16)
    assert math.isfinite(noise_statistics(noise - noise.mean((-2, -1), keepdim=True)).spectral_slope)


def test_scaled_noise_is_flagged_by_norm_and_variance_alone():
    shape = (2, 4, 16, 16)
    found = noise_statistics(1.2 * white(*shape))
    assert found.norm == pytest.approx(1.2 * noise_statistics(white(*shape)).norm)
    scores = gaussian_limits(shape).z_scores(found)
    assert scores.norm > 5 and scores.variance > 5
    assert max(map(abs, (scores.mean, scores.skewness, scores.excess_kurtosis, scores.spectral_slope))) < 4


def test_uniform_noise_is_flagged_by_its_kurtosis():
    """The excess kurtosis of a uniform distribution is -6/5; its spectrum is white."""
    shape = (2, 4, 32, 32)
    noise = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5) * math.sqrt(12)
    found = noise_statistics(noise)
    assert found.excess_kurtosis == pytest.approx(-1.2, abs=0.05)
    scores = gaussian_limits(shape).z_scores(found)
    assert scores.excess_kurtosis < -10 and abs(scores.spectral_slope) < 4


def test_half_precision_noise_is_measured_in_double():
    noise = white(1, 4, 16, 16).bfloat16()
    assert noise_statistics(noise) == noise_statistics(noise.double())


def test_one_ring_has_no_slope():
    shape = (1, 4, 2, 2)
    assert math.isnan(noise_statistics(white(*shape)).spectral_slope)
    assert math.isnan(gaussian_limits(shape).z_scores(noise_statistics(white(*shape))).spectral_slope)


@pytest.mark.parametrize("shape", [(4, 8, 8), (0, 4, 8, 8), (1, 4, 8, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        noise_statistics(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        gaussian_limits(shape)
