"""Train every model of the shapes world from scratch, with one command from a checkout.

    python -m training.train --device cpu --output DIR

Choose stages with `--stages`; each resumes from its last checkpoint. On several cores, start one process per core with
`RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` set, as for torch.distributed.

Each stage shows a progress bar, and the generators sample 24 validation prompts into DIR after every tenth of it.

The released weights were trained on two shared virtual CPU cores without a GPU. `training.json` in each model's folder,
and its card in `hub_cards`, record the samples, time and losses of each stage; `metrics.json`, written by `--stages
report`, records the quality. The weights did not come from a single run of this command, because some settings were
found on the way:

- The noises are coupled as now from sample 26,000 of the U-Net on, and its share of pure noise grew from 3/8 to 3/4.
- The rounds of hardening grew from 20 steps of ascent to 40.
- The reward was refined first on 8,704 generated images, then on a larger gallery with mirror images, and from sample
  312,000 on images of the final generators.
- The vision-language model is asked about own prompts as often as now since sample 88,000.
- The judge became more tolerant of soft outlines and stricter with circles.
- Careless captions were added to `guided` at sample 128,000, to `sdxl` at 24,000 and to `sd3` at 190,000, first with
  a share of 0.3, finally with the share that leaves a third of the prompts to repair; the learning rate was raised
  whenever a stage took longer than planned.

Another run gives similar but not identical weights.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from noiseopt.shapes_world.captions import VALIDATION_PROMPTS
from noiseopt.shapes_world.world import SIZE

from .coupling import couple
from .data import crops, encode_pictures, pictures
from .export import export
from .families import SD3Generator, SDXLGenerator, from_noise
from .gallery import gallery
from .models import Generator, Reward, VPGenerator, decode, final_student, final_vae, new_vae
from .optimization import Run, averaged
from .report import report
from .slips import slip
from .train_readers import train_tower, train_vqa
from .train_reward import harden_clip, refine_clip, train_clip

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def vae_losses(output: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Return the L1 with triple weight on saturated pixels, and the L1 of the gradients."""
    weight = 1 + 2 * ((image.amax(1, keepdim=True) - image.amin(1, keepdim=True)) > 0.5)
    error = output - image
    across, down = ((error.diff(dim=d) * weight.narrow(d, 1, image.shape[d] - 1)).abs().mean() for d in (3, 2))
    return {"pixel": (error.abs() * weight).mean(), "gradient": 0.5 * (across + down)}


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on 32x32 windows around shapes; it is convolutional and the most expensive stage."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    vae = new_vae().to(args.device)
    run = Run(vae, args.output / "vae.pt", samples=args.vae_samples, batch=64, lr=2e-3)
    forward = torch.compile(lambda x, noise: _autoencode(vae, x, noise)) if args.compile else None
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = crops(data["images"][rows], data["masks"][rows], 32)
        images = images.to(args.device).float() / 127.5 - 1
        noise = 0.05 * torch.randn(run.batch, 8, 4, 4, device=args.device)
        output, z = (forward or (lambda x, n: _autoencode(vae, x, n)))(images.contiguous(), noise)
        inside_tanh = 0.1 * (F.relu(z.abs() - 2.5).square() + 0.005 * z.square()).mean()
        run.step(vae_losses(output, images) | {"size": inside_tanh})


def _autoencode(vae: AutoencoderTiny, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    z = vae.encoder(images)
    return vae.decoder(z + noise), z


def coupled_losses(
    model: VPGenerator | SD3Generator, data: dict, batch: int, rng: random.Random, last: float, slips: float = 0.0
) -> dict[str, Tensor]:
    """Return the prediction errors at random times and, for a share `last` of the batch, from pure noise.

    Latent cells that show shapes have triple weight. A share `slips` of the captions is careless.
    """
    rows = torch.randint(0, len(data["latents"]), (batch,))
    shown = [data["requests"][i] for i in rows.tolist()]
    asked = [slip(request, rng, slips) for request in shown]
    prompts = [str(request) if rng.random() > 0.08 else "" for request in asked]
    z, weight = data["latents"][rows].to(model.device), 1 + 2 * data["masks"][rows].to(model.device)
    noise = couple(torch.randn_like(z), data["chance"][rows])
    t, count = model.times(batch), round(last * batch)
    t[:count] = model.last
    noisy, target = model.corrupt(z, noise, t.to(model.device))
    error = (model(noisy, t.to(model.device), prompts) - target).square() * weight
    losses = {"last": error[:count].sum() / weight.sum() / 8}
    return losses | ({"between": error[count:].sum() / weight.sum() / 8} if count < batch else {})


@torch.no_grad()
def draw(args: argparse.Namespace, model: VPGenerator | SD3Generator, path: Path) -> None:
    """Write one-step samples of 24 validation prompts, to monitor the training."""
    prompts = list(VALIDATION_PROMPTS[:24])
    noise = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(7)).to(args.device)
    images = decode(final_vae(args), from_noise(model, noise, model.embed(prompts)), encode_pictures(args)["scale"])
    rows = images.cpu().unflatten(0, (3, 8)).permute(0, 3, 1, 4, 2).reshape(3 * SIZE, 8 * SIZE, 3)
    Image.fromarray((rows * 255).round().byte().numpy()).resize((1536, 576)).save(path)


def train_generator(
    args: argparse.Namespace,
    stage: str,
    model: VPGenerator | SD3Generator,
    last: float,
    lr: float = 2e-3,
    decay: float = 0.998,
    slips: float = 0.0,
) -> None:
    """Train a generator on noises coupled to their images (`coupling.py`); a share `last` starts from pure noise."""
    data = encode_pictures(args)
    samples = vars(args)[f"{stage.replace('-', '_')}_samples"]
    path = args.output / f"{stage}.pt"
    run = Run(model.to(args.device), path, samples, batch=64, lr=lr, decay=decay, look=functools.partial(draw, args))
    batch = run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        run.step(coupled_losses(run.model, data, batch, rng, last, slips))


