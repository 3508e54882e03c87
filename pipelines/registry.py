"""The methods by name."""

from collections.abc import Mapping
from typing import Any

from .method import NoiseOptimizer

METHODS: dict[str, type[NoiseOptimizer]] = {}


def register_noise_optimizer(name: str):
    """Class decorator: make a method known by name. The same class may come again, as it does when code is reloaded."""

    def register(cls):
        known = METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"The method name {name!r} is taken by {known.__qualname__}.")
        METHODS[name] = cls
        return cls

    return register


def list_noise_optimizers() -> list[str]:
    """The names that `optimize_noise` takes."""
    return sorted(METHODS)


def call_settings(named: dict[str, Any], others: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    """The settings of a method from a pipeline call: arguments that are not `None`, and a dict of others.

    Raises `ValueError` for a setting that is given both ways; `argument` is what the dict is called.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(settings.keys() & (others or {}).keys()):
        raise ValueError(f"Expected each setting once, but got {twice} by argument and in `{argument}` too.")
    return {**settings, **(others or {})}


def as_noise_optimizer(method: Any, settings: dict[str, Any] | None = None) -> NoiseOptimizer:
    """A method by its name and settings, or a method as it is. Raises `ValueError` or `TypeError` otherwise."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}. Available: {', '.join(list_noise_optimizers())}.")
        return METHODS[method](**(settings or {}))
    if settings:
        raise ValueError("Expected `method_kwargs` only beside the name of a method, but got a method object as well.")
    if isinstance(method, type) or not hasattr(method, "run"):
        raise TypeError(
            f"Expected a method such as `ReNO(rewards=...)` or one of the names {list_noise_optimizers()}, but got "
            f"{method!r}."
        )
    return method
