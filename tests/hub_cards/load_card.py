"""Run by `test_loading.py` in a fresh process: load a card from its folder and from the Hub, and compare the images.

Local pipelines share one module name, and the Hub's address is read at import: hence one process for each card.
Arguments: the class; its family in `tiny_pipelines`; its method; the module it has in the package; the card's folder;
its Hub id; the Hub's folder of repositories. Prints one JSON object.
"""

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import BUILDERS, call_arguments, quiet, save_tiny_clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What the cards of a method are asked for.

    Attributes:
        plain: Arguments of every call, over those of the family; the stock class takes them too.
        off: What leaves a pipeline as its stock class.
        requests: What it does to the noise otherwise: each leads to other images.
    """

    plain: dict[str, Any]
    off: dict[str, Any]
    requests: list[dict[str, Any]]


TRIALS = {
    "ReNO": Trial(
        plain={"num_inference_steps": 1, "guidance_scale": 0.0},
        off={},
        requests=[{"rewards": {"red": 1.0, "tiny/clip": 0.1}, "optimization_steps": 3}],
    ),
    "CNO": Trial(
        plain={"num_images_per_prompt": 2},
        off={"optimization_steps": 0},
        requests=[{}, {"optimization_steps": 2, "cno_kwargs": {"window_size": 4}}],
    ),
}


def draw(pipe: Any, **kwargs: Any) -> Any:
    """What one seed gives."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", output_type="pt", **{"generator": torch.Generator().manual_seed(7), **kwargs})


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second, strict=True))


def main(name: str, family: str, method: str, module: str, folder: str, repository: str, hub: Path) -> dict[str, bool]:
    """What is true of the card."""
    trial = TRIALS[method]
    plain = call_arguments(family) | trial.plain
    stock = quiet(BUILDERS[family]())
    weights = hub / "tiny" / name.lower()
    stock.save_pretrained(weights)
    save_tiny_clip(hub / "tiny" / "clip")

    def optimized(pipe: Any) -> list[Any]:
        return [draw(pipe, **plain, **request) for request in trial.requests]

    local = DiffusionPipeline.from_pretrained(weights, custom_pipeline=folder, trust_remote_code=True)
    remote = DiffusionPipeline.from_pretrained(
        f"tiny/{weights.name}", custom_pipeline=repository, trust_remote_code=True
    )
    outputs, stock_images = optimized(remote), draw(stock, **plain).images
    images = [output.images for output in outputs]
    for index, output in enumerate(outputs):
        output.noise_result.save(hub / f"noise_{index}.safetensors")
    pairs = itertools.combinations([stock_images, *images], 2)
    facts = {
        "folder and Hub draw the same": same(images, [output.images for output in optimized(local)]),
        "the noise was optimised as asked": not any(torch.equal(*pair) for pair in pairs),
        "switched off it is the stock pipeline": torch.equal(draw(remote, **plain, **trial.off).images, stock_images),
        "the package was not needed": "noiseopt" not in sys.modules,
    }
    package = getattr(importlib.import_module(module), name).from_pretrained(weights)
    facts["the package draws the same"] = same(images, [output.images for output in optimized(package)])
    load = importlib.import_module("noiseopt.pipelines.noise_result").NoiseResult.load
    noises = [load(hub / f"noise_{index}.safetensors") for index in range(len(outputs))]
    again = [
        draw(package, **plain, **trial.off, latents=noise.latents, generator=noise.generator()).images
        for noise in noises
    ]
    facts["the package draws it again from the saved noise"] = same(images, again)
    return facts


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:7], hub=Path(sys.argv[7]))))
