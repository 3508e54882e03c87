"""The callback contract of a noise optimisation."""

from collections.abc import Callable, Iterable

from .noise_state import NoiseState


class NoiseCallback:
    """Base of callbacks per *optimisation* step. (diffusers' `callback_on_step_end` is per denoising step.)

    Subclasses override what they need. A plain function `(state) -> bool | None` does where one hook is enough.
    """

    def on_run_start(self, state: NoiseState) -> None:
        """Called once, before the first evaluation."""

    def on_step_end(self, state: NoiseState) -> bool | None:
        """Called after each evaluation. Return `False`, or call `state.stop()`, to end the run."""

    def on_run_end(self, state: NoiseState) -> None:
        """Called once at the end, also when the run ends in an exception."""


class FunctionCallback(NoiseCallback):
    """A plain function as a callback."""

    def __init__(self, function: Callable[[NoiseState], bool | None]) -> None:
        self.function = function

    def on_step_end(self, state: NoiseState) -> bool | None:
        return self.function(state)


CallbackSpec = NoiseCallback | Callable[[NoiseState], bool | None]


def as_callbacks(callbacks: CallbackSpec | Iterable[CallbackSpec] | None) -> list[NoiseCallback]:
    """One callback, several, or none, as a list. Raises `TypeError` for what is neither callback nor function.

    Anything with an `on_step_end` counts, whichever copy of `NoiseCallback` it derives from.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Iterable):
        return [as_callback(each) for each in callbacks]
    return [as_callback(callbacks)]


def as_callback(callback: CallbackSpec) -> NoiseCallback:
    if hasattr(callback, "on_step_end"):
        return callback  # pyright: ignore[reportReturnType]
    if callable(callback):
        return FunctionCallback(callback)
    raise TypeError(
        f"Expected a callback with `on_step_end(state)` or a function of `state`, but got {type(callback).__name__}."
    )
