"""The contract that every feature map meets: images in, what sets and pairs of images are compared by out."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...registry import Registry
from ..contract.frozen_module import FrozenModule
from ..contract.reward import check_images
from ..contract.transforms import at_least_float32

FeatureMetric = Literal["cosine", "l2", "squared_l2"]
FeaturesT = TypeVar("FeaturesT", bound="Features")


class Features(FrozenModule):
    """Maps images to features: `features(images) -> (B, ...)`, float32, with a gradient to the images.

    A subclass implements `encode`; one with weights of its own also `load`. It hands its modules to this constructor,
    which freezes them. The features of an image do not depend on its neighbours, so they may be computed one image at a
    time, detached, kept and compared later (`PairwiseDistance.between`, `SetReward.of_features`).

    Attributes:
        name: the name under which values are reported.
        metric: the distance that these features are made for: "cosine" is 1 - cos, the mean over positions where there
            are several; "l2" and "squared_l2" are those of all numbers of an image, whose scale is that of the
            published distance.
        differentiable: whether there is a gradient with respect to the images.
        license: the licence of the weights.
        default_checkpoint: the Hub id that `from_pretrained()` loads, or None.
        package: the optional package that brings the weights instead; noiseopt's extra is called the same.
        parameter_count: how many parameters there are, where there are weights by default.
    """

    name: str = "features"
    metric: FeatureMetric = "cosine"
    differentiable: bool = True
    license: str | None = None
    default_checkpoint: str | None = None
    package: str | None = None
    parameter_count: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images to features.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device.

        Returns:
            (B, D), or (B, P, D) for features at P positions; float32, on the device of the weights.

        Raises:
            ValueError: images that do not meet the contract.
        """
        check_images(images, f"the features of {self.name}")
        return at_least_float32(self.encode(at_least_float32(images).to(self.device or images.device)))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1], on the device of the weights -> (B, D) or (B, P, D)."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode`.")

    @classmethod
    def from_pretrained(
        cls: type[FeaturesT],
        checkpoint: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FeaturesT:
        """Load from a Hub id or a folder, by default `default_checkpoint`.

        `dtype` is that of the weights, by default float32: nearly equal images differ by less than bfloat16 resolves.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = cls.load(checkpoint or cls.default_checkpoint, hub)
        return features.to(device=device, dtype=dtype or torch.float32)

    @classmethod
    def load(cls: type[FeaturesT], checkpoint: str | None, hub: dict[str, Any]) -> FeaturesT:
        """Build the features in float32. `hub` holds `from_pretrained`'s revision, cache_dir, token and
        local_files_only."""
        check_no_checkpoint(cls, checkpoint)
        return cls()


FEATURES: Registry[type[Features]] = Registry("feature map")


def register_features(name: str) -> Callable[[type[FeaturesT]], type[FeaturesT]]:
    """Register a class of features under a name.

    Raises:
        ValueError: a name that another class has.
    """
    return FEATURES.register(name)  # pyright: ignore[reportReturnType]


def list_features() -> list[str]:
    """The registered names, sorted."""
    return FEATURES.names()


def check_no_checkpoint(features: type[Features], checkpoint: str | None) -> None:
    """Raise `ValueError` for a checkpoint of features that have none on the Hub."""
    if checkpoint is not None:
        raise ValueError(
            f"Expected no checkpoint for the features '{features.name}', but got {checkpoint!r}. They have no weights, "
            "or those of a package: leave it out."
        )


def import_optional(package: str) -> ModuleType:
    """The module of an optional package.

    Raises:
        ImportError: it is not installed, or the torchvision that it needs does not fit torch.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # a torchvision for CUDA beside a torch for the CPU: RuntimeError
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"Expected the package `{package}`, but it cannot be imported: {reason}. Install the torchvision build "
            f"that matches your torch first (https://pytorch.org/get-started), then `pip install noiseopt[{package}]`. "
            "A torchvision that does not match breaks transformers too."
        ) from error
