"""Noise Diffusion against the four updates compared in its paper, and best-of-N at equal time.

python benchmarks/noise_diffusion.py --prompts held-out --limit 48 --output found.json --plot found.png

All rows start from the same noises and maximize the same score, the P("yes") of the embedded vision-language model. The
judge and the CLIP reward are held out. Rounds, seconds, correctness and Gaussianity are measured. Two rows show what
better predictions would give: the true gradient, through the denoiser, and an oracle that evaluates its candidates.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import noiseopt
from noiseopt import AutoReward, BestOfN, NoiseDiffusion, TimeBudget, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseCallback, NoiseState
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines import MeanVariance, NoisePGD
from noiseopt.pipelines.noise_diffusion.unit_score import UnitScore
from noiseopt.pipelines.noise_math import displacement, per_image
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Reward

PROMPTS = {"validation": shapes_world.VALIDATION_PROMPTS, "held-out": shapes_world.HELD_OUT_PROMPTS}
TIMED = "best-of-N, equal time"
OURS = "Noise Diffusion"
TRIED = 8  # candidates of the oracle in each round
MANY = 10**6  # more than fit in any time
Rows = dict[str, dict[str, Any]]


def load_scorer() -> Reward:
    """Return the embedded vision-language model, whose P("yes") all rows maximize."""
    return AutoReward.from_pretrained(shapes_world.path("vqa"))


def methods(reward: Reward, rounds: int) -> dict[str, Any]:
    """Return the methods by name; they evaluate the baseline and `rounds` more images, or as the time allows."""
    common = {"rewards": reward, "steps": rounds + 1}
    return {
        "random sampling": BestOfN(**common),
        "PGD": NoisePGD(**common),
        "mean/variance": MeanVariance(**common),
        "random diffusion": NoiseDiffusion(**common, selection="random"),
        OURS: NoiseDiffusion(**common),
        "Noise Diffusion, exact N = 10⁶": NoiseDiffusion(**common, selection="exact", candidates=1e6),
        "Noise Diffusion, true gradient": NoiseDiffusion(**common, gradient="full"),
        f"oracle, best of {TRIED} candidates": Oracle(**common, selection="random", candidates=TRIED),
        TIMED: BestOfN(rewards=reward, steps=MANY),
    }


class Oracle(NoiseDiffusion):
    """Noise Diffusion that takes the candidate whose image does score highest, for as many evaluations a round."""

    def start(self, problem: NoiseProblem) -> Any:
        state = super().start(problem)
        state.problem = problem  # pyright: ignore[reportAttributeAccessIssue]
        return state

    def step(self, run: NoiseState, gradient: torch.Tensor | None, state: Any) -> torch.Tensor:
        state.move_to(run, gradient, True)
        gamma, problem = 1 - UnitScore.score_of(-state.loss, None).sqrt(), state.problem
        best, highest = state.noise, torch.full_like(state.loss, -math.inf)
        for _ in range(int(self.candidates)):
            noise = state.noise + displacement(state.noise, state.fresh.draw(), gamma)
            with torch.no_grad():
                score = self.rewards(problem.sampler.images(noise), problem.reward_prompts)
            best = torch.where(per_image(score > highest, noise), noise, best)
            highest = torch.maximum(score, highest)
        return best


class Curve(NoiseCallback):
    """Best score, correctness of the best image, and seconds, after each round."""

    def on_run_start(self, state: NoiseState) -> None:
        self.scores: list[list[float]] = []
        self.right: list[list[float]] = []
        self.seconds: list[float] = []
        self.lost = 0.0  # time spent in the judge, which does not count

    def on_step_end(self, state: NoiseState) -> None:
        assert state.best.images is not None
        self.seconds.append(state.elapsed - self.lost)
        self.scores.append((-state.best.loss).tolist())
        verdicts = shapes_world.judge(state.best.images, state.prompts)
        self.right.append([float(verdict.correct) for verdict in verdicts])
        self.lost += state.elapsed - self.lost - self.seconds[-1]


def compare(pipe: Any, prompts: Sequence[str], rounds: int, batch: int, call: dict[str, Any]) -> Rows:
    """Run every row on every prompt.

    Returns:
        Curves `(prompts, rounds + 1)`, seconds per image, and final measurements, by row.
    """
    reward, held_out = load_scorer(), AutoReward.from_pretrained(shapes_world.path("clip"))
    names = list(methods(reward, rounds))
    found: Rows = {name: {"score": [], "right": [], "clip": [], "evaluations": [], "seconds": []} for name in names}
    noises: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for start in tqdm(range(0, len(prompts), batch), unit="batch"):
        part = list(prompts[start : start + batch])
        for name, method in methods(reward, rounds).items():
            curve = Curve()
            callbacks: list[NoiseCallback] = [curve]
            if name == TIMED:  # our total seconds; time in the judge does not count
                callbacks.append(TimeBudget(found[OURS]["seconds"][-1][-1] * len(part)))
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            result = optimize_noise(pipe, part, method, callbacks=callbacks, generator=generators, **call)
            with torch.no_grad():
                clip = held_out(result.images, part).tolist()
            row = found[name]
            row["score"] += torch.tensor(curve.scores).T.tolist()
            row["right"] += torch.tensor(curve.right).T.tolist()
            row["clip"] += clip
            row["evaluations"] += [len(curve.scores)] * len(part)
            row["seconds"] += [[second / len(part) for second in curve.seconds]] * len(part)
            noises[name].append(result.noise)
    for name, parts in noises.items():
        found[name]["noise"] = departure(torch.cat(parts))
    return found


def departure(noise: torch.Tensor) -> dict[str, float]:
    """Return the deviation of returned noises `(N, C, H, W)` from Gaussian noise in standard errors, and their norm."""
    statistics = noise_statistics(noise)
    scores = gaussian_limits(tuple(noise.shape)).z_scores(statistics)
    return {
        "norm": statistics.norm,
        "norm z": scores.norm,
        "variance z": scores.variance,
        "kurtosis z": scores.excess_kurtosis,
        "spectral slope z": scores.spectral_slope,
    }


def last(values: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return the end of each curve, `(prompts,)`."""
    return torch.tensor([curve[-1] for curve in values])


