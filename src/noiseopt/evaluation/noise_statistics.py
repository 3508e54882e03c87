"""Norm, moments and radial spectrum of noise, with the values expected of Gaussian noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class NoiseStatistics:
    """Statistics of a batch of noises (B, C, H, W), or a quantity derived from each of them.

    Attributes:
        norm: `‖z‖ / √d` with `d = C·H·W`, averaged over the images.
        mean, variance, skewness, excess_kurtosis: Biased moments (divided by n) of all entries together.
        spectrum: Mean power of the frequencies whose distance from zero rounds to 0, 1, 2, ... index units; 1 for white
            noise of unit variance.
        spectral_slope: Slope of the log spectrum over log(1 + f), without f = 0: 0 for white noise, and -2α for the
            pink noise of https://arxiv.org/abs/2601.00090, whose amplitudes are those of white noise times (1 + f)^-α.
    """

    norm: float
    mean: float
    variance: float
    skewness: float
    excess_kurtosis: float
    spectrum: tuple[float, ...]
    spectral_slope: float

    def combined(self, other: NoiseStatistics, operation: Callable[[float, float], float]) -> NoiseStatistics:
        """Apply a binary operation to each pair of numbers."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        pairs = zip(mine.pop("spectrum"), theirs.pop("spectrum"), strict=True)
        spectrum = tuple(operation(*pair) for pair in pairs)
        return NoiseStatistics(spectrum=spectrum, **{name: operation(mine[name], theirs[name]) for name in mine})


@dataclasses.dataclass(frozen=True)
class GaussianLimits:
    """Expected statistics of Gaussian noise of one shape, and their standard errors."""

    expected: NoiseStatistics
    standard_error: NoiseStatistics

    def z_scores(self, statistics: NoiseStatistics) -> NoiseStatistics:
        """Return the deviation of each statistic in standard errors; beyond ±3 is noteworthy."""
        differences = statistics.combined(self.expected, lambda value, expected: value - expected)
        return differences.combined(self.standard_error, lambda difference, error: difference / error)


def noise_statistics(noise: Tensor) -> NoiseStatistics:
    """Measure unit-variance noise, (B, C, H, W) of any dtype and device, in float64."""
    check_shape(tuple(noise.shape))
    noise = noise.detach().double().cpu()
    mean = noise.mean()
    centered = noise - mean
    variance = centered.square().mean()
    spectrum = radial_spectrum(noise)
    return NoiseStatistics(
        norm=float(noise.flatten(1).norm(dim=1).mean() / math.sqrt(noise[0].numel())),
        mean=float(mean),
        variance=float(variance),
        skewness=float(centered.pow(3).mean() / variance.pow(1.5)),
        excess_kurtosis=float(centered.pow(4).mean() / variance.square() - 3),
        spectrum=tuple(spectrum.tolist()),
        spectral_slope=float(log_slope(spectrum, *noise.shape[-2:])),
    )


def check_shape(shape: Sequence[int]) -> None:
    """Raise `ValueError` unless the shape is (B, C, H, W) with H and W of at least 2."""
    if len(shape) != 4 or min(shape) < 1 or min(shape[-2:]) < 2:
        raise ValueError(
            f"Expected noise of shape (B, C, H, W), with H and W of 2 or more, but got {tuple(shape)}. Unpack packed "
            "latents first, and divide latents by the scheduler's `init_noise_sigma`."
        )


def radial_spectrum(noise: Tensor) -> Tensor:
    """Return the mean power of (B, C, H, W) in each ring of frequencies, over images and channels, (R,)."""
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))
    rings, counts = frequency_rings(*noise.shape[-2:])
    return torch.zeros_like(counts).index_add_(0, rings.flatten(), power.flatten()) / counts


def frequency_rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the ring of each frequency, (H, W), and the number of frequencies per ring, (R,), all nonzero."""
    rings = frequencies(height, width).add(0.5).floor().long()
    return rings, torch.bincount(rings.flatten()).double()


def frequencies(height: int, width: int) -> Tensor:
    """Return the distance of each entry of `fft2` from frequency zero in index units, (H, W), as for pink noise."""
    rows, columns = (torch.fft.fftfreq(side, 1 / side, dtype=torch.float64) for side in (height, width))
    return torch.hypot(rows[:, None], columns)


def log_slope(spectrum: Tensor, height: int, width: int) -> Tensor:
    """Return the least squares slope of log power over log(1 + f), weighting each ring by its number of frequencies.

    The logarithm of a mean of M powers has variance 2 / M, so these weights are optimal.
    """
    x, counts = log_positions(height, width)
    x = x - (x * counts).sum() / counts.sum()
    return (counts * x * spectrum[1:].log()).sum() / (counts * x.square()).sum()


def log_positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the mean of log(1 + f) in each ring but the first, and the number of frequencies in it."""
    rings, counts = frequency_rings(height, width)
    logs = frequencies(height, width).log1p()
    sums = torch.zeros_like(counts).index_add_(0, rings.flatten(), logs.flatten())
    return (sums / counts)[1:], counts[1:]


def gaussian_limits(shape: Sequence[int]) -> GaussianLimits:
    """Return the expected `noise_statistics` of standard Gaussian noise of shape (B, C, H, W).

    The norm follows the χ_d distribution (series in 1/d); skewness and kurtosis are Fisher's, see
    https://doi.org/10.1111/1467-9884.00122. The standard error of a ring of M frequencies is `√(2 / (B·C·M))`, because
    powers come in equal pairs or are squares of real Gaussians. That of the slope is to first order in `1 / (B·C·M)`.
    """
    check_shape(shape)
    images, channels, height, width = shape
    d, n = channels * height * width, math.prod(shape)
    counts = frequency_rings(height, width)[1] * images * channels
    expected = NoiseStatistics(
        norm=1 - 1 / (4 * d) + 1 / (32 * d**2) + 5 / (128 * d**3),
        mean=0.0,
        variance=1 - 1 / n,
        skewness=0.0,
        excess_kurtosis=-6 / (n + 1),
        spectrum=(1.0,) * len(counts),
        spectral_slope=0.0,
    )
    standard_error = NoiseStatistics(
        norm=math.sqrt((1 / (2 * d) - 1 / (8 * d**2) - 1 / (16 * d**3)) / images),
        mean=1 / math.sqrt(n),
        variance=math.sqrt(2 * (n - 1)) / n,
        skewness=math.sqrt(6 * (n - 2) / ((n + 1) * (n + 3))),
        excess_kurtosis=math.sqrt(24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))),
        spectrum=tuple((2 / counts).sqrt().tolist()),
        spectral_slope=slope_error(shape),
    )
    return GaussianLimits(expected, standard_error)


def slope_error(shape: Sequence[int]) -> float:
    """Return the standard error of `log_slope` for white noise; infinite for a single ring."""
    images, channels, height, width = shape
    x, counts = log_positions(height, width)
    spread = (counts * (x - (x * counts).sum() / counts.sum()).square()).sum()
    return float((2 / (images * channels * spread)).sqrt())
