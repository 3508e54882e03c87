"""Choice of the Gaussian noise to mix in: the candidate with the largest predicted rise of the score."""

import torch

from ..noise_math import displacement, per_image, unit
from ..problem import CandidateNoise


def best_of_pool(
    noise: torch.Tensor, ascent: torch.Tensor, gamma: torch.Tensor, fresh: CandidateNoise, count: int
) -> torch.Tensor:
    """Return for each image the candidate with the largest ⟨∇s, v⟩ / ‖v‖².

    Noise Diffusion, https://arxiv.org/abs/2411.16503, divides by the squared norm: this is not a cosine. Candidates are
    drawn one at a time, so memory does not grow with `count`.

    Args:
        noise: z, `(B, ...)`.
        ascent: ∇s, `(B, ...)`; its scale does not matter.
        gamma: γ, `(B,)` in [0, 1].
        fresh: The source of candidates.
        count: N, the number of candidates, at least 1.
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
    """Return ⟨∇s, v⟩ / ‖v‖², `(B,)`, with ∇s scaled to length 1: gradients of tiny scores underflow in float32."""
    v = displacement(noise, sigma, gamma)
    return (unit(ascent) * v).flatten(1).sum(1) / v.square().flatten(1).sum(1)


def guided_gaussian(ascent: torch.Tensor, fresh: CandidateNoise, count: float) -> torch.Tensor:
    """Draw from the distribution of the one of `count` Gaussian noises that has the largest projection on `ascent`.

    The maximum of N standard normals is Φ⁻¹(U^(1/N)) for a uniform U, and the component orthogonal to `ascent` is
    Gaussian whichever candidate wins. So one draw replaces a pool of any size, even 10¹². Unlike `best_of_pool` it
    ranks by ⟨∇s, σ⟩ alone; both choose the same candidate in nine of ten draws. The distribution is exact for white
    noise; noise with another spectrum keeps it only orthogonal to `ascent`.

    Args:
        ascent: ∇s, `(B, ...)`; where it is zero the draw is plain Gaussian noise.
        fresh: The source of noise.
        count: N, any number of at least 1; 1 is plain Gaussian noise.
    """
    sigma, direction = fresh.draw(), unit(ascent)
    tail = -torch.expm1(fresh.uniform().clamp_min(1e-300).log() / count)  # 1 − U^(1/N), exact also where it is tiny
    projection = -torch.special.ndtri(tail).to(sigma.dtype)
    shift = projection - (sigma * direction).flatten(1).sum(1)
    return sigma + per_image(shift, sigma) * direction
