"""It's Never Too Late against plain sampling and group selection, from white and pink noise, for each objective.

python benchmarks/never_too_late.py --prompts held-out --limit 48 --output found.json --plot found.png

All rows start from the same random numbers with the embedded CLIP as their reward. Held out are the judge and its
attributes, and all features except those marked *, whose model the row optimizes. Seconds are those of a batch, divided
by its size; their intervals do not include the variation of the machine. Run it again with the same `--output` to
resume.
"""

import argparse
import dataclasses
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cno_diversity import PROMPTS, cell
from noise_diffusion import rounded
from torch import Tensor
from tqdm import tqdm

import noiseopt
from noiseopt import AutoReward, GroupSelection, NeverTooLate, TimeBudget, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseCallback, NoiseState
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.metrics import ground_spread, layout_spread, size_spread
from noiseopt.evaluation.noise_statistics import noise_statistics
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import AutoFeatures, Features, ImageFeatures, PairwiseDiversity

# Objective -> set reward, its features, gradient norm. The scales of the gradients differ: λ makes the median norm at
# initial noise over 8 validation prompts `PULL` times that of the CLIP reward of weight 1, 3.24.
PULL = 1.5
GRADIENT_NORMS = {
    "dpp": ("dpp", "dinov2", 0.0671),
    "dpp_patch": ("dpp_patch", "DINO", 0.0796),
    "pairwise patches": ("pairwise", "DINO", 0.137),
    "vendi": ("vendi", "dinov2", 0.304),
    "vendi_2": ("vendi_2", "dinov2", 0.163),
    "pairwise clip": ("pairwise", "clip", 0.358),
    "tiny L2": ("pairwise", "tiny_image", 0.114),
    "soft colors": ("pairwise", "color_histogram", 0.118),
}
WEIGHTS = {name: (reward, features, PULL * 3.24 / norm) for name, (reward, features, norm) in GRADIENT_NORMS.items()}
LEARNING_RATE = 25.0 * math.sqrt(2)
SEEN = {"dinov2": ("dinov2", "DINO"), "DINO": ("dinov2", "DINO"), "clip": ("clip",), "tiny_image": ("pixels",)}
GUARD = {"sharpness": {"keep": 0.8}, "complexity": {"keep": 0.8}}
MAIN = "dpp"  # the objective of the sweep of α and of the guard
SAME = "pairwise patches"  # also maximized by group selection
PUBLISHED = "DINO"  # the measure of the paper's times
ALPHAS = (0.0, 0.1, 0.3, 0.5)  # besides white noise and the paper's 0.2
CANDIDATES = 64  # of group selection, per set
MANY = 10**6  # more than fit in any time
DISTANCES = ("DINO", "dinov2", "clip", "pixels")
ATTRIBUTES = ("positions", "sizes", "grounds")
QUALITY = ("reward", "right", "sharpness", "complexity")
COST = ("seconds", "evaluations", "norm", "slope")
SWEPT = (*DISTANCES, *ATTRIBUTES, *QUALITY, "norm")
Numbers = dict[str, float]
Found = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A noise out of `NOISES`, and a method.

    Attributes:
        what: "plain", "group of 64", "group, equal time", or an objective out of `WEIGHTS`.
        guard: Whether sharpness and complexity have lower bounds.
    """

    noise: str
    what: str
    guard: bool = False

    @property
    def name(self) -> str:
        return f"{self.noise}, {self.what}{', guard' if self.guard else ''}"

    @property
    def optimized(self) -> tuple[str, ...]:
        """Columns of the table with a measure that this row optimizes."""
        if self.what == "plain":
            return ()
        features = WEIGHTS[self.what][1] if self.what in WEIGHTS else PUBLISHED
        return SEEN.get(features, ())


def rows() -> list[Row]:
    """Return every method from white and pink noise, then the sweep.

    Group selection gets the time of the row before it.
    """
    found = []
    for noise in ("white", "pink"):
        found += [Row(noise, what) for what in ("plain", "group of 64", SAME, "group, equal time")]
        found += [Row(noise, what) for what in WEIGHTS if what != SAME]
        found.append(Row(noise, MAIN, guard=True))
    return found + [Row(noise, what) for noise in list(NOISES)[2:] for what in ("plain", MAIN)]


NOISES: dict[str, Any] = {"white": "white", "pink": {"name": "pink", "alpha": 0.2}}
NOISES |= {f"α = {alpha:g}": {"name": "pink", "alpha": alpha} for alpha in ALPHAS}
NOISES["pink with mean"] = {"name": "pink", "alpha": 0.2, "standardize": False}


class Pixels(Features):
    """Pixels divided by the root of their number, so that black and white images have the L2 distance 1."""

    name = "pixels"
    metric = "l2"

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1) / math.sqrt(images[0].numel())


class Curve(NoiseCallback):
    """Seconds after each evaluation, and the diversity of the best images, if a measure is given."""

    def __init__(self, measure: Callable[[Tensor], list[float]] | None = None) -> None:
        self.measure, self.lost = measure, 0.0  # time spent in the measure, which does not count
        self.values: list[list[float]] = []
        self.seconds: list[float] = []

    def on_step_end(self, state: NoiseState) -> None:
        self.seconds.append(state.elapsed - self.lost)
        if self.measure is not None:
            assert state.best.images is not None
            self.values.append(self.measure(state.best.images))
        self.lost = state.elapsed - self.seconds[-1]


class Bench:
    """A pipeline with the models that rows optimize and are measured with.

    Args:
        model: An embedded model.
        images: B, images per set.
        steps: Evaluations of Never Too Late.
    """

    def __init__(self, model: str, images: int, steps: int) -> None:
        with quiet_libraries():
            self.pipe: Any = load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {**shapes_world.MODELS[model].call, "num_images_per_prompt": images}
        self.images, self.steps = images, steps
        self.reward = AutoReward.from_pretrained(shapes_world.path("clip"))
        self.floors = {name: AutoReward.from_pretrained(name) for name in GUARD}
        self.features: dict[str, Features] = {
            "DINO": ImageFeatures.from_pretrained(shapes_world.path("dinov2"), kind="patch"),
            "dinov2": ImageFeatures.from_pretrained(shapes_world.path("dinov2")),
            "clip": ImageFeatures.from_pretrained(shapes_world.path("clip")),
            "pixels": Pixels(),
            "tiny_image": AutoFeatures.from_pretrained("tiny_image"),
            "color_histogram": AutoFeatures.from_pretrained("color_histogram"),
        }

    def method(self, row: Row) -> Any:
        """Return the method of a row. Plain sampling is a method with one evaluation.

        Group selection maximizes the objective `SAME`, λ times the mean distance, so its weight is λ·2/(K(K−1)).
        """
        if row.what.startswith("group"):
            weight = 2 * WEIGHTS[SAME][2] / (self.images - 1)
            count = max(1, CANDIDATES // self.images) if row.what == "group of 64" else MANY
            features = self.features[WEIGHTS[SAME][1]]
            return GroupSelection(rewards=self.reward, features=features, weight=weight, steps=count)
        reward, features, weight = WEIGHTS[MAIN if row.what == "plain" else row.what]
        return NeverTooLate(
            diversity=[(reward, self.features[features], weight)],
            rewards=self.reward,
            guard=GUARD if row.guard else None,
            steps=1 if row.what == "plain" else self.steps,
            learning_rate=LEARNING_RATE,
        )

    def run(self, row: Row, prompts: Sequence[str], first: int, seconds: float | None) -> tuple[Any, Curve]:
        """Run a row on prompts, the first of which has index `first`.

        With equal time, group selection gets `seconds`.
        """
        selects = row.what.startswith("group")
        curve = Curve(None if selects else lambda images: self.distances(PUBLISHED, images))
        callbacks: list[NoiseCallback] = [curve]
        if row.what == "group, equal time":
            assert seconds is not None
            callbacks.append(TimeBudget(seconds))
        numbers = range(first, first + len(prompts))
        generators = [seeded(1000 * number + image) for number in numbers for image in range(self.images)]
        result = optimize_noise(
            self.pipe,
            list(prompts),
            self.method(row),
            callbacks=callbacks,
            noise_sampler=NOISES[row.noise],
            generator=generators,
            **self.call,
        )
        return result, curve

    @torch.no_grad()
    def distances(self, name: str, images: Tensor) -> list[float]:
        """Return the mean pairwise distance of each set in one of the features."""
        diversity = PairwiseDiversity(self.features[name])
        return [float(diversity.of_features(each)) for each in self.features[name](images).split(self.images)]

    def measure(self, result: Any, prompts: Sequence[str]) -> list[Numbers]:
        """Return the measurements of a result's sets, one per prompt."""
        images, each = result.images, [prompt for prompt in prompts for _ in range(self.images)]
        with torch.no_grad():
            scores = {"reward": self.reward(images, each)}
            scores |= {name: floor(images, each) for name, floor in self.floors.items()}
        scores["right"] = torch.tensor([float(verdict.correct) for verdict in shapes_world.judge(images, each)])
        scores["norm"] = result.at_best(result.norms)
        diversity = [name for name in result.scores if name in {"distance", *(r for r, _, _ in WEIGHTS.values())}]
        scores["value before"], scores["value"] = result.scores[diversity[0]][0], result.best_scores[diversity[0]]
        columns = {name: values.unflatten(0, (-1, self.images)).mean(1).tolist() for name, values in scores.items()}
        columns |= {name: self.distances(name, images) for name in DISTANCES}
        found = [{name: values[index] for name, values in columns.items()} for index in range(len(prompts))]
        sets = zip(found, prompts, images.split(self.images), result.noise.split(self.images), strict=True)
        for numbers, prompt, pictures, noise in sets:
            numbers["positions"], numbers["sizes"] = layout_spread(pictures, prompt), size_spread(pictures, prompt)
            numbers["grounds"], numbers["slope"] = ground_spread(pictures), noise_statistics(noise).spectral_slope
        return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare(bench: Bench, prompts: Sequence[str], batch: int, found: Found) -> Iterator[Found]:
    """Run every row on every prompt not yet in `found`; yields all numbers after each batch."""
    for name in (row.name for row in rows()):
        found.setdefault(name, {"numbers": [], "curve": [], "seconds": []})
    done = len(next(iter(found.values()))["numbers"])
    for first in tqdm(range(done, len(prompts), batch), unit="batch"):
        part, before = prompts[first : first + batch], None
        for row in rows():
            result, curve = bench.run(row, part, first, before)
            before = curve.seconds[-1]
            shares = [second / len(part) for second in curve.seconds]
            cost = {"seconds": shares[-1], "evaluations": float(len(shares))}
            numbers = [{**each, **cost} for each in bench.measure(result, part)]
            found[row.name]["numbers"] += numbers
            found[row.name]["curve"] += torch.tensor(curve.values).T.tolist() if curve.values else [[]] * len(part)
            found[row.name]["seconds"] += [shares] * len(part)
        yield found


