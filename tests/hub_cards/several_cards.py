"""Run by `test_several_cards.py` in a fresh process: load several cards, and use them alternately.

diffusers puts the files of each pipeline from a local folder in the same place, and runs each `pipeline.py` in the same
module. Arguments: the folder of cards; the folder of a card of a later release, which differs in its bundle only, in as
many bytes; an empty folder; the Hub's folder. Prints one JSON object.
"""

import functools
import inspect
import json
import sys
import typing
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import call_arguments, quiet, sd_pipeline, sdxl_pipeline

REQUESTS: dict[str, dict[str, Any]] = {
    "reno": {"rewards": {"red": 1.0}, "steps": 2},
    "cno": {"steps": 2, "num_images_per_prompt": 2},
    "noise-diffusion": {"rewards": "brightness", "steps": 2},
    "never-too-late": {"diversity": {"dpp": ("color_histogram", 150.0)}, "steps": 2, "num_images_per_prompt": 2},
}
load = functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)


def generate(pipe: Any, paper: str, family: str) -> torch.Tensor:
    """Return the optimized images of one seed."""
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(family) | {"generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    return pipe("a red cat", **{**arguments, **REQUESTS[paper]}).images


def main(cards: Path, later: Path, folder: Path, hub: Path) -> dict[str, bool]:
    """Return what is true of cards in one process."""
    quiet(sd_pipeline()).save_pretrained(folder / "sd")
    quiet(sdxl_pipeline()).save_pretrained(folder / "sdxl")
    facts: dict[str, bool] = {}

    def from_folder(card: Path, family: str = "sd") -> Any:
        return load(folder / family, custom_pipeline=str(card))

    xl = {paper: cards / f"{paper}-stable-diffusion-xl" for paper in ("cno", "noise-diffusion")}
    first, second = (from_folder(card, "sdxl") for card in xl.values())
    place = Path(str(sys.modules["diffusers_modules.local.pipeline"].__file__)).parent
    # Python takes a compiled file for that of any source of the same size and second
    facts["no compiled file is left"] = place.is_dir() and not list(place.glob("__pycache__/[np]*"))
    facts["two cards from folders are two classes"] = (type(first).__name__, type(second).__name__) == (
        "CNOStableDiffusionXLPipeline",
        "NoiseDiffusionStableDiffusionXLPipeline",
    )
    alone = [generate(first, "cno", "sdxl"), generate(second, "noise-diffusion", "sdxl")]

    pipes = {paper: from_folder(cards / f"{paper}-stable-diffusion") for paper in REQUESTS}
    images = {paper: generate(pipe, paper, "sd") for paper, pipe in pipes.items()}
    facts["they are used alternately"] = all(
        torch.equal(generate(pipes[paper], paper, "sd"), images[paper]) for paper in [*REQUESTS, *reversed(REQUESTS)]
    )
    facts["the first ones still work"] = torch.equal(generate(first, "cno", "sdxl"), alone[0]) and torch.equal(
        generate(second, "noise-diffusion", "sdxl"), alone[1]
    )

    remote = {paper: load(folder / "sd", custom_pipeline=f"someone/{paper}-stable-diffusion") for paper in REQUESTS}
    facts["folder and Hub generate the same, alternately"] = all(
        torch.equal(generate(pipe, paper, "sd"), generate(pipes[paper], paper, "sd")) for paper, pipe in remote.items()
    )

    other = from_folder(later)
    facts["a later release brings its own bundle"] = other.from_later_release() == 2
    facts["the earlier one keeps its own"] = not hasattr(pipes["reno"], "from_later_release")
    other = from_folder(cards / "reno-stable-diffusion")
    facts["and comes back"] = not hasattr(other, "from_later_release")
    facts["a release from the Hub as well"] = (
        load(folder / "sd", custom_pipeline="someone/later").from_later_release() == 2
    )

    changed = type(pipes["cno"]).from_pipe(pipes["reno"])
    facts["a pipeline becomes one of an earlier card"] = torch.equal(generate(changed, "cno", "sd"), images["cno"])
    method = type(pipes["cno"]).own_method
    facts["annotations are found"] = "steps" in typing.get_type_hints(method)
    facts["sources are found"] = "class CNO(" in inspect.getsource(method)
    for paper, pipe in pipes.items():
        pipe.save_pretrained(folder / paper)
    facts["each saves its own code"] = all(
        (folder / paper / name).read_bytes() == (cards / f"{paper}-stable-diffusion" / name).read_bytes()
        for paper in REQUESTS
        for name in ("pipeline.py", "noiseopt_bundle.py")
    )
    saved = {paper: load(folder / paper, custom_pipeline="pipeline") for paper in REQUESTS}
    facts["saved pipelines are used alternately"] = all(
        torch.equal(generate(saved[paper], paper, "sd"), images[paper]) for paper in REQUESTS
    )
    facts["the package was not needed"] = "noiseopt" not in sys.modules
    return facts


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:5]))))
