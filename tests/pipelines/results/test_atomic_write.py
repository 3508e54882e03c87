"""Files that are replaced whole: beside other writers, on a full disk, after a kill, with the modes of plain files."""

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from noiseopt.pipelines.results import atomic_write as module
from noiseopt.pipelines.results.atomic_write import PART_NAME, atomic_write

LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("atomic_write", {str(Path(module.__file__))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def write(path: Path, content: bytes = b"new") -> None:
    atomic_write(path, lambda part: part.write_bytes(content))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def test_the_umask_decides_the_mode_of_a_new_file_and_an_old_one_keeps_its_own(tmp_path):
    for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            write(tmp_path / f"{mask}")
        assert mode(tmp_path / f"{mask}") == expected
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    write(tmp_path / "old")
    assert mode(tmp_path / "old") == 0o640 and (tmp_path / "old").read_bytes() == b"new"


def test_a_write_that_replaces_its_temporary_file_gets_the_same_mode(tmp_path):
    def save(part: Path) -> None:
        other = part.with_name("other")
        other.touch(mode=0o600)
        other.replace(part)

    with umask(0o022):
        atomic_write(tmp_path / "new", save)
    assert mode(tmp_path / "new") == 0o644


def test_a_device_a_pipe_and_a_folder_are_refused_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    for name, why in (
        ("pipe", "device or a pipe"),
        ("device", "device or a pipe"),
        ("folder", "is a folder. Add a na"),
    ):
        with pytest.raises(ValueError, match=f"^Expected the path of a file to write, but .*{name} .*{why}"):
            write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "device").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "folder", "device"}


def test_a_link_is_replaced_and_what_it_names_is_untouched(tmp_path):
    """A folder from someone else may hold links to any file."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "mine").chmod(0o600)
    (tmp_path / "link").symlink_to("mine")
    with umask(0o022):
        write(tmp_path / "link")
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "link").is_symlink()
    assert mode(tmp_path / "link") == 0o644


def test_a_full_disk_is_an_error_with_the_path_and_the_older_file_stays(tmp_path):
    """The system's limit for the size of a file stands for the full disk."""
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="Free some space, or choose another path; a file that was there") as error:
            write(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_is_missing_or_closed_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write(tmp_path / "gone" / "file")


def test_many_writers_of_one_path(tmp_path):
    """Each write succeeds, whole, and files that look similar are the user's own."""
    path, errors = tmp_path / "shared", []
    own = [tmp_path / ".part-shared", tmp_path / ".noiseopt-mine.part", tmp_path / ".tmpAb3dEf"]
    for file in own:
        file.write_bytes(b"own")

    def many(content: bytes) -> None:
        try:
            for _ in range(60):
                write(path, content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(bytes([index]) * 50_000,)) for index in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            assert len(content) == 50_000 and len(set(content)) == 1
    assert not errors and sorted(tmp_path.iterdir()) == sorted([path, *own])


def test_what_a_killed_process_leaves_is_removed_by_the_next_write_and_only_that(tmp_path):
    """Two processes hang in the middle of a write; one is killed."""
    hang = LOAD + textwrap.dedent("""
        import time
        def write(part):
            part.write_bytes(b"half")
            print("half", flush=True)
            time.sleep(60)
        from pathlib import Path
        module.atomic_write(Path(sys.argv[1]), write)
    """)
    command = [sys.executable, "-S", "-c", hang]
    names = (tmp_path / "killed.png", tmp_path / "living.png")
    processes = [subprocess.Popen([*command, str(name)], stdout=subprocess.PIPE) for name in names]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"half\n"
        parts = [path for path in tmp_path.iterdir() if PART_NAME.fullmatch(path.name)]
        assert len(parts) == 2 and all(path.suffix == ".png" for path in parts)
        write(tmp_path / "other")
        assert set(parts) < set(tmp_path.iterdir())
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        write(tmp_path / "other")
        left = [path for path in tmp_path.iterdir() if PART_NAME.fullmatch(path.name)]
        assert len(left) == 1 and left[0].read_bytes() == b"half"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
