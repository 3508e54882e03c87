"""What `diversity=` of a method means on an embedded model: its set rewards on the towers of the shapes world."""

import functools
from typing import Any, Literal

import torch

from .. import shapes_world
from ..rewards.features.image_features import ImageFeatures
from ..rewards.sets.set_reward import find_set_reward
from ..rewards.sets.set_reward_sum import set_reward_entries

# features -> the tower that stands for them, and which of its outputs they are
TOWERS: dict[str, tuple[str, Literal["cls", "patch"]]] = {
    "dinov2": ("dinov2", "cls"),
    "dinov2_patch": ("dinov2", "patch"),
    "clip": ("clip", "cls"),
}


def features_of(diversity: Any) -> list[Any]:
    """The features of each set reward: a name, a folder, or a module.

    Raises:
        ValueError: For set rewards that are none.
    """
    found = []
    for reward, features, _ in set_reward_entries(diversity):
        default = find_set_reward(reward).default_features if isinstance(reward, str) else reward.features
        found.append(default if features is None else features)
    return found


def towers_of(diversity: Any) -> set[str]:
    """The names of the embedded models that it looks at."""
    return {TOWERS[name][0] for name in features_of(diversity) if isinstance(name, str) and name in TOWERS}


def embedded_diversity(diversity: Any, device: torch.device | None = None) -> list[tuple[Any, Any, Any]]:
    """The same with towers of the shapes world, loaded, where it names the large ones; what else it names stays."""
    entries = zip(set_reward_entries(diversity), features_of(diversity), strict=True)
    return [
        (reward, tower(features, device) if isinstance(features, str) and features in TOWERS else features, weight)
        if isinstance(reward, str)
        else (reward, None, weight)
        for (reward, _, weight), features in entries
    ]


@functools.cache
def tower(name: str, device: torch.device | None) -> ImageFeatures:
    """Features of the shapes world under the name of the large ones; loaded once."""
    folder, kind = TOWERS[name]
    features = ImageFeatures.from_pretrained(shapes_world.path(folder), kind, device=device)
    features.name = name
    return features
