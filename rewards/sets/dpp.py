"""Diversity of a set as the volume spanned by its images."""

import math

import torch
from torch import Tensor

from .cosine_kernel import kernels_of_set
from .set_reward import SetReward, register_set_reward

DPP_JITTER = 1e-6


@register_set_reward("dpp")
class DPP(SetReward):
    """`logdet(I + K + 1e-6 I) / (N ln 2)` of the cosine kernel K of all N images, including references.

    The objective of It's Never Too Late, https://arxiv.org/abs/2601.00090, on the class token of DINOv2, based on
    determinantal point processes, https://arxiv.org/abs/1207.6083. The value is 1 (up to 1e-6) for orthogonal features
    and `ln(1 + N) / (N ln 2)` for identical ones: .792 for N = 2, .580 for 4, .396 for 8. So a target relative to the
    initial value is of little use: for N = 4 the value can grow by a factor of at most 1.72. The released code logs
    the value times N ln 2.

    For features (N, P, D) at P positions, the value is the mean over positions.

    On a scale from 0 for 4 identical images to 1 for 4 orthogonal ones, the step from all identical to one outlier is
    worth .40 (.50 with `PairwiseDiversity`), and the last step, from two identical images to none, .25 (.17). Exact
    copies have no gradient, as for any function of cosines.
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
    """`DPP` averaged over patches: images have to differ everywhere, not just on average."""

    name = "dpp_patch"
    default_features = "dinov2_patch"
