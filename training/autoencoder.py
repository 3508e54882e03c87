"""The autoencoder: 128 x 128 pixels to 32 x 32 latents of 4 channels."""

from __future__ import annotations

import argparse
import random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import sample_request
from noiseopt.shapes_world.world import SIZE, render

from .data import load_records, pictures, sample_pictures
from .optimization import Run, averaged, fast

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

CHANNELS = 4
CROP = 64  # pixels, side of training windows


def new_vae() -> AutoencoderTiny:
    """Build an untrained autoencoder."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 0),
        scaling_factor=1.0,
    )


def crops(images: Tensor, masks: Tensor, size: int) -> Tensor:
    """Return random size x size windows, 4 of 5 of them centered near a shape."""
    count, side = len(images), images.shape[-1]
    anywhere = torch.randint(0, side - size + 1, (count, 2))
    spot = torch.multinomial(masks.flatten(1).float() + 1e-6, 1).squeeze(1)
    near = (
        torch.stack((spot // side, spot % side), 1) - size // 2 + torch.randint(-size // 4, size // 4 + 1, (count, 2))
    )
    corner = torch.where(torch.rand(count, 1) < 0.8, near.clamp(0, side - size), anywhere)
    span = torch.arange(size)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span
    return images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def losses(output: Tensor, image: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Return the L1 with double weight on saturated pixels, the L1 of the gradients, and a bound of the latents."""
    weight = 1 + ((image.amax(1, keepdim=True) - image.amin(1, keepdim=True)) > 0.3).float()
    error = output - image
    across, down = ((error.diff(dim=d) * weight.narrow(d, 1, image.shape[d] - 1)).abs().mean() for d in (3, 2))
    bound = 0.1 * (F.relu(latents.abs() - 2.5).square() + 0.005 * latents.square()).mean()
    return {"pixel": (error.abs() * weight).mean(), "gradient": 0.5 * (across + down), "bound": bound}


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on windows of the pictures, with noise on the latents in place of a KL loss."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    run = Run(new_vae().to(args.device), args.output / "vae.pt", args.vae_samples, batch=32, lr=2e-3, dtype=args.dtype)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = crops(data["images"][rows], data["masks"][rows], CROP).to(args.device).float() / 127.5 - 1
        z = run.fast.encoder(images.to(args.dtype, memory_format=torch.channels_last))
        level = 0.2 * torch.rand(run.batch, 1, 1, 1).to(z)
        output = run.fast.decoder(z + level * torch.randn_like(z)).float()
        run.step(losses(output, images, z.float()))


@torch.no_grad()
def normalized(args: argparse.Namespace, count: int = 500) -> AutoencoderTiny:
    """Return the autoencoder with latents of zero mean and unit covariance over channels, cached in a file.

    They have it on `count` pictures.

    The normalization is part of the last layer of the encoder. Its inverse in the first layer of the decoder is
    approximate, because that bounds its input and pads it with zeros: `train_decoder` adapts the decoder.
    """
    path = args.output / "normalized.pt"
    if not path.exists():
        vae = averaged(args.output / "vae.pt", new_vae())
        rng = random.Random(3)
        scenes, looks, _ = sample_pictures([sample_request(rng) for _ in range(count)], rng)
        images = render(scenes, torch.Generator().manual_seed(3), looks, SIZE) * 2 - 1
        z = torch.cat([vae.encoder(part) for part in images.split(50)]).movedim(1, -1).flatten(0, 2)
        mean = z.mean(0)
        values, vectors = torch.linalg.eigh(z.T.cov())
        white, back = (vectors @ torch.diag(values**power) @ vectors.T for power in (-0.5, 0.5))
        layers: Any = vae.encoder.layers[-1], vae.decoder.layers[0]
        last, first = layers
        last.weight.copy_(torch.einsum("ij,jabc->iabc", white, last.weight))
        last.bias.copy_(white @ (last.bias - mean))
        first.bias += torch.einsum("ijab,j->i", first.weight, mean)
        first.weight.copy_(torch.einsum("ijab,jk->ikab", first.weight, back))
        torch.save({"average": vae.state_dict()}, path)
    return averaged(path, new_vae()).to(args.device)


def train_decoder(args: argparse.Namespace) -> None:
    """Train the decoder on the normalized latents."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    vae = normalized(args)
    vae.decoder.requires_grad_()
    encoder = fast(vae.encoder, args.dtype)
    run = Run(vae.decoder, args.output / "decoder.pt", args.decoder_samples, batch=32, lr=1e-3, dtype=args.dtype)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = crops(data["images"][rows], data["masks"][rows], CROP).to(args.device).float() / 127.5 - 1
        with torch.no_grad():
            z = encoder(images.to(args.dtype, memory_format=torch.channels_last))
        level = 0.3 * torch.rand(run.batch, 1, 1, 1).to(z)
        output = run.fast(z + level * torch.randn_like(z)).float()
        run.step({key: loss for key, loss in losses(output, images, z.float()).items() if key != "bound"})


def latents(args: argparse.Namespace) -> dict:
    """Return requests and latents, (N, 4, 32, 32) in half precision, cached in a file."""
    path = args.output / "latents.pt"
    if not path.exists():
        encoder = fast(normalized(args).encoder, args.dtype)
        rng, generator = random.Random(2), torch.Generator().manual_seed(2)
        requests = [sample_request(rng) for _ in range(args.latents)]
        found = []
        for i in tqdm(range(0, len(requests), 250), desc="latents"):
            scenes, looks, _ = sample_pictures(requests[i : i + 250], rng)
            images = render(scenes, generator, looks, SIZE).to(args.device) * 2 - 1
            images = images.to(args.dtype, memory_format=torch.channels_last)
            with torch.no_grad():
                found += [encoder(part).cpu().half() for part in images.split(50)]
        torch.save({"requests": requests, "latents": torch.cat(found)}, path)
    return load_records(path)


def final_vae(args: argparse.Namespace) -> AutoencoderTiny:
    """Return the autoencoder with its trained decoder."""
    vae = normalized(args)
    if (args.output / "decoder.pt").exists():
        averaged(args.output / "decoder.pt", vae.decoder)
    return vae
