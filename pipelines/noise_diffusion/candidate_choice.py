"""Which fresh Gaussian noise to mix in: the candidate that leads up a gradient the most."""

import torch

from ..noise_math import per_image, per_sample_norm
from ..problem import CandidateNoise


def displacement(noise: torch.Tensor, sigma: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """`v = (√(1−γ) − 1)·z + √γ·σ`: where mixing `sigma` into `noise`, both `(B, ...)`, moves it; `gamma` is `(B,)`."""
    gamma = per_image(gamma, noise)
    return ((1 - gamma).sqrt() - 1) * noise + gamma.sqrt() * sigma


def best_of_pool(
    noise: torch.Tensor, ascent: torch.Tensor, gamma: torch.Tensor, fresh: CandidateNoise, count: int
) -> torch.Tensor:
    """The candidate with the largest ⟨∇s, v⟩ / ‖v‖² of `count`, for each image by itself.

    Noise Diffusion, https://arxiv.org/abs/2411.16503: the squared norm, not a cosine. Candidates are drawn one after
    the other, so memory does not grow with `count`.

    Args:
        noise: z, `(B, ...)`.
        ascent: ∇s, `(B, ...)`; its scale does not matter.
        gamma: γ, `(B,)` in [0, 1].
        fresh: Where candidates come from.
        count: N, at least 1.
    """
    best = fresh.draw()
    highest = ascent_rate(noise, ascent, gamma, best)
    for _ in range(count - 1):
        sigma = fresh.draw()
        rate = ascent_rate(noise, ascent, gamma, sigma)
        better = rate > highest
        best, highest = torch.where(per_image(better, best), sigma, best), torch.where(better, rate, highest)
    return best


def ascent_rate(noise: torch.Tensor, ascent: torch.Tensor, gamma: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """⟨∇s, v⟩ / ‖v‖², `(B,)`, with ∇s scaled to length 1: a score near 0 has gradients near the end of float32."""
    v = displacement(noise, sigma, gamma)
    return (unit(ascent) * v).flatten(1).sum(1) / v.square().flatten(1).sum(1)


def guided_gaussian(ascent: torch.Tensor, fresh: CandidateNoise, count: float) -> torch.Tensor:
    """A draw from the law of the one of `count` Gaussian noises that has the largest projection on `ascent`.

    Its law is exact for white noise. Of noise with another spectrum only what is orthogonal to `ascent` keeps it.

    The maximum of N standard normals is Φ⁻¹(U^(1/N)) for a uniform U, and what is orthogonal to `ascent` is Gaussian
    whichever wins: so one draw does for a pool of any size, also 10¹². It differs from `best_of_pool` in that the pool
    is ranked by ⟨∇s, σ⟩ alone; both choose the same candidate in nine of ten draws.

    Args:
        ascent: ∇s, `(B, ...)`; where it is zero the draw is a plain Gaussian.
        fresh: Where noise comes from.
        count: N, any number of at least 1; 1 is plain Gaussian noise.
    """
    sigma, direction = fresh.draw(), unit(ascent)
    tail = -torch.expm1(fresh.uniform().clamp_min(1e-300).log() / count)  # 1 − U^(1/N), exact also where it is tiny
    projection = -torch.special.ndtri(tail).to(sigma.dtype)
    shift = projection - (sigma * direction).flatten(1).sum(1)
    return sigma + per_image(shift, sigma) * direction


def unit(direction: torch.Tensor) -> torch.Tensor:
    """`(B, ...)` at length 1 each; zero stays zero."""
    largest = direction.flatten(1).abs().amax(1)
    scaled = direction / per_image(largest.clamp_min(torch.finfo(direction.dtype).tiny), direction)
    return scaled / per_image(per_sample_norm(scaled).clamp_min(1), scaled)
