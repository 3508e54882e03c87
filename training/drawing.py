"""The trained generators as stock pipelines, and a gallery of their images as training data of the readers."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import sample_request
from noiseopt.shapes_world.embedded import MODELS
from noiseopt.shapes_world.world import SIZE

from .autoencoder import final_vae
from .data import load_records
from .distillation import halved
from .generators import SD3Generator, SDGenerator, SDXLGenerator
from .optimization import averaged
from .precision import HalfPrecision


@dataclass(frozen=True)
class Family:
    """A generator: its class, the arguments of its pipeline's call, and the share of the gallery it draws."""

    kind: Any
    call: Mapping[str, Any]
    share: float = 1.0


FAMILIES = {  # by stage, which is also the name of the model
    "turbo": Family(SDGenerator, MODELS["turbo"].call),
    "guided": Family(SDGenerator, MODELS["guided"].call, 0.25),
    "sdxl": Family(SDXLGenerator, MODELS["sdxl"].call, 0.25),
    "sdxl-turbo": Family(SDXLGenerator, MODELS["sdxl-turbo"].call),
    "sd3": Family(SD3Generator, MODELS["sd3"].call, 0.25),
}


def assemble(args: argparse.Namespace, name: str) -> Any:
    """Assemble the stock pipeline of a trained generator."""
    model = averaged(args.output / f"{name}.pt", FAMILIES[name].kind()).to(args.device)
    return model.pipeline(final_vae(args))


def denoiser_of(pipe: Any) -> Any:
    """Return the U-Net or the transformer of a pipeline."""
    return pipe.components.get("unet") or pipe.transformer


@torch.no_grad()
def gallery(args: argparse.Namespace) -> None:
    """Draw images of training prompts, four of each, in a file per generator; those that exist are kept."""
    for seed, (name, family) in enumerate(FAMILIES.items(), start=5):
        path = args.output / f"gallery_{name}.pt"
        if path.exists() or not (args.output / f"{name}.pt").exists():
            continue
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        pipe = assemble(args, name)
        pipe.set_progress_bar_config(disable=True)
        halved(denoiser_of(pipe), args.dtype)
        images, asked = [], []
        for _ in tqdm(range(int(args.gallery * family.share) // 64), desc=path.stem, mininterval=5):
            prompts = [str(sample_request(rng)) for _ in range(16)] * 4
            with HalfPrecision():
                output = pipe(prompts, generator=generator, output_type="pt", **family.call)
            images.append((output.images.cpu() * 255).round().byte())
            asked += prompts
        torch.save({"images": torch.cat(images), "prompts": asked}, path)


def drawn(folder: Path, pattern: str = "gallery_*.pt") -> tuple[Tensor, list[str]]:
    """Return the images of all files of a pattern, uint8 (N, 3, 128, 128), and their N prompts."""
    parts = [load_records(path) for path in sorted(folder.glob(pattern))]
    images = torch.cat([part["images"] for part in parts]) if parts else torch.empty(0, 3, SIZE, SIZE).byte()
    return images, [prompt for part in parts for prompt in part["prompts"]]
