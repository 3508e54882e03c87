"""Distances of all pairs of two sets of images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.features import FeatureMetric, Features


class PairwiseDistance(nn.Module):
    """`distance(images_a, images_b) -> (N, M)`, with a gradient to both, in the metric that the features are made for.

    N images and M others are encoded once each. What is compared often is encoded once for all:

        known = distance.features(references).detach()
        distance.between(distance.features(images), known)

    Args:
        features: what the images are compared by.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images_a: Tensor, images_b: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) and (M, 3, H, W) in [0, 1], by default the same, to (N, M), on the device of the first.

        Raises:
            ValueError: images that do not meet the contract, or whose features do not fit together.
        """
        features_a = self.features(images_a)
        features_b = features_a if images_b is None else self.features(images_b)
        return self.between(features_a, features_b).to(images_a.device)

    def between(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Features (N, ...) and (M, ...) of images, in float32 or more, to (N, M)."""
        if features_a.shape[1:] != features_b.shape[1:]:
            raise ValueError(
                f"Expected features of the same shape for '{self.features.name}', but got {tuple(features_a.shape)} "
                f"and {tuple(features_b.shape)}. Resize the images to one size."
            )
        return DISTANCES[self.features.metric](features_a, features_b)


def cosine_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """1 - cos of (N, D) and (M, D), or of (N, P, D) and (M, P, D) the mean over P, in [0, 2], to (N, M).

    One product of matrices: (N, M, P, D) never exists.
    """
    units_a, units_b = (F.normalize(features, dim=-1).flatten(1) for features in (features_a, features_b))
    positions = units_a.shape[1] // features_a.shape[-1]
    return 1 - units_a @ units_b.mT / positions


def l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """‖a - b‖ over all numbers of an image, (N, M); its gradient is 0 where a = b.

    Not by the product of the two: where they are close, the root makes 1e-3 of its rounding errors.
    """
    return torch.cdist(features_a.flatten(1), features_b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def squared_l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """‖a - b‖² over all numbers of an image, (N, M), as ‖a‖² + ‖b‖² - 2ab: LPIPS has too many for N M differences."""
    vectors_a, vectors_b = features_a.flatten(1), features_b.flatten(1)
    squares = vectors_a.square().sum(1)[:, None] + vectors_b.square().sum(1)
    return (squares - 2 * vectors_a @ vectors_b.mT).clamp_min(0)


DISTANCES: dict[FeatureMetric, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l2": l2_distance,
    "squared_l2": squared_l2_distance,
}
