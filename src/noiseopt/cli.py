"""The command line: `noiseopt demo`, `evaluate`, `analyze`, `rewards`, `score` and `hub`."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo import Choice


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: The words after the program's name; those of the process if `None`.

    Raises:
        SystemExit: With code 2 for arguments that cannot work, with code 1 and a message for a machine that lacks
            something, with code 130 if interrupted.
    """
    with contextlib.suppress(AttributeError):  # a terminal that has no arrow shows a question mark, not an exception
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def build_parser() -> argparse.ArgumentParser:
    """All commands. Each sets `run`, a function of the parsed arguments."""
    from .analysis.command import add_analyze
    from .evaluation.command import add_evaluate  # here: it takes its argument types from this module
    from .hub.command import add_hub
    from .scoring import add_rewards, add_score

    parser = argparse.ArgumentParser(
        prog="noiseopt", description="Optimise the initial noise of text-to-image diffusion."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_evaluate(commands)
    add_analyze(commands)
    add_rewards(commands)
    add_score(commands)
    add_hub(commands)
    return parser


def add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="optimise the noise of an embedded model and show what changes; offline, under a minute",
        description="Draw prompts with an embedded model before and after a method chose the noise, and let a judge "
        "compare the pictures with the prompts. Needs no GPU, and with the models turbo and guided no download.",
    )
    parser.add_argument(
        "--method", default="reno", metavar="NAME", help="of list_noise_optimizers(), such as best_of_n (reno)"
    )
    parser.add_argument(
        "--model",
        default="turbo",
        metavar="NAME",
        help="turbo or guided, which the package carries; sdxl, sdxl-turbo or sd3 from a checkout or the Hub (turbo)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=shapes_prompt,
        dest="prompts",
        metavar="TEXT",
        help="a prompt such as 'a red circle left of a blue star'; may be repeated (default: 8 validation prompts)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="seed of the first prompt, the next has the next (0)")
    parser.add_argument(
        "--steps",
        type=positive,
        help="evaluations of each noise (the method's own number, at most 50, or 20 for models of several steps)",
    )
    parser.add_argument("--output", type=Path, default=Path("noiseopt-demo"), help="folder to write to (noiseopt-demo)")
    parser.set_defaults(run=lambda arguments: demo(arguments, parser))


def demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """`noiseopt demo`: what can fail for want of something is asked for before any model runs."""
    require_plots("noiseopt demo")
    from .quiet import quiet_libraries

    with quiet_libraries():  # as some modules are imported, transformers says what else could be installed
        from .demo import Choice, run_demo
    try:
        choice = Choice.of(arguments.method, arguments.model, arguments.steps)
    except ValueError as error:
        parser.error(str(error))
    require_weights(choice)
    make_folder(arguments.output)
    run_demo(choice, arguments.prompts or choice.prompts, arguments.seed, arguments.output)


def require_weights(choice: "Choice") -> None:
    try:
        choice.weights()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


def require_plots(command: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(f"{command} draws with matplotlib, which is not installed. Run `pip install noiseopt[plots]`.")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"Expected a folder to write to, but got {path}: {error.strerror}.") from None


def positive(text: str) -> int:
    """An integer of 1 or more, as an argparse type."""
    return integer(text, least=1)


def natural(text: str) -> int:
    """An integer from 0 to what a generator takes as its seed, as an argparse type."""
    return integer(text, least=0)


def integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value < 2**62:
        raise argparse.ArgumentTypeError(f"Expected an integer of {least} or more, but got {text!r}.")
    return value


def shapes_prompt(text: str) -> str:
    """A prompt that the embedded world can draw, as an argparse type."""
    from . import shapes_world

    try:
        return str(shapes_world.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
