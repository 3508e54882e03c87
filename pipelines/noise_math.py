"""Priors on the initial noise: penalties that keep it looking like a Gaussian sample."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class ChiPrior:
    """Negative log-density of the norm of a d-dimensional standard Gaussian, up to a constant.

    ReNO, https://arxiv.org/abs/2406.04312, equation 4: `weight · (r²/2 − (d−1)·ln r)` with `r = ‖noise‖₂`. Its minimum
    is at `r = √(d−1)`, where the curvature is `2·weight`. It constrains the norm alone and is blind to the spectrum.

    Args:
        weight: λ_reg, at least 0. The paper uses 0.01.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight >= 0 or math.isinf(self.weight):
            raise ValueError(f"Expected a prior weight of 0 or more, but got {self.weight}.")

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """`noise` (B, ...) to the penalty `(B,)`, each sample by itself; at least float32 whatever the noise is."""
        norm = per_sample_norm(noise)
        return self.weight * (norm.square() / 2 - (noise[0].numel() - 1) * norm.log())


def per_sample_norm(noise: torch.Tensor) -> torch.Tensor:
    """`(B, ...)` to the L2 norms `(B,)`, in float32 or better: in bfloat16 the spacing of numbers near 256 is 2."""
    return noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).norm(dim=1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B,)` values in a shape that broadcasts over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def clip_per_sample(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """`(B, ...)` scaled down where a sample's norm exceeds `max_norm`, as `clip_grad_norm_` does for a whole tensor."""
    factor = (max_norm / (per_sample_norm(gradient) + 1e-6)).clamp(max=1)
    return gradient * per_image(factor, gradient)
