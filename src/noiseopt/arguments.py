"""Argument types and checks that the commands share, and their progress bar."""

import argparse
import importlib.util
from pathlib import Path

from tqdm import tqdm

LIMIT = 2**62  # of integers; seeds of torch have 64 bits, and others are added to those given


def require_plots(command: str) -> None:
    """Exit with a message if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(f"{command} needs matplotlib, which is not installed. Run `pip install noiseopt[plots]`.")


def make_folder(path: Path) -> None:
    """Create a folder, or exit with a message if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"Expected a folder to write to, but got {path}: {error.strerror}.") from None


def progress_line() -> tqdm:
    """Return the progress bar of a demo, which is there only on a terminal. Until it has a total it says "Loading"."""
    return tqdm(desc="Loading ...", bar_format="{desc}", unit=" steps", leave=False, dynamic_ncols=True, disable=None)


def positive(text: str) -> int:
    """Parse an integer of 1 or more, as an argparse type."""
    return integer(text, least=1)


def natural(text: str) -> int:
    """Parse an integer of 0 or more that is valid as a seed, as an argparse type."""
    return integer(text, least=0)


def integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is not None and value >= LIMIT:
        raise argparse.ArgumentTypeError(f"Expected an integer below 2**62 = {LIMIT}, but got {text!r}.")
    if value is None or value < least:
        raise argparse.ArgumentTypeError(f"Expected an integer of {least} or more, but got {text!r}.")
    return value


def shapes_prompt(text: str) -> str:
    """Parse a prompt of the shapes world, as an argparse type."""
    from . import shapes_world

    try:
        return str(shapes_world.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_device(group: argparse._ArgumentGroup) -> None:
    """Add the arguments `--device` and `--dtype` of the models."""
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if available)")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the models (default: bfloat16 on CUDA, else float32)",
    )


def examples(*commands: str) -> str:
    """Return the last part of a command's help: how it is called."""
    return "\n".join([f"example{'s' * (len(commands) > 1)}:", *(f"  {command}" for command in commands)])
