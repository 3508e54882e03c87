"""The arithmetic of initial noise that methods share: per-sample norms, the χ prior, mixing, and groups of samples."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class ChiPrior:
    """Negative log-density of the norm of a d-dimensional standard Gaussian, up to a constant.

    ReNO, https://arxiv.org/abs/2406.04312, equation 4: `weight · (r²/2 − (d−1)·ln r)` with `r = ‖noise‖₂`. The minimum
    is at `r = √(d−1)`, where the curvature is `2·weight`. The prior constrains the norm only, not the spectrum.

    Args:
        weight: λ_reg, at least 0. The paper uses 0.01.

    Raises:
        ValueError: For a negative or infinite weight.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight >= 0 or math.isinf(self.weight):
            raise ValueError(f"Expected a prior weight of 0 or more, but got {self.weight}.")

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the penalty `(B,)` of noise `(B, ...)`, in float32 or better."""
        norm = per_sample_norm(noise)
        return self.weight * (norm.square() / 2 - (noise[0].numel() - 1) * norm.log())


def per_sample_norm(noise: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms `(B,)` of `(B, ...)`, in float32 or better: bfloat16 numbers near 256 are 2 apart."""
    return noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).norm(dim=1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape `(B,)` values so that they broadcast over `like` `(B, ...)`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def clip_per_sample(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Clip each sample of `(B, ...)` to an L2 norm, with the formula of `torch.nn.utils.clip_grad_norm_`."""
    factor = (max_norm / (per_sample_norm(gradient) + 1e-6)).clamp(max=1)
    return gradient * per_image(factor, gradient)


def unit(direction: torch.Tensor) -> torch.Tensor:
    """Scale each sample of `(B, ...)` to length 1; a zero sample stays zero. Safe for very small gradients."""
    largest = direction.flatten(1).abs().amax(1)
    scaled = direction / per_image(largest.clamp_min(torch.finfo(direction.dtype).tiny), direction)
    return scaled / per_image(per_sample_norm(scaled).clamp_min(1), scaled)


def rate_unit(noise: torch.Tensor) -> float:
    """Return the unit of learning rates for noise `(B, C, H, W)`: √(H·W) / 64.

    ReNO's and Never Too Late's rates were chosen at 512 px, where the noise is 64 × 64, with 4 channels (SD and SDXL)
    and with 16 (FLUX) alike; at 1024 px ReNO's is twice as large. So the channels do not count.
    """
    height, width = noise.shape[-2:]
    return math.sqrt(height * width) / 64


def displacement(noise: torch.Tensor, sigma: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return `v = (√(1−γ) − 1)·z + √γ·σ`, the change of `noise` z when `sigma` is mixed into it.

    Mixing two independent Gaussian noises this way gives Gaussian noise of the same variance.

    Args:
        noise: z, `(B, ...)`.
        sigma: σ, `(B, ...)`.
        gamma: γ, `(B,)` in [0, 1].
    """
    gamma = per_image(gamma, noise)
    return ((1 - gamma).sqrt() - 1) * noise + gamma.sqrt() * sigma


def sets(groups: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the rows of each group of samples, one index tensor per group, in the order of the group numbers."""
    labels = torch.tensor(groups)
    for group in sorted(set(groups)):
        yield (labels == group).nonzero().flatten()
