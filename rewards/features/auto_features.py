"""Image features, loaded by name, Hub id or folder."""

import os

import torch

from ..contract.checkpoints import is_checkpoint
from .features import FEATURES, Features
from .image_features import ImageFeatures


class AutoFeatures:
    """Loader of the features that a name, a Hub id or a folder refers to."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Features:
        """Load features.

        Args:
            name_or_path: A registered name loads those features with their default checkpoint; it takes precedence
                over a folder of the same name. A Hub id or folder loads its vision model, with one vector per image,
                and a folder with the weights file of registered features (SSCD) those.

        The keyword arguments are those of `Features.from_pretrained`. Features from a package (LPIPS,
        DreamSim, PE-Spatial) use `cache_dir` at most.

        Raises:
            ValueError: For an unknown name, or a checkpoint whose image processor has no differentiable equivalent.
            ImportError: If a package is not installed.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = find_features(path)
        if features is not None:
            return features.from_pretrained(**hub, dtype=dtype, device=device)
        published = (entry for entry in FEATURES.entries.values() if is_published_as(path, entry))
        return next(published, ImageFeatures).from_pretrained(path, **hub, dtype=dtype, device=device)


def is_published_as(path: str, features: type[Features]) -> bool:
    """Return whether a Hub id is the default checkpoint of features, or a folder has their weights file."""
    in_folder = features.weights_file is not None and os.path.isfile(os.path.join(path, features.weights_file))
    return in_folder or path == features.default_checkpoint


def find_features(name_or_path: str) -> type[Features] | None:
    """Return the class registered under a name, or None for a Hub id or an existing folder.

    Raises:
        ValueError: For anything else.
    """
    if name_or_path not in FEATURES.entries and is_checkpoint(name_or_path):
        return None
    return FEATURES.find(name_or_path, ", a Hub id such as 'org/name' or a folder")
