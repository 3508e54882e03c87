"""The tables of an evaluation for the terminal: a line per value, so that they fit 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .table import COST_NAMES, GROUPS, Entry, Results, cost_texts, costs, heading, notes

LEFT_TO_FILES = ("noise",)  # groups


def print_results(results: Results, console: Console | None = None) -> None:
    """Print means, differences and costs by model; the statistics of the noise are in the files only."""
    console = console or Console(highlight=False)
    entries, differences, rows = results.entries(), results.differences(), costs(results)
    console.print(Text(heading(results.plan)))
    for model in results.plan.models:
        console.print(Text(f"\n{model.name}", "bold"))
        titles = {contender.key: results.title(model.name, contender) for contender in results.plan.contenders}
        for group, title in GROUPS.items():
            shown = [entry for entry in entries if (entry.model, entry.metric.group) == (model.name, group)]
            if shown and group not in LEFT_TO_FILES:
                console.print(values(title, shown, titles))
        pairs = {
            f"{ours.key} − {theirs.key}": results.difference_title(model.name, ours, theirs)
            for ours, theirs in results.pairs()
        }
        gaps = [entry for entry in differences if entry.model == model.name]
        console.print(values("Differences on the same prompts", gaps, pairs, sign="+"))
        console.print(cost_table([row for row in rows if row["model"] == model.name]))
    for note in [*notes(results), *(f"Warning: {warning}" for warning in results.warnings())]:
        console.print(Text(note))


def values(title: str, entries: Sequence[Entry], names: Mapping[str, str], sign: str = "") -> Table:
    """Return a table with a line per entry, metric by metric; evident differences are bold."""
    found = table(title, {"": "left", "method": "left", "mean": "right", "95% interval": "left", "n": "right"})
    for metric in dict.fromkeys(entry.metric.title for entry in entries):
        for number, entry in enumerate(entry for entry in entries if entry.metric.title == metric):
            cells = (metric if number == 0 else "", names[entry.method], *entry.parts(sign), str(entry.prompts))
            found.add_row(*(Text(cell, "bold" if sign and entry.is_evident else "") for cell in cells))
    return found


def cost_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    found = table("Cost", {name: "left" if name in COST_NAMES else "right" for name in rows[0] if name != "model"})
    for row in rows:
        found.add_row(*map(Text, cost_texts({name: value for name, value in row.items() if name != "model"})))
    return found


def table(title: str, columns: Mapping[str, Literal["left", "right"]]) -> Table:
    found = Table(title=f"\n{title}", title_justify="left", title_style="", box=None, pad_edge=False)
    for name, side in columns.items():
        width = 24 if name == "method" else None
        found.add_column(name, justify=side, overflow="fold", min_width=width, header_style="dim")
    return found
