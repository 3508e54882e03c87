"""`noiseopt analyze`: its arguments, and what it prints and writes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import make_folder, positive, require_plots

if TYPE_CHECKING:
    from .analysis import Analysis
    from .groups import Group

DESCRIPTION = """\
How optimised noise differs from the noise it began as: L2 distances, coherence and power by spatial frequency, and how
much each third of the frequencies changes step by step. Reads what `NoiseResult.save` and `noiseopt demo` write, and
sorts it by method, model and shape of the noise.
"""

EPILOG = """\
results, in the folder given by --output:
  table.md        what is printed: a column for each method, model and shape
  analysis.json   all numbers
  coherence.png   how much of the initial noise is left, by frequency, against a white edit of the same size
  bands.png       how much each third of the frequencies has changed after each step
  spectrum.png    the power of initial and optimised noise by frequency

examples:
  noiseopt demo --output demo && noiseopt analyze demo
  noiseopt analyze reno/ cno/ --output comparison
  noiseopt analyze noise.safetensors --draw
"""


def add_analyze(commands) -> None:
    """The parser of the command; `commands` is what `add_subparsers` returned."""
    parser = commands.add_parser(
        "analyze",
        help="show how optimised noise differs from the initial one: distances, coherence, spectrum",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="a file, or a folder that holds some")
    parser.add_argument(
        "--output", type=Path, default=Path("noiseopt-analysis"), help="folder to write to (noiseopt-analysis)"
    )
    parser.add_argument(
        "--draw",
        action="store_true",
        help="load each result's model and draw its images, for the distances between noises and images (as latents)",
    )
    parser.add_argument(
        "--rings", type=positive, help="of frequencies, for the coherence (as many as the noise has room for, up to 16)"
    )
    parser.set_defaults(run=analyze)


def analyze(arguments: argparse.Namespace) -> None:
    """`noiseopt analyze`: everything that can be wrong with the results is said before anything is written."""
    require_plots("noiseopt analyze")
    from ..quiet import quiet_libraries

    with quiet_libraries():  # as some modules are imported, transformers says what else could be installed
        from .groups import CannotAnalyze, load_groups
    try:
        analyses = analyses_of(load_groups(arguments.results), arguments.rings, arguments.draw)
    except CannotAnalyze as error:
        raise SystemExit(str(error)) from None
    make_folder(arguments.output)
    write(analyses, arguments.output)


def analyses_of(groups: "Sequence[Group]", rings: int | None, draw: bool) -> "list[Analysis]":
    """One for each group that has changed. Raises `CannotAnalyze` if none has, or one has too little to pool."""
    from .analysis import Analysis
    from .drawing import draw_latents
    from .groups import CannotAnalyze

    found = []
    for analysis in (Analysis(group, rings) for group in groups):
        if analysis.unchanged < len(analysis.change):
            found.append(analysis)
        else:
            print(f"left out: {analysis.group.title}, which returned each noise as it was")
    if not found:
        raise CannotAnalyze(
            "Expected a noise that was changed, but every one is as it began: there is nothing to plot. Give results "
            "of more steps, or of a method that found something better than the plain result."
        )
    try:
        for analysis in found:
            _ = analysis.coherence
    except ValueError as error:
        raise CannotAnalyze(f"{error} The command takes more results, and --rings.") from None
    return [Analysis(each.group, rings, draw_latents(each.group)) if draw else each for each in found]


def write(analyses: "Sequence[Analysis]", folder: Path) -> None:
    """Print the table, and write it with all numbers and figures into a folder that is there."""
    from ..evaluation.unit import write_json
    from .analysis import markdown
    from .figures import draw_analyses

    table = markdown(analyses)
    print(table)
    (folder / "table.md").write_text(table, encoding="utf-8")
    write_json(folder / "analysis.json", [analysis.numbers() for analysis in analyses])
    for path in (folder / "table.md", folder / "analysis.json", *draw_analyses(analyses, folder)):
        print(f"wrote {path}")
