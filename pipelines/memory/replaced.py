"""Methods and functions that somebody replaced, on an object, on its class or in a library."""

import sys
import types
from typing import Any


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
