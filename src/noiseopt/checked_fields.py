"""Settings that check themselves: dataclass fields with an interval, `Literal`s, switches; and functions of users."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def checked(default: Any, interval: str) -> Any:
    """Return a dataclass field for a number in an interval.

    Args:
        default: The default value.
        interval: In mathematical notation, `"[0, 1)"` or `"[1, inf)"`. The annotation of the field says whether the
            number has to be an integer (`int`) and whether `None` is allowed (`int | None`).
    """
    return dataclasses.field(default=default, metadata={"interval": interval})


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass: those made by `checked`, `bool`s, and those whose annotation has a `Literal`.

    Raises:
        ValueError: For a value outside, naming the field and what was expected.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        check_value(field.name, getattr(settings, field.name), hints[field.name], field.metadata.get("interval"))


def check_value(name: str, value: Any, hint: Any, interval: str | None) -> None:
    """Check one value against its annotation and its interval. Raises `ValueError`, naming both."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    choices += [None] if type(None) in members else []
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        return
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be True or False, but got {value!r}.")
    if interval is None:
        if choices and not {int, float, str}.intersection(members) and len(choices) > (None in choices):
            raise ValueError(f"Expected `{name}` to be one of {tuple(choices)}, but got {value!r}.")
        return
    kind = int if float not in members else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not is_in(interval, value):
        number = "an integer" if kind is int else "a number"
        others = "".join(f" or {choice!r}" for choice in choices)
        raise ValueError(f"Expected `{name}` to be {number} in {interval}{others}, but got {value!r}.")


def refused_signature(function: Callable[..., Any], count: int, *names: str) -> str | None:
    """Return the parameters of a function, as text, that refuses `count` arguments and some by name; else `None`.

    A function whose parameters are unknown, such as one written in C, can be called.
    """
    try:
        signature = inspect.signature(function)
        forward = getattr(function, "forward", None)
        if forward is not None and signature_is_open(signature):  # a module, whose call shows none
            signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(count), **dict.fromkeys(names))
    except TypeError:
        return str(signature.replace(return_annotation=inspect.Signature.empty))
    return None


def signature_is_open(signature: inspect.Signature) -> bool:
    """Return whether a function takes any number of arguments."""
    return any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())


def is_in(interval: str, value: float) -> bool:
    """Return whether a finite number lies in an interval such as `"[0, 1)"`; NaN and infinity lie in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return math.isfinite(value) and above and below
