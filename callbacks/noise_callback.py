"""Base class of callbacks of a noise optimization."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from ..checked_fields import refused_signature
from .noise_state import NoiseState


class NoiseCallback:
    """Base class of callbacks per *optimization* step.

    (diffusers' `callback_on_step_end` is per denoising step.) Subclasses override the hooks that they need. A function
    `(state) -> bool | None` is accepted as `on_step_end`.

    Attributes:
        continues: Names of attributes, tensors and numbers, with which the callback goes on in a resumed run.
    """

    continues: ClassVar[tuple[str, ...]] = ()

    def on_run_start(self, state: NoiseState) -> None:
        """Called once, before the first evaluation."""

    def on_step_end(self, state: NoiseState) -> bool | None:
        """Called after each evaluation. Return `False`, or call `state.stop()`, to end the run."""

    def on_run_end(self, state: NoiseState) -> None:
        """Called once at the end, also after an exception."""


class FunctionCallback(NoiseCallback):
    """Wrapper that makes a function a callback."""

    def __init__(self, function: Callable[[NoiseState], bool | None]) -> None:
        self.function = function

    def on_step_end(self, state: NoiseState) -> bool | None:
        return self.function(state)


CallbackSpec = NoiseCallback | Callable[[NoiseState], bool | None]


def as_callbacks(callbacks: CallbackSpec | Iterable[CallbackSpec] | None) -> list[NoiseCallback]:
    """Convert one callback, several, or none to a list.

    Any object with `on_step_end` is accepted, because a pipeline from the Hub has its own copy of `NoiseCallback`.

    Raises:
        TypeError: For an object that is neither a callback nor a function.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Iterable):
        return [as_callback(each) for each in callbacks]
    return [as_callback(callbacks)]


def as_callback(callback: Any) -> NoiseCallback:
    expected = "Expected a callback with `on_step_end(state)` or a function of `state`, but got"
    if isinstance(callback, type) or not (hasattr(callback, "on_step_end") or callable(callback)):
        got = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
        raise TypeError(f"{expected} {got}.")
    function = getattr(callback, "on_step_end", callback)
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{expected} an `async` one, which nobody awaits. Make it a plain function.")
    if parameters := refused_signature(function, 1):
        raise TypeError(
            f"{expected} one that takes {parameters}. A callback of each denoising step belongs to "
            "`callback_on_step_end=`."
        )
    found: Any = callback
    return found if hasattr(callback, "on_step_end") else FunctionCallback(found)
