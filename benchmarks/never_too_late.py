"""It's Never Too Late against plain sampling and group selection, from white and from pink noise.

python benchmarks/never_too_late.py --prompts held-out --limit 48 --output found.json --plot found.png
python benchmarks/never_too_late.py --prompts held-out --limit 48 --images 8 --output found_8.json
python benchmarks/never_too_late.py --table objectives --limit 24 --output objectives.json
python benchmarks/never_too_late.py --table pink --limit 16 --output pink.json --plot pink.png

All rows start from the same random numbers, with the embedded CLIP as reward and, but for the objectives that say else,
as the features in which the images are to differ. Other settings are those of the demo. Held out are the judge, the
spreads that it measures, and DINOv2: MSS, Vendi and patches. Run a command again with the same `--output` to resume.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sets import COST, DIVERSITY, QUALITY, Bench, Found, Report, Row, at_least, column, parser_of, run
from torch import Tensor

from noiseopt import GroupSelection, NeverTooLate, optimize_noise, shapes_world
from noiseopt.demo import seeded
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.recipes import RECIPES
from noiseopt.rewards import AutoFeatures, Features, SetRewardSum

# Objective -> set reward and its features.
OBJECTIVES = {
    "dpp": ("dpp", "clip"),
    "pairwise": ("pairwise", "clip"),
    "vendi": ("vendi", "clip"),
    "vendi_2": ("vendi_2", "clip"),
    "dpp, DINOv2": ("dpp", "dinov2"),
    "pairwise, DINOv2 patches": ("pairwise", "patches"),
    "tiny L2": ("pairwise", "tiny_image"),
    "soft colors": ("pairwise", "color_histogram"),
}
MAIN = "tiny L2"  # the objective of the other tables, which group selection maximizes, too
PULL = 1.0  # the norm of the gradient of λ·v relative to that of the reward, at plain noises
BALANCED = 4  # validation prompts whose median that is
SETTINGS = {name: value for name, value in RECIPES["never_too_late"].settings.items() if name != "diversity"}
SEARCH = SETTINGS.pop("search")
STEPS = SETTINGS.pop("steps") - SEARCH
FLOOR = SETTINGS.pop("guard")["clip"]  # of the reward, after a search
GUARD = {"sharpness": {"keep": 0.8}, "complexity": {"keep": 0.8}}
CANDIDATES = 64  # of group selection, per set
MANY = 10**6  # more than fit in any time
ALPHAS = tuple(round(0.05 * step, 2) for step in range(11))
TITLES = {
    "patches": "held-out diversity:\nDINOv2 patch distance",
    "MSS": "held-out similarity:\nMSS of DINOv2",
    "positions": "spread of positions,\npixels",
    "right": "share right\nby the judge",
}


def pink(alpha: float) -> dict[str, Any]:
    return {"name": "pink", "alpha": alpha}


NOISES: dict[str, Any] = {"white": None, "pink": pink(0.2)}
SWEPT: dict[str, Any] = {"white": None} | {f"α = {alpha:g}": pink(alpha) for alpha in ALPHAS}
SWEPT["α = 0.2 with mean"] = pink(0.2) | {"standardize": False}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The noises of a search at each position of a set, and the evaluations that follow."""

    search: int
    steps: int


ALONE = Budget(0, 20)  # without a search


@functools.cache
def features(bench: Bench, name: str) -> Features:
    return bench.features[name] if name in bench.features else AutoFeatures.from_pretrained(name)


@functools.cache
def weight(bench: Bench, objective: str) -> float:
    """Return the λ of an objective at which its gradient is `PULL` times that of the reward."""
    reward, name = OBJECTIVES[objective]
    total = SetRewardSum([(reward, features(bench, name), 1.0)])
    ratios: list[float] = []

    def look(problem: NoiseProblem) -> None:
        leaf = problem.noise.clone().requires_grad_()
        images = problem.sampler.images(leaf, "full")
        values = (bench.reward(images, problem.prompts).mean(), total(images).total)
        quality, diversity = (float(torch.autograd.grad(v, leaf, retain_graph=True)[0].norm()) for v in values)
        ratios.append(quality / diversity)

    for number, prompt in enumerate(shapes_world.VALIDATION_PROMPTS[:BALANCED]):
        call = {**bench.call, "num_images_per_prompt": 4, "generator": seeded(number, 4)}
        optimize_noise(bench.pipe, prompt, Looking(look), callbacks=[], **call)
    return PULL * statistics.median(ratios)


def ours(
    budget: Budget, objective: str = MAIN, guard: dict[str, Any] | None = None, **settings: Any
) -> Callable[[Bench], NeverTooLate]:
    """Return the maker of our method with an objective, further guards and other settings."""

    def make(bench: Bench) -> NeverTooLate:
        reward, name = OBJECTIVES[objective]
        entry = (reward, features(bench, name), weight(bench, objective))
        evaluations = {"search": budget.search, "steps": budget.search + budget.steps}
        guards = {**({bench.reward.name: FLOOR} if budget.search else {}), **(guard or {})}
        own = {**SETTINGS, **evaluations, **settings, "guard": guards or None}
        return NeverTooLate(diversity=[entry], rewards=bench.reward, **own)

    return make


