"""ReNO against plain sampling and best-of-N by the same reward at equal wall-clock time, evaluated by the judge.

python benchmarks/reno_vs_best_of_n.py --limit 40 --output reno.json
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import noiseopt
from noiseopt import AutoReward, BestOfN, ReNO, TimeBudget, optimize_noise, shapes_world
from noiseopt.callbacks import StepImages
from noiseopt.demo import ONE_STEP, load_pipeline
from noiseopt.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap
from noiseopt.pipelines import NoiseOptimizer
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Reward

SPLITS = {"validation": "VALIDATION_PROMPTS", "held-out": "HELD_OUT_PROMPTS"}
METHODS = {
    "plain": "plain",
    "best_of_steps": "best-of-N, equal evaluations",
    "best_of_n": "best-of-N, equal time",
    "reno": "ReNO",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, its index in the split, and the seed of its initial noise."""

    prompt: str
    index: int
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(10_000 * self.seed + self.index)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All evaluations of a method on a batch of `B` problems.

    Attributes:
        images: `(N, B, 3, 64, 64)` in [0, 1].
        rewards: `(N, B)`, higher is better.
        norms: `(N, B)`, ‖z‖ / √d.
        seconds: `(N,)`, from the start of the loop to the end of each evaluation.
    """

    images: torch.Tensor
    rewards: torch.Tensor
    norms: torch.Tensor
    seconds: torch.Tensor

    def evaluations_within(self, seconds: float) -> int:
        """Return the number of evaluations that begin within a time, at least one."""
        return min(1 + int((self.seconds < seconds).sum()), len(self.seconds))

    def best_of(self, count: int, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        """Return the outcome of the best, by reward, of the first `count` evaluations of each problem."""
        best = self.rewards[:count].argmax(0)
        at_best = (best, torch.arange(len(problems)))
        verdicts = shapes_world.judge(self.images[at_best], [problem.prompt for problem in problems])
        columns = zip(verdicts, self.rewards[at_best].tolist(), self.norms[at_best].tolist(), strict=True)
        share = float(self.seconds[count - 1]) / len(problems)
        return [
            {
                "correct": verdict.correct,
                "found": verdict.found,
                "reward": reward,
                "norm": norm,
                "evaluations": count,
                "seconds": share,
            }
            for verdict, reward, norm in columns
        ]


def run(pipe, method: NoiseOptimizer, problems: Sequence[Problem], budget: float | None = None) -> Run:
    """Run a method on a batch and store every evaluation; `budget` in seconds."""
    frames, seconds = StepImages(), []
    callbacks = [frames, lambda state: seconds.append(state.elapsed)]
    callbacks += [TimeBudget(budget)] if budget is not None else []
    generators = [problem.generator() for problem in problems]
    prompts = [problem.prompt for problem in problems]
    result = optimize_noise(pipe, prompts, method, callbacks=callbacks, generator=generators, **ONE_STEP)
    images = torch.stack([frames.images[step] for step in sorted(frames.images)])
    return Run(images, -result.losses.cpu(), result.norms.cpu(), torch.tensor(seconds))


class Comparison:
    """ReNO and best-of-N on one batch after another, alternating in order.

    One best-of-N run serves three rows: its first evaluation is the plain image, its first `steps` are best-of-N at
    equal evaluations, and those that begin within ReNO's seconds are best-of-N at equal time. It runs longer than that,
    or than ReNO's last time if it runs before ReNO, and is cut once ReNO's time on this batch is known.
    """

    ahead = 1.5

    def __init__(self, pipe, reward: Reward, steps: int, mode: str) -> None:
        self.pipe = pipe
        # √2: the embedded models' noise has 8 channels, so that its norm is √2 times that of the paper's models
        rate = 5.0 * math.sqrt(2)
        self.reno = ReNO(rewards=reward, steps=steps, mode=mode, learning_rate=rate)  # pyright: ignore[reportArgumentType]
        self.best_of_n = BestOfN(rewards=reward, steps=1_000_000)
        self.seconds_per_image: float | None = None

    def measure(self, problems: Sequence[Problem], reno_first: bool) -> list[dict[str, Any]]:
        """Return one row per problem."""
        if reno_first or self.seconds_per_image is None:
            reno = run(self.pipe, self.reno, problems)
            other = run(self.pipe, self.best_of_n, problems, self.ahead * float(reno.seconds[-1]))
        else:
            other = run(self.pipe, self.best_of_n, problems, self.ahead * self.seconds_per_image * len(problems))
            reno = run(self.pipe, self.reno, problems)
        seconds = float(reno.seconds[-1])
        self.seconds_per_image = seconds / len(problems)
        outcomes = {
            "plain": other.best_of(1, problems),
            "best_of_steps": other.best_of(min(self.reno.steps, len(other.seconds)), problems),
            "best_of_n": other.best_of(other.evaluations_within(seconds), problems),
            "reno": reno.best_of(len(reno.seconds), problems),
        }
        return [
            dataclasses.asdict(problem)
            | {"category": shapes_world.category(problem.prompt)}
            | {name: outcome[i] for name, outcome in outcomes.items()}
            for i, problem in enumerate(problems)
        ]


def batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    return (problems[start : start + size] for start in range(0, len(problems), size))


class Table:
    """Estimates over prompts from the measured problems (one prompt with one seed each).

    Each prompt counts once, however many seeds it has.

    Args:
        rows: By method the outcome of each problem, and the index and category of its prompt.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def sums(self, value: Callable[[dict[str, Any]], float], keep: Callable[[dict[str, Any]], bool]):
        """Return the sum of a value over the rows of each prompt that `keep` selects, and their number, both `(P,)`.

        Prompts without such rows are left out.
        """
        ordered = sorted(filter(keep, self.rows), key=lambda row: row["index"])
        groups = [[value(row) for row in group] for _, group in itertools.groupby(ordered, lambda row: row["index"])]
        return torch.tensor([sum(group) for group in groups]).double(), torch.tensor([len(group) for group in groups])

    def mean(self, method: str, name: str, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> Estimate:
        """Return the mean of one number of a method's outcomes over the rows that `keep` selects."""
        return bootstrap(*self.sums(lambda row: float(row[method][name]), keep))

    def difference(self, ours: str, theirs: str, name: str = "correct") -> Estimate:
        """Return the paired difference of a number between two methods."""
        sides = (
            self.sums(lambda row, method=method: float(row[method][name]), lambda row: True)
            for method in (ours, theirs)
        )
        return paired_bootstrap(*(total / count for total, count in sides))

    def categories(self) -> dict[str, Callable[[dict[str, Any]], bool]]:
        """Return, by category with its number of prompts, the function that tells whether a row belongs to it."""
        category_of = {row["index"]: row["category"] for row in self.rows}
        counts = collections.Counter(category_of.values())
        return {
            f"{name} (n = {counts[name]})": lambda row, name=name: row["category"] == name
            for name in shapes_world.CATEGORIES
            if counts[name]
        }

    def estimates(self, method: str) -> dict[str, Estimate]:
        """Return all numbers of one method."""
        return {
            "right": self.mean(method, "correct"),
            **{f"right, {name}": self.mean(method, "correct", keep) for name, keep in self.categories().items()},
            "failures repaired": self.mean(method, "correct", lambda row: not row["plain"]["correct"]),
            "right ones kept": self.mean(method, "correct", lambda row: row["plain"]["correct"]),
            "reward": self.mean(method, "reward"),
            "evaluations": self.mean(method, "evaluations"),
            "seconds": self.mean(method, "seconds"),
            "‖z‖/√d": self.mean(method, "norm"),
        }

    def summary(self) -> dict[str, Any]:
        """Return all estimates as plain numbers."""
        pairs = [("reno", "plain"), ("reno", "best_of_steps"), ("reno", "best_of_n"), ("best_of_n", "plain")]
        methods = {method: self.estimates(method) for method in METHODS}
        differences = {f"{ours} - {theirs}": self.difference(ours, theirs) for ours, theirs in pairs}
        return {
            "methods": {
                method: {name: dataclasses.asdict(each) for name, each in estimates.items()}
                for method, estimates in methods.items()
            },
            "differences": {name: dataclasses.asdict(each) for name, each in differences.items()},
        }


def markdown(summary: dict[str, Any]) -> str:
    """Format the summary as two tables: shares in percent, with 95% intervals over prompts."""
    names = list(summary["methods"]["plain"])
    lines = ["| | " + " | ".join(METHODS.values()) + " |", "|---" * (1 + len(METHODS)) + "|"]
    for name in names:
        cells = [formatted(name, summary["methods"][method][name]) for method in METHODS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| difference in images judged right | points |", "|---|---|"]
    for pair, estimate in summary["differences"].items():
        ours, theirs = (METHODS[name] for name in pair.split(" - "))
        lines.append(f"| {ours} − {theirs} | {formatted('right', estimate, sign='+')} |")
    return "\n".join(lines)


def formatted(name: str, estimate: dict[str, float], sign: str = "") -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if math.isnan(value):
        return "–"
    if name.startswith(("right", "failures")):
        return f"{100 * value:{sign}.1f}% [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
    return {"reward": "{:.2f}", "evaluations": "{:.0f}"}.get(name, "{:.3f}").format(value)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--limit", type=int, help="use only the first prompts of the split")
    parser.add_argument("--seeds", type=int, default=1, help="initial noises per prompt")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of ReNO")
    parser.add_argument("--mode", choices=("default", "parity"), default="default", help="mode of ReNO")
    parser.add_argument("--batch-size", type=int, default=8, help="independent problems per call")
    parser.add_argument("--output", type=Path, default=Path("reno_vs_best_of_n.json"), help="file for all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write all numbers as JSON."""
    arguments = parse_arguments(argv)
    prompts = getattr(shapes_world, SPLITS[arguments.split])[: arguments.limit]
    numbered = list(enumerate(prompts))
    problems = [Problem(prompt, i, seed) for seed in range(arguments.seeds) for i, prompt in numbered]
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with quiet_libraries():
        reward = AutoReward.from_pretrained(shapes_world.path("clip"))
    comparison = Comparison(pipe, reward, arguments.steps, arguments.mode)
    warm_up(pipe, reward, problems[: arguments.batch_size])
    rows = []
    for number, batch in enumerate(tqdm(list(batches(problems, arguments.batch_size)), unit="batch")):
        rows += comparison.measure(batch, reno_first=number % 2 == 0)
    summary = Table(rows).summary()
    print(f"\n{arguments.split}, {len(prompts)} prompts × {arguments.seeds} seeds, {arguments.mode} mode\n")
    print(markdown(summary))
    write(arguments, {"settings": settings(arguments), "summary": summary, "rows": rows})


def warm_up(pipe, reward: Reward, problems: Sequence[Problem]) -> None:
    """Run the first passes, which are slower."""
    for method in (ReNO(rewards=reward, steps=2), BestOfN(rewards=reward, steps=2)):
        run(pipe, method, problems)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that the numbers depend on besides the code."""
    given = {name: value for name, value in vars(arguments).items() if name != "output"}
    machine = {
        "noiseopt": noiseopt.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    return given | machine


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
