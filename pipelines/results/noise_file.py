"""Where the best noise of a run is kept on disk while the run goes on."""

import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from .atomic_write import part_of_file
from .noise_result import NoiseResult

SECONDS_BETWEEN_WRITES = 10.0


class NoiseFile:
    """The file that holds the best noise so far: from the first step on, whatever ends the run, always whole.

    Args:
        path: Where the file is to be; its folder is made. What is there already is replaced.

    Raises:
        ValueError: If no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ValueError(f"Expected `save_noise_to` to be the path of a file, but got {path!r}.")
        self.path = Path(path)
        self.next_write = -math.inf
        if os.path.isdir(self.path):
            raise ValueError(f"Expected `save_noise_to` to be a file, but {path} is a folder. Add a name to it.")
        part = part_of_file(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_and_remove(part)
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected `save_noise_to` to be a file that can be written, but got {error}.") from None

    def keep(self, result: Callable[[], NoiseResult]) -> None:
        """Write what a run has found after a step, unless that was done a moment ago."""
        if time.monotonic() >= self.next_write:
            self.write_if_possible(result())
            self.next_write = time.monotonic() + SECONDS_BETWEEN_WRITES

    def write_if_possible(self, result: NoiseResult) -> None:
        """Write a result, and warn where that fails: a run does not end because the disk is full."""
        try:
            result.save(self.path)
        except Exception as error:
            warnings.warn(f"The noise found so far cannot be written to {self.path}: {error}", stacklevel=2)


def write_and_remove(file: Path) -> None:
    """Raise `OSError` where no file can be written."""
    try:
        file.touch()
    finally:
        file.unlink(missing_ok=True)
