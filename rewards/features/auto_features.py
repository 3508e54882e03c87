"""Features by name, Hub id or folder."""

import os
import re

import torch

from .features import FEATURES, Features
from .image_features import ImageFeatures


class AutoFeatures:
    """Loads the features that a name, a Hub id or a folder stands for."""

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
        """A registered name gives those features with their default checkpoint; a Hub id or folder gives one vector an
        image of the vision model there. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Features.from_pretrained`. What a package brings (LPIPS, DreamSim) is not on
        the Hub: of its arguments `cache_dir` alone may matter.

        Raises:
            ValueError: a name that is unknown.
            ImportError: a package that is not installed.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = find_features(path)
        if features is not None:
            return features.from_pretrained(**hub, dtype=dtype, device=device)
        published = (entry for entry in FEATURES.classes.values() if entry.default_checkpoint == path)
        return next(published, ImageFeatures).from_pretrained(path, **hub, dtype=dtype, device=device)


def find_features(name_or_path: str) -> type[Features] | None:
    """The class that is registered under a name, or None for a Hub id or an existing folder.

    Raises:
        ValueError: for anything else.
    """
    is_path = os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path)
    if is_path and name_or_path not in FEATURES.classes:
        return None
    return FEATURES.find(name_or_path, ", a Hub id such as 'org/name' or a folder")
