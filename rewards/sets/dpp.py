"""Diversity of a set as the volume that its images span."""

import math

import torch
from torch import Tensor

from .cosine_kernel import kernels_of_set
from .set_reward import SetReward, register_set_reward

DPP_JITTER = 1e-6


@register_set_reward("dpp")
class DPP(SetReward):
    """`logdet(I + K + 1e-6 I) / (N ln 2)` of the cosine kernel K of all N images, references included.

    The objective of It's Never Too Late, https://arxiv.org/abs/2601.00090, on the class token of DINOv2, after the
    determinantal point processes of https://arxiv.org/abs/1207.6083. It is 1 (to 1e-6) for images at right angles and
    `ln(1 + N) / (N ln 2)` for copies of one: .792 of 2, .580 of 4, .396 of 8. So a stop at a multiple of the first
    value is no use: of 4 images that can at most grow by 1.72. What the released code logs is this times N ln 2.

    Of features at several positions (N, P, D) it is the mean over the positions.

    One outlier is worth less than in the mean of pairs, and the last copy that changes more: of 4 images at right
    angles, .40 (there .50) and .25 (there .17) of the way from all alike to all different. Exact copies have no
    gradient, as in everything that is made of cosines.
    """

    name = "dpp"
    range = (0.0, 1.0)

    def score(self, features: Tensor) -> Tensor:
        count, kernels = len(features), kernels_of_set(features)
        identity = torch.eye(count, dtype=kernels.dtype, device=kernels.device)
        volumes = torch.linalg.slogdet(kernels + (1 + DPP_JITTER) * identity).logabsdet
        return volumes.mean() / (count * math.log(2))

    def bounds(self, count: int) -> tuple[float, float]:
        return math.log(1 + count) / (count * math.log(2)), 1.0


@register_set_reward("dpp_patch")
class DPPPatch(DPP):
    """`DPP` patch by patch: images must differ everywhere, or at least where others of the set agree."""

    name = "dpp_patch"
    default_features = "dinov2_patch"
