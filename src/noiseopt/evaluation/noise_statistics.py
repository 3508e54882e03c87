"""Whether initial noise still looks like a Gaussian sample: norm, moments and radial spectrum, with their limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class NoiseStatistics:
    """What is left of a batch of noises (B, C, H, W); or, of each of these numbers, something else.

    Attributes:
        norm: `‖z‖ / √d` with `d = C·H·W`, averaged over the images.
        mean, variance, skewness, excess_kurtosis: of all entries together, with the plain moments (divided by n).
        spectrum: the mean power of the frequencies whose distance from zero rounds to 0, 1, 2, ... index units; that of
            white noise of unit variance is 1.
        spectral_slope: of the logarithm of the spectrum over log(1 + f), without f = 0: 0 for white noise, and -2α for
            the pink noise of https://arxiv.org/abs/2601.00090, whose amplitudes are those of white noise · (1 + f)^-α.
    """

    norm: float
    mean: float
    variance: float
    skewness: float
    excess_kurtosis: float
    spectrum: tuple[float, ...]
    spectral_slope: float

    def combined(self, other: NoiseStatistics, operation: Callable[[float, float], float]) -> NoiseStatistics:
        """An operation on each number of the two."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        pairs = zip(mine.pop("spectrum"), theirs.pop("spectrum"), strict=True)
        spectrum = tuple(operation(*pair) for pair in pairs)
        return NoiseStatistics(spectrum=spectrum, **{name: operation(mine[name], theirs[name]) for name in mine})


@dataclasses.dataclass(frozen=True)
class GaussianLimits:
    """What the statistics of Gaussian noise are, for one shape: the expected numbers and their standard errors."""

    expected: NoiseStatistics
    standard_error: NoiseStatistics

    def z_scores(self, statistics: NoiseStatistics) -> NoiseStatistics:
        """By how many standard errors each number differs from that of Gaussian noise; beyond ±3 it is worth a look."""
        differences = statistics.combined(self.expected, lambda value, expected: value - expected)
        return differences.combined(self.standard_error, lambda difference, error: difference / error)


def noise_statistics(noise: Tensor) -> NoiseStatistics:
    """Measures unit-variance noise, (B, C, H, W) of any type and device, in float64."""
    check_shape(tuple(noise.shape))
    noise = noise.detach().double().cpu()
    mean = noise.mean()
    centred = noise - mean
    variance = centred.square().mean()
    spectrum = radial_spectrum(noise)
    return NoiseStatistics(
        norm=float(noise.flatten(1).norm(dim=1).mean() / math.sqrt(noise[0].numel())),
        mean=float(mean),
        variance=float(variance),
        skewness=float(centred.pow(3).mean() / variance.pow(1.5)),
        excess_kurtosis=float(centred.pow(4).mean() / variance.square() - 3),
        spectrum=tuple(spectrum.tolist()),
        spectral_slope=float(log_slope(spectrum, *noise.shape[-2:])),
    )


def check_shape(shape: Sequence[int]) -> None:
    """Raise unless this is the shape (B, C, H, W) of at least one noise of at least two entries a side."""
    if len(shape) != 4 or min(shape) < 1 or min(shape[-2:]) < 2:
        raise ValueError(
            f"Expected noise of shape (B, C, H, W), with H and W of 2 or more, but got {tuple(shape)}. Unpack packed "
            "latents first, and divide latents by the scheduler's `init_noise_sigma`."
        )


def radial_spectrum(noise: Tensor) -> Tensor:
    """(B, C, H, W) to the mean power in each ring of frequencies, over images and channels, (R,)."""
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))
    rings, counts = frequency_rings(*noise.shape[-2:])
    return torch.zeros_like(counts).index_add_(0, rings.flatten(), power.flatten()) / counts


def frequency_rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The ring of each frequency, (H, W), and how many frequencies each ring has, (R,). Every ring has some."""
    rings = frequencies(height, width).add(0.5).floor().long()
    return rings, torch.bincount(rings.flatten()).double()


def frequencies(height: int, width: int) -> Tensor:
    """The distance of each entry of `fft2` from frequency zero in index units, (H, W), as in the definition of pink
    noise."""
    rows, columns = (torch.fft.fftfreq(side, 1 / side, dtype=torch.float64) for side in (height, width))
    return torch.hypot(rows[:, None], columns)


def log_slope(spectrum: Tensor, height: int, width: int) -> Tensor:
    """Least squares slope of log power over log(1 + f); a ring weighs as much as it has frequencies.

    The logarithm of a mean of M powers has the variance 2 / M, so these are the best weights.
    """
    x, counts = log_positions(height, width)
    x = x - (x * counts).sum() / counts.sum()
    return (counts * x * spectrum[1:].log()).sum() / (counts * x.square()).sum()


def log_positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The mean of log(1 + f) in each ring but the first, and how many frequencies are in it."""
    rings, counts = frequency_rings(height, width)
    logs = frequencies(height, width).log1p()
    sums = torch.zeros_like(counts).index_add_(0, rings.flatten(), logs.flatten())
    return (sums / counts)[1:], counts[1:]


def gaussian_limits(shape: Sequence[int]) -> GaussianLimits:
    """What `noise_statistics` are for standard Gaussian noise of shape (B, C, H, W).

    Those of the norm are from the χ_d distribution (series in 1/d), those of skewness and kurtosis are Fisher's, see
    https://doi.org/10.1111/1467-9884.00122. For a ring of M frequencies the standard error is `√(2 / (B·C·M))`: powers
    come twice or are squares of real Gaussians. That of the slope follows to first order in `1 / (B·C·M)`.
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
    """The standard error of `log_slope` for white noise; infinite where there is only one ring."""
    images, channels, height, width = shape
    x, counts = log_positions(height, width)
    spread = (counts * (x - (x * counts).sum() / counts.sum()).square()).sum()
    return float((2 / (images * channels * spread)).sqrt())
