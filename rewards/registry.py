"""Rewards by name: registration, listing and loading."""

import difflib
import os
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import AutoConfig

from .reward import Reward

RewardFactory = Callable[..., Reward]
RewardFactoryT = TypeVar("RewardFactoryT", bound=RewardFactory)

# name or alias -> (name, what builds it); `model_type` of a config.json -> the class that loads it
REWARDS: dict[str, tuple[str, RewardFactory]] = {}
REWARD_MODEL_TYPES: dict[str, tuple[str, type[Reward]]] = {}


def register_reward(
    name: str, *aliases: str, model_type: str | None = None
) -> Callable[[RewardFactoryT], RewardFactoryT]:
    """Register a `Reward` class, or a function that returns a reward, under a name.

    Args:
        name: what users write in `rewards=` and read in results.
        aliases: further names it is found by.
        model_type: the `model_type` of the checkpoints that the class loads when only a Hub id or folder is given.

    Raises:
        ValueError: a name that something else has. Registering again what has the same qualified name replaces it,
            since diffusers executes the code of a Hub pipeline twice per load.
    """

    def register(factory: RewardFactoryT) -> RewardFactoryT:
        claims = [(REWARDS, key) for key in (name, *aliases)]
        if model_type is not None:
            claims.append((REWARD_MODEL_TYPES, model_type))
        for table, key in claims:
            taken_by = table[key][1].__qualname__ if key in table else factory.__qualname__
            if taken_by != factory.__qualname__:
                raise ValueError(f"Expected a free reward name, but '{key}' is taken by `{taken_by}`. Choose another.")
        for table, key in claims:
            table[key] = (name, factory)
        return factory

    return register


def list_rewards() -> list[str]:
    """The registered names, sorted, without aliases."""
    return sorted({name for name, _ in REWARDS.values()})


def find_reward(name_or_path: str) -> RewardFactory | None:
    """What is registered under a name or alias, or None for a Hub id or an existing folder.

    Raises:
        ValueError: for anything else.
    """
    if name_or_path in REWARDS:
        return REWARDS[name_or_path][1]
    if os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path):
        return None
    close = difflib.get_close_matches(name_or_path.lower(), REWARDS)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    raise ValueError(
        f"Expected a reward name out of {list_rewards()}, a Hub id such as 'org/name' or a folder, but got "
        f"'{name_or_path}'.{hint} A callable `(images, prompts) -> (B,)` works too."
    )


class AutoReward:
    """Loads the reward that a name, a Hub id or a folder stands for."""

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
    ) -> Reward:
        """A registered name gives that reward with its default checkpoint; for a Hub id or folder, `model_type` in its
        config.json selects the class. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Reward.from_pretrained`; a reward without weights needs none of them.

        Raises:
            ValueError: an unknown name, or a model type that no reward loads.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        factory = find_reward(path)
        if factory is None:
            model_type = AutoConfig.from_pretrained(path, **hub).model_type
            return reward_class_of(model_type, path).from_pretrained(path, dtype=dtype, device=device, **hub)
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.default_checkpoint:
            return factory.from_pretrained(dtype=dtype, device=device, **hub)
        return factory().to(device=device, dtype=dtype)


def reward_class_of(model_type: str, path: str) -> type[Reward]:
    """The class that loads checkpoints of this `model_type`; `path` is for the message."""
    if model_type not in REWARD_MODEL_TYPES:
        raise ValueError(
            f"Expected a checkpoint of model type {sorted(REWARD_MODEL_TYPES)}, but '{path}' is of type "
            f"'{model_type}'. Load it yourself and pass a callable `(images, prompts) -> (B,)`."
        )
    return REWARD_MODEL_TYPES[model_type][1]
