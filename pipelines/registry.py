"""Methods by name."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..registry import Registry
from .method import NoiseOptimizer

METHODS: Registry[type[NoiseOptimizer]] = Registry("method")
MethodT = TypeVar("MethodT", bound=type)


def register_method(name: str) -> Callable[[MethodT], MethodT]:
    """Return a class decorator that registers a method under a name. Raises `ValueError` if the name is taken."""
    return METHODS.register(name)


def list_methods() -> list[str]:
    """Return the method names that `optimize_noise` and every pipeline class take."""
    return METHODS.names()


def as_method(method: Any, settings: Mapping[str, Any] | None = None) -> NoiseOptimizer:
    """Return a method given by name and settings, or a method object as it is.

    Raises:
        ValueError: For an unknown name, an unknown setting, or settings beside a method object.
        TypeError: For anything that is not a method.
    """
    if isinstance(method, str):
        return METHODS.find(method)(**(settings or {}))
    if settings:
        raise ValueError("Expected `method_kwargs` beside the name of a method, but got a method object as well.")
    if isinstance(method, type) or not (hasattr(method, "objective") and hasattr(method, "step")):
        raise TypeError(
            f"Expected a method such as `ReNO(rewards=...)` or one of the names {list_methods()}, but got {method!r}."
        )
    return method
