"""When to end a run of ReNO, and which of its images to return: rules compared on the same runs.

python benchmarks/stopping.py --output stopping.json
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from per_second import SPLITS, Problem, batches, settings  # pyright: ignore[reportMissingImports]
from torch import Tensor
from tqdm import tqdm

from noiseopt import AutoReward, ReNO, optimize_noise, shapes_world
from noiseopt.callbacks import StepImages
from noiseopt.demo import ONE_STEP, load_pipeline
from noiseopt.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap
from noiseopt.pipelines.reno.stopping import JUDGING_VIEWS, StoppingRewards
from noiseopt.pipelines.reno.views import random_views
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Reward

LENGTHS = (5, 10, 15, 20, 30, 40, 50, 80, 120)
PATIENCES = (3, 5, 8, 10, 15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed(ReNO):
    """ReNO that makes all steps, as all rules would, and whose loss is minus the mean over the views."""

    def objective(self, pipe) -> StoppingRewards:
        objective = StoppingRewards(self.differentiable_rewards(pipe, self.rewards), self.views_used)
        objective.callbacks = ()
        return objective


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """All evaluations of runs.

    Attributes:
        scores: `(T, B)` by name: "reward" of the image, "views", the mean over its views, and "held-out".
        right: `(T, B)`, whether the judge calls the image right.
        seconds: Processor seconds of an evaluation of one image, by the reward alone.
        more: `seconds` of "views" and "held-out", beyond these; those of views are 0 where the gradient is theirs.
    """

    scores: dict[str, Tensor]
    right: Tensor
    seconds: float
    more: dict[str, float]

    def best(self, name: str, last: Tensor) -> Tensor:
        """Return the steps `(B,)` of the highest scores up to the steps `last` `(B,)`."""
        steps = torch.arange(len(self.right))[:, None]
        return self.scores[name].masked_fill(steps > last, -torch.inf).argmax(0)

    def after(self, count: int) -> Tensor:
        """Return the last steps `(B,)` of runs of `count` evaluations."""
        return torch.full(self.right.shape[1:], min(count, len(self.right)) - 1)

    def patient(self, name: str, patience: int) -> Tensor:
        """Return the steps `(B,)` at which a score has not risen for as many steps, or the last ones."""
        highest = self.scores[name].cummax(0).values
        rises = torch.cat([torch.ones_like(highest[:1], dtype=torch.bool), highest[1:] > highest[:-1]])
        steps = torch.arange(len(highest))[:, None].expand_as(highest)
        waited = steps - steps.where(rises, 0).cummax(0).values
        ended = waited >= patience
        return torch.where(ended.any(0), ended.int().argmax(0), len(highest) - 1)

    def outcome(self, chosen_by: str, last: Tensor, ended_by: str = "reward") -> dict[str, Any]:
        """Return the estimates of a rule, and the gain over the reward alone in as many seconds."""
        count = float(last.double().mean()) + 1
        seconds = count * (self.seconds + sum(self.more.get(name, 0.0) for name in {chosen_by, ended_by}))
        usual = self.after(max(1, int(seconds / self.seconds + 1e-6)))
        ours, theirs = (
            self.right.gather(0, self.best(name, end)[None])[0].double()
            for name, end in ((chosen_by, last), ("reward", usual))
        )
        values = {"right": bootstrap(ours), "gain": paired_bootstrap(ours, theirs)}
        estimates = {name: dataclasses.asdict(value) for name, value in values.items()}
        return {**estimates, "evaluations": count, "seconds": seconds}

    def rules(self) -> dict[str, dict[str, Any]]:
        """Return the outcome of each rule by name."""
        found = {}
        for count in (each for each in LENGTHS if each <= len(self.right)):
            for name in self.scores:
                found[f"{count} evaluations, best {name}"] = self.outcome(name, self.after(count))
        for patience in PATIENCES:
            for ends, best in (
                ("reward", "reward"),
                ("views", "views"),
                ("held-out", "held-out"),
                ("held-out", "reward"),
                ("held-out", "views"),
            ):
                name = f"{ends} not risen for {patience}, best {best}"
                found[name] = self.outcome(best, self.patient(ends, patience), ends)
        return found


def follow(pipe, method: Followed, reward: Reward, reader: Reward, problems: Sequence[Problem]) -> Runs:
    """Run a batch, and read and judge all of its images afterwards."""
    frames, prompts = StepImages(), [problem.prompt for problem in problems]
    start = time.process_time()
    generator = [problem.generator() for problem in problems]
    result = optimize_noise(pipe, prompts, method, callbacks=frames, generator=generator, **ONE_STEP)
    end, images = time.process_time(), [frames.images[step] for step in sorted(frames.images)]
    with torch.no_grad():
        read = torch.stack([reader(each, prompts) for each in images])
        read_at = time.process_time()
        for each in images * (method.views_used == 0):  # the run has scored such views, only to judge it
            for view in random_views(each, JUDGING_VIEWS, range(len(each))):
                reward(view, prompts)
    seen_at, count = time.process_time(), read.numel()
    more = {"held-out": (read_at - end) / count, "views": (seen_at - read_at) / count}
    right = torch.tensor([[each.correct for each in shapes_world.judge(batch, prompts)] for batch in images])
    (own,) = result.scores.values()
    scores = {"reward": own, "views": -result.losses, "held-out": read}
    return Runs(scores, right, (end - start) / count - more["views"], more)


def joined(parts: Sequence[Runs]) -> Runs:
    """Return the runs of several batches."""
    sizes = torch.tensor([part.right.shape[1] for part in parts]).double()

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values) * sizes).sum() / sizes.sum())

    seconds = mean([part.seconds for part in parts])
    more = {name: mean([part.more[name] for part in parts]) for name in parts[0].more}
    scores = {name: torch.cat([part.scores[name] for part in parts], 1) for name in parts[0].scores}
    return Runs(scores, torch.cat([part.right for part in parts], 1), seconds, more)


def table(rules: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| rule | right | evaluations | seconds | more than the reward in the same time |",
        "|---|---|---|---|---|",
    ]
    for name, rule in rules.items():
        right, gain = (Estimate(**rule[key]) for key in ("right", "gain"))
        lines.append(
            f"| {name} | {100 * right.value:.1f}% [{100 * right.low:.1f}, {100 * right.high:.1f}] | "
            f"{rule['evaluations']:.1f} | {rule['seconds']:.3f} | {100 * gain.value:+.1f} "
            f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] |"
        )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("turbo", "sdxl-turbo"), default="turbo")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--limit", type=int, help="use only the first prompts of the split")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noises")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of each run")
    parser.add_argument("--views", type=int, help="that give the gradient (default: that of ReNO)")
    parser.add_argument("--batch-size", type=int, default=8, help="independent problems per call")
    parser.add_argument("--output", type=Path, default=Path("stopping.json"), help="file for all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write all numbers as JSON."""
    arguments = parse_arguments(argv)
    prompts = getattr(shapes_world, SPLITS[arguments.split])[: arguments.limit]
    problems = [Problem(prompt, i, arguments.seed) for i, prompt in enumerate(prompts)]
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    with quiet_libraries():
        reward, reader = (AutoReward.from_pretrained(shapes_world.path(name)) for name in ("clip", "vqa"))
    method = Followed(rewards=reward, steps=arguments.steps, search=0, views=arguments.views)
    groups = list(batches(problems, arguments.batch_size))
    rules = joined([follow(pipe, method, reward, reader, batch) for batch in tqdm(groups, unit="batch")]).rules()
    print(f"\n{arguments.model}, {arguments.split}, {len(prompts)} prompts\n")
    print(table(rules))
    arguments.output.write_text(json.dumps({"settings": settings(arguments), "rules": rules}, indent=1) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
