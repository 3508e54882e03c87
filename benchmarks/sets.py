"""Sets of images of a prompt, for the benchmarks of CNO and of It's Never Too Late: drawn, measured and compared.

A row is a way to draw the set of a prompt. Its measurements are saved after each set, and a command goes on where its
file ends. Seconds are those of the processor.
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from defaults import digest_of_defaults  # pyright: ignore[reportMissingImports]
from torch import Tensor
from tqdm import tqdm

import noiseopt
from noiseopt import AutoReward, optimize_noise, shapes_world
from noiseopt.callbacks import DenoisingCallback, NoiseCallback, NoiseState
from noiseopt.demo import load_pipeline, seeded
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.metrics import (
    ground_spread,
    layout_spread,
    mean_pairwise_similarity,
    size_spread,
    vendi_score,
)
from noiseopt.evaluation.noise_statistics import noise_statistics
from noiseopt.pipelines.baselines.plain_sampling import PlainSampling
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Features, ImageFeatures, PairwiseDiversity

PROMPTS = {"validation": shapes_world.VALIDATION_PROMPTS, "held-out": shapes_world.HELD_OUT_PROMPTS}
USUAL_GROUND = 0.7  # brightness of most training pictures at their border
SEEDS = 1000  # apart, for the sets of two prompts
DIVERSITY = ("MSS", "Vendi", "patches", "clip", "positions", "sizes", "grounds")
QUALITY = ("right", "reward", "sharpness", "complexity")
COST = ("seconds", "evaluations", "norm", "slope")
Numbers = dict[str, Any]
Found = dict[str, dict[str, Numbers]]  # row -> prompt -> measurements


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to draw the set of a prompt.

    Attributes:
        name: Its name in tables.
        make: Returns the method from the `Bench`; `None` for the pipeline itself.
        noise: The distribution of the initial noise.
        time_of: The name of an earlier row whose seconds this one gets.
        against: The name of the row it is compared with.
        images: The images of a set, if not those of the `Bench`.
        steer: Returns what changes the denoising steps from the generators of the images: a callback, or an object with
            `generate`.
    """

    name: str
    make: Callable[["Bench"], Any] | None = None
    noise: Any = None
    time_of: str | None = None
    against: str = "plain"
    images: int | None = None
    steer: Callable[[list[torch.Generator]], Any] | None = None


class Clock(NoiseCallback):
    """Processor seconds after each evaluation, without those of `measure`, and what that says of the best images.

    Args:
        measure: Maps images to a number.
        limit: Ends the run before the evaluation that, with one more for what was found, would end after these seconds.
    """

    def __init__(self, measure: Callable[[Tensor], float] | None = None, limit: float = math.inf) -> None:
        self.measure, self.limit = measure, limit
        self.seconds: list[float] = []
        self.values: list[float] = []
        self.began, self.lost = time.process_time(), 0.0

    @property
    def now(self) -> float:
        return time.process_time() - self.began - self.lost

    def on_step_end(self, state: NoiseState) -> None:
        now = self.now
        took = now - (self.seconds[-1] if self.seconds else 0.0)
        self.seconds.append(now)
        if self.measure and state.best.images is not None:
            self.values.append(self.measure(state.best.images))
        if now + 2 * took > self.limit:
            state.stop("time")
        self.lost += self.now - now


