"""Tables of an evaluation: means over prompts, with bootstrap intervals, from its units (see `unit.py`)."""

import csv
import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import shapes_world
from .bootstrap import Estimate, bootstrap, paired_bootstrap
from .plan import PLAIN, Contender, Plan, control_of, diversity_measures
from .plane import front_notes

Numbers = Mapping[str, Any]  # the JSON of a unit
SETS = {"mss": "MSS", "vendi": "Vendi", "coverage": "Coverage", "layout spread": "layout spread"}
DIVERSITY = {"mss": "MSS", "vendi": "Vendi", "distance": "distance"}
LEAST_FOR_INTERVAL, LEAST_FOR_EVIDENCE = 5, 10  # prompts
FROM_FEATURES = ("mss", "vendi", "coverage")
NOISE = {
    "norm": "norm / √d",
    "norm z": "norm, z",
    "mean": "mean",
    "variance": "variance",
    "skewness": "skewness",
    "excess_kurtosis": "excess kurtosis",
    "spectral_slope": "spectral slope",
    "spectral_slope z": "spectral slope, z",
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of a table.

    Attributes:
        name: Its name in files.
        group: The table that it belongs to.
        value: Maps a unit to its value, the mean over its images; NaN where it does not apply.
        percent: Whether it is a share.
        optimized: Whether methods optimize it, so that higher values are no evidence of quality.
    """

    name: str
    group: str
    value: Callable[[Numbers], float]
    percent: bool = False
    optimized: bool = False

    @property
    def is_quality(self) -> bool:
        """Return whether the metric measures how well an image fits its prompt."""
        return self.group == "rewards" or self.name == "right"

    @property
    def is_diversity(self) -> bool:
        """Return whether the metric measures how much the images of a prompt differ, by features."""
        return self.group == "sets" and self.name.partition(" (")[0] in DIVERSITY.values()

    @property
    def title(self) -> str:
        return self.name + "*" * self.optimized + ", %" * self.percent


@dataclasses.dataclass(frozen=True)
class Entry:
    """An estimate of a metric, for a contender or the difference of two, with its number of prompts.

    Fewer than `LEAST_FOR_INTERVAL` prompts have no interval: resamples of so few do not tell their spread.
    """

    model: str
    method: str
    metric: Metric
    estimate: Estimate
    prompts: int

    def __post_init__(self) -> None:
        if self.prompts < LEAST_FOR_INTERVAL:
            object.__setattr__(self, "estimate", Estimate(self.estimate.value, math.nan, math.nan))

    def text(self, sign: str = "") -> str:
        """Format the estimate with its interval."""
        value, interval = self.parts(sign)
        return value + f" [{interval}]" * bool(interval)

    def parts(self, sign: str = "") -> tuple[str, str]:
        """Format the estimate and its interval, in percent for a share. A dash stands for too few prompts."""
        value, low, high = dataclasses.astuple(self.estimate)
        if math.isnan(value):
            return "–", ""
        scale, form = (100, f"{sign}.1f") if self.metric.percent else (1, f"{sign}.4g")
        interval = f"{scale * low:{form}}, {scale * high:{form}}"
        if math.isnan(low):
            interval = "–" if self.prompts < LEAST_FOR_INTERVAL else ""
        return f"{scale * value:{form}}".replace("-", "−"), interval.replace("-", "−")

    @property
    def is_evident(self) -> bool:
        """Return whether the interval of a difference excludes 0, for enough prompts to trust it."""
        return self.prompts >= LEAST_FOR_EVIDENCE and (self.estimate.low > 0 or self.estimate.high < 0)


def mean(values: Sequence[Any] | None) -> float:
    """Return the mean of numbers or booleans; NaN if there are none, or one is `None`, which stands for NaN."""
    return sum(math.nan if value is None else value for value in values) / len(values) if values else math.nan


def right(numbers: Numbers) -> float:
    """Return the share of a unit's images that are right according to the judge."""
    return mean(numbers["judge"]["right"]) if numbers["judge"] else math.nan


def metrics_of(plan: Plan, categories: Iterable[str]) -> list[Metric]:
    """Return all columns of a plan, including those without values."""
    optimized = dict(plan.rewards)
    seen = plan.optimizes(plan.features)
    judge = [Metric("right", "judge", right, percent=True)]
    judge += [Metric(f"right: {name}", "judge", right_within(name), percent=True) for name in categories]
    rewards = [
        Metric(name, "rewards", reading("rewards", name), optimized=name in optimized) for name in plan.reward_names
    ]
    sets = [
        Metric(title, "sets", reading("set", name), optimized=seen and name in FROM_FEATURES)
        for name, title in SETS.items()
    ]
    sets += [
        Metric(f"{DIVERSITY[name]} ({of})", "sets", reading("set", f"{name} {of}"), optimized=plan.optimizes(of))
        for of in plan.more_features
        for name in diversity_measures(of)
    ]
    return judge + rewards + sets + [Metric(title, "noise", reading("noise", name)) for name, title in NOISE.items()]


def right_within(category: str) -> Callable[[Numbers], float]:
    """Return a function like `right` for the units of one category; NaN for other units."""
    return lambda unit: right(unit) if unit["category"] == category else math.nan


def reading(part: str, name: str) -> Callable[[Numbers], float]:
    """Return a function that reads a number of a unit, or the mean of a list; NaN if missing."""

    def read(unit: Numbers) -> float:
        value = unit[part].get(name)
        return mean(value) if isinstance(value, list) else math.nan if value is None else float(value)

    return read


class Results:
    """The units of a plan as estimates over prompts; each prompt counts once, however many seeds it has.

    Args:
        plan: The plan.
        units: The numbers of all units.
        best_of: N of the control, by model and label of the method.
        pooled: Coverage of a folder of references, by model and key of the contender, if there is one.
    """

    def __init__(
        self,
        plan: Plan,
        units: Iterable[Numbers],
        best_of: Mapping[tuple[str, str], int],
        pooled: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self.plan, self.best_of, self.pooled = plan, best_of, pooled or {}
        self.units: dict[tuple[str, str], list[Numbers]] = {}
        for unit in sorted(units, key=lambda unit: unit["index"]):
            self.units.setdefault((unit["model"], unit["method"]), []).append(unit)
        known = {unit["category"] for unit in self.all_units() if unit["category"]}
        order = [name for name in shapes_world.CATEGORIES if name in known]
        self.categories = order + sorted(known.difference(order))
        self.metrics = [metric for metric in metrics_of(plan, self.categories) if self.applies(metric)]

    def all_units(self) -> list[Numbers]:
        return [unit for group in self.units.values() for unit in group]

    def applies(self, metric: Metric) -> bool:
        pooled = metric.name == "Coverage" and bool(self.pooled)
        return pooled or not all(math.isnan(metric.value(unit)) for unit in self.all_units())

    def title(self, model: str, contender: Contender) -> str:
        """Return the key of a contender, with the N of best-of-N."""
        n = self.best_of.get((model, contender.method.label)) if contender.control and contender.method else None
        return contender.key if n is None else contender.key.replace("best-of-N", f"best-of-{n}")

    def difference_title(self, model: str, ours: Contender, theirs: Contender) -> str:
        """Return the name of a comparison, with the N of best-of-N."""
        return f"{ours.key} − {self.title(model, theirs).partition(' for ')[0]}"

    def values(self, model: str, key: str, metric: Metric) -> torch.Tensor:
        """Return the metric by prompt, `(P,)` float64, NaN where it does not apply."""
        return torch.tensor([metric.value(unit) for unit in self.units[model, key]], dtype=torch.float64)

    def entry(self, model: str, contender: Contender, metric: Metric) -> Entry:
        """Return one cell of a table."""
        if metric.name == "Coverage" and (pooled := self.pooled.get((model, contender.key))) is not None:
            estimate = Estimate(pooled, math.nan, math.nan)
            return Entry(model, contender.key, metric, estimate, len(self.plan.prompts.prompts))
        values = self.values(model, contender.key, metric)
        values = values[~values.isnan()]
        return Entry(model, contender.key, metric, bootstrap(values), len(values))

    def entries(self) -> list[Entry]:
        """Return every metric of every contender, and the changes from plain sampling."""
        found = []
        for model in self.plan.models:
            for contender in self.plan.contenders:
                found += [self.entry(model.name, contender, metric) for metric in self.metrics]
                found += self.changes(model.name, contender)
        return found

    def changes(self, model: str, contender: Contender) -> list[Entry]:
        """Return the shares of wrong plain images that became right and of right ones that stayed right, by noise."""
        if contender == PLAIN or not self.judged(model):
            return []
        before = self.verdicts(model, PLAIN.key)
        after = self.verdicts(model, contender.key)
        found = []
        for name, cases in (("failures repaired", ~before), ("right ones kept", before)):
            metric = Metric(name, "judge", right, percent=True)
            counts, kept = cases.sum(1), (cases & after).sum(1)
            estimate = bootstrap(kept, counts) if counts.any() else bootstrap(kept[:0])
            found.append(Entry(model, contender.key, metric, estimate, int((counts > 0).sum())))
        return found

    def judged(self, model: str) -> bool:
        return all(unit["judge"] is not None for unit in self.units[model, PLAIN.key])

    def verdicts(self, model: str, key: str) -> torch.Tensor:
        """Return the images that are right, `(P, seeds)` bool."""
        return torch.tensor([unit["judge"]["right"] for unit in self.units[model, key]])

    def differences(self) -> list[Entry]:
        """Return each method minus plain sampling and minus its control, on the same prompts."""
        metrics = [metric for metric in self.metrics if metric.is_quality or metric.is_diversity]
        return [
            self.difference(model.name, ours, theirs, metric)
            for model in self.plan.models
            for ours, theirs in self.pairs()
            for metric in metrics
        ]

    def pairs(self) -> list[tuple[Contender, Contender]]:
        """Return the comparisons: each method with plain sampling and with its control."""
        found = []
        for contender in self.plan.contenders:
            if contender.method and not contender.control:
                found.append((contender, PLAIN))
                found += [(contender, other) for other in self.plan.contenders if other == control_of(contender.method)]
        return found

    def difference(self, model: str, ours: Contender, theirs: Contender, metric: Metric) -> Entry:
        sides = [self.values(model, contender.key, metric) for contender in (ours, theirs)]
        known = ~(sides[0] - sides[1]).isnan()
        estimate = paired_bootstrap(*(side[known] for side in sides))
        return Entry(model, f"{ours.key} − {theirs.key}", metric, estimate, int(known.sum()))

    def warnings(self) -> list[str]:
        """Return a warning for each method that raises what it optimizes and lowers another quality metric."""
        found = []
        for model in self.plan.models:
            for ours, theirs in (pair for pair in self.pairs() if pair[0].method and pair[0].method.takes_rewards):
                gaps = [
                    self.difference(model.name, ours, theirs, metric) for metric in self.metrics if metric.is_quality
                ]
                evident = [gap for gap in gaps if gap.is_evident]
                up = [gap.metric.name for gap in evident if gap.metric.optimized and gap.estimate.value > 0]
                down = [gap.metric.name for gap in evident if not gap.metric.optimized and gap.estimate.value < 0]
                if theirs == PLAIN and up and down:
                    found.append(
                        f"{ours.key} on {model.name} raises {' and '.join(up)}, which it optimizes, and lowers "
                        f"{' and '.join(down)}, which it does not: it exploits the reward."
                    )
        return found


COST_NAMES = ("model", "method")
COST = {
    "seconds per image": lambda unit: unit["cost"]["seconds"] / len(unit["seeds"]),
    "model calls per image": lambda unit: unit["cost"]["model_calls"] / len(unit["seeds"]),
    "peak memory, MiB": reading("cost", "memory"),
}


def costs(results: Results) -> list[dict[str, Any]]:
    """Return the costs per model and contender: means over prompts, and peak memory.

    For best-of-N, a column has its time relative to that of the method that it controls.
    """
    rows = []
    for model in results.plan.models:
        seconds = {}
        for contender in results.plan.contenders:
            units = results.units[model.name, contender.key]
            numbers = {name: [value(unit) for unit in units] for name, value in COST.items()}
            seconds[contender.key] = mean(numbers["seconds per image"])
            peak = max(numbers.pop("peak memory, MiB"))
            rows.append(
                {"model": model.name, "method": results.title(model.name, contender)}
                | {name: mean(values) for name, values in numbers.items()}
                | {"peak memory, MiB": peak, "n": len(units)}
            )
        for row, contender in zip(rows[-len(results.plan.contenders) :], results.plan.contenders, strict=True):
            of = contender.method.label if contender.control and contender.method else None
            row["time / method's"] = math.nan if of is None else row["seconds per image"] / seconds[of]
    return rows


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


GROUPS = {
    "judge": "Right by the judge",
    "rewards": "Rewards",
    "sets": "Sets of images",
    "noise": "The noise",
}


def markdown(results: Results) -> str:
    """Format all estimates with a row per model and contender, and the differences."""
    parts = ["# Evaluation", f"{escaped(heading(results.plan))} Brackets are 95% bootstrap intervals over prompts."]
    entries = results.entries()
    for group, title in GROUPS.items():
        ours = [entry for entry in entries if entry.metric.group == group]
        columns = list(dict.fromkeys(entry.metric.title for entry in ours))
        if columns:
            cells = {(entry.model, entry.method, entry.metric.title): entry.text() for entry in ours}
            rows = [["model", "method", *(head(column, ours) for column in columns)]]
            for model in results.plan.models:
                for contender in results.plan.contenders:
                    row = [cells.get((model.name, contender.key, column), "–") for column in columns]
                    rows.append([escaped(model.name), escaped(results.title(model.name, contender)), *row])
            parts.append(f"## {title}\n\n{grid(rows)}")
    parts.append(f"## Differences on the same prompts\n\n{difference_table(results)}")
    return "\n\n".join([*parts, *(escaped(note) for note in notes(results)), *warned(results)]) + "\n"


def head(title: str, entries: Sequence[Entry]) -> str:
    """Return the head of a column with its number of prompts, a range if it is not the same in all rows."""
    counts = sorted({entry.prompts for entry in entries if entry.metric.title == title})
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"{escaped(title)} (n = {count})"


def escaped(text: str) -> str:
    """Return a text for Markdown in which nothing is markup: no HTML, link, picture, code or cell."""
    return re.sub(r"[\\`*|\[\]~$]", r"\\\g<0>", html.escape(text, quote=False))


def warned(results: Results) -> list[str]:
    return [f"**Warning:** {escaped(warning)}" for warning in results.warnings()]


def heading(plan: Plan) -> str:
    prompts, images = plural(len(plan.prompts.prompts), "prompt"), plural(plan.seeds, "image")
    skipped = f" {plural(len(plan.prompts.problems), 'entry', 'entries')} without a prompt left out."
    return f"{plan.prompts.name}: {prompts}, {images} each." + skipped * bool(plan.prompts.problems)


def plural(count: int, noun: str, several: str = "") -> str:
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def difference_table(results: Results) -> str:
    entries = results.differences()
    columns = list(dict.fromkeys(entry.metric.title for entry in entries))
    cells = {(entry.model, entry.method, entry.metric.title): entry for entry in entries}
    rows = [["model", "difference", *(head(column, entries) for column in columns)]]
    for model in results.plan.models:
        for ours, theirs in results.pairs():
            found = [cells[model.name, f"{ours.key} − {theirs.key}", column] for column in columns]
            texts = [f"**{entry.text('+')}**" if entry.is_evident else entry.text("+") for entry in found]
            rows.append([escaped(model.name), escaped(results.difference_title(model.name, ours, theirs)), *texts])
    return grid(rows)


def notes(results: Results) -> list[str]:
    """Return the explanations below the tables."""
    plan, found = results.plan, []
    names = ", ".join(name for name, _ in plan.rewards)
    found.append(f"* {names}: optimized by the methods that take rewards, so higher values are no evidence of quality.")
    if plan.features is not None:
        kind = ", which are optimized too" if plan.optimizes(plan.features) else ""
        found.append(f"MSS, Vendi and Coverage use {plan.features} features{kind}.")
    if plan.more_features:
        found.append("MSS, Vendi and distance (the mean over pairs) with a name in parentheses use those features.")
    found += front_notes(results)
    found.append(
        f"Bold: the interval of the difference excludes 0, with {LEAST_FOR_EVIDENCE} prompts or more. Fewer than "
        f"{LEAST_FOR_INTERVAL} prompts have no interval."
    )
    found.append("Gaussian noise has norm / √d 1, variance 1 and all else 0; z is in standard errors of one set.")
    return found


def cost_markdown(results: Results) -> str:
    rows = costs(results)
    texts = [[escaped(cell) for cell in cost_texts(row)] for row in rows]
    return f"## Cost\n\n{grid([list(rows[0]), *texts])}\n"


def cost_texts(row: Mapping[str, Any]) -> list[str]:
    """Format a row of costs."""
    numbers = {name: "–" if value != value else f"{value:.4g}" for name, value in row.items() if name not in COST_NAMES}
    return [row[name] if name in COST_NAMES else numbers[name] for name in row]


def table_csv(entries: Sequence[Entry]) -> str:
    """Format model, method, metric, value, low, high, prompts in long form; empty if unknown."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "method", "metric", "value", "low", "high", "prompts"])
    for entry in entries:
        numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in dataclasses.astuple(entry.estimate)]
        writer.writerow([entry.model, entry.method, entry.metric.name, *numbers, entry.prompts])
    return file.getvalue()


def cost_csv(results: Results) -> str:
    file = io.StringIO()
    rows = costs(results)
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
    return file.getvalue()
