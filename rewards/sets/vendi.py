"""Diversity of a set as the effective number of different images."""

import math

import torch
from torch import Tensor

from ..features.features import Features
from .cosine_kernel import cosine_kernel, kernels_of_set
from .set_reward import SetReward, register_set_reward


@register_set_reward("vendi")
class Vendi(SetReward):
    """Effective number of different images among all N, including references, in [1, N]; see `vendi_score`.

    For features (N, P, D) at P positions, the value is the mean over positions. The gradient vanishes for exact copies
    and for orthogonal features.

    Args:
        features: The features by which images are compared.
        order: The order, above 0 or `math.inf`; by default that of the class, 1. Order 2 needs no eigenvalues and is
            smooth everywhere. Other orders are part of the name: "vendi_0.5".

    Raises:
        ValueError: For an order of 0, which has no gradient, or below.
    """

    name = "vendi"
    order: float = 1.0

    def __init__(self, features: Features, order: float | None = None) -> None:
        super().__init__(features)
        self.order = float(self.order if order is None else order)
        if not self.order > 0:
            raise ValueError(
                f"Expected an order above 0 for the Vendi score as a reward, but got {order}. Order 0, the number of "
                "distinct images, has no gradient: use `order=0.1`, or `vendi_score` to measure it."
            )
        self.name = "vendi" if self.order == 1 else f"vendi_{self.order:g}"

    def score(self, features: Tensor) -> Tensor:
        return kernel_vendi(kernels_of_set(features), self.order, torch.finfo(features.dtype).eps).mean()

    def bounds(self, count: int) -> tuple[float, float]:
        return 1.0, float(count)


@register_set_reward("vendi_2")
class VendiOrder2(Vendi):
    """Vendi score of order 2, `1 / ‖K / N‖²`, smooth and without eigenvalues (RKE, https://arxiv.org/abs/2211.02242)."""

    name = "vendi_2"
    order = 2.0


@register_set_reward("vendi_inf")
class VendiOrderInfinity(Vendi):
    """Vendi score of order ∞, the reciprocal of the largest eigenvalue of K / N: it penalizes only what all share."""

    name = "vendi_inf"
    order = math.inf


def vendi_score(features: Tensor, q: float = 1.0) -> Tensor:
    """Return the exponential of the Rényi entropy of the eigenvalues λ of K / N, K the cosine kernel of N images.

    Vendi score (q = 1, Shannon): https://arxiv.org/abs/2210.02410. Other orders: https://arxiv.org/abs/2310.12952,
    `(Σ λ^q)^(1 / (1 - q))`; the smaller the order, the larger the weight of rare images. Order 0 is the number of
    nonzero eigenvalues, order ∞ is `1 / max λ`, and order 2 is `1 / ‖K / N‖²`, which needs no eigenvalues.

    Below order 1 rounding errors in eigenvalues would count, so eigenvalues below N · ε · max λ, with the ε of the
    features' dtype, are treated as zero, as in `torch.linalg.matrix_rank`.

    Args:
        features: (..., N, D), sets of at least 1 image.
        q: The order, at least 0 or `math.inf`.

    Returns:
        (...) in [1, N], float64 and differentiable, with a gradient of zero for order 0.

    Raises:
        ValueError: For a negative order.
    """
    if not q >= 0:
        raise ValueError(f"Expected an order of 0 or more for the Vendi score, but got {q}.")
    return kernel_vendi(cosine_kernel(features), q, torch.finfo(features.dtype).eps)


def kernel_vendi(kernel: Tensor, q: float, features_eps: float) -> Tensor:
    """Return the Vendi score of order q of (..., N, N) kernels; `features_eps` is the ε of the features' dtype."""
    count = kernel.shape[-1]
    kernel = kernel / count
    if q == 2:
        return 1 / kernel.square().sum((-2, -1))
    shares = torch.linalg.eigvalsh(kernel)
    if q == math.inf:
        return 1 / shares[..., -1]
    return hill_number(shares, q, floor=count * (features_eps if q < 1 else torch.finfo(kernel.dtype).eps))


def hill_number(shares: Tensor, q: float, floor: float) -> Tensor:
    """Return `(Σ λ^q)^(1 / (1 - q))`, or its limit for q = 1, over the (..., N) shares above `floor` · max λ."""
    counted = shares > floor * shares.amax(-1, keepdim=True)
    # Replace zeros, whose logarithm would make the gradient of all shares NaN.
    shares = shares.where(counted, 1.0)
    if q == 1:
        return (-(shares * shares.log()).sum(-1)).exp()
    return (shares.pow(q) * counted).sum(-1).pow(1 / (1 - q))
