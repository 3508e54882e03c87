"""Write the README's compatibility tables from `matrix.py`: `python tests/conformance/table.py`."""

import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance.matrix import (
    COLUMNS,
    FAMILIES,
    GRADIENTS,
    MODULAR,
    OTHERS,
    REASONS,
    REFUSED,
    REFUSED_VIDEOS,
    SCHEDULERS,
    TOOLS,
    VIDEOS,
    Family,
)

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- conformance:begin -->\n", "<!-- conformance:end -->\n"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def family_table(families: Mapping[str, Family], kind: str, tools: Mapping[str, Collection[str]]) -> str:
    """Return the table with families in rows, methods and their gradient modes in columns.

    `tools` has the headings of tools, and the families that are tested with each.
    """
    headings = [f"{column.heading}<br>{column.gradient}" for column in COLUMNS.values()]
    headings += [f"{heading}<br>none" for heading in tools]
    text = line([kind, *headings]) + line(["---", *[":-:"] * len(headings)])
    for name, row in families.items():
        with_tools = ["✓" if name in tested else "" for tested in tools.values()]
        text += line([name_of(row), *["✓"] * len(COLUMNS), *with_tools])
    return text


def name_of(row: Family) -> str:
    return f"`{row.pipeline}` ({row.models}), {row.scheduler.removesuffix('Scheduler')}"


def video_table() -> str:
    """Return the table of video pipelines; refusals have the numbers of `scheduler_table`."""
    headings = [f"{column.heading}<br>{column.gradient}" for column in COLUMNS.values()]
    text = line(["video pipeline", *headings]) + line(["---", *[":-:"] * len(headings)])
    for key, row in VIDEOS.items():
        refused = [REFUSED_VIDEOS.get((key, column)) for column in COLUMNS]
        text += line([name_of(row), *[mark(why) for why in refused]])
    return text


def mark(why: str | None) -> str:
    """Return the mark of a cell, with the number of its reason if it is refused."""
    return "✓" if why is None else f"— [{REASONS.index(why) + 1}]"


def scheduler_table() -> str:
    """Return the table with schedulers in rows, gradient modes in columns, and numbered reasons of refusals."""
    text = line(["scheduler", *GRADIENTS]) + line(["---", *[":-:"] * len(GRADIENTS)])
    for key, row in SCHEDULERS.items():
        settings = ", ".join(f"{name}={value!r}" for name, value in row.settings.items())
        refused = [REFUSED.get((key, gradient)) for gradient in GRADIENTS]
        text += line([f"`{row.name}{f'({settings})' if settings else ''}`", *map(mark, refused)])
    return text + "".join(f"\n[{index + 1}] {why}.\n" for index, why in enumerate(REASONS))


def tables() -> str:
    standard = family_table({**FAMILIES, **OTHERS}, "pipeline", dict.fromkeys(TOOLS.values(), FAMILIES))
    modular = family_table(MODULAR, "modular pipeline", {TOOLS["diversity_boost"]: MODULAR})
    return f"{standard}\n{modular}\n{video_table()}\n{scheduler_table()}"


def between_markers(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(
            f"Expected the lines {BEGIN.strip()} and {END.strip()} in {README}. Put them around the tables."
        )
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
