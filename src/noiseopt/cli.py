"""The command line: `noiseopt demo`, `generate`, `evaluate`, `analyze`, `presets`, `rewards`, `score` and `hub`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__
from .arguments import examples, make_folder, natural, positive, progress_line, require_plots, shapes_prompt
from .shown_text import shown_lines

if TYPE_CHECKING:
    from .story import Choice


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: Arguments after the program's name. Defaults to those of the process.

    Raises:
        SystemExit: With code 2 for invalid arguments; code 1 and a message if something is missing, cannot be written,
            or failed; code 130 if interrupted. If the reader of the output has left (`| head`): code 1, no message.
    """
    with contextlib.suppress(AttributeError):  # a terminal without an arrow prints a question mark instead of failing
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with checked_output():
            arguments = build_parser().parse_args(argv)
            arguments.run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as end:  # its message may quote a file from anyone
        raise SystemExit(shown_lines(end.code)) if isinstance(end.code, str) else end from None


class Parser(argparse.ArgumentParser):
    """A parser whose error messages have no control characters: they may quote a file from anyone."""

    def error(self, message: str) -> NoReturn:
        super().error(shown_lines(message))


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """Turn an `OSError`, such as a full disk or a closed pipe behind the output, into a `SystemExit`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        drop_output()
        raise SystemExit(f"noiseopt: {error}") from None


def drop_output() -> None:
    """Drop what cannot be written, so that Python does not try it again on exit and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands. Each sets `run`, a function of the parsed arguments."""
    from .analysis.command import add_analyze
    from .evaluation.command import add_evaluate
    from .generate import add_generate
    from .hub.command import add_hub
    from .preset_command import add_presets
    from .scoring import add_rewards, add_score
    from .vary import add_vary

    parser = Parser(
        prog="noiseopt",
        description="Optimize the initial noise of text-to-image diffusion.",
        epilog=examples("noiseopt demo", "noiseopt generate --help"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"noiseopt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_generate(commands)
    add_vary(commands)
    add_evaluate(commands)
    add_analyze(commands)
    add_presets(commands)
    add_rewards(commands)
    add_score(commands)
    add_hub(commands)
    return parser


def add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="optimize the noise of an embedded model and show the effect; offline, under a minute",
        description="Show what a method does to the images of an embedded model, in its own unit: how many images are "
        "right for reno, how much four images of a prompt differ for cno and never_too_late, P(yes) of a "
        "vision-language model for noise_diffusion. Needs no GPU, and under a minute on two cores.",
        epilog=examples(
            "noiseopt demo",
            "noiseopt demo --method cno",
            "noiseopt demo --method reno:mode=parity --prompt 'a red circle left of a blue star'",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--method",
        default="reno",
        metavar="NAME[:SETTING=VALUE,...]",
        help="method: reno, cno, noise_diffusion, never_too_late, group_selection, best_of_n, pcn, zero_order_search, "
        "noise_pgd or mean_variance (default: reno)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="turbo, guided, sdxl, sdxl-turbo or sd3 (default: of the kind that the method is made for)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=shapes_prompt,
        dest="prompts",
        metavar="TEXT",
        help="prompt such as 'a red circle left of a blue star'; repeatable (default: the first validation prompts, as "
        "many as fit into a minute)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="seed of the first image, plus 1 for each (default: 0)")
    parser.add_argument(
        "--steps",
        type=positive,
        help="evaluations of each noise (default: the method's own, or as many as fit into a minute)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("noiseopt-demo"), help="output folder (default: noiseopt-demo)"
    )
    parser.set_defaults(run=lambda arguments: demo(arguments, parser))


def demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt demo`; missing requirements are reported before any model runs."""
    require_plots("noiseopt demo")
    with progress_line() as line:  # from here on: importing the libraries takes seconds
        from .quiet import quiet_libraries

        with quiet_libraries():  # transformers prints notices on import
            from .demo import run_demo
            from .story import Choice
        try:
            choice = Choice.of(arguments.method, arguments.model, arguments.steps)
        except ValueError as error:
            line.close()
            parser.error(str(error))
        require_weights(choice)
        make_folder(arguments.output)
        run_demo(choice, arguments.prompts or choice.prompts, arguments.seed, arguments.output, line)


def require_weights(choice: "Choice") -> None:
    try:
        choice.weights()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
