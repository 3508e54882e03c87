"""Right images and reward per second: ReNO, what it replaces, and its controls, in one run on one machine.

python benchmarks/per_second.py --limit 64 --seeds 2 --output per_second.json --plot per_second.png

Seconds are those of the processor, or on a GPU those of the clock, from the call to an image in hand, per image of the
batch. The judge is not counted, and no method sees it. Run it again with the same `--output` to resume or to draw anew.
"""

import argparse
import bisect
import dataclasses
import functools
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from defaults import digest_of_defaults  # pyright: ignore[reportMissingImports]
from never_too_late import reached  # pyright: ignore[reportMissingImports]
from sets import border, load, rounded  # pyright: ignore[reportMissingImports]
from torch import Tensor
from tqdm import tqdm

import noiseopt
from noiseopt import AutoReward, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseCallback, NoiseState
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap
from noiseopt.evaluation.measure import synchronize
from noiseopt.evaluation.plan import GuidanceChoice, MethodChoice
from noiseopt.quiet import quiet_libraries

SPLITS = {"validation": "VALIDATION_PROMPTS", "held-out": "HELD_OUT_PROMPTS"}
MODELS = ("turbo", "sdxl-turbo", "guided", "sd3")
MANY = 10**6  # more evaluations than fit in any time
AHEAD = 1.03  # a run lasts for this many times the seconds of `BEFORE` on the batch before
PLAIN, BEST_OF_N, RELEASED, BEFORE, NOW = (
    "plain",
    "best-of-N",
    "ReNO, released code",
    "ReNO, released step, 4 views",
    "ReNO",
)
UNSEARCHED, NO_VIEWS = "ReNO, search=0", "ReNO, search=0, views=0"
LENGTHS = (6, 11, 20, 40, 78)  # of the default, whose search depends on the number of steps
BANDS = (BEST_OF_N, BEFORE, NOW)  # whose intervals are drawn
RATE = "learning_rate=5.0"  # the paper's, in units of √(H·W)/64: noise of the embedded models has its 4 channels
DARK, WEIGHT = 0.3, 20.0  # mean of a dark border of an image; the reward of a change by 1
Judge = Callable[[Tensor, Sequence[str]], Tensor]  # images and prompts to 1.0 or 0.0 of each
Moment = Tensor  # `(batches,)`, a time in each batch, in seconds per image


@dataclasses.dataclass(frozen=True)
class Row:
    """A curve.

    Attributes:
        color: Its color in the plot.
        methods: Methods with settings, as `noiseopt evaluate` takes them; none is plain sampling. A method without
            `steps` is followed from evaluation to evaluation until the time is over. One with `steps`, because its path
            depends on them, and one that steers the denoising steps give one point of the curve each: their end.
        chain: Whether it needs more than one denoising step.
    """

    color: str
    methods: tuple[str, ...] = ()
    chain: bool = False

    @property
    def choices(self) -> list[MethodChoice]:
        return [MethodChoice.parse(method) for method in self.methods]

    @property
    def followed(self) -> bool:
        choices = self.choices
        return bool(choices) and "steps" not in choices[0].settings and not isinstance(choices[0], GuidanceChoice)


