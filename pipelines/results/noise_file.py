"""File that holds the best noise of a run in progress."""

import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from .atomic_write import check_replaceable, part_beside
from .noise_result import NoiseResult

SECONDS_BETWEEN_WRITES = 10.0


class NoiseFile:
    """File of the best noise so far, written atomically from the first step on.

    Args:
        path: Path of the file. Its folder is created, and an existing file is replaced.

    Raises:
        ValueError: If no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.next_write = -math.inf
        try:
            check_replaceable(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part_beside(self.path):
                pass
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected `save_noise_to` to be a file that can be written, but got: {error}") from None

    def keep(self, result: Callable[[], NoiseResult]) -> None:
        """Write `result()`, at most every `SECONDS_BETWEEN_WRITES`."""
        if time.monotonic() >= self.next_write:
            self.write_if_possible(result())
            self.next_write = time.monotonic() + SECONDS_BETWEEN_WRITES

    def write_if_possible(self, result: NoiseResult) -> None:
        """Write a result; a failure such as a full disk is a warning and does not end the run."""
        try:
            result.save(self.path)
        except Exception as error:
            warnings.warn(f"The noise found so far cannot be written to {self.path}: {error}", stacklevel=2)
