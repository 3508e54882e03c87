"""Rewards by name: registration, listing and loading."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from .reward import Reward

RewardFactory = Callable[..., Reward]
RewardFactoryT = TypeVar("RewardFactoryT", bound=RewardFactory)

# name or alias -> (name, what builds it); architecture or `model_type` of a config.json -> the class that loads it
REWARDS: dict[str, tuple[str, RewardFactory]] = {}
REWARD_LOADERS: dict[str, tuple[str, type[Reward]]] = {}


def register_reward(
    name: str, *aliases: str, loads: str | Iterable[str] = ()
) -> Callable[[RewardFactoryT], RewardFactoryT]:
    """Register a `Reward` class, or a function that returns a reward, under a name.

    Args:
        name: what users write in `rewards=` and read in results.
        aliases: further names it is found by.
        loads: which checkpoints the class loads when only a Hub id or folder is given: their `model_type` in
            config.json, or the class under `architectures`, which is looked up first.

    Raises:
        ValueError: a name that something else has. Registering again what has the same qualified name replaces it,
            since diffusers executes the code of a Hub pipeline twice per load.
    """

    def register(factory: RewardFactoryT) -> RewardFactoryT:
        claims = [(REWARDS, key) for key in (name, *aliases)]
        claims += [(REWARD_LOADERS, key) for key in ((loads,) if isinstance(loads, str) else loads)]
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
        ValueError: for anything else, and for a reward whose weights are in no Hub repository.
    """
    if name_or_path in REWARDS:
        factory = REWARDS[name_or_path][1]
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.published_at:
            factory.require_default_checkpoint()
        return factory
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
        """A registered name gives that reward with its default checkpoint. A Hub id or folder gives the reward whose
        default checkpoint it is, or whose weights are in the folder under their published name, or which loads the
        architecture or `model_type` in its config.json. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Reward.from_pretrained`; a reward without weights needs none of them.

        Raises:
            ValueError: an unknown name, or a model type that no reward loads.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        factory = find_reward(path)
        if factory is None:
            reward_class = published_as(path) or reward_class_of(PretrainedConfig.get_config_dict(path, **hub)[0], path)
            return reward_class.from_pretrained(path, dtype=dtype, device=device, **hub)
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.default_checkpoint:
            return factory.from_pretrained(dtype=dtype, device=device, **hub)
        return factory().to(device=device, dtype=dtype)


def published_as(path: str) -> type[Reward] | None:
    """The first registered class whose default checkpoint `path` is, or whose weights file is in that folder."""
    for _, factory in REWARDS.values():
        if not (isinstance(factory, type) and issubclass(factory, Reward)):
            continue
        in_folder = factory.weights_file is not None and os.path.isfile(os.path.join(path, factory.weights_file))
        if in_folder or path == factory.default_checkpoint:
            return factory
    return None


def reward_class_of(config: Mapping[str, Any], path: str) -> type[Reward]:
    """The class that loads checkpoints with this config.json, also of types that transformers does not know."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for kind in (*(architectures or ()), model_type):
        if kind in REWARD_LOADERS:
            return REWARD_LOADERS[kind][1]
    raise ValueError(
        f"Expected a checkpoint of the model type or architecture {sorted(REWARD_LOADERS)}, but '{path}' is of type "
        f"'{model_type}', architecture {architectures}. Load it yourself and pass a callable "
        "`(images, prompts) -> (B,)`."
    )
