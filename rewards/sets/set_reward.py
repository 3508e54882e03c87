"""Rewards of sets of images: how much they differ."""

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
    """Scores a set of images by its features: `set_reward(images) -> scalar`, float32, higher is better.

    A subclass implements `score`, and is built from its features alone: `SetRewardClass(features)`. The value does not
    depend on the order of the images.

    To optimise a large set in the memory of one image, compute all features without a gradient, then the gradient of
    `of_features` with respect to them, then one image at a time: each image depends on the others through them alone.

    Args:
        features: what the images are compared by; frozen.

    Attributes:
        name: the name under which values are reported.
        range: the lowest and highest possible value of any set, where there is one.
        default_features: what `from_pretrained()` takes.
    """

    name: str = "set_reward"
    range: tuple[float, float] | None = None
    default_features: str = "dinov2"

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, references: Tensor | None = None) -> Tensor:
        """The value of the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W), images that are given: they count and get no gradient.

        Returns:
            a scalar, on the device of `images`.

        Raises:
            ValueError: fewer than two images in all, or images that do not meet the contract.
            NonFiniteReward: a value that is NaN or infinite.
        """
        known = None
        if references is not None:
            with torch.no_grad():
                known = self.features(references)
        return self.of_features(self.features(images), known).to(images.device)

    def of_features(self, features: Tensor, references: Tensor | None = None) -> Tensor:
        """The same of features (B, ...) and (M, ...), which `self.features` gave. Those of references may be kept.

        In a sequence, where one image is optimised against all before it, this is the published objective: the value of
        the union, in which the pairs of references are a constant. Features in half precision become float32;
        references go to the device and the type of the others.

        Raises:
            ValueError: fewer than two images in all, or references of another shape.
            NonFiniteReward: features or a value that are NaN or infinite.
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
        """Features (M + B, ...) of at least two images, those of references first and detached."""
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
                f"{len(features)}. Draw several images of the prompt, or pass `references`."
            )
        return features

    def score(self, features: Tensor) -> Tensor:
        """(N, D) or (N, P, D) features of at least two images, in float32 or more -> scalar."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def bounds(self, count: int) -> tuple[float, float] | None:
        """The lowest and highest possible value of a set of `count` images, references included, where there is one."""
        return self.range

    @classmethod
    def from_pretrained(
        cls: type[SetRewardT],
        features: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SetRewardT:
        """On the features of a name, a Hub id or a folder, by default `default_features`."""
        return cls(AutoFeatures.from_pretrained(features or cls.default_features, dtype=dtype, device=device))


SET_REWARDS: Registry[type[SetReward]] = Registry("set reward")


def register_set_reward(name: str) -> Callable[[type[SetRewardT]], type[SetRewardT]]:
    """Register a class of set rewards under a name.

    Raises:
        ValueError: a name that another class has.
    """
    return SET_REWARDS.register(name)  # pyright: ignore[reportReturnType]


def list_set_rewards() -> list[str]:
    """The registered names, sorted."""
    return SET_REWARDS.names()


def find_set_reward(name: str) -> type[SetReward]:
    """The class of a name. Raises `ValueError` for one that is not registered."""
    return SET_REWARDS.find(name)


@register_set_reward("pairwise")
class PairwiseDiversity(SetReward):
    """The mean distance of all pairs of images.

    On the patches of DINOv2 the objective of It's Never Too Late, https://arxiv.org/abs/2601.00090; on one vector an
    image 1 - MSS; on LPIPS the usual measure of diversity. One image far from the others is enough to raise it. In a
    cosine it has no gradient at images that are all the same.
    """

    name = "pairwise"
    default_features = "dinov2_patch"

    def __init__(self, features: Features) -> None:
        super().__init__(features)
        self.distance = PairwiseDistance(features)

    def score(self, features: Tensor) -> Tensor:
        first, second = torch.triu_indices(len(features), len(features), offset=1)
        return self.distance.between(features, features)[first, second].mean()