class Bench:
    """An embedded pipeline with the models that rows optimize and are measured with.

    Args:
        model: The pipeline.
        images: B, images per set.
        curves: Whether to measure the patch distance of the best images after each evaluation.
    """

    def __init__(self, model: str, images: int, curves: bool = False) -> None:
        with quiet_libraries():
            self.pipe: Any = load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.call, self.images, self.curves = shapes_world.MODELS[model].call, images, curves
        self.reward = AutoReward.from_pretrained(shapes_world.path("clip"))
        self.floors = {name: AutoReward.from_pretrained(name) for name in QUALITY[2:]}
        tower = shapes_world.path("dinov2")
        self.features: dict[str, Features] = {
            "dinov2": ImageFeatures.from_pretrained(tower),
            "patches": ImageFeatures.from_pretrained(tower, kind="patch"),
            "clip": ImageFeatures.from_pretrained(shapes_world.path("clip")),
        }

    def draw(self, row: Row, prompt: str, number: int, seconds: float) -> Numbers:
        """Draw the set of a prompt, the seeds of which its number fixes, in at most some seconds; and measure it."""
        count = row.images or self.images
        call = {**self.call, "num_images_per_prompt": count}
        clock = Clock(self.distance if self.curves else None, seconds)
        generator = seeded(SEEDS * number, count)
        method = PlainSampling() if row.make is None else row.make(self)
        settings: dict[str, Any] = {"callbacks": [clock], "generator": generator, "noise_sampler": row.noise}
        result = optimize_noise(self.pipe, prompt, method, **settings, **call)
        images = result.images
        if row.steer or images is None or method.returns == "last":
            drawn = {"latents": result.latents, "generator": result.generator(), "output_type": "pt"}
            images = self.steered(row, number, count)(prompt, **call, **drawn).images
        cost = {"seconds": clock.now, "evaluations": len(clock.seconds), "norm": relative_norm(result.noise)}
        cost["slope"] = noise_statistics(result.noise).spectral_slope
        curve = {"clock": clock.seconds, "curve": clock.values} if self.curves else {}
        return {**self.measure(images, prompt), **cost, **curve}

    def steered(self, row: Row, number: int, count: int) -> Callable[..., Any]:
        """Return the call of the pipeline, changed as a row has it by random numbers of the prompt's own."""
        if row.steer is None:
            return self.pipe
        tool = row.steer(seeded(2**40 + SEEDS * number, count))
        if not isinstance(tool, DenoisingCallback):
            return functools.partial(tool.generate, self.pipe)
        inputs = tool.tensor_inputs
        return functools.partial(self.pipe, callback_on_step_end=tool, callback_on_step_end_tensor_inputs=inputs)

    @torch.no_grad()
    def distance(self, images: Tensor, name: str = "patches") -> float:
        """Return the mean distance of two images of a set; of patches, that of It's Never Too Late's Table 1."""
        return float(PairwiseDiversity(self.features[name])(images))

    @torch.no_grad()
    def measure(self, images: Tensor, prompt: str) -> Numbers:
        """Return the measurements of a set `(B, 3, H, H)` of a prompt."""
        whole = self.features["dinov2"](images)
        found = {name: self.distance(images, name) for name in ("patches", "clip")}
        found |= {"MSS": float(mean_pairwise_similarity(whole)), "Vendi": float(vendi_score(whole))}
        found |= {"positions": layout_spread(images, prompt), "sizes": size_spread(images, prompt)}
        found |= {"grounds": ground_spread(images)}
        right = torch.tensor([verdict.correct for verdict in shapes_world.judge(images, prompt)])
        usual = ((border(images) - USUAL_GROUND).abs() < 0.05).cpu()
        found["right"] = float(right.double().mean())
        found |= {"usual grounds": int(usual.sum()), "right on them": int((usual & right).sum())}
        scorers = {"reward": self.reward, **self.floors}
        return found | {name: float(scorer(images, prompt).mean()) for name, scorer in scorers.items()}


def border(images: Tensor) -> Tensor:
    """Return the mean `(B,)` of the outer sixteenth on the left and on the right of images in [0, 1]."""
    width = images.shape[-1] // 16
    return torch.cat([images[..., :width], images[..., -width:]], -1).mean((1, 2, 3))


def relative_norm(noise: Tensor) -> float:
    """Return the mean norm of noises, relative to that expected."""
    return float(noise.flatten(1).norm(dim=1).mean()) / math.sqrt(noise[0].numel())


def compare(bench: Bench, rows: Sequence[Row], prompts: Sequence[str], found: Found) -> Iterator[None]:
    """Draw every row of every prompt that is not yet in `found`, and pause after each."""
    missing = [
        (number, prompt, row)
        for number, prompt in enumerate(prompts)
        for row in rows
        if prompt not in found.setdefault(row.name, {})
    ]
    for number, prompt, row in tqdm(missing, unit="set", smoothing=0, disable=None):
        limit = found[row.time_of][prompt]["seconds"] if row.time_of else math.inf
        found[row.name][prompt] = rounded(bench.draw(row, prompt, number, limit))
        yield