def group(candidates: int = MANY, times: float = 1.0) -> Callable[[Bench], GroupSelection]:
    """Return the maker of group selection from a number of candidates, with some times the λ of ours.

    It maximizes the objective `MAIN`, λ times the mean distance, so its weight is λ·2/(K−1).
    """

    def make(bench: Bench) -> GroupSelection:
        strength = times * 2 * weight(bench, MAIN) / (bench.images - 1)
        count = max(1, candidates // bench.images)
        known = features(bench, OBJECTIVES[MAIN][1])
        return GroupSelection(rewards=bench.reward, features=known, weight=strength, steps=count)

    return make


def contest(noise: str, sampler: Any, budget: Budget, against: str) -> list[Row]:
    """Return plain sampling, ours, and group selection in the same seconds, from a noise."""
    timed = f"{noise}, group selection in the seconds of ours"
    return [
        Row(f"{noise}, plain", None, sampler, against=against),
        Row(f"{noise}, ours", ours(budget), sampler, against=timed),
        Row(timed, group(), sampler, time_of=f"{noise}, ours", against=f"{noise}, plain"),
    ]


def rows(table: str, budget: Budget) -> list[Row]:
    """Return the rows of a table."""
    if table == "objectives":
        found = [Row("plain")] + [Row(name, ours(budget, name)) for name in OBJECTIVES]
        found.append(Row(f"{MAIN}, paper's step", ours(budget, geometry=None)))
        return [*found, Row(f"{MAIN}, guard", ours(budget, guard=GUARD))]
    if table == "pink":
        return [row for noise, sampler in SWEPT.items() for row in contest(noise, sampler, budget, "white, plain")]
    found = []
    for noise, sampler in NOISES.items():
        found += contest(noise, sampler, budget, "white, plain")
        if budget.search:
            found.append(Row(f"{noise}, ours without search", ours(ALONE), sampler, against=f"{noise}, plain"))
        twice, timed = group(times=2.0), f"{noise}, ours"
        found.append(Row(f"{noise}, the same with twice the λ", twice, sampler, time_of=timed, against=timed))
        found.append(Row(many_of(noise), group(CANDIDATES), sampler, against=f"{noise}, plain"))
    return found


def many_of(noise: str) -> str:
    return f"{noise}, group selection from {CANDIDATES}"


def compared(found: Sequence[Row], against: Callable[[Row], str]) -> list[Row]:
    """Return rows compared with others."""
    return [dataclasses.replace(row, against=against(row)) for row in found]


def of_white(row: Row) -> str:
    """Return the row of the same method from white noise."""
    return f"white, {row.name.partition(', ')[2]}"


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


def time_to_reach(found: Found, prompts: Sequence[str], noise: str, resamples: int = 2000) -> str:
    """Format the time at which ours passes the patch distance of group selection from `CANDIDATES`.

    The ratio of seconds is given with its 95% interval.
    """
    curves, seconds = (column(found, f"{noise}, ours", key, prompts) for key in ("curve", "clock"))
    target, cost = (column(found, many_of(noise), key, prompts) for key in ("patches", "seconds"))
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(0))
    (at,) = reached(curves, seconds, target, cost, torch.arange(len(prompts))[None])
    ratios = sorted(each.ratio for each in reached(curves, seconds, target, cost, drawn))
    low, high = (ratios[round(share * (resamples - 1))] for share in (0.025, 0.975))
    text = f"{noise}: step {at.steps:.0f}, {at.seconds:.2f} s, {at.ratio:.2f} [{low:.2f}, {high:.2f}] of its seconds"
    return text.replace("inf", "∞")


def report(result: Report, table: str) -> str:
    """Format all tables in Markdown."""
    every = [*DIVERSITY, *QUALITY, *COST]
    if table == "objectives":
        return result.table(every)
    parts = {"Differences to plain white noise": result.table(every, compared(result.rows, lambda _: "white, plain"))}
    timed = [row for row in result.rows if row.name.endswith(", ours")]
    parts["Ours, and its differences to group selection in the same seconds"] = result.table(every, timed)
    parts["Differences to the same from white noise"] = result.table(every[:-1], compared(result.rows, of_white))
    if table == "methods":
        lines = [time_to_reach(result.found, result.prompts, noise) for noise in NOISES]
        parts[f"Until the mean patch distance passes that of group selection from {CANDIDATES}"] = "\n".join(lines)
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items())


def draw_sweep(result: Report, path: Path) -> None:
    """Plot diversity and correctness of each method against α."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=160, layout="constrained")
    kinds = list(dict.fromkeys(row.name.partition(", ")[2] for row in result.rows))
    panels = figure.subplots(1, len(TITLES))
    for axes, (metric, title) in zip(panels, TITLES.items(), strict=True):
        for kind in kinds:
            means = [float(result.of(f"α = {alpha:g}, {kind}", metric).nanmean()) for alpha in ALPHAS]
            (line,) = axes.plot(ALPHAS, means, marker="o", markersize=3, label=kind)
            white = float(result.of(f"white, {kind}", metric).nanmean())
            axes.axhline(white, color=line.get_color(), linewidth=0.8, linestyle="--")
        axes.set_title(title, size=9, loc="left")
        axes.set_xlabel("α of the pink noise (dashed: white)", size=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> Report:
    parser = parser_of("It's Never Too Late from white and pink noise.", "turbo", images=4, limit=24)
    parser.add_argument("--table", choices=("methods", "objectives", "pink"), default="methods")
    parser.add_argument("--search", type=at_least(0), default=SEARCH, help="noises that are searched, per image")
    parser.add_argument("--steps", type=at_least(2), default=STEPS, help="evaluations after the search")
    options = parser.parse_args(arguments)
    budget = Budget(options.search, options.steps)
    found = run(options, rows(options.table, budget), "never_too_late", curves=options.table == "methods")
    print(report(found, options.table))
    if options.plot:
        draw_sweep(found, options.plot) if options.table == "pink" else found.plot(TITLES, options.plot)
    return found


if __name__ == "__main__":
    main()
