"""Write the README's compatibility tables from `matrix.py`: `python tests/conformance/table.py`."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance.matrix import COLUMNS, FAMILIES, GRADIENTS, MODULAR, REFUSED, SCHEDULERS, TOOLS, Family

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- conformance:begin -->\n", "<!-- conformance:end -->\n"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def family_table(families: Mapping[str, Family], kind: str, tools: Iterable[str]) -> str:
    """Return the table with families in rows, methods and their gradient modes in columns."""
    headings = [f"{column.heading}<br>{column.gradient}" for column in COLUMNS.values()]
    headings += [f"{heading}<br>none" for heading in tools]
    text = line([kind, *headings]) + line(["---", *[":-:"] * len(headings)])
    for row in families.values():
        scheduler = row.scheduler.removesuffix("Scheduler")
        text += line([f"`{row.pipeline}` ({row.models}), {scheduler}", *["✓"] * len(headings)])
    return text


def scheduler_table() -> str:
    """Return the table with schedulers in rows, gradient modes in columns, and numbered reasons of refusals."""
    reasons = list(dict.fromkeys(REFUSED.values()))
    text = line(["scheduler", *GRADIENTS]) + line(["---", *[":-:"] * len(GRADIENTS)])
    for key, row in SCHEDULERS.items():
        settings = ", ".join(f"{name}={value!r}" for name, value in row.settings.items())
        refused = [REFUSED.get((key, gradient)) for gradient in GRADIENTS]
        marks = ["✓" if why is None else f"— [{reasons.index(why) + 1}]" for why in refused]
        text += line([f"`{row.name}{f'({settings})' if settings else ''}`", *marks])
    return text + "".join(f"\n[{index + 1}] {why}.\n" for index, why in enumerate(reasons))


def tables() -> str:
    standard = family_table(FAMILIES, "pipeline", TOOLS.values())
    modular = family_table(MODULAR, "modular pipeline", [TOOLS["diversity_boost"]])
    return f"{standard}\n{modular}\n{scheduler_table()}"


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