def column(found: Found, name: str, metric: str) -> Tensor:
    """Return a measurement of a row by prompt, `(prompts,)`."""
    return torch.tensor([numbers[metric] for numbers in found[name]["numbers"]], dtype=torch.float64)


def compared(found: Found, ours: str, theirs: str, metric: str) -> str:
    """Return the mean of a row, and in brackets its difference from another on the prompts where both have a value."""
    a, b = column(found, ours, metric), column(found, theirs, metric)
    both = a.isfinite() & b.isfinite()
    return cell(bootstrap(a[a.isfinite()]), paired_bootstrap(a[both], b[both]))


def table(found: Found, pairs: Mapping[str, str], metrics: Sequence[str], value: bool = False) -> str:
    """Format a table of the rows in `pairs`, with their difference from the row that each is paired with.

    `*` marks metrics whose features a row optimizes. With `value`, a column has the objective before and after.
    """
    optimized = {row.name: row.optimized for row in rows()}
    lines = ["| | " + " | ".join([*metrics, *(["optimized value"] if value else [])]) + " |"]
    lines.append("|---" * (len(metrics) + 1 + value) + "|")
    for name, other in pairs.items():
        cells = [compared(found, name, other, each) + "*" * (each in optimized[name]) for each in metrics]
        if value:
            before, after = (column(found, name, each).mean() for each in ("value before", "value"))
            cells.append("" if name.endswith("plain") else f"{before:.3g} → {after:.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("-", "−").replace("|−−−", "|---")


@dataclasses.dataclass(frozen=True)
class Reached:
    """Time at which the mean diversity of a method passes a target: in steps, in seconds per set, and as a ratio.

    The ratio is to the seconds of the method that set the target. All are infinite if the target is never passed.
    """

    steps: float
    seconds: float
    ratio: float


def reached(curves: Tensor, seconds: Tensor, target: Tensor, cost: Tensor, chosen: Tensor) -> list[Reached]:
    """Return the time to reach the target for each resample of the prompts.

    Args:
        curves, seconds: `(P, T)`, the diversity and the time so far, by prompt and step.
        target, cost: `(P,)`, the diversity of the other method, and its seconds.
        chosen: `(R, P)`, the indices of the prompts of R resamples.
    """
    mean, clock = curves[chosen].mean(1), seconds[chosen].mean(1)
    passed = mean >= target[chosen].mean(1)[:, None]
    step = torch.where(passed.any(1), passed.int().argmax(1), -1)
    when = clock.gather(1, step.clamp_min(0)[:, None])[:, 0]
    ratio = when / cost[chosen].mean(1)
    return [
        Reached(float(s), float(w), float(r)) if s >= 0 else Reached(math.inf, math.inf, math.inf)
        for s, w, r in zip(step, when, ratio, strict=True)
    ]


def time_to_reach(found: Found, ours: str, theirs: str, resamples: int = 2000) -> tuple[Reached, float, float]:
    """Return the time at which `ours` passes the `PUBLISHED` diversity of `theirs`, and a 95% interval of the ratio."""
    curves, seconds = (torch.tensor(found[ours][key], dtype=torch.float64) for key in ("curve", "seconds"))
    target, cost = column(found, theirs, PUBLISHED), column(found, theirs, "seconds")
    count = len(target)
    drawn = torch.randint(count, (resamples, count), generator=seeded(0))
    (estimate,) = reached(curves, seconds, target, cost, torch.arange(count)[None])
    ratios = sorted(each.ratio for each in reached(curves, seconds, target, cost, drawn))
    return estimate, ratios[round(0.025 * (resamples - 1))], ratios[round(0.975 * (resamples - 1))]


def time_table(found: Found) -> str:
    """Format the times at which each objective passes group selection from 64 candidates.

    Both start from the same noise, except in the last column: from pink noise, to the target from white noise.
    """
    contests = {"white": ("white", "white"), "pink": ("pink", "pink"), "pink to white's": ("pink", "white")}
    titles = [f"{title}: steps, seconds, ratio" for title in contests]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for what in (row.what for row in rows() if row.noise == "white" and row.what in WEIGHTS and not row.guard):
        cells = []
        for ours, theirs in contests.values():
            estimate, low, high = time_to_reach(found, f"{ours}, {what}", f"{theirs}, group of 64")
            cells.append(f"{estimate.steps:.0f}, {estimate.seconds:.2f}, {estimate.ratio:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("inf", "∞")


def report(found: Found) -> str:
    """Format all tables in Markdown."""
    main = [row for row in rows() if row.noise in ("white", "pink")]
    against_plain = {row.name: "white, plain" for row in main}
    against_group = {row.name: f"{row.noise}, group, equal time" for row in main if row.what in WEIGHTS}
    pink = {row.name: row.name.replace("pink", "white") for row in main if row.noise == "pink"}
    diversity = [*DISTANCES, *ATTRIBUTES]
    parts = {
        "Difference to plain white noise: how much the images differ": table(found, against_plain, diversity),
        "The same: quality and cost": table(found, against_plain, [*QUALITY, *COST], value=True),
        f"Difference to group selection from the same noise, in the seconds of {SAME}": table(
            found, against_group, [*diversity, *QUALITY[:2], "seconds"]
        ),
        "Difference of pink to white noise by the same method": table(found, pink, [*diversity, *QUALITY[:2]]),
        "Sweep of α, difference to white noise by the same method": table(found, sweep("white"), SWEPT),
        "Sweep of α, difference to α = 0, which is white noise standardized": table(found, sweep("α = 0"), SWEPT),
        f"Until the mean {PUBLISHED} distance passes that of group selection from {CANDIDATES}": time_table(found),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items())


def sweep(other: str) -> dict[str, str]:
    """Return the rows of plain sampling and `MAIN` from each noise, paired with the same row from the noise `other`."""
    order = ["white", "α = 0", "α = 0.1", "pink", "α = 0.3", "α = 0.5", "pink with mean"]
    present = {(row.noise, row.what) for row in rows()}
    names = [(noise, what) for what in ("plain", MAIN) for noise in order if {(noise, what), (other, what)} <= present]
    return {f"{noise}, {what}": f"{other}, {what}" for noise, what in names}


def draw(found: Found, path: Path) -> None:
    """Plot diversity, correctness and reward of each method, from white and from pink noise."""
    from matplotlib.figure import Figure

    columns = {
        "DINO": "diversity:\nmean DINO patch distance",
        "positions": "diversity:\nspread of positions, pixels",
        "right": "share right\nby the judge",
        "reward": "CLIP reward,\nseen by all but plain",
    }
    kinds = list(dict.fromkeys(row.name.partition(", ")[2] for row in rows()))
    figure = Figure(figsize=(10, 1.3 + 0.27 * len(kinds)), dpi=160, layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(columns), sharey=True), columns.items(), strict=True):
        for place, kind in enumerate(kinds):
            white, pink = (column(found, f"{noise}, {kind}", metric).nanmean().item() for noise in ("white", "pink"))
            axes.plot([white, pink], [place, place], color="#afb8c1", linewidth=2, zorder=1)
            axes.plot(white, place, "o", color="#0969da", markerfacecolor="white", markeredgewidth=1.6, markersize=7)
            axes.plot(pink, place, "D", color="#bc4c00", markersize=6)
        axes.set_title(title, size=9, loc="left")
        axes.set(yticks=range(len(kinds)), ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticklabels(kinds)
        axes.grid(axis="y", color="#d0d7de", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
    marks = {"white noise": figure.axes[0].lines[1], "pink noise": figure.axes[0].lines[2]}
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path)


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
    text = json.dumps({"settings": settings, "machine": machine, "rows": rounded(found)}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="It's Never Too Late from white and pink noise, on an embedded model.")
    parser.add_argument("--model", default="turbo", help="an embedded one-step model")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="validation")
    parser.add_argument("--limit", type=int, default=24, metavar="N", help="the first N prompts")
    parser.add_argument("--images", type=int, default=4, metavar="B", help="images per set")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="evaluations, including the baseline")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sets per call")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON, and resume from there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write diversity against quality as an image")
    options = parser.parse_args(arguments)
    if min(options.limit, options.batch_size) < 1 or min(options.images, options.steps) < 2:
        parser.error("expected at least 1 prompt, batches of 1, 2 images and 2 steps")
    return options


def main(arguments: list[str] | None = None) -> Found:
    options = parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "plot")}
    earlier = load(options.output, settings)
    prompts = list(PROMPTS[options.prompts][: options.limit])
    bench = Bench(options.model, options.images, options.steps)
    found = earlier
    for each in compare(bench, prompts, options.batch_size, earlier):
        found = each
        if options.output:
            save(options.output, settings, found)
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    print(f"noiseopt {noiseopt.__version__}, torch {torch.__version__}: {told}\n", report(found), sep="\n")
    if options.plot:
        draw(found, options.plot)
    return found


if __name__ == "__main__":
    main()
