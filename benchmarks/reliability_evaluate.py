"""Kill `noiseopt evaluate` at random moments, start it again, and compare the end with an uninterrupted evaluation.

python benchmarks/reliability_evaluate.py --count 50

All runs write to one folder and die by SIGKILL, which no code can catch. After each, every unit that was finished has
to be there, unchanged. At the end the table, and the numbers, noises and images of every unit have to equal those of an
evaluation that nobody interrupted; only seconds and memory may differ.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from noiseopt.cli import main as noiseopt
from noiseopt.evaluation import evaluate, figures  # noqa: F401  imported once, for all processes

COMMAND = ["evaluate", "--method", "reno:steps=2", "--method", "best_of_n:steps=2", "--best-of", "2", "--device", "cpu"]
FORK = multiprocessing.get_context("fork")


def start(folder: Path, limit: int) -> Any:
    """Start an evaluation in a process of its own."""
    process = FORK.Process(target=run, args=([*COMMAND, "--limit", str(limit), "--output", str(folder)], folder))
    process.start()
    return process


def run(arguments: Sequence[str], folder: Path) -> None:
    """Run the command with its output in a file beside the folder."""
    with (
        folder.with_suffix(".log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        noiseopt(arguments)


def finish(folder: Path, limit: int) -> float:
    """Run an evaluation to its end and return its seconds."""
    started, process = time.perf_counter(), start(folder, limit)
    process.join()
    if process.exitcode:
        raise SystemExit(f"The evaluation failed:\n{folder.with_suffix('.log').read_text()}")
    return time.perf_counter() - started


def finished(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of each finished unit."""
    paths = folder.glob("units/*/*/*.json")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def end_of(folder: Path) -> dict[str, Any]:
    """Return all that an evaluation leaves but seconds and memory."""
    found: dict[str, Any] = {name: (folder / name).read_text() for name in ("table.md", "table.csv")}
    for path in sorted(folder.glob("units/*/*/*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            unit = json.loads(path.read_text())
            found[name] = {**unit, "cost": unit["cost"]["model_calls"]}
    return found


def kill_evaluations(count: int, folder: Path, limit: int = 24, seed: int = 0) -> dict[str, int]:
    """Kill `count` evaluations of `limit` prompts in one folder, and return what was counted.

    Returns:
        "killed"; "while measuring" and "while reporting", the kills of runs that began with missing units and without;
        "units"; "units lost" and "units changed" by a later run; "temporary files left" at the end; and "differences"
        of the end from that of an uninterrupted evaluation.
    """
    seconds = finish(folder / "uninterrupted", limit)
    expected, place, chance = end_of(folder / "uninterrupted"), folder / "killed", random.Random(seed)
    total = sum(name.endswith(".json") for name in expected)
    counts = {"killed": 0, "while measuring": 0, "while reporting": 0, "units": total}
    counts |= {"units lost": 0, "units changed": 0}
    longest = seconds / 3  # of a run until it is killed
    with tqdm(total=count, unit="kill") as bar:
        before: dict[str, tuple[int, bytes]] = {}
        while counts["killed"] < count:
            started, process = time.perf_counter(), start(place, limit)
            process.join(chance.uniform(0, longest))
            if process.exitcode is None:
                process.kill()
                process.join()
            elif process.exitcode:
                raise SystemExit(f"The evaluation failed:\n{place.with_suffix('.log').read_text()}")
            else:  # all units are there: from now on it only writes the tables and figures
                longest = time.perf_counter() - started
                continue
            after = finished(place)
            counts["killed"] += 1
            counts["while reporting" if len(before) == total else "while measuring"] += 1
            counts["units lost"] += len(before.keys() - after.keys())
            counts["units changed"] += sum(after[name] != before[name] for name in before.keys() & after.keys())
            before = after
            bar.set_postfix(units=f"{len(after)}/{total}")
            bar.update()
    finish(place, limit)
    found = end_of(place)
    names = expected.keys() | found.keys()
    counts["temporary files left"] = sum(path.is_file() for path in place.rglob(".*"))
    counts["differences"] = sum(expected.get(name) != found.get(name) for name in names)
    return counts


def main(arguments: Sequence[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description="Kill evaluations at random moments and compare the end.")
    parser.add_argument("--count", type=int, default=50, help="evaluations to kill (default: 50)")
    parser.add_argument("--limit", type=int, default=24, help="prompts of the evaluation (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options = parser.parse_args(arguments)
    if min(options.count, options.limit) < 1 or sys.platform == "win32":
        parser.error("expected at least 1 kill and 1 prompt, on a system with fork")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_evaluations(options.count, Path(folder), options.limit, options.seed)
    for name, number in counts.items():
        print(f"{name}: {number}")
    if any(counts[name] for name in ("units lost", "units changed", "temporary files left", "differences")):
        raise SystemExit(1)
    return counts


if __name__ == "__main__":
    main()
