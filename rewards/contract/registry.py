"""Rewards by name: registration, listing and loading."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from ...registry import Registry
from .checkpoints import is_checkpoint
from .reward import Reward

RewardFactory = Callable[..., Reward]
RewardFactoryT = TypeVar("RewardFactoryT", bound=RewardFactory)

REWARDS: Registry[RewardFactory] = Registry("reward")
# the architecture or `model_type` of a config.json -> the class that loads it
REWARD_LOADERS: Registry[Any] = Registry("model type")

# What commands call the rewards of the shapes world. They are no names here: nobody wants to take them for large ones.
EMBEDDED_REWARDS = ("clip", "vqa")


def register_reward(
    name: str, *aliases: str, loads: str | Iterable[str] = ()
) -> Callable[[RewardFactoryT], RewardFactoryT]:
    """Register a `Reward` class, or a function that returns a reward, under a name.

    Args:
        name: The name that users pass as `rewards=` and read in results.
        aliases: Other names for the same reward.
        loads: Checkpoints that the class loads when only a Hub id or folder is given, by the `model_type` or an entry
            of `architectures` in their config.json. Architectures take precedence.

    Raises:
        ValueError: If something else has one of the names. An entry with the same qualified name is replaced, because
            diffusers executes the code of a Hub pipeline twice per load.
    """

    def register(factory: RewardFactoryT) -> RewardFactoryT:
        kinds = (loads,) if isinstance(loads, str) else tuple(loads)
        REWARD_LOADERS.check_free(factory, *kinds)
        REWARDS.register(name, *aliases)(factory)
        for kind in kinds:
            REWARD_LOADERS.register(kind)(factory)
        return factory

    return register


def list_rewards() -> list[str]:
    """Return the registered names, sorted, without aliases."""
    return REWARDS.names()


def find_reward(name_or_path: str, also: Iterable[str] = ()) -> RewardFactory | None:
    """Return the entry registered under a name or alias, or None for a Hub id or an existing folder.

    Args:
        name_or_path: The name, Hub id or folder.
        also: Other names that the caller accepts, for the error message.

    Raises:
        ValueError: For anything else, and for a registered reward whose weights are not on the Hub.
    """
    if name_or_path not in REWARDS.entries and is_checkpoint(name_or_path):
        return None
    embedded = f" (the embedded {name_or_path!r} is in `noiseopt.shapes_world.path({name_or_path!r})`)"
    folder = f"a folder{embedded * (name_or_path in EMBEDDED_REWARDS)}"
    factory = REWARDS.find(name_or_path, f", a Hub id such as 'org/name', {folder} or a callable", also)
    if isinstance(factory, type) and issubclass(factory, Reward) and factory.published_at:
        factory.require_default_checkpoint()
    return factory


class AutoReward:
    """Loader of the reward that a name, a Hub id or a folder refers to."""

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
        """Load a reward.

        Args:
            name_or_path: A registered name loads that reward with its default checkpoint; it takes precedence over a
                folder of the same name. A Hub id or folder loads the reward that has it as its default checkpoint, or
                whose published weights file is in the folder, or that is registered for the architecture or
                `model_type` in its config.json.

        The keyword arguments are those of `Reward.from_pretrained`; they have no effect on a reward without weights.

        Raises:
            ValueError: For an unknown name or a model type that no reward loads.
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


class LoadedModels:
    """Models that were loaded by name, each once for a device and a dtype.

    Attributes:
        bars: Whether transformers shows its progress bar "Loading weights".
    """

    def __init__(self) -> None:
        self.bars = True
        self.models: dict[tuple[Any, ...], Any] = {}

    def load(
        self,
        kind: str,
        load: Callable[..., Any],
        name: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """Return `load(name, dtype=dtype, device=device)`, called at the first use of this kind and name."""
        path = os.fspath(name)
        key = (kind, path, dtype, None if device is None else torch.device(device))
        if key not in self.models:
            with contextlib.nullcontext() if self.bars else without_loading_bars():
                self.models[key] = load(path, dtype=dtype, device=device)
        return self.models[key]


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers inside the context."""
    shown = transformers_logging.is_progress_bar_enabled()
    if shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def published_as(path: str) -> type[Reward] | None:
    """Return the first registered class that has `path` as its default checkpoint, or its weights file in `path`."""
    for factory in REWARDS.entries.values():
        if not (isinstance(factory, type) and issubclass(factory, Reward)):
            continue
        in_folder = factory.weights_file is not None and os.path.isfile(os.path.join(path, factory.weights_file))
        if in_folder or path == factory.default_checkpoint:
            return factory
    return None


def reward_class_of(config: Mapping[str, Any], path: str) -> type[Reward]:
    """Return the class registered for a config.json, whose model type transformers need not know."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for kind in (*(architectures or ()), model_type):
        if kind in REWARD_LOADERS.entries:
            return REWARD_LOADERS.entries[kind]
    raise ValueError(
        f"Expected a checkpoint of the model type or architecture {REWARD_LOADERS.names()}, but '{path}' is of type "
        f"'{model_type}', architecture {architectures}. Load it yourself and pass a callable "
        "`(images, prompts) -> (B,)`."
    )
