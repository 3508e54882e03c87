"""The command `noiseopt analyze`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import make_folder, positive, require_plots
from ..shown_text import LONGEST_LINE, shown

if TYPE_CHECKING:
    from .analysis import Analysis
    from .groups import Group

DESCRIPTION = """\
Compare optimized noise with the initial noise: L2 distances, coherence and power by spatial frequency, and the change
of each third of the frequencies over the steps. Reads files written by `NoiseResult.save` or `noiseopt demo`, grouped
by method, model and shape of the noise.
"""

EPILOG = """\
results, in the folder given by --output:
  table.md        the printed table: a column per method, model and shape
  analysis.json   all numbers
  coherence.png   coherence of initial and optimized noise by frequency, against a white edit of the same norm
  bands.png       change of each third of the frequencies after each step
  spectrum.png    power of initial and optimized noise by frequency

examples:
  noiseopt demo --output demo && noiseopt analyze demo
  noiseopt analyze reno/ cno/ --output comparison
  noiseopt analyze noise.safetensors --draw --model stabilityai/sdxl-turbo
"""


def add_analyze(commands) -> None:
    """Add the parser of the command to `commands`, the result of `add_subparsers`."""
    parser = commands.add_parser(
        "analyze",
        help="compare optimized with initial noise: distances, coherence, spectrum",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="file, or folder with files")
    parser.add_argument(
        "--output", type=Path, default=Path("noiseopt-analysis"), help="output folder (default: noiseopt-analysis)"
    )
    parser.add_argument(
        "--draw",
        action="store_true",
        help="sample the images of the results, for distances between noises and images (as latents)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        dest="models",
        metavar="MODEL",
        help="Hub id or folder of the model of the results, for --draw, with @REVISION for another than the main one; "
        "repeatable. Nothing is loaded because a file names it, but for the models in this package",
    )
    parser.add_argument(
        "--rings",
        type=positive,
        help="number of frequency rings of the coherence (default: as many as fit, at most 16)",
    )
    parser.set_defaults(run=lambda arguments: analyze(arguments, parser))


def analyze(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt analyze`; the results are checked before anything is written."""
    if arguments.models and not arguments.draw:
        parser.error("Expected --draw beside --model, which names the model that draws.")
    require_plots("noiseopt analyze")
    from ..quiet import quiet_libraries

    with quiet_libraries():  # transformers prints notices on import
        from .groups import CannotAnalyze, load_groups
    try:
        analyses = analyses_of(load_groups(arguments.results), arguments.rings, arguments.draw, arguments.models)
    except CannotAnalyze as error:
        raise SystemExit(shown(error, LONGEST_LINE)) from None
    make_folder(arguments.output)
    write(analyses, arguments.output)


def analyses_of(
    groups: "Sequence[Group]", rings: int | None, draw: bool, models: "Sequence[str]" = ()
) -> "list[Analysis]":
    """Analyze each group that changed. Raises `CannotAnalyze` if none did, or a group is too small to pool."""
    from .analysis import Analysis
    from .groups import CannotAnalyze
    from .sampling import sample_latents

    found = []
    for analysis in (Analysis(group, rings) for group in groups):
        if analysis.unchanged < len(analysis.change):
            found.append(analysis)
        else:
            print(f"skipped: {analysis.group.title}, which returned every noise unchanged")
    if not found:
        raise CannotAnalyze(
            "Expected a noise that changed, but every result returned its initial noise. Pass results of more "
            "steps, or of a method that improved on the baseline."
        )
    try:
        for analysis in found:
            _ = analysis.coherence
    except ValueError as error:
        raise CannotAnalyze(f"{error} Pass more results, or --rings.") from None
    return [Analysis(each.group, rings, sample_latents(each.group, models)) if draw else each for each in found]


def write(analyses: "Sequence[Analysis]", folder: Path) -> None:
    """Print the table, and write it with all numbers and figures to an existing folder."""
    from ..evaluation.unit import write_json
    from .analysis import markdown
    from .figures import draw_analyses

    table = markdown(analyses)
    print(table)
    (folder / "table.md").write_text(table, encoding="utf-8")
    write_json(folder / "analysis.json", [analysis.numbers() for analysis in analyses])
    for path in (folder / "table.md", folder / "analysis.json", *draw_analyses(analyses, folder)):
        print(f"wrote {path}")