ROWS = {
    PLAIN: Row("#6e7781"),
    BEST_OF_N: Row("#bf8700", ("best_of_n",)),
    "zero-order search": Row("#8250df", ("zero_order_search",)),
    RELEASED: Row("#1a7f37", (f"reno:mode=parity,{RATE}",)),
    BEFORE: Row("#cf222e", (f"reno:geometry=sphere,search=0,views=4,{RATE}",)),
    NOW: Row("#0969da", tuple(f"reno:steps={steps}" for steps in LENGTHS)),
    UNSEARCHED: Row("#1b7c83", ("reno:search=0",)),
    NO_VIEWS: Row("#54aeff", ("reno:search=0,views=0",)),
    "ReNO, 4 starts": Row("#bf3989", ("reno:search=16,starts=4,steps=25", "reno:search=16,starts=4,steps=80")),
    "RewardGuidance": Row("#0f1419", ("reward_guidance", "reward_guidance:particles=8"), chain=True),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The outcomes of a row on a batch of `B` problems, one after another.

    Attributes:
        seconds: `(N,)`, ascending, per image: the time at which each outcome is there.
        rewards: `(N, B)`, of the image that would be returned then.
        right: `(N, B)`, 1.0 where the judge finds it right, else 0.0.
    """

    seconds: Tensor
    rewards: Tensor
    right: Tensor

    def at(self, seconds: float) -> int:
        """Return the index of the last outcome that is there at a time; before the first one, that of the first."""
        return max(0, bisect.bisect_right(self.seconds.tolist(), seconds) - 1)

    def packed(self) -> dict[str, Any]:
        """Return plain values: all seconds, and for each problem `[index, reward, right]` where the outcome changes."""
        pairs = torch.stack([self.rewards, self.right], 2)
        changes = torch.cat([torch.ones_like(pairs[:1, :, 0]), (pairs[1:] != pairs[:-1]).any(2).float()])
        problems = [
            [
                [index, float(pairs[index, problem, 0]), int(pairs[index, problem, 1])]
                for index in column.nonzero()[:, 0].tolist()
            ]
            for problem, column in enumerate(changes.T)
        ]
        return {"seconds": self.seconds.tolist(), "problems": problems}

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> "Curve":
        """Return the curve of `packed`."""
        count = len(values["seconds"])
        pairs = torch.zeros(count, len(values["problems"]), 2)
        for problem, changes in enumerate(values["problems"]):
            for index, reward, right in changes:
                pairs[index:, problem] = torch.tensor([reward, float(right)])
        return cls(torch.tensor(values["seconds"]), *pairs.unbind(2))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, its index in the split, and the seed of its initial noise."""

    prompt: str
    index: int
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(10_000 * self.seed + self.index)


def right(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the judge's verdicts, `(B,)`, 1.0 or 0.0."""
    return torch.tensor([float(verdict.correct) for verdict in shapes_world.judge(images, prompts)])


def right_and_dark(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return 1.0 for images that are right and have a dark ground, `(B,)`, else 0.0."""
    return right(images, prompts) * (border(images).cpu() < DARK)


@dataclasses.dataclass(frozen=True)
class DarkGround:
    """A reward that also prefers a dark ground: less by `WEIGHT` times what its border is above `DARK` − 0.1."""

    reward: Callable[[Tensor, Sequence[str]], Tensor]
    name: ClassVar[str] = "clip_and_dark"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts) - WEIGHT * (border(images) - DARK + 0.1).clamp_min(0)


class Follower(NoiseCallback):
    """Record what a run would return after each evaluation, and stop it when its time is over.

    Args:
        clock: The seconds of the run so far.
        name: The reward to record.
        horizon: The time, in the same seconds.
        least: The number of evaluations before which no run is stopped.
        judge: What says which images are right.
    """

    def __init__(self, clock: Callable[[], float], name: str, horizon: float, least: int, judge: Judge = right) -> None:
        self.clock, self.name, self.horizon, self.least, self.lost = clock, name, horizon, least, 0.0
        self.judge = judge
        self.seconds: list[float] = []
        self.rewards: list[Tensor] = []
        self.right: list[Tensor] = []

    def on_step_end(self, state: NoiseState) -> None:
        seconds, best = self.clock() - self.lost, state.best
        assert best.images is not None
        rewards, verdicts = (
            known[-1].clone() if known else torch.zeros(len(best.step)) for known in (self.rewards, self.right)
        )
        (new,) = (best.step == state.step).cpu().nonzero(as_tuple=True)
        if len(new):
            rewards[new] = state.scores[self.name].cpu()[new]
            verdicts[new] = self.judge(best.images[new], [state.prompts[index] for index in new])
        self.seconds.append(seconds)
        self.rewards.append(rewards)
        self.right.append(verdicts)
        if seconds >= self.horizon and len(self.seconds) >= self.least:
            state.stop("time")
        self.lost = self.clock() - seconds

    def curve(self) -> Curve:
        seconds = torch.tensor(self.seconds) / len(self.rewards[0])
        return Curve(seconds, torch.stack(self.rewards), torch.stack(self.right))


class Bench:
    """A pipeline with the reward that all rows maximize.

    Args:
        model: An embedded model.
        steps: The evaluations of `BEFORE` and `RELEASED` that count.
        device: Where to run it.
        dark: Whether the ground is to be dark, too.
    """

    def __init__(self, model: str, steps: int, device: str, dark: bool = False) -> None:
        self.device, self.steps = torch.device(device), steps
        with quiet_libraries():
            self.pipe: Any = load_pipeline(model).to(self.device)
            reward = AutoReward.from_pretrained(shapes_world.path("clip")).to(self.device)
        self.reward: Any = DarkGround(reward) if dark else reward
        self.judge: Judge = right_and_dark if dark else right
        self.pipe.set_progress_bar_config(disable=True)
        self.call = dict(shapes_world.MODELS[model].call)

    def now(self) -> float:
        """Return the seconds of the processor, or on an accelerator those of the clock once its work is done."""
        if self.device.type == "cpu":
            return time.process_time()
        synchronize(self.device)
        return time.perf_counter()

    def run(self, row: Row, problems: Sequence[Problem], horizon: float) -> Curve:
        """Run a row on a batch; `horizon` in seconds per image."""
        if not row.methods:
            return self.sample(self.pipe, problems)
        if row.followed:
            return self.follow(row.choices[0], problems, horizon)
        ends = sorted((self.end(choice, problems) for choice in row.choices), key=lambda end: float(end.seconds))
        return Curve(*(torch.cat([getattr(end, name) for end in ends]) for name in ("seconds", "rewards", "right")))

    def sample(self, draw: Callable[..., Any], problems: Sequence[Problem]) -> Curve:
        """Draw with the pipeline itself, or with a function of the same arguments."""
        prompts, generators = inputs(problems)
        began = self.now()
        images = draw(prompts, generator=generators, output_type="pt", **self.call).images
        seconds = (self.now() - began) / len(problems)
        with torch.no_grad():
            rewards = self.reward(images, prompts).cpu()
        return Curve(torch.tensor([seconds]), rewards[None], self.judge(images, prompts)[None])

    def follow(self, choice: MethodChoice, problems: Sequence[Problem], horizon: float) -> Curve:
        """Run a method until the time is over."""
        prompts, generators = inputs(problems)
        method = dataclasses.replace(choice.build(self.reward), steps=MANY)
        began = self.now()
        follower = Follower(
            lambda: self.now() - began, self.reward.name, horizon * len(problems), self.steps, self.judge
        )
        optimize_noise(self.pipe, prompts, method, callbacks=follower, generator=generators, **self.call)
        return follower.curve()

    def end(self, choice: MethodChoice, problems: Sequence[Problem]) -> Curve:
        """Run a method to its end."""
        if isinstance(choice, GuidanceChoice):
            return self.sample(functools.partial(choice.guidance(self.reward).generate, self.pipe), problems)
        prompts, generators = inputs(problems)
        began = self.now()
        result = optimize_noise(self.pipe, prompts, choice.build(self.reward), generator=generators, **self.call)
        seconds = (self.now() - began) / len(problems)
        rewards = result.best_scores[self.reward.name].cpu()
        return Curve(torch.tensor([seconds]), rewards[None], self.judge(result.images, prompts)[None])


def batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    return (problems[start : start + size] for start in range(0, len(problems), size))


def inputs(problems: Sequence[Problem]) -> tuple[list[str], list[torch.Generator]]:
    return [problem.prompt for problem in problems], [problem.generator() for problem in problems]


def rows_of(call: Mapping[str, Any]) -> dict[str, Row]:
    """Return the rows that a model can run which is called in this way."""
    chain = call["num_inference_steps"] > 1
    return {label: row for label, row in ROWS.items() if chain or not row.chain}


Found = dict[str, list[dict[str, Any]]]  # row -> `Curve.packed` of each batch


def compare(bench: Bench, batches: Sequence[Sequence[Problem]], found: Found) -> Iterator[None]:
    """Run every row on every batch not yet in `found`, and pause after each batch.

    Rows alternate between both orders, so that a drift of the machine cancels.
    """
    rows = rows_of(bench.call)
    for label in rows:
        found.setdefault(label, [])
    done = len(found[PLAIN])
    if done == len(batches):
        return
    for row in rows.values():
        if row.followed or not row.methods:  # first passes are slower
            bench.run(row, batches[done][:1], horizon=0.0)
    horizon = AHEAD * float(bench.run(ROWS[BEFORE], batches[done], horizon=0.0).seconds[-1])
    for number, problems in enumerate(tqdm(batches[done:], unit="batch"), done):
        for label in rows if number % 2 == 0 else reversed(rows):
            curve = bench.run(rows[label], problems, horizon)
            found[label].append(rounded(curve.packed()))
        horizon = AHEAD * found[BEFORE][-1]["seconds"][bench.steps - 1]
        yield


class Results:
    """Means over prompts at equal times. Each prompt counts once, however many noises it has.

    A time is a share of the seconds that `BEFORE` takes for its evaluations on the same batch, so that a machine that
    becomes slower from batch to batch does not count; in seconds it is multiplied with their mean.

    Args:
        found: The curves of each row, by batch.
        prompts: The number of prompts; the problems are these with the first noise, then with the second, and so on.
        steps: The evaluations of `BEFORE` and `RELEASED` that count.
    """

    def __init__(self, found: Found, prompts: int, steps: int) -> None:
        self.curves = {label: [Curve.unpacked(each) for each in batches] for label, batches in found.items()}
        self.prompts, self.steps = prompts, steps
        self.before = self.end(BEFORE)

    def end(self, label: str) -> Moment:
        """Return the time of the last evaluation that counts of a row."""
        return torch.stack([curve.seconds[self.steps - 1] for curve in self.curves[label]])

    def begins(self, label: str) -> float:
        """Return the share at which a row has an image for all problems."""
        return float((torch.stack([curve.seconds[0] for curve in self.curves[label]]) / self.before).max())

    def values(self, label: str, name: str, moment: Moment) -> Tensor:
        """Return "right" or "rewards" of a row at a time, `(prompts,)`, float64."""
        columns = [
            getattr(curve, name)[curve.at(float(seconds))]
            for curve, seconds in zip(self.curves[label], moment, strict=True)
        ]
        return torch.cat(columns).double().unflatten(0, (-1, self.prompts)).mean(0)

    def track(self, label: str, name: str) -> tuple[list[float], list[Tensor]]:
        """Return times, and the `values` at each: 60 over the curve of a row that is followed."""
        curves, unit = self.curves[label], float(self.before.mean())
        if not ROWS[label].followed:
            ends = torch.stack([curve.seconds for curve in curves], 1)
            return (unit * (ends / self.before).mean(1)).tolist(), [self.values(label, name, end) for end in ends]
        shares = torch.logspace(math.log10(self.begins(label)), 0.0, 60)
        return (unit * shares).tolist(), [self.values(label, name, each * self.before) for each in shares]

    def evaluations(self, label: str, moment: Moment) -> float:
        """Return the mean number of evaluations until a time of a row that is followed."""
        pairs = zip(self.curves[label], moment, strict=True)
        counts = [1.0 + curve.at(float(seconds)) for curve, seconds in pairs]
        return sum(counts) / len(counts)

    def begun(self, label: str, moment: Moment) -> bool:
        """Return whether a row has an image for all problems at a time."""
        return all(curve.seconds[0] <= seconds for curve, seconds in zip(self.curves[label], moment, strict=True))

    def difference(self, name: str, ours: tuple[str, Moment], theirs: tuple[str, Moment]) -> Estimate:
        """Return the paired difference between two rows, each at its time; NaN if one has no images then."""
        if not (self.begun(*ours) and self.begun(*theirs)):
            return Estimate(math.nan, math.nan, math.nan)
        return paired_bootstrap(*(self.values(label, name, moment) for label, moment in (ours, theirs)))

    def time_to(self, name: str, ours: str, target: Tensor, cost: Moment, resamples: int = 2000) -> Estimate:
        """Return the time at which the mean of a row first is that of `target`, `(prompts,)`, in units of `cost`."""
        shares = torch.linspace(0.005, 1.0, 200, dtype=torch.float64)
        curves = torch.stack([self.values(ours, name, share * cost) for share in shares], 1)
        curves[:, [not self.begun(ours, share * cost) for share in shares]] = -math.inf
        drawn = torch.randint(self.prompts, (resamples, self.prompts), generator=torch.Generator().manual_seed(0))
        chosen = torch.cat([torch.arange(self.prompts)[None], drawn])
        found = reached(curves, shares.expand_as(curves), target, torch.ones_like(target), chosen)
        value, *ratios = (each.ratio for each in found)
        ratios.sort()
        return Estimate(value, *(ratios[round(tail * (resamples - 1))] for tail in (0.025, 0.975)))


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim with its figures.

    Attributes:
        text: The claim.
        figures: A difference, and where it says how soon, a time.
        holds: Whether the figures say so.
    """

    text: str
    figures: str
    holds: bool

    def __str__(self) -> str:
        return f"* {self.text}: **{'holds' if self.holds else 'does not hold'}** ({self.figures})"


def statements(results: Results) -> list[Statement]:
    """Check what is claimed of ReNO, as it is and without its search, and of its step."""
    return [*(each for label in (NOW, UNSEARCHED) for each in claims(results, label)), claim_of_step(results)]


def claims(results: Results, label: str) -> list[Statement]:
    """Check a row against the released step on four views and best-of-N."""
    before, steps = results.before, f"{results.steps} evaluations"
    soon = results.difference("right", (label, before / 5), (BEFORE, before))
    sooner = results.time_to("right", label, results.values(BEFORE, "right", before), before)
    above = results.difference("right", (label, before), (BEFORE, before))
    control, early = (results.difference("right", (label, time), (BEST_OF_N, time)) for time in (before, before / 5))
    return [
        Statement(
            f"{label} in 1/5 of the seconds: at least as many right as by the released step on 4 views after {steps}",
            f"{points(soon)}; as many after {share(sooner)} of the seconds",
            soon.value >= 0,
        ),
        Statement(f"{label} in the same seconds: more right than that", points(above), above.value > 0),
        Statement(
            f"{label} in the same seconds: at least 15 points more right than by best-of-N",
            f"{points(control)}; at 1/5 of the seconds of both {points(early)}",
            control.value >= 0.15 and control.low > 0,
        ),
    ]


def claim_of_step(results: Results) -> Statement:
    """Check the step of ReNO against that of the released code, both without views."""
    released = results.end(RELEASED)
    target = results.values(RELEASED, "rewards", released)
    reward, viewed = (
        results.difference("rewards", (label, released / 2), (RELEASED, released)) for label in (NO_VIEWS, UNSEARCHED)
    )
    reached_at = results.time_to("rewards", NO_VIEWS, target, released)
    return Statement(
        f"{NO_VIEWS} in 1/2 of the seconds: at least the reward of the released code after {results.steps} evaluations",
        f"{number(reward)}; as much after {share(reached_at)} of the seconds; with the view {number(viewed)}",
        reward.value >= 0,
    )


def points(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "no image yet"
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}] points"


def number(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "no image yet"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def share(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]".replace("inf", "never")


def table(results: Results) -> str:
    """Format the share of right images, the reward and the number of evaluations of each row at four times."""
    before = results.before
    moments = [before / 10, before / 5, results.end(RELEASED), before]
    titles = [f"{float(moment.mean()):.2f} s" for moment in moments]
    names = [
        "a tenth",
        "a fifth",
        f"{results.steps} of the released code",
        f"{results.steps} of the released step on 4 views",
    ]
    lines = [" | ".join(["|", *(f"{title} ({name})" for title, name in zip(titles, names, strict=True)), ""]).strip()]
    lines.append("|---" * (len(moments) + 1) + "|")
    for label in results.curves:
        cells = []
        for moment in moments:
            if results.begins(label) > float((moment / before).min()):
                cells.append("–")
                continue
            shown = bootstrap(results.values(label, "right", moment))
            reward = float(results.values(label, "rewards", moment).mean())
            numbers = f"{100 * shown.value:.1f}% [{100 * shown.low:.1f}, {100 * shown.high:.1f}], {reward:.2f}"
            counted = f", {results.evaluations(label, moment):.0f}" if ROWS[label].followed else ""
            cells.append(numbers + counted)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Results, title: str, seconds: str, path: Path) -> None:
    """Plot right images and reward of each row over the seconds, and 95% intervals over prompts of `BANDS`.

    Args:
        results: The curves.
        title: What was measured.
        seconds: The label of the time.
        path: The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=160, layout="constrained")
    figure.suptitle(f"{title}. Bands: 95% intervals over prompts", size=10, color="#1f2328", x=0.01, ha="left")
    kinds = {"right": ("right by the judge, %", 100.0), "rewards": ("reward, seen by all but plain", 1.0)}
    for axes, (name, (label, scale)) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        ends = {}
        for row, color in ((row, ROWS[row].color) for row in results.curves):
            times, values = results.track(row, name)
            found = [bootstrap(each, resamples=1000) for each in values]
            mean, low, high = ([scale * getattr(each, bound) for each in found] for bound in ("value", "low", "high"))
            width, marker = 2.4 if row in BANDS else 1.4, "" if ROWS[row].followed else "o"
            axes.plot(times, mean, color=color, linewidth=width, marker=marker, markersize=5)
            if row in BANDS:
                axes.fill_between(times, low, high, color=color, alpha=0.12, linewidth=0)
            if len(times) == 1:
                axes.axhline(mean[0], color=color, linewidth=1, linestyle=":")
            ends[row] = mean[-1]
        axes.set(xscale="log", xlabel=seconds)
        axes.set_title(label, size=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.tick_params(labelsize=8, length=2)
        axes.xaxis.set_major_formatter("{x:g}")
        gap = 0.055 * (axes.get_ylim()[1] - axes.get_ylim()[0])
        for row, place in apart(ends, gap).items():
            axes.annotate(
                row, (1.01, place), xycoords=("axes fraction", "data"), size=8, color=ROWS[row].color, va="center"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move labels as far as needed for a gap between neighbors: the mean of moving only up and only down."""
    order = sorted(places, key=lambda name: places[name])
    up, down = dict(places), dict(places)
    for below, above in itertools.pairwise(order):
        up[above] = max(up[above], up[below] + gap)
    for above, below in itertools.pairwise(reversed(order)):
        down[below] = min(down[below], down[above] - gap)
    return {name: (up[name] + down[name]) / 2 for name in order}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="an embedded model")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="the first N prompts of the split")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="initial noises per prompt")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="evaluations whose time is compared")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="problems per call")
    parser.add_argument("--dark", action="store_true", help="the ground is to be dark, too: reward and judge say so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON, and resume from there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves as an image")
    options = parser.parse_args(arguments)
    if min(options.limit, options.seeds, options.batch_size) < 1 or options.steps < 2:
        parser.error("expected at least 1 prompt, 1 noise, batches of 1, and 2 evaluations")
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that the numbers depend on besides the code."""
    given = {name: value for name, value in vars(options).items() if name not in ("output", "plot")}
    versions = {"noiseopt": noiseopt.__version__, "torch": torch.__version__}
    defaults = {"defaults": digest_of_defaults("reno", options.model, "clip")}
    return given | defaults | versions | {"threads": torch.get_num_threads(), "machine": platform.machine()}


def save(path: Path, settings: Mapping[str, Any], prompts: Sequence[str], found: Found) -> None:
    """Write settings, prompts and curves as JSON, atomically."""
    values = {"settings": settings, "prompts": prompts, "rows": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, print the table and the statements, and write all numbers."""
    options = parse(arguments)
    rows = rows_of(shapes_world.MODELS[options.model].call)
    known = settings(options) | {"rows": {label: list(row.methods) for label, row in rows.items()}}
    found: Any = load(options.output, known)
    prompts = list(getattr(shapes_world, SPLITS[options.split])[: options.limit])
    problems = [Problem(prompt, i, seed) for seed in range(options.seeds) for i, prompt in enumerate(prompts)]
    parts = list(batches(problems, options.batch_size))
    for _ in compare(Bench(options.model, options.steps, options.device, options.dark), parts, found):
        if options.output:
            save(options.output, known, prompts, found)
    results = Results(found, len(prompts), options.steps)
    noises = f"{options.seeds} noise{'s' * (options.seeds > 1)}"
    what = f"{options.model}, {len(prompts)} {options.split} prompts × {noises}{', on a dark ground' * options.dark}"
    seconds = "processor seconds per image" if options.device == "cpu" else "seconds per image"
    print(f"{what}. Right by the judge, reward, and evaluations, at equal {seconds}\n\n{table(results)}\n")
    print(*statements(results), sep="\n")
    if options.plot:
        draw(results, what, seconds, options.plot)
    return results


if __name__ == "__main__":
    main()
