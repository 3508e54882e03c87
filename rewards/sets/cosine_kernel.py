"""Cosine kernel of a set of images, precise enough for determinants and eigenvalues."""

import torch.nn.functional as F
from torch import Tensor


def cosine_kernel(features: Tensor) -> Tensor:
    """Return the (..., N, N) cosines of (..., N, D) features, in float64 and differentiable.

    In float32, rounding errors would add eigenvalues for nearly equal images. `torch.autocast` does not affect float64.
    On devices without float64 (MPS), the kernel is on the CPU.

    Raises:
        ValueError: For features without an image dimension, or with no images.
    """
    if features.ndim < 2 or features.shape[-2] < 1:
        raise ValueError(f"Expected features of shape (..., N, D), but got {tuple(features.shape)}.")
    device = "cpu" if features.device.type == "mps" else features.device
    directions = F.normalize(features.to(device).double(), dim=-1)
    return directions @ directions.mT


def kernels_of_set(features: Tensor) -> Tensor:
    """Return the kernel (N, N) of (N, D) features, or the kernels (P, N, N) of all positions of (N, P, D) features."""
    return cosine_kernel(features.transpose(0, 1) if features.ndim == 3 else features)