def rounded(value: Any) -> Any:
    """Round numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def column(found: Found, name: str, metric: str, prompts: Sequence[str]) -> Tensor:
    """Return a measurement of a row by prompt, `(P,)`."""
    return torch.tensor([found[name][prompt][metric] for prompt in prompts], dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables and figures of what was found on some prompts."""

    found: Found
    rows: Sequence[Row]
    prompts: Sequence[str]

    def of(self, name: str, metric: str) -> Tensor:
        return column(self.found, name, metric, self.prompts)

    def both(self, row: Row, metric: str) -> tuple[Tensor, Tensor]:
        """Return a measurement of a row, and of that it is compared with, where both have a value."""
        ours, theirs = self.of(row.name, metric), self.of(row.against, metric)
        both = ours.isfinite() & theirs.isfinite()
        return ours[both], theirs[both]

    def cell(self, row: Row, metric: str) -> str:
        """Return a mean, and in parentheses the difference with its 95% interval."""
        values = self.of(row.name, metric)
        text = f"{bootstrap(values[values.isfinite()]).value:.3g}"
        difference = paired_bootstrap(*self.both(row, metric))
        if row.name == row.against or difference.low == difference.high == 0:
            return text
        return f"{text} ({difference.value:+.2g} [{difference.low:+.2g}, {difference.high:+.2g}])"

    def table(self, metrics: Sequence[str], rows: Sequence[Row] | None = None) -> str:
        """Return a table in Markdown."""
        lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        cells = ((row.name, *(self.cell(row, metric) for metric in metrics)) for row in rows or self.rows)
        lines += ["| " + " | ".join(each) + " |" for each in cells]
        return "\n".join(lines).replace("-", "−").replace("|−−−", "|---")

    def share(self, row: Row, metric: str) -> str:
        """Return the change of a mean in percent of that it is compared with, and its 95% interval."""
        ours, theirs = self.both(row, metric)
        change = bootstrap(ours, weights=theirs)
        low, high = (100 * (each - 1) for each in (change.low, change.high))
        return f"{metric} {100 * (change.value - 1):+.0f}% [{low:+.0f}, {high:+.0f}]".replace("-", "−")

    def by_ground(self, row: Row, size: int) -> str:
        """Return the shares of right images, of `size` in a set, among those with the usual ground and among others."""
        right, usual, both = (self.of(row.name, key).sum() for key in ("right", "usual grounds", "right on them"))
        others = len(self.prompts) * size - usual
        kept, changed = (f"{100 * each:.0f}%" for each in (both / usual, (size * right - both) / others))
        return f"right: {kept} of {usual:.0f} images with the usual ground, {changed} of {others:.0f} others"

    def plot(self, metrics: Mapping[str, str], path: Path) -> None:
        """Plot the means of the rows as points, with the interval of the difference from the row of comparison.

        Args:
            metrics: The titles of measurements.
            path: The image.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 1 + 0.3 * len(self.rows)), dpi=160, layout="constrained")
        for axes, (metric, title) in zip(figure.subplots(1, len(metrics), sharey=True), metrics.items(), strict=True):
            for place, row in enumerate(self.rows):
                ours, theirs = self.both(row, metric)
                base, change = float(theirs.mean()), paired_bootstrap(ours, theirs)
                ends = [base + change.low, base + change.high]
                axes.plot(ends, [place, place], color="#afb8c1", linewidth=2, zorder=1)
                axes.plot(base + change.value, place, "o", color="#0969da", markersize=6)
            axes.set_title(title, size=9, loc="left")
            axes.set(yticks=range(len(self.rows)), ylim=(len(self.rows) - 0.5, -0.5))
            axes.set_yticklabels([row.name for row in self.rows])
            axes.grid(axis="y", color="#d0d7de", linewidth=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(labelsize=8, length=0)
        figure.savefig(path)


def parser_of(description: str, model: str, images: int, limit: int) -> argparse.ArgumentParser:
    """Return a parser of the arguments of all commands, with some defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model, choices=pipelines(), help="an embedded pipeline")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="validation")
    parser.add_argument("--limit", type=at_least(1), default=limit, metavar="N", help="the first N prompts")
    parser.add_argument("--images", type=at_least(2), default=images, metavar="B", help="images per set")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON, and resume from there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the means as an image")
    return parser


def pipelines() -> list[str]:
    return [name for name, model in shapes_world.MODELS.items() if model.is_pipeline]


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of numbers."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, but got {text}")
        return int(text)

    return number


def run(options: argparse.Namespace, rows: Sequence[Row], method: str, curves: bool = False) -> Report:
    """Draw all rows of a benchmark of a method that the file of an earlier run lacks, and save each."""
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "plot", "limit")}
    settings["defaults"] = digest_of_defaults(method, options.model, "clip", "dinov2")
    found = load(options.output, settings)
    prompts = PROMPTS[options.prompts][: options.limit]
    if any(prompt not in found.get(row.name, {}) for row in rows for prompt in prompts):
        for _ in compare(Bench(options.model, options.images, curves), rows, prompts, found):
            if options.output:
                save(options.output, settings, found)
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"noiseopt {noiseopt.__version__}, torch {torch.__version__}: {len(prompts)} prompts, {told}\n")
    return Report(found, rows, prompts)


def load(path: Path | None, settings: Mapping[str, Any]) -> Found:
    """Load the numbers of an earlier run. Raises `SystemExit` if its settings differ."""
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["settings"] != settings:
        raise SystemExit(f"Expected {path} to be of {settings}, but it is of {stored['settings']}. Take another file.")
    return stored["rows"]


def save(path: Path, settings: Mapping[str, Any], found: Found) -> None:
    """Write settings, versions and rows as JSON, atomically."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "noiseopt": noiseopt.__version__}
    text = json.dumps({"settings": settings, "machine": machine, "rows": found}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
