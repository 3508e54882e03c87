"""Putting things back, whatever comes in between."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, and once more if that is interrupted: Ctrl-C may come while something is put back."""
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise
