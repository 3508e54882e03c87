"""Noise Diffusion against the updates its paper compares with, and best-of-N at equal evaluations and equal seconds.

python benchmarks/noise_diffusion.py --prompts held-out --limit 48 --output found.json --plot found.png

All rows start from the same noises, and maximize the P("yes") of a vision-language model; in the second table a smooth
score of the pixels, which is there to tell what the gradient is worth apart from the reader. The judge and the CLIP
reward are held out. Seconds are those of the processor. With the same `--output` a run goes on after its last row.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from defaults import digest_of_defaults  # pyright: ignore[reportMissingImports]
from sets import PROMPTS, rounded  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

import noiseopt
from noiseopt import BestOfN, NoiseDiffusion, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseCallback, NoiseState
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.evaluate import load_pipeline
from noiseopt.evaluation.instruments import load_reward
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.evaluation.plan import ModelChoice
from noiseopt.pipelines import MeanVariance, NoisePGD
from noiseopt.pipelines.results.atomic_write import atomic_write
from noiseopt.quiet import quiet_libraries

CPU = torch.device("cpu")
CALL = {"num_inference_steps": 20, "guidance_scale": 5.0}  # of a model that is not embedded
RADIUS = 1.0  # the first of the trust region: it begins with the paper's γ
RANDOM, BEST, OURS = "random diffusion", "best-of-N", "Noise Diffusion, trust region"
LONG = 3  # times the evaluations of the others: enough for the seconds of the full gradient
Row = dict[str, Any]
Rows = dict[str, Row]


def left_brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return a score in [0, 1] of images `(B, 3, H, W)`: how much brighter the left half is than the right one."""
    left, right = images.tensor_split(2, dim=-1)
    return torch.sigmoid(10 * (left.mean((1, 2, 3)) - right.mean((1, 2, 3))))


def methods(reward: Any, rounds: int) -> dict[str, Any]:
    """Return the methods by name; they evaluate the baseline and `rounds` more images, best-of-N more of them."""
    common = {"rewards": reward, "steps": rounds + 1}
    trust = {**common, "trust_region": RADIUS}
    return {
        BEST: BestOfN(rewards=reward, steps=LONG * (rounds + 1)),
        RANDOM: NoiseDiffusion(**common, selection="random"),
        "Noise Diffusion": NoiseDiffusion(**common),
        OURS: NoiseDiffusion(**trust),
        f"{OURS}, exact N = 10⁶": NoiseDiffusion(**trust, selection="exact", candidates=1e6),
        f"{OURS}, white geometry": NoiseDiffusion(**trust, geometry="white"),
        f"{OURS}, full gradient": NoiseDiffusion(**trust, gradient="full"),
        "Noise Diffusion, full gradient": NoiseDiffusion(**common, gradient="full"),
        f"{RANDOM}, trust region": NoiseDiffusion(**trust, selection="random"),
        "PGD": NoisePGD(**common),
        "mean/variance": MeanVariance(**common),
    }


class Curve(NoiseCallback):
    """Best score, correctness of the best image, and seconds of the processor, after each round."""

    def on_run_start(self, state: NoiseState) -> None:
        self.scores: list[list[float]] = []
        self.right: list[list[float]] = []
        self.seconds: list[float] = []
        self.started = time.process_time()  # later by the time spent in the judge, which does not count

    def on_step_end(self, state: NoiseState) -> None:
        now = time.process_time()
        self.seconds.append(now - self.started)
        assert state.best.images is not None
        self.scores.append((-state.best.loss).tolist())
        verdicts = shapes_world.judge(state.best.images, state.prompts)
        self.right.append([float(verdict.correct) for verdict in verdicts])
        self.started += time.process_time() - now


class Bench:
    """A pipeline with its call, prompts and held-out reward."""

    def __init__(self, options: argparse.Namespace) -> None:
        choice = ModelChoice.parse(options.model, options.call)
        with quiet_libraries():
            self.pipe: Any = load_pipeline(choice, options.dtype, CPU)
            self.held_out = load_reward(options.clip, CPU)
            self.scores: dict[str, Callable] = {"P(yes)": load_reward(options.vlm, CPU), "pixels": left_brightness}
        self.call = choice.arguments if choice.embedded else {**CALL, **choice.arguments}
        self.prompts = list(PROMPTS[options.prompts][: options.limit])
        self.rounds, self.batch = options.rounds, options.batch_size

    def run(self, score: str, name: str) -> Row:
        """Return curves `(prompts, evaluations)`, seconds per image, and the statistics of the noises of a row."""
        row: Row = {"score": [], "right": [], "clip": [], "seconds": []}
        noises = []
        for start in tqdm(range(0, len(self.prompts), self.batch), desc=f"{score}: {name}", unit="batch", leave=False):
            part, curve = self.prompts[start : start + self.batch], Curve()
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            method = methods(self.scores[score], self.rounds)[name]
            result = optimize_noise(self.pipe, part, method, callbacks=[curve], generator=generators, **self.call)
            with torch.no_grad():
                row["clip"] += self.held_out(result.images, part).tolist()
            row["score"] += torch.tensor(curve.scores).T.tolist()
            row["right"] += torch.tensor(curve.right).T.tolist()
            row["seconds"] += [[second / len(part) for second in curve.seconds]] * len(part)
            noises.append(result.noise)
        return {**row, "noise": departure(torch.cat(noises))}


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


def after(row: Row, key: str, rounds: int) -> torch.Tensor:
    """Return a value of each prompt after some rounds, `(prompts,)`."""
    return torch.tensor([curve[min(rounds, len(curve) - 1)] for curve in row[key]])


def within(row: Row, key: str, seconds: torch.Tensor) -> torch.Tensor:
    """Return a value of each prompt after some seconds `(prompts,)`; that of the baseline counts always."""
    found = []
    for curve, times, limit in zip(row[key], row["seconds"], seconds.tolist(), strict=True):
        found.append(curve[max(0, sum(each <= limit for each in times) - 1)])
    return torch.tensor(found)