def train_base(args: argparse.Namespace) -> None:
    """Train the U-Net from which all others start, with 3 of 4 samples from pure noise."""
    model = Generator()
    if (args.output / "clip.pt").exists():
        tower = averaged(args.output / "clip.pt", Reward()).clip.text_model
        model.text_encoder.load_state_dict(tower.state_dict())
    train_generator(args, "base", model, last=0.75, lr=2.5e-3)


def train_unet(args: argparse.Namespace) -> None:
    """Continue the training of `train_base`, with the same settings."""
    model = averaged(args.output / "base.pt", Generator()).requires_grad_()
    train_generator(args, "unet", model, last=0.75, lr=2.5e-3)


def train_guided(args: argparse.Namespace) -> None:
    """Continue training the U-Net for multi-step sampling with guidance."""
    model = averaged(args.output / "unet.pt", Generator()).requires_grad_()
    train_generator(args, "guided", model, last=0.25, slips=0.45)


def train_student(args: argparse.Namespace) -> None:
    """Continue training the U-Net as a one-step student, only from pure noise."""
    model = averaged(args.output / "unet.pt", Generator()).requires_grad_()
    train_generator(args, "student", model, last=1.0, lr=8e-4, decay=0.99)


def begun(args: argparse.Namespace, stage: str) -> SDXLGenerator:
    """Initialize the SDXL generator from the SD U-Net of a stage."""
    base, model = averaged(args.output / f"{stage}.pt", Generator()), SDXLGenerator()
    model.begin_with(base.unet.state_dict(), base.text_encoder.state_dict())
    return model


def train_sdxl(args: argparse.Namespace) -> None:
    """Train the SDXL generator for multi-step sampling with guidance."""
    train_generator(args, "sdxl", begun(args, "unet"), last=0.25, slips=0.35)


def train_sdxl_turbo(args: argparse.Namespace) -> None:
    """Train the SDXL generator for one step, only from pure noise; from less, to leave more to repair."""
    train_generator(args, "sdxl-turbo", begun(args, "base"), last=1.0)


def train_sd3(args: argparse.Namespace) -> None:
    """Train the flow-matching transformer for multi-step sampling with guidance."""
    model = SD3Generator()
    model.begin_with(averaged(args.output / "unet.pt", Generator()).text_encoder.state_dict())
    train_generator(args, "sd3", model, last=0.25, slips=0.45)


def train_decoder(args: argparse.Namespace) -> None:
    """Train the decoder on whole images: from noisier latents and, for half of the batch, from the student's.

    It learns to decode clean shapes from generated latents.
    """
    data, latents = pictures(args.output / "pictures.pt", args.pictures, seed=1), encode_pictures(args)
    vae = new_vae()
    vae.load_state_dict(torch.load(args.output / "vae.pt")["average"])
    vae.encoder.requires_grad_(False)
    run = Run(vae.to(args.device), args.output / "decoder.pt", samples=args.decoder_samples, batch=16, lr=1e-3)
    forward = torch.compile(vae.decoder) if args.compile else vae.decoder
    student = final_student(args)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = data["images"][rows].to(args.device).float() / 127.5 - 1
        z = latents["latents"][rows].to(args.device)
        z = z + 0.25 * torch.rand(run.batch, 1, 1, 1).to(z) * torch.randn_like(z)
        half = run.batch // 2
        with torch.no_grad():
            noise = couple(torch.randn_like(z[:half]), latents["chance"][rows[:half]])
            asked = [str(latents["requests"][i]) for i in rows[:half].tolist()]
            z[:half] = from_noise(student, noise, student.embed(asked))
        run.step(vae_losses(forward(z / latents["scale"]), images))


STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "latents": encode_pictures,
    "base": train_base,
    "unet": train_unet,
    "guided": train_guided,
    "student": train_student,
    "sdxl": train_sdxl,
    "sdxl-turbo": train_sdxl_turbo,
    "sd3": train_sd3,
    "decoder": train_decoder,
    "harden": harden_clip,
    "gallery": gallery,
    "refine": refine_clip,
    "tower": train_tower,
    "vqa": train_vqa,
    "export": export,
    "report": report,
}


SAMPLES = {  # default number of samples by stage, as for the released weights
    "vae": 89_600,
    "clip": 102_400,
    "base": 102_400,
    "unet": 64_000,
    "guided": 216_000,
    "student": 10_240,
    "decoder": 11_200,
    "sdxl": 152_000,
    "sdxl-turbo": 22_400,
    "sd3": 370_000,
    "refine": 660_000,
    "tower": 40_000,
    "vqa": 256_000,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the models of the shapes world.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, samples and `weights`")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the autoencoder")
    parser.add_argument("--pictures", type=int, default=30_000, help="number of rendered training images")
    parser.add_argument("--failures", type=int, default=5_000, help="number of imitated failures")
    parser.add_argument("--gallery", type=int, default=25_600, help="images by each one-step model; 1/4 by others")
    parser.add_argument("--climbs", type=int, default=128, help="ascents per round of hardening")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--round-samples", type=int, default=3_200)
    parser.add_argument("--report-prompts", type=int, default=170)
    parser.add_argument("--report-seeds", type=int, default=1)
    parser.add_argument("--report-pictures", type=int, default=512, help="rendered images to evaluate on")
    for stage, samples in SAMPLES.items():
        parser.add_argument(f"--{stage}-samples", type=int, default=samples, metavar="N", help=f"default {samples}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
