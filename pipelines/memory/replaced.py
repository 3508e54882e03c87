"""Methods and functions that somebody replaced, on an object, on its class or in a library."""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from ...private_names import is_context_decorated


def replaced_methods(thing: Any) -> list[str]:
    """Return the names of the methods of an object's class that were replaced on the object itself."""
    kind = type(thing)
    return [name for name, value in vars(thing).items() if callable(value) and callable(getattr(kind, name, None))]


def is_stock_method(kind: type, name: str) -> bool:
    """Return whether a method of a class is the one that was written in the module of the class.

    A wrapper can copy all names of what it wraps, but not the globals that it looks names up in.
    """
    return is_written_in(sys.modules[kind.__module__], getattr(kind, name), f"{kind.__qualname__}.{name}")


def is_stock_function(module: types.ModuleType, name: str) -> bool:
    """Return whether a function of a module is written there, or in C."""
    function = getattr(module, name)
    return isinstance(function, types.BuiltinFunctionType) or is_written_in(module, function, name)


def is_written_in(module: types.ModuleType, function: Any, qualified_name: str) -> bool:
    written_there = getattr(function, "__globals__", None) is vars(module)
    return written_there and function.__qualname__ == qualified_name


def with_gradient(function: Callable[..., Any], name: str) -> Any:
    """Return a function without the decorators of torch that turn gradients off.

    Raises:
        TypeError: For another wrapper, which could not be told from what it wraps.
    """
    while is_context_decorated(function):
        function = function.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    if hasattr(function, "__wrapped__") or (name.endswith(".__call__") and takes_anything(function)):
        code = getattr(function, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
        raise TypeError(
            f"Expected `{name}` as its class defines it, but it is wrapped by code of others ({where}), which a run "
            "would bypass. Undo that first, or write the whole function out in a subclass of the pipeline."
        )
    return function


def takes_anything(function: Callable[..., Any]) -> bool:
    """Return whether a function hands its arguments on without a look at them."""
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds
