"""Run by `test_saving.py` in a fresh process: save pipelines, load them again, and compare their images.

Arguments: the folders of a card of ReNO and of one of CNO; an empty folder. Prints one JSON object.
"""

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import call_arguments, quiet, sd_pipeline

FILES = ("pipeline.py", "noiseopt_bundle.py")
load = functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True, safety_checker=None)
load_saved = functools.partial(load, custom_pipeline="pipeline")


def generate(pipe: Any) -> torch.Tensor:
    """Return the optimized images of one seed."""
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments("sd") | {"generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    return pipe("a red cat", rewards={"red": 1.0}, steps=2, **arguments).images


def refused(folder: Path) -> bool:
    """Return whether diffusers asks for trust before it runs the code of a folder."""
    try:
        DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline")
    except ValueError as error:
        return "trust_remote_code=True" in str(error)
    return False


def dot_refused(pipe: Any, folder: Path) -> bool:
    """Return whether a repository from which diffusers could not load is refused before anything is written."""
    refusals = 0
    for push in (
        lambda: pipe.push_to_hub("someone/v1.0"),
        lambda: pipe.save_pretrained(folder / "v1.0", push_to_hub=True),
    ):
        try:
            push()
        except ValueError as error:
            refusals += "Expected a repository name without a dot" in str(error)
    return refusals == 2 and not (folder / "v1.0").exists()


def code_of(folder: Path) -> list[bytes]:
    """Return the content of both files of code, which are no links."""
    return [(folder / name).read_bytes() for name in FILES if not (folder / name).is_symlink()]


def main(card: Path, other: Path, folder: Path) -> dict[str, bool]:
    """Return what is true of saved pipelines."""
    stock = quiet(sd_pipeline())
    stock.save_pretrained(folder / "weights")
    pipe = load(folder / "weights", custom_pipeline=str(card))
    images, code = generate(pipe), [(card / name).read_bytes() for name in FILES]
    load(folder / "weights", custom_pipeline=str(other))  # diffusers puts its code where that of the card was
    pipe.save_pretrained(folder / "saved")
    pipe.push_to_hub("someone/mine", token="hf_loopback")
    again = load_saved(folder / "saved")
    again.save_pretrained(folder / "saved again")
    facts = {
        "the card's own code is saved": code_of(folder / "saved") == code,
        "and saved again": code_of(folder / "saved again") == code,
        "the folder generates the same": torch.equal(generate(again), images),
        "so does the Hub": torch.equal(generate(load_saved("someone/mine")), images),
        "without its code it is the stock pipeline": all(
            type(each) is type(stock) for each in (load(folder / "saved"), load("someone/mine"))
        ),
        "names with a dot are refused": dot_refused(pipe, folder),
        "trust is asked for": refused(folder / "saved"),
        "the package was not needed": "noiseopt" not in sys.modules,
    }
    package = importlib.import_module("noiseopt.pipelines.reno.stable_diffusion").ReNOStableDiffusionPipeline
    mine = package.from_pretrained(folder / "saved", safety_checker=None)
    facts["the class of the package needs no trust"] = type(mine) is package and torch.equal(generate(mine), images)
    mine.save_pretrained(folder / "of the package")
    facts["the package saves the code of the card"] = code_of(folder / "of the package") == code
    return facts


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:4]))))
