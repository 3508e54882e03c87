"""Random interrupts and kills: whether anything is lost or wrong afterwards.

python benchmarks/reliability.py --interrupts 300 --kills 50
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from noiseopt import (
    ImageSet,
    NoiseResult,
    generation,  # noqa: F401  imported once, for all processes
    grow_set,
    list_methods,
    optimize_noise,
)
from noiseopt.cli import main as noiseopt
from noiseopt.demo import ONE_STEP, load_pipeline
from noiseopt.pipelines import NeverTooLate, ReNO
from noiseopt.pipelines.registry import METHODS
from noiseopt.pipelines.results import noise_file
from noiseopt.pipelines.results.settings_diff import settings_diff

CALL = {"num_images_per_prompt": 2, **ONE_STEP}
PROMPT = "a red circle left of a blue square"
PROMPTS = [PROMPT, "a green triangle above a red square", "a blue circle", "a red square"]
SETTINGS: dict[str, dict[str, Any]] = {
    "cno": {},
    "group_selection": {"rewards": "red", "features": "tiny_image", "steps": 4},
    "never_too_late": {"diversity": {"pairwise": ("tiny_image", 5.0)}, "rewards": "red", "guard": {"blue": 0.05}},
    "noise_diffusion": {"rewards": "red", "score_range": (-1.0, 1.0), "candidates": 3},
}
IMAGES = 4  # of a set that is grown
# interrupts come last: processes cannot be forked from one whose autograd has run
PARTS = ["set", "folder", "generate", "races", "interrupts"]
TENSORS = ("noise", "latents", "losses", "norms", "best_step", "initial_noise", "band_changes")


@dataclasses.dataclass
class Count:
    """The events of one kind, and what went wrong in them."""

    name: str
    events: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def check(self, condition: bool, fault: str) -> None:
        if not condition:
            self.faults.append(fault)
            print(f"{self.name}, event {self.events}: {fault}", file=sys.stderr)

    def row(self) -> str:
        return f"| {self.name} | {self.events} | {len(self.faults)} |"


def method_of(name: str):
    return METHODS[name](**{"steps": 4, **SETTINGS.get(name, {"rewards": "red"})})


def differences(left: NoiseResult, right: NoiseResult) -> list[str]:
    """Return what differs in two results that should be equal bit by bit, but for the time that they took."""
    pairs = {name: (getattr(left, name), getattr(right, name)) for name in TENSORS}
    pairs |= {name: (values, right.scores[name]) for name, values in left.scores.items()}
    found = [name for name, (a, b) in pairs.items() if not torch.equal(a.nan_to_num(9), b.nan_to_num(9))]
    found += [] if left.reports == right.reports else ["reports"]
    return found + settings_diff(left.provenance | {"seconds": 0}, right.provenance | {"seconds": 0})


# interrupts


class Alarm:
    """Context that raises `KeyboardInterrupt` after some seconds, wherever the program is then.

    Attributes:
        rang: Whether it has raised.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rang, self.armed = seconds, False, True

    def ring(self, *_) -> None:
        if self.armed:
            self.rang, self.armed = True, False
            raise KeyboardInterrupt

    def __enter__(self) -> "Alarm":
        signal.signal(signal.SIGALRM, self.ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(self, *_) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def fingerprint(pipe) -> dict[str, Any]:
    """Return everything about a pipeline that a run could leave changed."""
    own = {name: id(value) for name, value in vars(pipe).items() if not name.startswith("_")}  # others are of each call
    found: dict[str, Any] = {"own": own, "class": type(pipe)}
    found["scheduler"] = (id(pipe.scheduler), sorted(vars(pipe.scheduler)))
    for root, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for name, module in model.named_modules():
                attributes = {
                    key: len(value) if key.endswith("_hooks") else None for key, value in vars(module).items()
                }
                flags = (module.training, getattr(module, "gradient_checkpointing", None))
                found[f"{root}.{name}"] = (type(module), attributes, flags)
            for name, weight in model.named_parameters():
                found[f"{root}.{name} weight"] = (weight.requires_grad, weight.grad is None, weight.data_ptr())
    return found


@contextlib.contextmanager
def ignored_exceptions() -> Iterator[list[str]]:
    """Yield a list of the exceptions that Python prints as ignored, such as those of finalizers."""
    found, hook = [], sys.unraisablehook
    sys.unraisablehook = lambda error: found.append(f"{error.exc_value!r} in {error.object!r}")
    try:
        yield found
    finally:
        sys.unraisablehook = hook


def interrupts(count: int, folder: Path, chance: random.Random) -> Count:
    """Interrupt runs of random methods at random moments.

    What was found up to the last finished step must be in the exception and in the file; the pipeline must be as it
    was, and so must its images; and the run must go on to the result of one that was never interrupted.
    """
    pipe, counted = load_pipeline("turbo"), Count("interrupts of `optimize_noise`")
    draw = functools.partial(plain_image, pipe)
    image, state, path = draw(), fingerprint(pipe), folder / "noise.safetensors"
    whole, seconds = {}, {}
    for name in list_methods():
        find(pipe, name)  # the first run of a method imports and measures
        begun = time.perf_counter()
        whole[name] = find(pipe, name)
        seconds[name] = time.perf_counter() - begun
    while counted.events < count:
        name, steps, error = chance.choice(list_methods()), [], None
        path.unlink(missing_ok=True)
        alarm = Alarm(chance.uniform(0, seconds[name]))
        with ignored_exceptions() as ignored:
            try:
                with alarm:
                    find(pipe, name, callbacks=lambda run, steps=steps: steps.append(run.step), save_noise_to=path)
            except KeyboardInterrupt as raised:
                error = raised
        if not alarm.rang:
            continue  # the run was faster
        counted.events += 1
        place = "" if error is None else "".join(traceback.format_tb(error.__traceback__)[-2:-1]).strip()
        counted.check(error is not None and not ignored, f"{name} did not stop: {ignored}")
        if steps:
            check_kept(counted, name, vars(error or KeyboardInterrupt()).get("noise_result"), path, len(steps), place)
        counted.check(fingerprint(pipe) == state, f"{name} left the pipeline changed: {place}")
        counted.check(torch.equal(draw(), image), f"{name} left the images changed: {place}")
        resumed = find(pipe, name, save_noise_to=path, resume_from=path)
        changed = differences(whole[name], resumed)
        counted.check(not changed, f"{name} went on to another result, {changed}: {place}")
    return counted


def check_kept(counted: Count, name: str, known: NoiseResult | None, path: Path, steps: int, place: str) -> None:
    """Check that an exception and a file have the result of at least so many steps."""
    if known is None:
        counted.check(False, f"{name} lost the result of the exception: {place}")
    else:
        counted.check(len(known.losses) >= steps, f"{name} lost steps: {place}")
    try:
        found = NoiseResult.load(path)
    except (OSError, ValueError) as error:
        counted.check(False, f"{name} left no file: {error}, {place}")
        return
    counted.check(len(found.losses) >= steps, f"{name} has a file of {len(found.losses)} of {steps} steps: {place}")
    counted.check(found.complete or len(found.losses) <= 4, f"{name} calls a half-done result complete: {place}")


def find(pipe, name: str, **arguments) -> NoiseResult:
    return optimize_noise(
        pipe, PROMPT, method_of(name), generator=torch.Generator().manual_seed(0), **arguments, **CALL
    )


def plain_image(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(PROMPT, generator=generator, output_type="pt", **ONE_STEP).images


# kills


def child(action: Callable[[], Any], log: Path) -> int:
    """Run an action in a forked process, and return the id of the process. Its output is appended to a file."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                action()
                status = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int, seconds: float) -> int | None:
    """Return the exit status of a process, or `None` if it was still running after some seconds and was killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that writes to a folder and can be started again.

    Attributes:
        name: Its name in the table.
        run: The function that runs it in a folder.
        finished: The function that returns how much of it is finished. Raises an error for an invalid folder.
        content: The function that returns what is in a finished folder, to be compared.
    """

    name: str
    run: Callable[[Path], Any]
    finished: Callable[[Path], int]
    content: Callable[[Path], Any]


def kills(task: Task, count: int, folder: Path, chance: random.Random) -> Count:
    """Kill a task (`kill -9`) at random moments and start it again until it is finished, in one folder after another.

    What was finished before a kill must be so after it, and the end must be that of a task that was never killed.
    """
    counted, log = Count(f"kill −9 of {task.name}"), folder / "log"
    begun = time.perf_counter()
    counted.check(ended(child(lambda: task.run(folder / "whole"), log), 600) == 0, f"failed: {log.read_text()}")
    seconds, whole, place, number = time.perf_counter() - begun, task.content(folder / "whole"), folder / "0", 0
    while counted.events < count:
        process = child(functools.partial(task.run, place), log)
        status = ended(process, chance.uniform(0, seconds))
        before = number
        try:
            number = task.finished(place)
            equal = status is None or task.content(place) == whole
        except Exception as error:
            counted.check(False, f"left a folder that cannot be loaded: {error}")
            number, equal = 0, True
        if status is None:
            counted.events += 1
            counted.check(number >= before, f"lost {before - number} results")
            continue
        counted.check(status == 0, f"ended with status {status}: {log.read_text()[-2000:]}")
        counted.check(equal, "came to another result than one that was never killed")
        shutil.rmtree(place)
        place, number = folder / str(counted.events), 0
    return counted


def races(task: Task, count: int, folder: Path, chance: random.Random) -> Count:
    """Start a task twice at nearly the same time in one new folder: one ends well, the other is refused or waits."""
    counted, log = Count(f"two processes of {task.name} on one new folder"), folder / "log"
    while counted.events < count:
        place = folder / str(counted.events)
        first = child(functools.partial(task.run, place), log)
        time.sleep(chance.uniform(0, 0.2))
        second = child(functools.partial(task.run, place), log)
        statuses = sorted([ended(first, 600), ended(second, 600)], key=str)
        counted.events += 1
        counted.check(statuses[0] == 0, f"both failed: {log.read_text()[-2000:]}")
        refused = "another process is writing to" in log.read_text()
        counted.check(statuses[1] == 0 or refused, f"failed in another way: {log.read_text()[-2000:]}")
        try:
            counted.check(task.finished(place) == IMAGES, "left an unfinished folder")
        except Exception as error:
            counted.check(False, f"left a folder that cannot be loaded: {error}")
        log.write_text("")
    return counted


def bits(result: NoiseResult) -> Any:
    """Return a result as values that can be compared."""
    return {name: getattr(result, name).tolist() for name in ("noise", "losses", "best_step")}


def grown(pipe, folder: Path, seed: int | None = 3) -> ImageSet:
    method = NeverTooLate(diversity={"dpp": ("tiny_image", 15.0)}, steps=4)
    return grow_set(pipe, PROMPT, IMAGES, method, generator=seed, folder=folder, **ONE_STEP)


def grown_unseeded(folder: Path) -> None:
    torch.seed()  # a forked process has the random state of its parent
    grown(load_pipeline("turbo"), folder, None)


def set_size(folder: Path) -> int:
    return len(ImageSet.load(folder)) if (folder / "image_set.json").exists() else 0


def set_content(folder: Path) -> Any:
    found = ImageSet.load(folder)
    pictures = [picture.tobytes() for picture in found.pictures]
    return pictures, found.seeds, found.values, [bits(result) for result in found.results]


def many(pipe, folder: Path) -> list[NoiseResult]:
    noise_file.SECONDS_BETWEEN_WRITES = 0.0  # each step is written, so that runs go on in the middle
    return optimize_noise(pipe, PROMPTS, ReNO(rewards="red", steps=4, views=0), folder=folder, generator=5, **ONE_STEP)


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Return files in order, without the hidden one of a write that was killed, which the next write removes."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def results_in(folder: Path) -> list[NoiseResult]:
    return [NoiseResult.load(path) for path in files_in(folder, "*.safetensors")]


def generated(source: Path, folder: Path) -> None:
    noise_file.SECONDS_BETWEEN_WRITES = 0.0
    options = ["--model", "turbo", "--method", "reno:steps=4", "--device", "cpu"]
    noiseopt(["generate", "--prompts", str(source), "--output", str(folder), *options])


def untimed(records: list[str]) -> list[dict[str, Any]]:
    """Parse records of prompts, without the time that they took."""
    return [{name: value for name, value in json.loads(text).items() if name != "seconds"} for text in records]


def records_in(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the finished prompts of `noiseopt generate`."""
    for path in files_in(folder, "images/*.safetensors"):
        NoiseResult.load(path)
    return untimed([path.read_text() for path in files_in(folder, "images/*.json")])


def generated_in(folder: Path) -> Any:
    pictures = {path.name: path.read_bytes() for path in files_in(folder, "images/*.png")}
    noises = [bits(NoiseResult.load(path)) for path in files_in(folder, "images/*.safetensors")]
    listed = untimed((folder / "results.jsonl").read_text().splitlines())
    return pictures, noises, listed, records_in(folder), (folder / "index.html").exists()


def tasks(folder: Path) -> dict[str, Task]:
    pipe, source = load_pipeline("turbo"), folder / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    return {
        "set": Task("`grow_set`", functools.partial(grown, pipe), set_size, set_content),
        "folder": Task(
            "`optimize_noise(folder=…)`",
            functools.partial(many, pipe),
            lambda place: sum(result.complete for result in results_in(place)),
            lambda place: [bits(result) for result in results_in(place)],
        ),
        "generate": Task(
            "`noiseopt generate`",
            functools.partial(generated, source),
            lambda place: len(records_in(place)),
            generated_in,
        ),
    }


def measured(part: str, options: argparse.Namespace, folder: Path) -> Count:
    """Run one part of the measurement in a new folder."""
    chance, place = random.Random(options.seed), folder / part
    place.mkdir()
    if part == "interrupts":
        return interrupts(options.interrupts, place, chance)
    if part == "races":
        task = Task("`grow_set`", grown_unseeded, set_size, set_content)
        return races(task, options.kills, place, chance)
    return kills(tasks(folder)[part], options.kills, place, chance)


def main(arguments: list[str] | None = None) -> list[Count]:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=300, help="number of interrupts (default: 300)")
    parser.add_argument(
        "--kills", type=int, default=50, help="number of kills of each task, and of races (default: 50)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    warnings.simplefilter("ignore")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for part in sorted(options.parts, key=PARTS.index):
            found.append(measured(part, options, Path(folder)))
            print(found[-1].row(), flush=True)
    print("\n| events | number | faults |\n|---|---:|---:|")
    print("\n".join(count.row() for count in found))
    return found


if __name__ == "__main__":
    raise SystemExit(1 if any(count.faults for count in main()) else 0)
