"""The base class of set rewards, their registry, and the mean pairwise distance."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...registry import Registry
from ..contract.reward import NonFiniteReward
from ..contract.transforms import at_least_float32
from ..features.auto_features import AutoFeatures
from ..features.features import Features
from .pairwise_distance import PairwiseDistance

SetRewardT = TypeVar("SetRewardT", bound="SetReward")


class SetReward(nn.Module):
    """Base class of set rewards: `set_reward(images) -> scalar`, float32, higher is better.

    A subclass implements `score` and is constructed from its features: `SetRewardClass(features)`. The value does not
    depend on the order of the images.

    To optimize a large set with the memory of one image, compute all features without a graph, then the gradient of
    `of_features` with respect to them, then backpropagate it through one image at a time.

    Args:
        features: The features by which images are compared; frozen.

    Attributes:
        name: The name under which values are reported.
        range: The lowest and highest possible value of any set, if the formula is bounded.
        default_features: The features that `from_pretrained()` loads by default.
    """

    name: str = "set_reward"
    range: tuple[float, float] | None = None
    default_features: str = "dinov2"

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.features!r})"

    def forward(self, images: Tensor, references: Tensor | None = None) -> Tensor:
        """Score the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W) fixed images of the set, which get no gradient.

        Returns:
            A scalar on the device of `images`.

        Raises:
            ValueError: For fewer than two images in total, or invalid images.
            NonFiniteReward: For a value that is NaN or infinite.
        """
        known = None
        if references is not None:
            with torch.no_grad():
                known = self.features(references)
        return self.of_features(self.features(images), known).to(images.device)

    def of_features(self, features: Tensor, references: Tensor | None = None) -> Tensor:
        """Score a set by its features (B, ...) and those of its references (M, ...), which may be cached.

        The value is that of the union, to which pairs of references contribute a constant; for a growing set this is
        the published objective. Half precision is cast to float32, references to the device and dtype of `features`.

        Raises:
            ValueError: For fewer than two images in total, or references of another shape.
            NonFiniteReward: For features or a value that are NaN or infinite.
        """
        features = self.union(at_least_float32(features), references)
        if not features.isfinite().all():
            raise NonFiniteReward(
                f"Expected finite features for the set reward '{self.name}', but some are NaN or infinite. Load "
                f"'{self.features.name}' with `dtype=torch.float32` if they ran in half precision."
            )
        value = self.score(features).to(features)
        if not value.isfinite():
            raise NonFiniteReward(f"Expected a finite value from the set reward '{self.name}', but got {value.item()}.")
        return value

    def union(self, features: Tensor, references: Tensor | None) -> Tensor:
        """Return the features (M + B, ...) of at least two images, with detached references first."""
        if references is not None and references.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"Expected references with features of the shape {tuple(features.shape[1:])} of the images for the set "
                f"reward '{self.name}', but got {tuple(references.shape[1:])}. Compare images of one size by the same "
                "features."
            )
        if references is not None:
            features = torch.cat([references.detach().to(features), features])
        if len(features) < 2:
            raise ValueError(
                f"Expected at least 2 images for the set reward '{self.name}', references included, but got "
                f"{len(features)}. Generate several images of the prompt, or pass `references`."
            )
        return features

    def score(self, features: Tensor) -> Tensor:
        """Map (N, D) or (N, P, D) features of at least two images, in float32 or more, to a scalar."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def bounds(self, count: int) -> tuple[float, float] | None:
        """Return the lowest and highest possible value of a set of `count` images, references included, if bounded."""
        return self.range

    @classmethod
    def from_pretrained(
        cls: type[SetRewardT],
        features: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SetRewardT:
        """Load the features, by default `default_features`, by name, Hub id or folder."""
        return cls(AutoFeatures.from_pretrained(features or cls.default_features, dtype=dtype, device=device))


SET_REWARDS: Registry[type[SetReward]] = Registry("set reward")


def register_set_reward(name: str) -> Callable[[type[SetRewardT]], type[SetRewardT]]:
    """Return a decorator that registers a class of set rewards under a name.

    Raises:
        ValueError: If another class has the name.
    """
    return SET_REWARDS.register(name)  # pyright: ignore[reportReturnType]


def list_set_rewards() -> list[str]:
    """Return the registered names, sorted."""
    return SET_REWARDS.names()


def find_set_reward(name: str) -> type[SetReward]:
    """Return the class of a name. Raises `ValueError` if it is not registered."""
    return SET_REWARDS.find(name)


@register_set_reward("pairwise")
class PairwiseDiversity(SetReward):
    """Mean distance of all pairs of images.

    On the patches of DINOv2 it is an objective of It's Never Too Late, https://arxiv.org/abs/2601.00090; on one vector
    per image it is 1 - MSS; on LPIPS it is the usual measure of diversity. A single outlier raises it. With a cosine
    metric it has no gradient if all images are identical.
    """

    name = "pairwise"
    default_features = "dinov2_patch"

    def __init__(self, features: Features) -> None:
        super().__init__(features)
        self.distance = PairwiseDistance(features)

    def score(self, features: Tensor) -> Tensor:
        first, second = torch.triu_indices(len(features), len(features), offset=1)
        return self.distance.between(features, features)[first, second].mean()
