"""Run by `test_saving.py` in a fresh process: save pipelines, load them again, and compare what they draw.

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

load = functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True, safety_checker=None)


def draw(pipe: Any) -> torch.Tensor:
    """What one seed gives, optimised."""
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments("sd") | {"generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    return pipe("a red cat", rewards={"red": 1.0}, optimization_steps=2, **arguments).images


def refused(folder: Path) -> bool:
    """Whether diffusers asks for trust before it runs the code of a folder."""
    try:
        DiffusionPipeline.from_pretrained(folder)
    except ValueError as error:
        return "trust_remote_code=True" in str(error)
    return False


def main(card: Path, other: Path, folder: Path) -> dict[str, bool]:
    """What is true of saved pipelines."""
    quiet(sd_pipeline()).save_pretrained(folder / "weights")
    pipe = load(folder / "weights", custom_pipeline=str(card))
    images, code = draw(pipe), (card / "pipeline.py").read_bytes()
    quiet(sd_pipeline()).save_pretrained(other)
    index = json.loads((other / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "CNOStableDiffusionPipeline"]
    (other / "model_index.json").write_text(json.dumps(index))
    load(other)  # diffusers puts its code where that of the card was
    pipe.save_pretrained(folder / "saved")
    pipe.push_to_hub("someone/mine", token="hf_loopback")
    again = load(folder / "saved")
    again.save_pretrained(folder / "saved again")
    facts = {
        "the card's own code is saved": (folder / "saved/pipeline.py").read_bytes() == code,
        "and saved again": (folder / "saved again/pipeline.py").read_bytes() == code,
        "the folder draws the same": torch.equal(draw(again), images),
        "so does the Hub": torch.equal(draw(load("someone/mine")), images),
        "trust is asked for": refused(folder / "saved"),
        "the package was not needed": "noiseopt" not in sys.modules,
    }
    package = importlib.import_module("noiseopt.pipelines.reno.stable_diffusion").ReNOStableDiffusionPipeline
    mine = package.from_pretrained(folder / "saved", safety_checker=None)
    facts["the class of the package needs no trust"] = type(mine) is package and torch.equal(draw(mine), images)
    mine.save_pretrained(folder / "of the package")
    facts["the package saves the code of the card"] = (folder / "of the package/pipeline.py").read_bytes() == code
    return facts


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:4]))))
