"""Cosines of all pairs of images of a set, exact enough for determinants and eigenvalues."""

import torch.nn.functional as F
from torch import Tensor


def cosine_kernel(features: Tensor) -> Tensor:
    """(..., N, N) cosines of (..., N, D) features, float64 and with a gradient, whatever the features are.

    In float32 the rounding errors of nearly equal images would be eigenvalues of their own. Double precision is also
    what `torch.autocast` leaves alone; where a device has none (MPS), the kernel is on the CPU.

    Raises:
        ValueError: features without a dimension of images, or of none.
    """
    if features.ndim < 2 or features.shape[-2] < 1:
        raise ValueError(f"Expected features of shape (..., N, D), but got {tuple(features.shape)}.")
    device = "cpu" if features.device.type == "mps" else features.device
    directions = F.normalize(features.to(device).double(), dim=-1)
    return directions @ directions.mT


def kernels_of_set(features: Tensor) -> Tensor:
    """The kernel (N, N) of (N, D) features, or the kernels (P, N, N) of each position of (N, P, D)."""
    return cosine_kernel(features.transpose(0, 1) if features.ndim == 3 else features)
