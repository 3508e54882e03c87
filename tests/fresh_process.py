"""Programs in processes of their own, without importing torch, diffusers and transformers for each.

A program of a user finds nothing loaded by another one, and the Hub's address is read when the libraries are imported:
hence a process for each. Importing the libraries takes ten times what such a program does, so that one process does
it, which sees a loopback Hub only, and is forked for each program.
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
# None of them imports noiseopt, which a program takes from where it is told to.
LIBRARIES = ["torch", "diffusers.pipelines.pipeline_utils", "transformers", "tiny_pipelines"]


class FreshProcesses:
    """Forks of a process that has imported `LIBRARIES` and sees this Hub alone, with one thread each."""

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
        """Begin to run a program in a folder; what it says goes to two files. `path` is where it finds our modules."""
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
        """Run a program, a file or its source, to its end; as `subprocess.run` does."""
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
                raise TimeoutError(f"{err.read_text()}\nended after {timeout} s")
            return subprocess.CompletedProcess([file, *arguments], process.exitcode, out.read_text(), err.read_text())


def execute(
    program: Path,
    arguments: list[str],
    folder: Path,
    path: Sequence[Path],
    out: Path,
    err: Path,
) -> None:
    """What a fork does."""
    gc.freeze()  # what came with it is no garbage
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.chdir(folder)
    sys.argv = [str(program), *arguments]
    others = {str(ROOT), *map(str, OURS)}  # pytest's, which came with the fork
    sys.path[:] = [*map(str, path), *(each for each in sys.path if each not in others)]
    runpy.run_path(str(program), run_name="__main__")
