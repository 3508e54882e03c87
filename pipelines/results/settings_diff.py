"""Settings as plain values, and the differences between two of them."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from ...shown_text import shown


def plain_description(value: Any) -> Any:
    """Return a setting as a JSON value that is equal for equal settings.

    Tensors, arrays and images become the hash of their bytes. Other objects become what their `describe()` returns, or
    else their type and name.
    """
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_description(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_description(each) for each in value]
    if isinstance(value, torch.Tensor):
        return tensor_description(value)
    if isinstance(value, torch.Generator):
        state = tensor_description(value.get_state())["sha256"]
        return {"device": value.device.type, "seed": value.initial_seed(), "state": state[:16]}
    if hasattr(value, "describe"):
        return plain_description(value.describe())
    if hasattr(value, "tobytes"):
        facts = [getattr(value, name, "") for name in ("size", "shape", "mode", "dtype")]
        numbers = f"{facts}".encode() + value.tobytes()
        return {"type": type(value).__qualname__, "sha256": hashlib.sha256(numbers).hexdigest()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_description(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": type(value).__qualname__, "name": str(getattr(value, "name", getattr(value, "__qualname__", "")))}


def tensor_description(tensor: torch.Tensor) -> dict[str, Any]:
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": hashlib.sha256(numbers).hexdigest()}


def settings_diff(known: Any, given: Any, name: str = "") -> list[str]:
    """Return one sentence for each value in which two nested dictionaries differ."""
    if isinstance(known, dict) and isinstance(given, dict):
        names = [*known, *(key for key in given if key not in known)]
        found = [settings_diff(known.get(key), given.get(key), f"{name} {key}".strip()) for key in names]
        return [difference for group in found for difference in group]
    return [] if known == given else [f"{shown(name)} was {shown(repr(known))} and is {shown(repr(given))}"]
