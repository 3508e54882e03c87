"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there as a whole or not at all, whenever the process ends."""
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)
