"""Distances of all pairs between two sets of images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..features.features import FeatureMetric, Features
from .cosine_kernel import unit_vectors


class PairwiseDistance(nn.Module):
    """`distance(images_a, images_b) -> (N, M)`, differentiable with respect to both, in the metric of the features.

    Each image is encoded once. To compare with the same references repeatedly, encode them in advance:

        known = distance.features(references).detach()
        distance.between(distance.features(images), known)

    Args:
        features: The features by which images are compared.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images_a: Tensor, images_b: Tensor | None = None) -> Tensor:
        """Return the distances (N, M), on the device of the first images.

        Args:
            images_a: (N, 3, H, W) in [0, 1].
            images_b: (M, 3, H, W) in [0, 1]; by default `images_a`.

        Raises:
            ValueError: For invalid images, or features of different shapes.
        """
        features_a = self.features(images_a)
        features_b = features_a if images_b is None else self.features(images_b)
        return self.between(features_a, features_b).to(images_a.device)

    def between(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Return the distances (N, M) of features (N, ...) and (M, ...) in float32 or more."""
        if features_a.shape[1:] != features_b.shape[1:]:
            raise ValueError(
                f"Expected features of the same shape for '{self.features.name}', but got {tuple(features_a.shape)} "
                f"and {tuple(features_b.shape)}. Resize the images to one size."
            )
        return DISTANCES[self.features.metric](features_a, features_b)


def cosine_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Return 1 - cos, (N, M) in [0, 2], of (N, D) and (M, D), or the mean over P of (N, P, D) and (M, P, D).

    A single matrix product, without an intermediate of size (N, M, P, D). For features of zero length see
    `unit_vectors`.
    """
    units_a, units_b = unit_vectors(features_a), unit_vectors(features_b)
    return 1 - units_a.flatten(1) @ units_b.flatten(1).mT / units_a.shape[1:-1].numel()


def l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Return ‖a - b‖, (N, M), over all features of an image; its gradient is 0 where a = b.

    Computed without a matrix product, whose rounding errors the root would amplify to 1e-3 for nearly equal images.
    """
    return torch.cdist(features_a.flatten(1), features_b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def squared_l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Return ‖a - b‖², (N, M), over all features of an image.

    Computed as ‖a‖² + ‖b‖² - 2ab, because N·M differences of LPIPS features would not fit into memory.
    """
    vectors_a, vectors_b = features_a.flatten(1), features_b.flatten(1)
    squares = vectors_a.square().sum(1)[:, None] + vectors_b.square().sum(1)
    return (squares - 2 * vectors_a @ vectors_b.mT).clamp_min(0)


DISTANCES: dict[FeatureMetric, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l2": l2_distance,
    "squared_l2": squared_l2_distance,
}
