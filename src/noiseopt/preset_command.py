"""`noiseopt presets`: the method and settings for each model and goal."""

import argparse
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import examples
from .shown_text import shown

if TYPE_CHECKING:
    from .pipelines.preset_table import Preset

COLUMNS = ("model", "goal", "method and settings", "call", "evidence", "reason")


def add_presets(commands) -> None:
    """Add the parser of the command to `commands`, the result of `add_subparsers`."""
    parser = commands.add_parser(
        "presets",
        help="list the method and settings for each model and goal, with the reason and what was measured",
        description="List what `optimize_noise(pipe, prompt, GOAL)` picks for a model: the method, its settings, the "
        "arguments of the call that it is made for, what was measured on this model, and the reason. Goals: diverse "
        "(the images of a prompt differ), faithful (each shows its prompt), best (high reward for the seconds). "
        "Nothing is loaded or downloaded.",
        epilog=examples("noiseopt presets", "noiseopt presets stabilityai/sdxl-turbo --goal diverse"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", type=name, metavar="MODEL", help="Hub id, pipeline class, or a part of a name"
    )
    parser.add_argument("--goal", choices=("diverse", "faithful", "best"), help="goal (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=presets)


def name(text: str) -> str:
    """Parse the name of a model."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name, but got nothing")
    return text


def presets(arguments: argparse.Namespace) -> None:
    """Run `noiseopt presets`."""
    from .quiet import quiet_libraries

    with quiet_libraries():  # transformers prints notices on import
        from .pipelines.preset_table import FALLBACKS
        from .pipelines.presets import list_presets
    every = list_presets()
    found = every if arguments.model is None else of_model(arguments.model, every)
    if not found:
        print(
            f"no preset has the name {shown(arguments.model)}. A pipeline of a known class is told by its class and "
            "steps (pass the name of the class here), any other by its steps:",
            file=sys.stderr,
        )
        found = [preset for presets in FALLBACKS.values() for preset in presets]
    rows = [cells(preset) for preset in found if arguments.goal in (None, preset.goal)]
    if arguments.json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
        return
    print("\n".join(printed(rows, shutil.get_terminal_size().columns)))


def printed(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines of rows, sorted by model, wrapped to a width."""
    lines = []
    layout = {"subsequent_indent": " " * 12, "break_on_hyphens": False, "break_long_words": False}
    for (model, call), each in itertools.groupby(rows, lambda row: (row[0], row[3])):
        lines += ["", f"{model} ({call})"]
        for _, goal, method, _, evidence, reason in each:
            for head, text in ((goal, method), ("", f"{reason}; {evidence}")):
                lines += textwrap.wrap(text, max(width, 60), initial_indent=f"  {head:10}", **layout)
    return lines[1:]


def of_model(text: str, every: "Sequence[Preset]") -> "list[Preset]":
    """Return the presets of a pipeline class or a checkpoint, or else those with this text in the name of the model."""
    from .pipelines.preset_table import letters

    if of_class := [preset for preset in every if text in preset.model.pipelines]:
        return of_class
    name = letters(text)
    lengths = [max((len(each) for each in preset.model.checkpoints if each in name), default=0) for preset in every]
    if longest := max(lengths):
        return [preset for preset, length in zip(every, lengths, strict=True) if length == longest]
    return [preset for preset in every if name and name in letters(preset.model.title)]


def cells(preset: "Preset") -> list[str]:
    """Format a preset as a row of the printed table."""
    from .pipelines.presets import shown_method

    call = ", ".join(f"{name}={value!r}" for name, value in preset.call.items())
    return [preset.model.title, preset.goal, shown_method(preset), call, preset.evidence, preset.reason]
