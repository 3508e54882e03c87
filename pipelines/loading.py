"""Rewards, features and decoders that runs load by name, each once for a pipeline."""

import weakref
from typing import Any

from ..private_names import progress_bar_is_off
from ..rewards.contract.registry import LoadedModels

LOADED: "weakref.WeakKeyDictionary[Any, LoadedModels]" = weakref.WeakKeyDictionary()


def loaded_models(pipe: Any) -> LoadedModels:
    """Return what was loaded by name for a pipeline; it is freed with the pipeline, or by `release_rewards`.

    A twin of a pipeline, which has the pipeline as its attribute `_twin_of`, shares what was loaded for that.
    """
    found = LOADED.setdefault(vars(pipe).get("_twin_of", pipe), LoadedModels())
    found.bars = not progress_bar_is_off(pipe)
    return found


def release_rewards(pipe: Any) -> None:
    """Forget the rewards, features and decoders that were loaded by name for a pipeline, which frees their memory.

    They are loaded again when a run asks for them. Objects that were passed to a run are not affected.
    """
    LOADED.pop(pipe, None)