def markdown(found: Rows, rounds: int) -> str:
    """Format the end of each row, with differences to best-of-N and random diffusion; 95% intervals over prompts."""
    head = ["", "score, plain", f"after {min(5, rounds)} rounds", "at the end", "− best-of-N, same rounds"]
    head += ["− best-of-N, same seconds", f"− {RANDOM}", "right", "right − best-of-N, same seconds", "CLIP, unseen"]
    lines = ["| " + " | ".join([*head, "seconds", "‖noise‖/√d (z)", "kurtosis, z"]) + " |", "|---" * 13 + "|"]
    for name, row in found.items():
        score, right, seconds = (after(row, key, rounds) for key in ("score", "right", "seconds"))
        truth = bootstrap(right)
        cells = [name, f"{after(row, 'score', 0).mean():.3f}", f"{after(row, 'score', min(5, rounds)).mean():.3f}"]
        cells.append("{0.value:.3f} [{0.low:.3f}, {0.high:.3f}]".format(bootstrap(score)))
        best, walk = found.get(BEST), found.get(RANDOM)
        cells.append(difference(score, after(best, "score", rounds) if best else None))
        cells.append(difference(score, within(best, "score", seconds) if best else None))
        cells.append(difference(score, after(walk, "score", rounds) if walk else None))
        cells.append(f"{100 * truth.value:.1f}% [{100 * truth.low:.1f}, {100 * truth.high:.1f}]")
        cells.append(difference(right, within(best, "right", seconds) if best else None, 100, 1))
        cells += [f"{torch.tensor(row['clip']).mean():.2f}", f"{seconds.mean():.2f}"]
        cells += [f"{row['noise']['norm']:.3f} ({row['noise']['norm z']:+.1f})", f"{row['noise']['kurtosis z']:+.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    plain = after(next(iter(found.values())), "right", 0)
    return "\n".join([*lines, "", f"Plain images right: {100 * plain.mean():.1f}%."])


def difference(ours: torch.Tensor, theirs: torch.Tensor | None, unit: float = 1, digits: int = 3) -> str:
    """Format the mean difference of paired values with its interval; empty where there is nothing to compare with."""
    if theirs is None or torch.equal(ours, theirs):
        return ""
    found = paired_bootstrap(ours, theirs)
    value, low, high = (f"{unit * each:+.{digits}f}" for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def draw(tables: dict[str, Rows], rounds: int, path: Path) -> None:
    """Plot the score against rounds and seconds, and the judge's accuracy against rounds, in a line for each score."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6 * len(tables) + 0.6), dpi=160, layout="constrained")
    lines = figure.subplots(len(tables), 3, squeeze=False)
    for (score, found), (by_round, by_time, truth) in zip(tables.items(), lines, strict=True):
        for name, row in found.items():
            style = {
                "label": name,
                "linewidth": 2.2 if name == OURS else 1.3,
                "linestyle": "--" if name == BEST else "-",
            }
            scores, right, seconds = (mean_curve(row[key]) for key in ("score", "right", "seconds"))
            by_round.plot(scores[: rounds + 1], **style)
            truth.plot([100 * value for value in right[: rounds + 1]], **style)
            by_time.plot(seconds, scores, **style)
        by_round.set(xlabel="rounds", ylabel=f"mean {score} of the best so far")
        by_time.set(xlabel="seconds for an image")
        truth.set(xlabel="rounds", ylabel="% right by the judge")
        for axes in (by_round, truth):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (by_round, by_time, truth):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    handles, names = lines[0][1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean curve over prompts, cut to the length of the shortest."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured, which `gradient_direction.py` has too."""
    parser.add_argument("--model", default="guided", metavar="NAME_OR_FOLDER", help="an embedded or saved pipeline")
    parser.add_argument("--vlm", default="vqa", metavar="NAME_OR_FOLDER", help="the reader whose P(yes) counts")
    parser.add_argument("--call", type=json.loads, default={}, metavar="JSON", help="arguments of the pipeline's call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the pipeline")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="validation")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="the first N prompts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON, and resume from there")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Noise Diffusion against other updates of the noise.")
    add_model_arguments(parser)
    names = list(methods(left_brightness, 1))
    parser.add_argument("--clip", default="clip", metavar="NAME_OR_FOLDER", help="the held-out reward")
    parser.add_argument("--rounds", type=int, default=20, metavar="M")
    parser.add_argument("--score", action="append", choices=("P(yes)", "pixels"), help="default: both; repeatable")
    parser.add_argument("--row", action="append", choices=names, metavar="NAME", help="default: all; repeatable")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as an image")
    options = parser.parse_args(arguments)
    if min(options.limit, options.rounds, options.batch_size) < 1:
        parser.error("expected at least 1 prompt, 1 round and batches of 1")
    return options


NOT_SETTINGS = ("output", "plot", "row", "score", "steps", "guidance", "reach")


class Record:
    """The numbers of a run as JSON, written after each part. A file of other settings is refused."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {name: str(value) for name, value in vars(options).items() if name not in NOT_SETTINGS}
        settings["defaults"] = digest_of_defaults("noise_diffusion", options.model, options.vlm)
        self.path: Path | None = options.output
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path and self.path.exists() else {}
        if known and known["settings"] != settings:
            raise SystemExit(
                f"Expected a file of the same settings as --output, but {self.path} is of {known['settings']}. "
                "Choose another, or move it away."
            )
        machine = {"python": platform.python_version(), "torch": torch.__version__, "noiseopt": noiseopt.__version__}
        self.parts: dict[str, Any] = known.get("parts", {})
        self.head = {"settings": settings, "machine": machine}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, part: str, name: str, value: Any) -> None:
        self.parts.setdefault(part, {})[name] = rounded(value)
        if self.path:
            text = json.dumps({**self.head, "parts": self.parts}, ensure_ascii=False) + "\n"
            atomic_write(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def main(arguments: list[str] | None = None) -> dict[str, Rows]:
    options = parse(arguments)
    record, bench = Record(options), Bench(options)
    for score in options.score or list(bench.scores):
        for name in options.row or list(methods(left_brightness, 1)):
            if name not in record.parts.get(score, {}):
                record.keep(score, name, bench.run(score, name))
        print(f"\n### {score}\n\n{markdown(record.parts[score], options.rounds)}", flush=True)
    if options.plot:
        draw(record.parts, options.rounds, options.plot)
    return record.parts


if __name__ == "__main__":
    main()
