"""Run by `test_loading.py` in a fresh process: load a card from its folder and from the Hub, and compare the images.

Local pipelines share one module name, and the Hub's address is read at import: hence one process for each card.
Arguments: the class; its family in `tiny_pipelines`; the module it has in the package; the card's folder; its Hub id;
the Hub's folder of repositories. Prints one JSON object.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import BUILDERS, quiet, save_tiny_clip

REWARDS: dict[str, float] = {"red": 1.0, "tiny/clip": 0.1}


def draw(pipe: Any, **kwargs: Any) -> Any:
    """One image from one seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    settings: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
    return pipe("a red cat", generator=generator, **settings, **kwargs)


def optimized(pipe: Any) -> Any:
    return draw(pipe, rewards=REWARDS, optimization_steps=3)


def main(name: str, family: str, module: str, folder: str, repository: str, hub: Path) -> dict[str, bool]:
    """What is true of the card."""
    stock = quiet(BUILDERS[family]())
    weights = hub / "tiny" / name.lower()
    stock.save_pretrained(weights)
    save_tiny_clip(hub / "tiny" / "clip")

    local = DiffusionPipeline.from_pretrained(weights, custom_pipeline=folder, trust_remote_code=True)
    remote = DiffusionPipeline.from_pretrained(
        f"tiny/{weights.name}", custom_pipeline=repository, trust_remote_code=True
    )
    output = optimized(remote)
    image, noise_file = output.images, hub / "noise.safetensors"
    output.noise_result.save(noise_file)
    facts = {
        "folder and Hub draw the same": torch.equal(image, optimized(local).images),
        "the noise was optimised": not torch.equal(image, draw(stock).images),
        "without rewards it is the stock pipeline": torch.equal(draw(remote).images, draw(stock).images),
        "the package was not needed": "noiseopt" not in sys.modules,
    }
    package = getattr(importlib.import_module(module), name).from_pretrained(weights)
    facts["the package draws the same"] = torch.equal(image, optimized(package).images)
    noise = importlib.import_module("noiseopt.pipelines.noise_result").NoiseResult.load(noise_file)
    facts["the package draws it again from the saved noise"] = torch.equal(
        image, draw(package, latents=noise.latents).images
    )
    return facts


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:6], hub=Path(sys.argv[6]))))
