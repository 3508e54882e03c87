"""Training of generators on pictures, with noise that is independent of them."""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from noiseopt.shapes_world.captions import VALIDATION_PROMPTS, sample_request
from noiseopt.shapes_world.judge import judge

from .autoencoder import final_vae, latents
from .generators import Diffusion, SD3Generator, SDGenerator, SDXLGenerator
from .optimization import Run, averaged
from .precision import HalfPrecision
from .slips import frequency, slip


def losses(run: Run, data: dict, rng: random.Random, slips: float = 0.0) -> dict[str, Tensor]:
    """Return the error of v on a batch, drawn by the frequencies of the pictures.

    One caption of ten is empty, for guidance; a share `slips` is careless.
    """
    rows = torch.multinomial(data["frequency"], run.batch, replacement=True)
    asked = [slip(data["requests"][i], rng, slips) for i in rows.tolist()]
    prompts = [str(request) if rng.random() > 0.1 else "" for request in asked]
    model = run.fast
    z = data["latents"][rows].to(model.denoiser.device).float()
    t = model.times(run.batch).to(z.device)
    noisy, target = model.corrupt(z, torch.randn_like(z), t)
    with HalfPrecision():
        guess = model.predict(
            noisy.to(model.denoiser.dtype, memory_format=torch.channels_last), t, model.embed(prompts)
        )
    return {"v": (guess.float() - target).square().mean()}


@torch.no_grad()
def look(args: argparse.Namespace, model: Any, path: Path, **call: Any) -> None:
    """Draw pictures of validation and training prompts, write the former, and how many of each are right."""
    pipe = model.pipeline(final_vae(args))
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(7)
    prompts = [*VALIDATION_PROMPTS[:48], *(str(sample_request(rng)) for _ in range(48))]
    generator = torch.Generator().manual_seed(7)
    images = torch.cat(
        [pipe(prompts[i : i + 16], generator=generator, output_type="pt", **call).images for i in range(0, 96, 16)]
    ).cpu()
    verdicts = judge(images, prompts)
    right = torch.tensor([v.correct for v in verdicts]).float().view(2, 48).mean(1).tolist()
    bound = sum(v.shape_bound for v in verdicts) / 96
    rows = images[:48].unflatten(0, (6, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((rows * 255).round().byte().numpy()).save(path)
    found = {"right, validation": right[0], "right, training": right[1], "shapes bound": bound}
    path.with_suffix(".json").write_text(json.dumps({k: round(v, 3) for k, v in found.items()}) + "\n")
    print(path.stem, found, flush=True)


def train_generator(
    args: argparse.Namespace, stage: str, model: Diffusion | SD3Generator, slips: float = 0.0, lr: float = 2e-3
) -> None:
    """Train a generator; with `slips` on pictures by how common they are, a share of whose captions is careless."""
    data, samples = latents(args), vars(args)[f"{stage.replace('-', '_')}_samples"]
    data["frequency"] = frequency(data["requests"]) if slips else torch.ones(len(data["requests"]))
    call = {"num_inference_steps": 12, "guidance_scale": 3.0}
    call |= {"max_sequence_length": 16} if isinstance(model, SD3Generator) else {}
    check = functools.partial(look, args, **call)
    run = Run(
        model.to(args.device), args.output / f"{stage}.pt", samples, 64, lr, decay=0.999, look=check, dtype=args.dtype
    )
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        run.step(losses(run, data, rng, slips))


def train_base(args: argparse.Namespace) -> None:
    """Train the SD U-Net on true captions."""
    train_generator(args, "base", SDGenerator())


def train_guided(args: argparse.Namespace) -> None:
    """Continue on careless captions of common pictures: now prior and noise decide whether a prompt is followed."""
    model = averaged(args.output / "base.pt", SDGenerator()).requires_grad_()
    train_generator(args, "guided", model, slips=args.slips, lr=1e-3)


def train_sdxl(args: argparse.Namespace) -> None:
    """Train the SDXL U-Net, which starts from the SD U-Net, likewise."""
    model = SDXLGenerator()
    model.begin_with(averaged(args.output / "guided.pt", SDGenerator()))
    train_generator(args, "sdxl", model.requires_grad_(), slips=args.slips)


def train_sd3(args: argparse.Namespace) -> None:
    """Train the flow transformer likewise; only its first text encoder starts from the SD model."""
    model = SD3Generator()
    model.begin_with(averaged(args.output / "base.pt", SDGenerator()))
    train_generator(args, "sd3", model.requires_grad_(), slips=args.slips)
