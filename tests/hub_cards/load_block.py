"""Run by `test_blocks.py` in a fresh process: load a block from its folder and from the Hub, and compare images.

Arguments: those of `main`. Prints one JSON object.
"""

import importlib
import json
import sys
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from tiny_pipelines import BUILDERS, SIZE, quiet, save_tiny_clip

REQUESTS: dict[str, dict[str, Any]] = {
    "reno": {"rewards": {"red": 1.0, "tiny/clip": 0.1}, "steps": 3},
    "noise_diffusion": {"rewards": "brightness", "steps": 3},
    "cno": {"steps": 2, "method_kwargs": {"window_size": 4}},
    "never_too_late": {"diversity": {"dpp": ("color_histogram", 150.0)}, "steps": 3},
}
OFF: dict[str, dict[str, Any]] = {"cno": {"steps": 0}}


def modular() -> Any:
    """Return a tiny modular SDXL without guidance, which diffusers' two kinds of pipelines compute differently."""
    stock, pipe = quiet(BUILDERS["sdxl"]()), StableDiffusionXLAutoBlocks().init_pipeline()
    names = [each.name for each in pipe.blocks.expected_components]
    pipe.update_components(
        **{name: part for name, part in stock.components.items() if part is not None and name in names}
    )
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0, enabled=False))
    return pipe


def main(class_name: str, room: str, folder: str, repository: str, hub: str) -> dict[str, bool]:
    """Return what is true of the block."""
    save_tiny_clip(f"{hub}/tiny/clip")
    own = getattr(importlib.import_module(f"noiseopt.pipelines.{room}.block"), class_name)()
    blocks = [
        own,
        *(ModularPipelineBlocks.from_pretrained(each, trust_remote_code=True) for each in (folder, repository)),
    ]
    pipe, call = modular(), {"prompt": "a red cat", "num_inference_steps": 2, "num_images_per_prompt": 2, **SIZE}

    def draw(pipe: Any, **request: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        state = pipe(**call, **request, generator=generator, output_type="pt")
        return state.get("images")

    plain, request = draw(pipe), REQUESTS[room]
    pipes = [block.into(pipe) for block in blocks]
    images = [draw(each, **request) for each in pipes]
    state = pipes[1](**call, **request, generator=torch.Generator().manual_seed(7), output_type="pt")
    found = state.get("noise_result")
    redrawn = {"latents": found.latents, "generator": found.generator(), "output_type": "pt"}
    again = pipe(**call, **redrawn).get("images")
    return {
        "is remote code": all(type(block).__module__.startswith("diffusers_modules") for block in blocks[1:]),
        "from folder, Hub and package alike": all(torch.equal(each, images[0]) for each in images),
        "other images": not torch.equal(images[0], plain),
        "off is the stock call": all(torch.equal(draw(each, **OFF.get(room, {})), plain) for each in pipes),
        "redrawn from the latents": torch.equal(again, images[0])
        or pipe.scheduler.config.get("_class_name") is not None,
        "the pipeline stays": torch.equal(draw(pipe), plain),
        "inputs are documented": all(each.description for each in blocks[1].inputs),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
