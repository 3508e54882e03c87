"""Atomic file writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write(temporary)` writes a temporary file, which then replaces `path`.

    If writing fails or is interrupted, a previous file stays as it was, and no temporary file is left behind.
    """
    temporary = temporary_path(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Return the path of the temporary file: in the same folder, with the same suffix."""
    return path.with_name(f".part-{path.name}")
