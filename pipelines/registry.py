"""Methods by name, and the names of their settings."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..registry import Registry, did_you_mean
from .method import NoiseOptimizer

METHODS: Registry[type[NoiseOptimizer]] = Registry("method")
MethodT = TypeVar("MethodT", bound=type)


def register_method(name: str) -> Callable[[MethodT], MethodT]:
    """Return a class decorator that registers a method under a name, and checks the names of its settings.

    Raises:
        ValueError: If the name is taken.
    """

    def register(cls: MethodT) -> MethodT:
        init: Any = vars(cls)["__init__"]

        @functools.wraps(init)
        def checked_init(self: Any, *args: Any, **settings: Any) -> None:
            check_settings(type(self), args, settings)
            init(self, **settings)

        METHODS.register(name)(cls)
        setattr(cls, "__init__", checked_init)  # noqa: B010  a plain assignment is an error of pyright
        return cls

    return register


def check_settings(cls: Any, args: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
    """Raise `TypeError` for settings of a method class that are not named, unknown or missing."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if args:
        raise TypeError(f"Expected the settings of {cls.__name__} by name, as in `steps=10`, but got {args[0]!r}.")
    if unknown := [name for name in settings if name not in fields]:
        hint = did_you_mean(unknown[0], fields)
        raise TypeError(f"Expected settings of {cls.__name__} out of {list(fields)}, but got '{unknown[0]}'.{hint}")
    for name, field in fields.items():
        if name not in settings and field.default is field.default_factory is dataclasses.MISSING:
            raise TypeError(f"Expected `{name}` for {cls.__name__}, but got none. Pass `{cls.__name__}({name}=...)`.")


def list_methods() -> list[str]:
    """Return the method names that `optimize_noise` and every pipeline class take."""
    return METHODS.names()


def as_method(method: Any, settings: Mapping[str, Any] | None = None) -> NoiseOptimizer:
    """Return a method given by name and settings, or a method object as it is, with its settings checked.

    Raises:
        ValueError: For an unknown name, a setting that cannot work, or settings beside a method object.
        TypeError: For an unknown or missing setting, and for anything that is not a method.
    """
    if settings is not None and not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise TypeError(f"Expected `method_kwargs` to be a dict of settings by name, but got {settings!r}.")
    if isinstance(method, str):
        found = METHODS.find(method)(**(settings or {}))
        found.check()
        return found
    if settings:
        raise ValueError("Expected `method_kwargs` beside the name of a method, but got a method object as well.")
    if isinstance(method, type) or not (hasattr(method, "objective") and hasattr(method, "step")):
        remedy = ""
        if hasattr(method, "generate"):
            remedy = " It changes the denoising steps instead of the noise: call its `generate(pipe, prompt, ...)`."
        raise TypeError(
            f"Expected a method such as `ReNO(rewards=...)` or one of the names {list_methods()}, but got {method!r}."
            f"{remedy}"
        )
    method.check()
    return method
