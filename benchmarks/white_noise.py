"""ReNO's steps on white noise, one choice at a time: the order of the frequencies, what is projected, and the update.

python benchmarks/white_noise.py --limit 96

Each row changes one setting of the default. The judge is not seen by any row.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from per_second import SPLITS, Follower, Problem, batches, inputs  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from noiseopt import AutoReward, ReNO, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseState
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines import WhiteNoiseProjection
from noiseopt.pipelines.noise_math import per_image, per_sample_norm, unit
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.pipelines.white_noise import WHITE_RATE, with_gaussian_moments
from noiseopt.quiet import quiet_libraries

MODELS = ("turbo", "sdxl-turbo")
STATISTICS = ("norm", "skewness", "excess_kurtosis", "spectral_slope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(ReNO):
    """`ReNO` with the choices of its step.

    Args:
        order: The frequencies that are neighbors: those of rings in two dimensions, or of the flattened noise with
            channels first, channels last, or packed in patches of 2 × 2 as FLUX does.
        projected: "both", the "gradient" alone (the noise keeps its norm), or the "noise" alone (the gradient is scaled
            to the norm of noise).
        update: "mean" of the gradients, or "adam", "sign" or "nesterov" in its place.
    """

    search: int = 0
    order: Literal["rings", "channels first", "channels last", "packed"] = "rings"
    projected: Literal["both", "gradient", "noise"] = "both"
    update: Literal["mean", "adam", "sign", "nesterov"] = "mean"

    def start(self, problem: NoiseProblem) -> Any:
        zeros = torch.zeros_like(problem.noise)
        return {"first": zeros, "second": zeros, "count": 0, "radius": per_sample_norm(problem.noise)}

    def step(self, run: NoiseState, gradient: torch.Tensor, state: Any) -> torch.Tensor:
        whole = math.sqrt(gradient[0].numel())
        gradient = whole * unit(gradient) if self.projected == "noise" else self.project(gradient)
        state["count"] += 1
        state["first"] = torch.lerp(gradient, state["first"], self.momentum)
        state["second"] = torch.lerp(gradient.square(), state["second"], 0.999)
        mean = state["first"] / (1 - self.momentum ** state["count"])
        spread = (state["second"] / (1 - 0.999 ** state["count"])).sqrt() + 1e-8
        updates = {
            "mean": mean,
            "adam": mean / spread,
            "sign": gradient.sign(),
            "nesterov": (1 - self.momentum) * gradient + self.momentum * mean,
        }
        moved = run.noise - self.rate_or(WHITE_RATE) * updates[self.update]
        if self.projected == "gradient":
            return moved * per_image(state["radius"] / per_sample_norm(moved), moved)
        return with_gaussian_moments(self.project(moved))

    def project(self, samples: torch.Tensor) -> torch.Tensor:
        project, (batch, channels, height, width) = WhiteNoiseProjection(), samples.shape
        if self.order == "rings":
            return project(samples)
        if self.order == "channels first":
            return project(samples.reshape(batch, 1, -1)).view(samples.shape)
        patches = samples.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        if self.order == "packed":
            flat = project(patches.reshape(batch, 1, -1)).view(patches.shape)
            return flat.permute(0, 3, 1, 4, 2, 5).reshape(samples.shape)
        flat = project(samples.permute(0, 2, 3, 1).reshape(batch, 1, -1))
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "channels first": {"order": "channels first"},
    "channels last": {"order": "channels last"},
    "packed": {"order": "packed"},
    "only the gradient projected": {"projected": "gradient"},
    "only the noise projected": {"projected": "noise"},
    "Adam": {"update": "adam"},
    "sign": {"update": "sign"},
    "Nesterov": {"update": "nesterov"},
    "no view": {"views": 0},
    "2 views": {"views": 2},
    "4 views": {"views": 4},
    "rate 0.05": {"learning_rate": 0.05},
    "rate 0.2": {"learning_rate": 0.2},
    "momentum 0.5": {"momentum": 0.5},
}


@dataclasses.dataclass
class Found:
    """The outcomes of a row by batch: `(N, B)` right images and rewards of the best so far, seconds, and z-scores."""

    right: list[torch.Tensor]
    rewards: list[torch.Tensor]
    seconds: list[torch.Tensor]
    scores: list[list[float]]

    def at(self, name: str, count: int) -> torch.Tensor:
        return torch.cat([each[count - 1] for each in getattr(self, name)]).double()


def measure(pipe: Any, reward: Any, method: ReNO, parts: Sequence[Sequence[Problem]], call: Any) -> Found:
    """Run a method on all problems, and follow its best."""
    found = Found([], [], [], [])
    for problems in parts:
        prompts, generators = inputs(problems)
        began, last = time.process_time(), {}
        clock = lambda began=began: time.process_time() - began  # noqa: E731
        follower = Follower(clock, reward.name, math.inf, method.steps)
        keep = lambda state, last=last: last.update(noise=state.noise)  # noqa: E731
        optimize_noise(pipe, prompts, method, callbacks=[follower, keep], generator=generators, **call)
        curve = follower.curve()
        found.right.append(curve.right)
        found.rewards.append(curve.rewards)
        found.seconds.append(curve.seconds[:, None].expand(-1, len(problems)))
        limits = gaussian_limits((1, *last["noise"].shape[1:]))
        for noise in last["noise"]:
            scores = limits.z_scores(noise_statistics(noise[None]))
            found.scores.append([getattr(scores, name) for name in STATISTICS])
    return found


def table(found: dict[str, Found], counts: Sequence[int]) -> str:
    """Format right images, their difference to the default, and the statistics of the last noise.

    Brackets hold 95% bootstrap intervals over prompts. The statistics are root mean squares over the noises, in
    standard errors of Gaussian noise: 1 is expected of it.
    """
    titles = [f"right after {count}, difference" for count in counts]
    lines = [" | ".join(["|", *titles, "reward", "seconds", *STATISTICS, ""]).strip()]
    lines.append("|---" * (len(counts) + 3 + len(STATISTICS)) + "|")
    for label, row in found.items():
        cells = []
        for count in counts:
            value, base = row.at("right", count), found["default"].at("right", count)
            cells.append(f"{100 * bootstrap(value).value:.0f}%")
            if label != "default":
                shown = paired_bootstrap(value, base)
                cells[-1] += f" {100 * shown.value:+.0f} [{100 * shown.low:+.0f}, {100 * shown.high:+.0f}]"
        cells.append(f"{float(row.at('rewards', counts[-1]).mean()):.2f}")
        cells.append(f"{float(row.at('seconds', counts[-1]).mean()):.2f}")
        cells += [f"{value:.1f}" for value in torch.tensor(row.scores).square().mean(0).sqrt().tolist()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Found]:
    """Measure, print the table, and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="an embedded model")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out the first N prompts")
    parser.add_argument("--limit", type=int, default=96, metavar="N", help="use N prompts")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="evaluations")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--row", action="append", choices=ROWS, help="a row beside the default; repeatable")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the outcomes as JSON")
    options = parser.parse_args(arguments)
    prompts = getattr(shapes_world, SPLITS[options.split])[options.first : options.first + options.limit]
    problems = [Problem(prompt, options.first + i, 0) for i, prompt in enumerate(prompts)]
    parts = list(batches(problems, options.batch_size))
    with quiet_libraries():
        pipe: Any = load_pipeline(options.model)
        reward = AutoReward.from_pretrained(shapes_world.path("clip"))
    pipe.set_progress_bar_config(disable=True)
    labels = ["default", *(label for label in ROWS if label in (options.row or ROWS) and label != "default")]
    found = {}
    for label in tqdm(labels, unit="row"):
        method = Steps(rewards=reward, steps=options.steps, **ROWS[label])
        found[label] = measure(pipe, reward, method, parts, shapes_world.MODELS[options.model].call)
    counts = sorted({max(1, options.steps // 4), max(1, options.steps // 2), options.steps})
    print(f"{options.model}, {len(prompts)} {options.split} prompts, one noise each\n\n{table(found, counts)}")
    if options.output:
        rows = {label: {"right": row.at("right", options.steps).tolist()} for label, row in found.items()}
        options.output.write_text(json.dumps({"prompts": list(prompts), "rows": rows}) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