def markdown(found: Rows, rounds: int) -> str:
    """Format each row after some rounds and at the end, with 95% bootstrap intervals over prompts."""
    early = min(5, rounds)
    head = f"| | score, plain | after {early} rounds | at the end | right | right, difference to {OURS} "
    lines = [head + "| CLIP reward, unseen | evaluations | seconds | norm of noise (z) |", "|---" * 10 + "|"]
    for name, row in found.items():
        score, right = last(row["score"]), last(row["right"])
        plain, some = (torch.tensor([curve[min(at, len(curve) - 1)] for curve in row["score"]]) for at in (0, early))
        truth, gap = bootstrap(right), paired_bootstrap(right, last(found[OURS]["right"]))
        cells = [
            name,
            f"{plain.mean():.3f}",
            f"{some.mean():.3f}",
            "{0.value:.3f} [{0.low:.3f}, {0.high:.3f}]".format(bootstrap(score)),
            f"{100 * truth.value:.1f}% [{100 * truth.low:.1f}, {100 * truth.high:.1f}]",
            "" if name == OURS else f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
            f"{torch.tensor(row['clip']).mean():.2f}",
            f"{torch.tensor(row['evaluations']).float().mean():.0f}",
            f"{last(row['seconds']).mean():.2f}",
            f"{row['noise']['norm']:.3f} ({row['noise']['norm z']:+.1f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    plain_right = torch.tensor([curve[0] for curve in found[OURS]["right"]])
    return "\n".join([*lines, "", f"Plain images right: {100 * plain_right.mean():.1f}%."])


def draw(found: Rows, rounds: int, path: Path) -> None:
    """Plot the score against rounds and seconds, and the judge's accuracy against rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.8), dpi=160, layout="constrained")
    by_round, by_time, truth = figure.subplots(1, 3)
    for name, row in found.items():
        style = {"label": name, "linewidth": 2.2 if name == OURS else 1.3, "linestyle": "--" if name == TIMED else "-"}
        score, right, seconds = (mean_curve(row[key]) for key in ("score", "right", "seconds"))
        if name != TIMED:
            by_round.plot(score[: rounds + 1], **style)
            truth.plot([100 * value for value in right[: rounds + 1]], **style)
        by_time.plot(seconds, score, **style)
    by_round.set(xlabel="rounds", ylabel='mean P("yes") of the best so far')
    by_time.set(xlabel="seconds for an image")
    truth.set(xlabel="rounds", ylabel="% right by the judge")
    handles, names = by_time.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for axes in (by_round, truth):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (by_round, by_time, truth):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean curve over prompts, cut to the length of the shortest."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Noise Diffusion against other updates of the noise.")
    parser.add_argument("--model", default="guided", help="an embedded multi-step model")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="validation")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="the first N prompts")
    parser.add_argument("--rounds", type=int, default=20, metavar="M")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as an image")
    options = parser.parse_args(arguments)
    if min(options.limit, options.rounds, options.batch_size) < 1:
        parser.error("expected at least 1 prompt, 1 round and batches of 1")
    return options


def main(arguments: list[str] | None = None) -> Rows:
    options = parse(arguments)
    with quiet_libraries():
        pipe: Any = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(PROMPTS[options.prompts][: options.limit])
    call = dict(shapes_world.MODELS[options.model].call)
    found = compare(pipe, prompts, options.rounds, options.batch_size, call)
    print(markdown(found, options.rounds))
    if options.plot:
        draw(found, options.rounds, options.plot)
    if options.output:
        settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "plot")}
        machine = {"python": platform.python_version(), "torch": torch.__version__, "noiseopt": noiseopt.__version__}
        text = json.dumps({"settings": settings, "machine": machine, "rows": rounded(found)}, ensure_ascii=False)
        options.output.write_text(text + "\n", encoding="utf-8")
    return found


def rounded(value: Any) -> Any:
    """Round numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
