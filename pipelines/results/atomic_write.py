"""Atomic file writes."""

import contextlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PART_NAME = re.compile(r"\.noiseopt-[0-9a-f]{16}\.part(\..+)?")


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write(part)` writes a temporary file, which then replaces `path`.

    If writing fails or is interrupted, a previous file stays as it was, and no temporary file is left behind; that of a
    process that was killed is removed by the next write to the same folder. An existing file keeps its mode; a new one
    has the mode that the umask allows. A symbolic link is replaced and not followed.

    Raises:
        ValueError: If there is something at `path` that is not a file, such as a folder or a device.
        OSError: If the file cannot be written, naming it.
    """
    try:
        check_replaceable(path)
        with part_beside(path) as (part, lock):
            mode = stat.S_IMODE((part if path.is_symlink() or not path.is_file() else path).stat().st_mode)
            write(part)
            os.fsync(lock.fileno())  # or a power failure could leave an empty file with the final name
            part.chmod(mode)
            if sys.platform == "win32":  # which renames no open file
                lock.close()
            os.replace(part, path)
    except OSError as error:
        if error.errno is None:
            raise
        remedy = "Free some space, or choose another path; a file that was there is kept"
        raise OSError(error.errno, f"{error.strerror}. {remedy}", str(path)) from error


def check_replaceable(path: Path) -> None:
    """Raise `ValueError` if there is something at `path` that is not a file, such as a folder or a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a folder. Add a name to it" if stat.S_ISDIR(mode) else "a device or a pipe. Choose another one"
        raise ValueError(f"Expected the path of a file to write, but {path} is {what}.")


@contextlib.contextmanager
def part_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file in the folder of `path`, with its suffix, and the lock on it; removed unless it was renamed."""
    remove_abandoned(path.parent)
    while True:
        part = path.with_name(f".noiseopt-{secrets.token_hex(8)}.part{path.suffix}")
        try:
            with part.open("xb") as lock:
                if take_lock(lock, wait=True) and not os.fstat(lock.fileno()).st_nlink:
                    continue  # removed by another process before it was locked
                yield part, lock
                return
        finally:
            part.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed: those that nobody has locked."""
    with os.scandir(folder) as entries:
        parts = [entry for entry in entries if PART_NAME.fullmatch(entry.name)]
    for entry in parts:
        with contextlib.suppress(OSError):  # another process may have finished it, or removed it
            if entry.is_file(follow_symlinks=False):
                with open(entry.path, "r+b") as file:
                    if take_lock(file, wait=False):
                        os.unlink(entry.path)


def take_lock(file: BinaryIO, wait: bool) -> bool:
    """Lock a file for as long as it is open. Return `False` if someone else has, or where files have no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
