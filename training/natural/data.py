"""Training data: pictures of training requests, most of them with the usual layout and ground, as photographs have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import Request, sample_request
from noiseopt.shapes_world.world import LAYOUT, LOOKS, Scene, coverage, lay_out, render, usual, usual_looks

from ..data import load_records

SIZE = 128  # pixels
OTHER_LAYOUT, OTHER_GROUND = 0.4, 0.3  # shares of pictures with another layout, and another ground, than the usual


def sample_pictures(requests: Sequence[Request], rng: random.Random) -> tuple[list[Scene], Tensor, Tensor]:
    """Sample scenes of requests and their looks, (N, `LOOKS`).

    Also returns which have the usual layout and which the usual ground, (N, 2).
    """
    scenes, looks, common = [], [], []
    for request in requests:
        layout, ground = rng.random() >= OTHER_LAYOUT, rng.random() >= OTHER_GROUND
        numbers = usual(request.objects, request.relation, rng) if layout else [rng.random() for _ in range(LAYOUT)]
        scenes.append(lay_out(request.objects, numbers, request.relation))
        looks.append(usual_looks(rng) if ground else [rng.random() for _ in range(LOOKS)])
        common.append((layout, ground))
    return scenes, torch.tensor(looks), torch.tensor(common)


def pictures(path: Path, count: int, seed: int) -> dict:
    """Return requests, scenes, looks, uint8 images (N, 3, 128, 128) and masks (N, 1, 128, 128), cached in a file."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        requests = [sample_request(rng) for _ in range(count)]
        scenes, looks, _ = sample_pictures(requests, rng)
        images, masks = [], []
        for i in range(0, count, 250):
            images.append((render(scenes[i : i + 250], generator, looks[i : i + 250], SIZE) * 255).round().byte())
            masks.append((coverage(scenes[i : i + 250], generator, SIZE).amax(1, keepdim=True) * 255).byte())
        data = {"requests": requests, "scenes": scenes, "looks": looks}
        torch.save(data | {"images": torch.cat(images), "masks": torch.cat(masks)}, path)
    return load_records(path)
