"""Training data of the shapes world models. Each set is rendered once and cached in a file."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.shapes_world.captions import Request, caption, sample_request
from noiseopt.shapes_world.judge import judge
from noiseopt.shapes_world.world import LAYOUT, LOOKS, SIZE, Scene, Shape, coverage, lay_out, render

from .models import new_vae
from .negatives import imitate_failure
from .optimization import averaged


def pictures(path: Path, count: int, seed: int) -> dict:
    """Return requests, scenes, their numbers, and uint8 images (N, 3, 64, 64) and masks of shapes (N, 1, 64, 64)."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        requests = [sample_request(rng) for _ in range(count)]
        chance = torch.rand(count, LAYOUT + LOOKS, generator=generator)
        layouts, looks = chance[:, :LAYOUT].tolist(), chance[:, LAYOUT:]
        scenes = [lay_out(r.objects, layout, r.relation) for r, layout in zip(requests, layouts, strict=True)]
        images, masks = [], []
        for i in range(0, count, 500):
            images.append((render(scenes[i : i + 500], generator, looks[i : i + 500]) * 255).round().byte())
            masks.append((coverage(scenes[i : i + 500]).amax(1, keepdim=True) * 255).byte())
        data = {"requests": requests, "scenes": scenes, "chance": chance}
        torch.save(data | {"images": torch.cat(images), "masks": torch.cat(masks)}, path)
    return load_records(path)


def load_records(path: Path) -> dict:
    """Load tensors, requests and scenes; nothing else is unpickled."""
    with torch.serialization.safe_globals([Request, Scene, Shape]):
        return torch.load(path)


def failures(path: Path, scenes: Sequence[Scene], seed: int, size: int = SIZE) -> dict:
    """Return imitated failures of the scenes, uint8 (N, 3, size, size), and whether each is right even so, (N,)."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        images, right = [], []
        for i in range(0, len(scenes), 500):
            part = scenes[i : i + 500]
            drawn = render([imitate_failure(scene, rng) for scene in part], generator, size=size)
            right += [v.correct for v in judge(drawn, [caption(scene) for scene in part])]
            images.append((drawn * 255).round().byte())
        torch.save({"images": torch.cat(images), "right": torch.tensor(right)}, path)
    return torch.load(path)


def encode_pictures(args: argparse.Namespace) -> dict:
    """Return requests and numbers with the scaled latents (N, 8, 8, 8) and masks (N, 1, 8, 8) of their images."""
    path = args.output / "latents.pt"
    if not path.exists():
        data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
        vae = averaged(args.output / "vae.pt", new_vae()).to(args.device)
        with torch.no_grad():
            images = (part.to(args.device).float() / 127.5 - 1 for part in data["images"].split(250))
            latents = torch.cat([vae.encoder(part).cpu() for part in images])
        masks = torch.cat([F.max_pool2d(part.float() / 255, 8) for part in data["masks"].split(1000)])
        scale = float(1 / latents.std())
        kept = {key: data[key] for key in ("requests", "chance")}
        torch.save(kept | {"latents": latents * scale, "masks": masks, "scale": scale}, path)
    return load_records(path)


def crops(images: Tensor, masks: Tensor, size: int) -> Tensor:
    """Return random size x size windows, 4 of 5 of them centered near a shape."""
    count = len(images)
    anywhere = torch.randint(0, SIZE - size + 1, (count, 2))
    spot = torch.multinomial(masks.flatten(1).float() + 1e-6, 1).squeeze(1)
    near = torch.stack((spot // SIZE, spot % SIZE), 1) - size // 2 + torch.randint(-8, 9, (count, 2))
    corner = torch.where(torch.rand(count, 1) < 0.8, near.clamp(0, SIZE - size), anywhere)
    span = torch.arange(size)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span
    return images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def blemish(images: Tensor) -> Tensor:
    """Augment with small shifts, blur, noise and brightness that keep correctness; (B, 3, H, H) in [0, 1]."""
    count, side = len(images), images.shape[-1]
    reach = 3 * side // 64
    x, y = (int(v) for v in torch.randint(2 * reach + 1, (2,)))
    images = F.pad(images, (reach,) * 4, mode="replicate")[..., y : y + side, x : x + side]
    one = (count, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    strength = (torch.rand(one) - 0.4).clamp(min=0.0) * 1.6
    images = images.lerp(blurred, strength.to(images))
    noise = (torch.rand(one) - 0.5).clamp(min=0.0).to(images) * 0.1
    gain = 1 + 0.08 * torch.randn(one).to(images)
    return (images * gain + noise * torch.randn_like(images)).clamp(0.0, 1.0)
