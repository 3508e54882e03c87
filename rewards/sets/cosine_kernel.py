"""Cosine kernel of a set of images, precise enough for determinants and eigenvalues."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-12  # vectors up to this length have no direction


def cosine_kernel(features: Tensor) -> Tensor:
    """Return the (..., N, N) cosines of (..., N, D) features, in float64 and differentiable.

    In float32, rounding errors would add eigenvalues for nearly equal images. `torch.autocast` does not affect float64.
    On devices without float64 (MPS), the kernel is on the CPU. For features of zero length see `unit_vectors`.

    Raises:
        ValueError: For features without an image dimension, or with no images.
    """
    if features.ndim < 2 or features.shape[-2] < 1:
        raise ValueError(f"Expected features of shape (..., N, D), but got {tuple(features.shape)}.")
    device = "cpu" if features.device.type == "mps" else features.device
    units = unit_vectors(features.to(device).double())
    return units @ units.mT


def unit_vectors(features: Tensor) -> Tensor:
    """Return (..., D + 1) unit vectors in the directions of (..., D) features, with the gradient of these directions.

    The last entry is 0, but for features of zero length, such as those of a black image: they are 1 in this entry
    alone. So they equal one another, differ from all others, and get no gradient.
    """
    zero = torch.linalg.vector_norm(features, dim=-1, keepdim=True) <= SHORTEST
    return torch.cat([F.normalize(features.masked_fill(zero, 0), dim=-1), zero.to(features.dtype)], -1)


def kernels_of_set(features: Tensor) -> Tensor:
    """Return the kernel (N, N) of (N, D) features, or the kernels (P, N, N) of all positions of (N, P, D) features."""
    return cosine_kernel(features.transpose(0, 1) if features.ndim == 3 else features)
