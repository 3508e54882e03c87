"""Run programs in fresh processes that do not import torch, diffusers and transformers again.

A user's program starts with nothing loaded, and the Hub's address is read when the libraries are imported, so each
program needs its own process. Importing the libraries takes ten times as long as the program itself: one server process
that sees only the loopback Hub imports them, and forks for each program.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
OURS = (ROOT / "src", ROOT / "tests")
# None imports noiseopt: a program imports it from the path it is given.
LIBRARIES = ["torch", "diffusers.pipelines.pipeline_utils", "transformers", "tiny_pipelines"]


class FreshProcesses:
    """Forks of a process that has imported `LIBRARIES` and sees only this Hub."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        environment = hub.environment | {"PYTHONPATH": str(ROOT / "tests")}
        with mock.patch.dict(os.environ, environment, clear=True):
            multiprocessing.forkserver.ensure_running()

    def start(
        self,
        program: Path,
        *arguments: str | Path,
        folder: Path,
        out: Path,
        err: Path,
        path: Sequence[Path] = OURS,
    ) -> BaseProcess:
        """Start a program in `folder`, with its output in two files and `path` in front of its `sys.path`."""
        given = (program, [str(argument) for argument in arguments], folder, path, out, err)
        process = self.context.Process(target=execute, args=given, daemon=True)
        process.start()
        return process

    def run(
        self,
        program: str | Path,
        *arguments: str | Path,
        folder: Path,
        path: Sequence[Path] = OURS,
        timeout: float = 100.0,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program, given as a file or as source, to its end, like `subprocess.run`."""
        with tempfile.TemporaryDirectory() as temporary:
            file, out, err = (Path(temporary) / name for name in ("program.py", "out", "err"))
            if isinstance(program, str):
                file.write_text(program, encoding="utf-8")
            else:
                file = program
            for log in (out, err):
                log.touch()
            process = self.start(file, *arguments, folder=folder, out=out, err=err, path=path)
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise TimeoutError(f"{err.read_text()}\nnot finished after {timeout} s")
            return subprocess.CompletedProcess([file, *arguments], process.exitcode, out.read_text(), err.read_text())


def execute(
    program: Path,
    arguments: list[str],
    folder: Path,
    path: Sequence[Path],
    out: Path,
    err: Path,
) -> None:
    """Run the program in the forked process."""
    gc.freeze()  # objects of the server process are never collected
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.chdir(folder)
    sys.argv = [str(program), *arguments]
    others = {str(ROOT), *map(str, OURS)}  # inherited from pytest
    sys.path[:] = [*map(str, path), *(each for each in sys.path if each not in others)]
    runpy.run_path(str(program), run_name="__main__")
