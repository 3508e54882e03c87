"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there as a whole or not at all, whenever the process ends.

    If the writing ends in an exception, Ctrl-C among them, what was there before is still there, and nothing else.
    """
    part = part_of_file(path)
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_of_file(path: Path) -> Path:
    """Where a file is written before it is moved to its place: a name of the same kind in the same folder."""
    return path.with_name(f".part-{path.name}")
