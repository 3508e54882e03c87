"""The trained generators as stock pipelines, and a gallery of their images as training data of the readers."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import sample_request

from .autoencoder import final_vae
from .distillation import halved
from .generators import SD3Generator, SDGenerator, SDXLGenerator
from .optimization import averaged
from .precision import HalfPrecision

_GUIDED = {"num_inference_steps": 20, "guidance_scale": 3.0}
_ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}


@dataclass(frozen=True)
class Family:
    """A generator.

    Attributes:
        kind: Its class.
        call: Arguments of its pipeline's call.
        share: The share of the gallery it draws.
        spacing: The spacing of the timesteps, if not that of `SCHEDULE`. "leading", as in SD and SDXL, begins below
            999, where nothing is left of an image, so that an x0 estimate does not depend on the noise.
    """

    kind: Any
    call: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    spacing: str | None = None


FAMILIES = {  # by stage, which is also the name of the model
    "turbo": Family(SDGenerator, _ONE_STEP),
    "guided": Family(SDGenerator, _GUIDED, 0.25, spacing="leading"),
    "sdxl": Family(SDXLGenerator, _GUIDED, 0.25, spacing="leading"),
    "sdxl-turbo": Family(SDXLGenerator, _ONE_STEP),
    "sd3": Family(SD3Generator, _GUIDED | {"max_sequence_length": 16}, 0.25),
}


def assemble(args: argparse.Namespace, name: str) -> Any:
    """Assemble the stock pipeline of a trained generator."""
    family = FAMILIES[name]
    pipe = averaged(args.output / f"{name}.pt", family.kind()).to(args.device).pipeline(final_vae(args))
    if family.spacing:
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing=family.spacing)
    return pipe


@torch.no_grad()
def gallery(args: argparse.Namespace) -> None:
    """Draw right and wrong images of training prompts, four of each: uint8 (N, 3, 128, 128), and their N prompts."""
    path = args.output / "gallery.pt"
    if path.exists():
        return
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    images, asked = [], []
    for name in [name for name in FAMILIES if (args.output / f"{name}.pt").exists()]:
        pipe, family = assemble(args, name), FAMILIES[name]
        pipe.set_progress_bar_config(disable=True)
        halved(pipe.transformer if family.kind is SD3Generator else pipe.unet, args.dtype)
        for _ in tqdm(range(int(args.gallery * family.share) // 64), desc=f"gallery of {name}", mininterval=5):
            prompts = [str(sample_request(rng)) for _ in range(16)] * 4
            with HalfPrecision():
                output = pipe(prompts, generator=generator, output_type="pt", **family.call)
            images.append((output.images.cpu() * 255).round().byte())
            asked += prompts
    torch.save({"images": torch.cat(images), "prompts": asked}, path)
