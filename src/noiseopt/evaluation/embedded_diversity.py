"""The `diversity` of a method on an embedded model: set rewards on features of the shapes world."""

import functools
from typing import Any, Literal

import torch

from .. import shapes_world
from ..rewards.features.image_features import ImageFeatures
from ..rewards.sets.set_reward import find_set_reward
from ..rewards.sets.set_reward_sum import set_reward_entries

# features -> the embedded tower that replaces them, and its output
TOWERS: dict[str, tuple[str, Literal["cls", "patch"]]] = {
    "dinov2": ("dinov2", "cls"),
    "dinov2_patch": ("dinov2", "patch"),
    "clip": ("clip", "cls"),
}


def features_of(diversity: Any) -> list[Any]:
    """Return the features of each set reward: a name, a folder, or a module.

    Raises:
        ValueError: For invalid set rewards.
    """
    found = []
    for reward, features, _ in set_reward_entries(diversity):
        default = find_set_reward(reward).default_features if isinstance(reward, str) else reward.features
        found.append(default if features is None else features)
    return found


def towers_of(diversity: Any) -> set[str]:
    """Return the names of the embedded models that compute the features."""
    return {TOWERS[name][0] for name in features_of(diversity) if isinstance(name, str) and name in TOWERS}


def embedded_diversity(diversity: Any, device: torch.device | None = None) -> list[tuple[Any, Any, Any]]:
    """Replace named features by embedded towers, loaded; other entries stay unchanged."""
    entries = zip(set_reward_entries(diversity), features_of(diversity), strict=True)
    return [
        (reward, tower(features, device) if isinstance(features, str) and features in TOWERS else features, weight)
        if isinstance(reward, str)
        else (reward, None, weight)
        for (reward, _, weight), features in entries
    ]


@functools.cache
def tower(name: str, device: torch.device | None) -> ImageFeatures:
    """Load an embedded tower once, under the name of the large model that it replaces."""
    folder, kind = TOWERS[name]
    features = ImageFeatures.from_pretrained(shapes_world.path(folder), kind, device=device)
    features.name = name
    return features
