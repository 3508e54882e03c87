"""A search before ReNO's steps, and several starts: what they give in the time of steps from the given noise alone.

python benchmarks/search_and_starts.py --limit 96 --evaluations 16 32

Times are of the processor. A search of a share of the time scores as many noises as fit, from the measured costs.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from per_second import MODELS, Problem, batches, inputs, right  # pyright: ignore[reportMissingImports]

from noiseopt import AutoReward, BestOfN, ReNO, optimize_noise, shapes_world
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import paired_bootstrap
from noiseopt.pipelines import NoiseOptimizer
from noiseopt.quiet import quiet_libraries

BATCH = 16
TRIED = ((0.15, 1), (0.3, 1), (0.5, 1), (0.3, 2), (0.3, 4))  # shares of the search, and starts


@dataclasses.dataclass(frozen=True)
class Costs:
    """Processor seconds of an evaluation without a gradient, of a preview, and of an evaluation with its gradient.

    Attributes:
        single_step: Whether the pipeline makes one step. Then previews are images, and the baseline is one of those
            that are searched.
    """

    plain: float
    preview: float
    gradient: float
    single_step: bool

    def settings(self, seconds: float, share: float, starts: int) -> dict[str, Any] | None:
        """Return the settings of a run of a time whose search has a share; `None` if too little is left for steps."""
        search = max(starts, int(share * seconds / self.preview))
        before = 0 if self.single_step else 1
        moving = int((seconds - search * self.preview - before * self.plain) / self.gradient)
        steps = before + search + moving
        return None if steps < 1 + search + starts else {"steps": steps, "search": search, "starts": starts}


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Verdicts and rewards of the returned images, `(P,)` each, and the processor seconds of all."""

    right: torch.Tensor
    rewards: torch.Tensor
    seconds: float


class Bench:
    """A model, the embedded CLIP as its reward, and prompts with one noise each."""

    def __init__(self, model: str, prompts: Sequence[str]) -> None:
        self.pipe: Any = load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        with quiet_libraries():
            self.reward = AutoReward.from_pretrained(shapes_world.path("clip"))
        self.problems = [Problem(prompt, index, 0) for index, prompt in enumerate(prompts)]
        self.call = dict(shapes_world.MODELS[model].call)

    def run(self, method: NoiseOptimizer) -> Outcome:
        """Run a method on all prompts."""
        verdicts, rewards, seconds = [], [], 0.0
        for problems in batches(self.problems, BATCH):
            prompts, generators = inputs(problems)
            began = time.process_time()
            result = optimize_noise(self.pipe, prompts, method, generator=generators, **self.call)
            seconds += time.process_time() - began
            assert result.images is not None
            verdicts.append(right(result.images, prompts))
            rewards.append(-result.best_loss)
        return Outcome(torch.cat(verdicts), torch.cat(rewards), seconds)

    def costs(self) -> Costs:
        """Measure the costs of evaluations of all prompts, each from two runs of different length."""
        reward, single = self.reward, self.call["num_inference_steps"] == 1
        self.run(ReNO(rewards=reward, steps=2, search=0))
        plain = self.difference(*(BestOfN(rewards=reward, steps=steps) for steps in (2, 6)))
        gradient = self.difference(*(ReNO(rewards=reward, steps=steps, search=0) for steps in (2, 6)))
        looks = (BestOfN(rewards=reward, steps=steps, preview=True, keep=2) for steps in (2, 6))
        return Costs(plain, plain if single else self.difference(*looks), gradient, single)

    def difference(self, short: NoiseOptimizer, long: NoiseOptimizer) -> float:
        """Return the seconds of one more step."""
        return (self.run(long).seconds - self.run(short).seconds) / (long.steps - short.steps)

    def table(self, evaluations: Sequence[int]) -> str:
        """Measure, and return the table of all outcomes."""
        costs, reward = self.costs(), self.reward
        lines = [
            "| evaluations | search | starts | right | difference | reward | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for count in evaluations:
            alone = self.run(ReNO(rewards=reward, steps=count, search=0))
            lines.append(row(count, "none", 1, alone, alone))
            for share, starts in TRIED:
                if found := costs.settings(count * costs.gradient, share, starts):
                    outcome = self.run(ReNO(rewards=reward, **found))
                    lines.append(row(found["steps"], f"{found['search']} ({share:.0%})", starts, outcome, alone))
            seconds = count * costs.gradient
            best = self.run(BestOfN(rewards=reward, steps=max(1, round(seconds / costs.plain))))
            lines.append(row(round(seconds / costs.plain), "best-of-N", 0, best, alone))
        return "\n".join(lines)


def row(steps: int, search: str, starts: int, ours: Outcome, alone: Outcome) -> str:
    """Format an outcome; the difference of right images from those of steps alone has its 95% interval, in points."""
    points = paired_bootstrap(100 * ours.right, 100 * alone.right)
    difference = f"{points.value:+.1f} [{points.low:+.1f}, {points.high:+.1f}]"
    cells = (f"{ours.right.mean():.1%}", difference, f"{ours.rewards.mean():.2f}", f"{ours.seconds:.1f}")
    return f"| {steps} | {search} | {starts} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="turbo")
    parser.add_argument("--limit", type=int, help="use only the first validation prompts")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[16, 32], help="of ReNO alone; they set the time")
    options = parser.parse_args(argv)
    prompts = shapes_world.VALIDATION_PROMPTS[: options.limit]
    print(f"{options.model}, {len(prompts)} validation prompts\n")
    print(Bench(options.model, prompts).table(options.evaluations))


if __name__ == "__main__":
    main()
