"""Few-step students: regression on the guided teacher's own way from a noise to its image.

The teacher draws training prompts from fresh noise; its latents at the timesteps of the student and at the end are
kept. The student, which starts from the teacher's weights, learns to predict the end from each of them, without
guidance (as in https://arxiv.org/abs/2101.02388 and consistency distillation, https://arxiv.org/abs/2303.01469, with
the teacher's end in place of a bootstrapped target).
"""

from __future__ import annotations

import argparse
import functools
import random
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import sample_request

from .autoencoder import final_vae
from .data import load_records
from .generators import SIDE, Diffusion, SDGenerator, SDXLGenerator
from .optimization import Run, averaged, fast
from .precision import HalfPrecision
from .teacher import look

TEACHER = {"num_inference_steps": 12, "guidance_scale": 3.0}
KEPT = (999, 749, 499, 249)  # timesteps of the student's steps
PART = 512  # pairs in a file


def halved(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a denoiser compute in another precision, for callers in single precision."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.ndim > 1 else x for x in args]
        named = {k: x.to(dtype) if isinstance(x, Tensor) and x.ndim > 1 else x for k, x in kwargs.items()}
        return tuple(cast), named

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return tuple(x.float() for x in output) if isinstance(output, tuple) else output.float()

    fast(denoiser, dtype)
    denoiser.register_forward_pre_hook(before, with_kwargs=True)
    denoiser.register_forward_hook(after)
    return denoiser


class Way:
    """A callback of pipelines that keeps the latents at the timesteps `KEPT`, and at the end."""

    def __init__(self, noise: Tensor) -> None:
        self.kept = [noise]

    def __call__(self, pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        timesteps = pipe.scheduler.timesteps
        if step + 1 == len(timesteps) or int(timesteps[step + 1]) in KEPT:
            self.kept.append(tensors["latents"])
        return {}


@torch.no_grad()
def draw_pairs(args: argparse.Namespace) -> None:
    """Draw the teacher's ways, in files of `PART` each; those that exist are kept."""
    model = averaged(args.output / "guided.pt", SDGenerator()).to(args.device)
    pipe = model.pipeline(final_vae(args))
    pipe.set_progress_bar_config(disable=True)
    halved(pipe.unet, args.dtype)
    for part in tqdm(range(args.pairs // PART), desc="pairs"):
        path = args.output / f"pairs_{part}.pt"
        if path.exists():
            continue
        rng, generator = random.Random(10_000 + part), torch.Generator().manual_seed(10_000 + part)
        requests = [sample_request(rng) for _ in range(PART)]
        ways = []
        for start in range(0, PART, 64):
            noise = torch.randn(64, 4, SIDE, SIDE, generator=generator).to(args.device)
            way = Way(noise)
            prompts = [str(request) for request in requests[start : start + 64]]
            with HalfPrecision():
                pipe(prompts, latents=noise, output_type="latent", callback_on_step_end=way, **TEACHER)
            ways.append(torch.stack(way.kept, 1).half().cpu())
        torch.save({"requests": requests, "ways": torch.cat(ways)}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def pairs(args: argparse.Namespace) -> dict:
    """Return the requests of all pairs that are drawn, and the teacher's ways, (N, len(KEPT) + 1, 4, 32, 32)."""
    parts = [load_records(path) for path in sorted(args.output.glob("pairs_*.pt"))]
    requests = [request for part in parts for request in part["requests"]]
    return {"requests": requests, "ways": torch.cat([part["ways"] for part in parts])}


def student_losses(run: Run, data: dict, first: float = 0.6) -> dict[str, Tensor]:
    """Return how far the student's predicted end is from the teacher's, from pure noise for a share `first`."""
    rows = torch.randint(0, len(data["ways"]), (run.batch,))
    later = torch.randint(1, len(KEPT), (run.batch,)) * (torch.rand(run.batch) >= first)
    model = run.fast
    device, dtype = model.denoiser.device, model.denoiser.dtype
    x, end = data["ways"][rows, later].to(device).float(), data["ways"][rows, -1].to(device).float()
    t = torch.tensor(KEPT)[later].to(device)
    with HalfPrecision():
        context = model.embed([str(data["requests"][i]) for i in rows.tolist()])
        v = model.predict(x.to(dtype, memory_format=torch.channels_last), t, context).float()
    level = model.scheduler.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
    error = level.sqrt() * x - (1 - level).sqrt() * v - end
    each = (error.square() + 1e-3).sqrt().mean((1, 2, 3))
    start = (later == 0).to(device)
    return {"start": each[start].sum() / run.batch, "later": each[~start].sum() / run.batch}


def train_student(args: argparse.Namespace, stage: str, model: Diffusion, lr: float = 1e-3) -> None:
    """Train a student that starts from its teacher."""
    data, samples = pairs(args), vars(args)[f"{stage.replace('-', '_')}_samples"]
    check = functools.partial(look, args, num_inference_steps=1, guidance_scale=0.0)
    run = Run(
        model.to(args.device), args.output / f"{stage}.pt", samples, 64, lr, decay=0.999, look=check, dtype=args.dtype
    )
    for _ in run:
        run.step(student_losses(run, data))


def train_turbo(args: argparse.Namespace) -> None:
    """Train the SD student."""
    train_student(args, "turbo", averaged(args.output / "guided.pt", SDGenerator()).requires_grad_())


def train_sdxl_turbo(args: argparse.Namespace) -> None:
    """Train the SDXL student, which starts from the SD student."""
    model = SDXLGenerator()
    model.begin_with(averaged(args.output / "turbo.pt", SDGenerator()))
    train_student(args, "sdxl-turbo", model.requires_grad_())
