"""The base class of features, by which pairs and sets of images are compared."""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...frames import folded
from ...registry import Registry
from ..contract.frozen_module import FrozenModule
from ..contract.reward import check_images
from ..contract.transforms import at_least_float32

FeatureMetric = Literal["cosine", "l2", "squared_l2"]
FeaturesT = TypeVar("FeaturesT", bound="Features")


class Features(FrozenModule):
    """Base class of features: `features(images) -> (B, ...)`, float32, with a gradient with respect to the images.

    A subclass implements `encode`, and also `load` if it has weights. It passes its modules to this constructor, which
    freezes them. The features of an image do not depend on the rest of the batch, so they can be computed one image at
    a time, detached, stored and compared later (`PairwiseDistance.between`, `SetReward.of_features`).

    Attributes:
        name: The name under which values are reported.
        metric: The distance that the features are made for: "cosine" is 1 - cos, averaged over positions if there are
            several; "l2" and "squared_l2" are distances of the flattened features, with the scale of the published
            distance.
        differentiable: Whether there is a gradient with respect to the images.
        license: The license of the weights.
        default_checkpoint: The Hub id that `from_pretrained()` loads, or None.
        package: The optional package that provides the weights instead; noiseopt's extra has the same name.
        weights_file: The file with the weights, if they are neither on the Hub nor of a package. A folder that contains
            it is a checkpoint.
        published_at: The address of that file.
        parameter_count: The number of parameters of the default weights.
    """

    name: str = "features"
    metric: FeatureMetric = "cosine"
    differentiable: bool = True
    license: str | None = None
    default_checkpoint: str | None = None
    package: str | None = None
    weights_file: str | None = None
    published_at: str | None = None
    parameter_count: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Compute features.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device; or videos (B, F, 3, H, W).

        Returns:
            (B, D), or (B, P, D) for features at P positions; float32, on the device of the weights. The frames of a
            video are further positions: (B, F, D), or (B, F·P, D), divided by √F, so that distances are of the scale of
            those of images.

        Raises:
            ValueError: For invalid images.
        """
        if isinstance(images, Tensor) and images.ndim == 5:
            found = self(folded(images)).unflatten(0, images.shape[:2]) / math.sqrt(images.shape[1])
            return found if found.ndim == 3 else found.flatten(1, 2)
        check_images(images, f"the features of {self.name}")
        return at_least_float32(self.encode(at_least_float32(images).to(self.device or images.device)))

    def encode(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) float32 images in [0, 1], on the device of the weights, to (B, D) or (B, P, D)."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode`.")

    def as_released(self: FeaturesT) -> FeaturesT:
        """Return these features as the released code of It's Never Too Late computes them, with the same weights."""
        return self

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

        `dtype` is the dtype of the weights, by default float32, because bfloat16 cannot resolve the differences of
        nearly equal images.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = cls.load(checkpoint or cls.default_checkpoint, hub)
        return features.to(device=device, dtype=dtype or torch.float32)

    @classmethod
    def load(cls: type[FeaturesT], checkpoint: str | None, hub: dict[str, Any]) -> FeaturesT:
        """Build the features in float32.

        `hub` holds the revision, cache_dir, token and local_files_only of `from_pretrained`.
        """
        check_no_checkpoint(cls, checkpoint)
        return cls()


FEATURES: Registry[type[Features]] = Registry("feature map")


def register_features(name: str) -> Callable[[type[FeaturesT]], type[FeaturesT]]:
    """Return a decorator that registers a class of features under a name.

    Raises:
        ValueError: If another class has the name.
    """
    return FEATURES.register(name)  # pyright: ignore[reportReturnType]


def list_features() -> list[str]:
    """Return the registered names, sorted."""
    return FEATURES.names()


def check_no_checkpoint(features: type[Features], checkpoint: str | None) -> None:
    """Raise `ValueError` if a checkpoint is given for features that have none on the Hub."""
    if checkpoint is not None:
        raise ValueError(
            f"Expected no checkpoint for the features '{features.name}', but got {checkpoint!r}. They have no weights "
            "or get them from a package. Omit the checkpoint."
        )


def check_folder(features: type[Features], checkpoint: str | None) -> None:
    """Raise `ValueError` if no folder is given for features whose weights are a file to download."""
    if checkpoint is None and features.weights_file is not None:
        raise ValueError(
            f"Expected a folder for the features '{features.name}', whose weights are not on the Hub, but got only the "
            f"name. Download {features.weights_file} from {features.published_at} and pass the folder that contains it."
        )


def import_optional(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: If it is not installed, or if the installed torchvision does not match torch.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision is built for CUDA but torch is not
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"Expected the package `{package}`, but it cannot be imported: {reason}. Install the torchvision build "
            f"that matches your torch first (https://pytorch.org/get-started), then `pip install noiseopt[{package}]`. "
            "A torchvision that does not match breaks transformers too."
        ) from error
