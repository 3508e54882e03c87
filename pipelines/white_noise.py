"""White noise as a set in the Fourier domain, the nearest point of it, and steps from one point to the next."""

import functools
import math
from typing import NamedTuple

import torch

from .noise_math import per_image, per_sample_norm
from .problem import NoiseProblem

BLOCK = 16
MEAN_SIZE = math.sqrt(math.pi) / 2  # of a complex Gaussian with mean square 1
TOLERANCE = 1e-3  # of the norms of a block
WHITE_RATE = 0.1  # of steps on white noise, in standard deviations
MOST_ERRORS = 3.0  # of the moments of noise, in standard errors


class WhiteNoiseProjection:
    """Projection on the tensors whose Fourier coefficients are as large as those of white Gaussian noise.

    "Gradient Preconditioning for Efficient and Reliable Reward-Guided Generation", Hwang and Sung, ICML 2026,
    https://arxiv.org/abs/2602.08646. The spectrum of a sample of N numbers is N/2 complex coefficients y, independent
    Gaussians if the sample is white noise. Each block of B = 16 neighbors in frequency is held to the two norms
    expected of it, `‖y‖₁ = B·√π/2` and `‖y‖₂² = B`. So the sample has the norm √N, its spectrum is flat, and no
    frequency stands out. The nearest such block has the same phases and the sizes `c·max(|y| − λ, 0)`.

    The paper takes the spectrum of the flattened sample. Here it is that of each channel in two dimensions, and the
    coefficients of all channels are sorted by their distance from the frequency zero before they are divided into
    blocks: then a block is a ring, and the radial spectrum is flat whatever the sample was.

    The coefficients that do not fill a block join the last one. Where the number of real coefficients is odd, the last
    one has no partner, and gets size 1.
    """

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the projection of `(B, ..., H, W)`, in float32 or better.

        Each sample is projected by itself. A sample of zeros stays zero.

        Raises:
            ValueError: For samples of fewer than two dimensions each.
        """
        if samples.ndim < 3:
            raise ValueError(
                f"Expected samples of shape (B, ..., H, W), but got {tuple(samples.shape)}. Flat ones of N numbers are "
                "projected as (B, 1, N)."
            )
        flat = samples.flatten(1).to(torch.promote_types(samples.dtype, torch.float32))
        largest = flat.abs().amax(1, keepdim=True)
        scaled = flat / largest.clamp_min(torch.finfo(flat.dtype).tiny)  # the squares of a small gradient vanish
        channels = scaled.view(len(samples), -1, *samples.shape[-2:])
        rings = rings_of(tuple(channels.shape[1:]), samples.device)
        spectrum = torch.fft.fft2(channels, norm="ortho").flatten(1)
        values = coefficients(spectrum, rings)
        sizes = values.abs()
        phases = torch.where(sizes > 0, values / sizes.clamp_min(torch.finfo(flat.dtype).tiny), 1)
        projected = spectrum_of(phases * sizes_of_white_noise(sizes), spectrum, rings).view(channels.shape)
        noise = torch.fft.ifft2(projected, norm="ortho").real
        return torch.where(per_image(largest > 0, noise), noise, 0).view(samples.shape)


class Rings(NamedTuple):
    """Indices of Fourier coefficients of real samples `(C, H, W)`, flattened.

    Attributes:
        first, second: Real coefficients, in pairs: the parts of one complex number each.
        lone: The real coefficient without a partner, or none.
        half, mirror: Complex coefficients, one of each conjugate pair, and the other.
        order: The position by frequency of each complex number: the pairs, then `half`.
    """

    first: torch.Tensor
    second: torch.Tensor
    lone: torch.Tensor
    half: torch.Tensor
    mirror: torch.Tensor
    order: torch.Tensor


@functools.lru_cache(maxsize=8)
def rings_of(shape: tuple[int, int, int], device: torch.device) -> Rings:
    """Return the indices of the coefficients of samples `(C, H, W)`, sorted by frequency."""
    index = torch.arange(math.prod(shape)).view(shape)
    mirror = index.flip(1, 2).roll((1, 1), (1, 2)).flatten()
    vertical, horizontal = (torch.fft.fftfreq(size, dtype=torch.float32).square() for size in shape[1:])
    distance = (vertical[:, None] + horizontal).expand(shape).flatten()
    index = index.flatten()
    real, half = index[index == mirror], index[index < mirror]
    real = real[distance[real].argsort(stable=True)]
    pairs = len(real) // 2
    first, second, lone = real[: 2 * pairs : 2], real[1 : 2 * pairs : 2], real[2 * pairs :]
    order = torch.cat([distance[first], distance[half]]).argsort(stable=True)
    return Rings(*(each.to(device) for each in (first, second, lone, half, mirror[half], order)))


def coefficients(spectrum: torch.Tensor, rings: Rings) -> torch.Tensor:
    """Return complex coefficients `(B, ⌊C·H·W/2⌋)` in order of frequency, of mean square 1 for white noise."""
    pairs = torch.complex(spectrum[:, rings.first].real, spectrum[:, rings.second].real) / math.sqrt(2)
    return torch.cat([pairs, spectrum[:, rings.half]], 1)[:, rings.order]


def spectrum_of(values: torch.Tensor, spectrum: torch.Tensor, rings: Rings) -> torch.Tensor:
    """Return the spectrum `(B, C·H·W)` of `coefficients`; the signs of the lone one are those of `spectrum`."""
    unsorted = torch.empty_like(values)
    unsorted[:, rings.order] = values
    pairs, half = unsorted.split([len(rings.first), len(rings.half)], 1)
    lone = spectrum[:, rings.lone].real
    changed = torch.empty_like(spectrum)
    changed[:, rings.first] = (math.sqrt(2) * pairs.real).to(values.dtype)
    changed[:, rings.second] = (math.sqrt(2) * pairs.imag).to(values.dtype)
    changed[:, rings.lone] = torch.where(lone < 0, -1, 1).to(values.dtype)
    changed[:, rings.half], changed[:, rings.mirror] = half, half.conj()
    return changed


def sizes_of_white_noise(sizes: torch.Tensor) -> torch.Tensor:
    """Return sizes of coefficients `(B, n)`, projected block by block."""
    count = sizes.shape[1]
    full = count if count % BLOCK == 0 else max(count // BLOCK - 1, 0) * BLOCK
    blocks = nearest_block(sizes[:, :full].unflatten(1, (full // BLOCK, BLOCK))).flatten(1)
    return torch.cat([blocks, nearest_block(sizes[:, full:])], 1) if full < count else blocks


def nearest_block(sizes: torch.Tensor) -> torch.Tensor:
    """Return the sizes nearest to `(..., B)`, at least 0, whose sum is B·√π/2 and whose sum of squares is B.

    Where equal sizes leave no single nearest block, it is the block expected of white noise, in the order of the sizes.
    """
    block = sizes.shape[-1]
    if block == 1:
        return torch.ones_like(sizes)
    ranked, order = sizes.sort(dim=-1, descending=True, stable=True)
    nearest = nearest_ranked(ranked)
    quantiles = (torch.arange(block, dtype=sizes.dtype, device=sizes.device) + 0.5) / block
    expected = nearest_ranked((-quantiles.log()).sqrt())  # of the Rayleigh distribution
    found = (nearest.square().sum(-1, keepdim=True) / block - 1).abs() < TOLERANCE  # false for NaN
    return torch.empty_like(sizes).scatter(-1, order, torch.where(found, nearest, expected))


def nearest_ranked(ranked: torch.Tensor) -> torch.Tensor:
    """Return `nearest_block` of sizes in descending order: `c·max(ranked − λ, 0)`.

    With the m largest above λ, the two conditions are a quadratic equation, solved by `λ = mean − √(P·variance/(m−P))`
    with the mean and variance of those m, and P = B·π/4. The right m has λ between the m-th size and the next.
    """
    block = ranked.shape[-1]
    least, shift = MEAN_SIZE**2 * block, ranked.mean(-1, keepdim=True)
    count = torch.arange(1, block + 1, dtype=ranked.dtype, device=ranked.device)
    centered = ranked - shift  # or the small variance would be a difference of large sums
    mean = centered.cumsum(-1) / count
    variance = (centered.square().cumsum(-1) / count - mean.square()).clamp_min(0)
    threshold = mean - (least * variance / (count - least).clamp_min(0)).sqrt()
    following = torch.cat([centered[..., 1:], torch.full_like(shift, -math.inf)], -1)
    outside = torch.maximum(following - threshold, threshold - centered).where(count > least, math.inf)
    above = (centered - threshold.gather(-1, outside.argmin(-1, keepdim=True))).relu()
    return above * (MEAN_SIZE * block / above.sum(-1, keepdim=True))


def with_gaussian_moments(noise: torch.Tensor) -> torch.Tensor:
    """Return white noise `(B, C, H, W)`; where its third or fourth moment is not Gaussian, it is made so.

    There the entries become the quantiles of a Gaussian in the same order, and the noise is projected again.
    """
    flat = noise.flatten(1)
    count = flat.shape[1]
    centered = flat - flat.mean(1, keepdim=True)
    unit = centered / centered.square().mean(1, keepdim=True).sqrt()
    skewness = unit.pow(3).mean(1) * math.sqrt(count / 6)
    kurtosis = (unit.pow(4).mean(1) - 3) * math.sqrt(count / 24)
    beyond = torch.maximum(skewness.abs(), kurtosis.abs()) > MOST_ERRORS
    if not beyond.any():
        return noise
    quantiles = (torch.arange(count, device=noise.device, dtype=flat.dtype) + 0.5) / count
    gaussian = torch.empty_like(flat).scatter(1, flat.argsort(1), torch.special.ndtri(quantiles).expand_as(flat))
    return torch.where(per_image(beyond, noise), WhiteNoiseProjection()(gaussian.view(noise.shape)), noise)


class WhiteNoiseSteps:
    """Steps on white noise: the mean of projected gradients moves the noise, which is then projected.

    After Hwang and Sung, see `WhiteNoiseProjection`, with two differences. There are no second moments, as in their
    Adam: a projected gradient has the same size everywhere already, and dividing by second moments drives all entries
    of the noise toward the same size. And since the projection holds norm and spectrum alone, noise whose skewness or
    kurtosis leaves three standard errors of Gaussian noise is made Gaussian again, see `with_gaussian_moments`.

    Noise that a noise sampler draws in another color keeps its norm instead of being projected.

    Args:
        problem: The problem whose noise is moved.
        rate: η, in standard deviations of the noise: the length of a step along gradients that agree.
        momentum: The weight of the gradients before, in [0, 1).
    """

    def __init__(self, problem: NoiseProblem, rate: float, momentum: float) -> None:
        self.rate, self.momentum, self.steps = rate, momentum, 0
        self.mean = torch.zeros_like(problem.noise)
        self.radius = None if problem.is_white else per_sample_norm(problem.noise)

    def moved(self, noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the next noise `(B, C, H, W)`."""
        project = WhiteNoiseProjection()
        self.steps += 1
        self.mean = torch.lerp(project(gradient), self.mean, self.momentum)
        moved = noise - self.rate / (1 - self.momentum**self.steps) * self.mean
        if self.radius is None:
            return with_gaussian_moments(project(moved))
        return moved * per_image(self.radius / per_sample_norm(moved), moved)
