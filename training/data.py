"""Training data: pictures of training requests, most of them with the usual layout and ground, as photographs have.

Each set is rendered once and cached in a file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.shapes_world.captions import Request, caption, sample_request
from noiseopt.shapes_world.judge import judge
from noiseopt.shapes_world.world import LAYOUT, LOOKS, SIZE, Scene, Shape, coverage, lay_out, render, usual, usual_looks

from .negatives import imitate_failure

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


def load_records(path: Path) -> dict:
    """Load tensors, requests and scenes; nothing else is unpickled."""
    with torch.serialization.safe_globals([Request, Scene, Shape]):
        return torch.load(path)


def failures(path: Path, scenes: Sequence[Scene], seed: int) -> dict:
    """Return imitated failures of the scenes, uint8 (N, 3, 128, 128), and whether each is right even so, (N,)."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        images, right = [], []
        for i in range(0, len(scenes), 500):
            part = scenes[i : i + 500]
            drawn = render([imitate_failure(scene, rng) for scene in part], generator, size=SIZE)
            right += [v.correct for v in judge(drawn, [caption(scene) for scene in part])]
            images.append((drawn * 255).round().byte())
        torch.save({"images": torch.cat(images), "right": torch.tensor(right)}, path)
    return torch.load(path)


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
