"""Diversity of a set as the number of images that effectively differ."""

import math

import torch
from torch import Tensor

from ..features.features import Features
from .cosine_kernel import cosine_kernel, kernels_of_set
from .set_reward import SetReward, register_set_reward


@register_set_reward("vendi")
class Vendi(SetReward):
    """The effective number of different images among all N, references included, in [1, N]; see `vendi_score`.

    Of features at several positions (N, P, D) it is the mean over the positions. The gradient vanishes for exact
    copies and for images at right angles to one another.

    Args:
        features: what the images are compared by.
        order: above 0, `math.inf` is one; by default that of the class, 1. Order 2 needs no eigenvalues and is smooth
            everywhere. The reward of another order is named after it: "vendi_0.5".

    Raises:
        ValueError: an order of 0, which has no gradient, or below.
    """

    name = "vendi"
    order: float = 1.0

    def __init__(self, features: Features, order: float | None = None) -> None:
        super().__init__(features)
        self.order = float(self.order if order is None else order)
        if not self.order > 0:
            raise ValueError(
                f"Expected an order above 0 for the Vendi score as a reward, but got {order}. Order 0, the number of "
                "images that are no copies, has no gradient: use `order=0.1`, or `vendi_score` to measure it."
            )
        self.name = "vendi" if self.order == 1 else f"vendi_{self.order:g}"

    def score(self, features: Tensor) -> Tensor:
        return kernel_vendi(kernels_of_set(features), self.order, torch.finfo(features.dtype).eps).mean()

    def bounds(self, count: int) -> tuple[float, float]:
        return 1.0, float(count)


@register_set_reward("vendi_2")
class VendiOrder2(Vendi):
    """`1 / ‖K / N‖²`, the Vendi score of order 2 (RKE, https://arxiv.org/abs/2211.02242): no eigenvalues, smooth."""

    name = "vendi_2"
    order = 2.0


@register_set_reward("vendi_inf")
class VendiOrderInfinity(Vendi):
    """1 / the largest eigenvalue of K / N: only how much all images have in common counts."""

    name = "vendi_inf"
    order = math.inf


def vendi_score(features: Tensor, q: float = 1.0) -> Tensor:
    """The effective number of different images: exp of the Rényi entropy of the eigenvalues λ of the cosine kernel / N.

    Vendi score (q = 1, Shannon): https://arxiv.org/abs/2210.02410. Other orders: https://arxiv.org/abs/2310.12952,
    `(Σ λ^q)^(1 / (1 - q))`; the smaller the order, the more a rare image counts. Order 0 is the number of eigenvalues
    that are not zero, order ∞ is `1 / max λ`, and order 2 is `1 / ‖K / N‖²`, which needs no eigenvalues.

    Below order 1 an eigenvalue made of rounding errors would count, so those below N · ε · max λ, with the ε of the
    features' type, are taken for zero, as in `torch.linalg.matrix_rank`.

    Args:
        features: (..., N, D), sets of at least 1 image.
        q: the order, at least 0; `math.inf` is one.

    Returns:
        (...) in [1, N], float64, with a gradient, which is zero everywhere for order 0.
    """
    if not q >= 0:
        raise ValueError(f"Expected an order of 0 or more for the Vendi score, but got {q}.")
    return kernel_vendi(cosine_kernel(features), q, torch.finfo(features.dtype).eps)


def kernel_vendi(kernel: Tensor, q: float, features_eps: float) -> Tensor:
    """The Vendi score of order q of (..., N, N) kernels of features whose type has that ε; see `vendi_score`."""
    count = kernel.shape[-1]
    kernel = kernel / count
    if q == 2:
        return 1 / kernel.square().sum((-2, -1))
    shares = torch.linalg.eigvalsh(kernel)
    if q == math.inf:
        return 1 / shares[..., -1]
    return hill_number(shares, q, floor=count * (features_eps if q < 1 else torch.finfo(kernel.dtype).eps))


def hill_number(shares: Tensor, q: float, floor: float) -> Tensor:
    """`(Σ λ^q)^(1 / (1 - q))` of (..., N) shares over those above `floor` times the largest, or its limit for q = 1."""
    counted = shares > floor * shares.amax(-1, keepdim=True)
    # Not the zeros themselves: their logarithm would make the gradient of all others NaN.
    shares = shares.where(counted, 1.0)
    if q == 1:
        return (-(shares * shares.log()).sum(-1)).exp()
    return (shares.pow(q) * counted).sum(-1).pow(1 / (1 - q))
