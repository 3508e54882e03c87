"""Measures of naturalness: which part of the noise the pictures depend on, and how much seeds collapse."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.evaluation.metrics import mean_pairwise_similarity
from noiseopt.shapes_world.captions import Request, parse
from noiseopt.shapes_world.judge import judge, see
from noiseopt.shapes_world.world import SIDE, SIZE, Scene, render

from .data import sample_pictures


def draw(pipe: Any, prompts: Sequence[str], noise: Tensor, **call: Any) -> Tensor:
    """Run the stock pipeline from a noise, with gradients if the noise requires them: images (B, 3, 128, 128)."""
    plain = inspect.unwrap(type(pipe).__call__)
    with torch.set_grad_enabled(noise.requires_grad):
        return plain(pipe, list(prompts), latents=noise, output_type="pt", **call).images


def gradients(
    pipe: Any,
    denoiser: Any,
    prompts: Sequence[str],
    noise: Tensor,
    score: Callable[[Tensor, list[str]], Tensor],
    **call: Any,
) -> tuple[Tensor, Tensor]:
    """Return two gradients of a score of images and prompts, (B,), with respect to the noise (B, C, H, W).

    They are the true one, and the one that holds the outputs of the denoiser constant ("frozen").
    """
    forward, found = denoiser.forward, []
    for each in (forward, torch.no_grad()(forward)):
        denoiser.forward = each
        z = noise.clone().requires_grad_()
        found.append(torch.autograd.grad(score(draw(pipe, prompts, z, **call), list(prompts)).sum(), z)[0])
    denoiser.forward = forward
    full, frozen = found
    return full, frozen


def gradient_shares(full: Tensor, frozen: Tensor) -> dict[str, float]:
    """Return the shares of the squared norms of gradients in the means of the channels, and the cosine of the two.

    All are medians over prompts.
    """
    cosine = torch.cosine_similarity(full.flatten(1), frozen.flatten(1))
    found = {"full": _share(full), "frozen": _share(frozen), "cosine": cosine}
    return {name: round(float(each.median()), 4) for name, each in found.items()}


def _share(gradient: Tensor) -> Tensor:
    pixels = gradient[0, 0].numel()
    return pixels * gradient.mean((2, 3)).square().sum(1) / gradient.square().sum((1, 2, 3))


def spread(images: Tensor, sets: int) -> float:
    """Return the root mean square distance, in pixels, of objects from the mean place of their kind over a set.

    An object counts in images that have no other of its color and kind, if these are more than half of the set.
    """
    things = [found for part in images.split(64) for found in see(part)]
    size, squares = len(things) // sets, []
    for start in range(0, len(things), size):
        places: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for found in things[start : start + size]:
            names = [(thing.color, thing.kind) for thing in found]
            for name, thing in zip(names, found, strict=True):
                if names.count(name) == 1:
                    places.setdefault(name, []).append((thing.x, thing.y))
        for place in places.values():
            if len(place) > size // 2:
                xy = torch.tensor(place, dtype=torch.float64) * SIZE / SIDE
                squares.append((xy - xy.mean(0)).square().sum(1).mean())
    return float(torch.stack(squares).mean().sqrt()) if squares else float("nan")


def similarity_among(features: Tensor, chosen: Tensor) -> float:
    """Return the mean cosine of all pairs of chosen images of a set, from features (P, N, D) and a mask (P, N)."""
    unit = F.normalize(features, dim=-1)
    pairs = (chosen[:, :, None] & chosen[:, None, :]).tril(-1)
    return float((unit @ unit.mT)[pairs].mean())


def new_pictures(requests: Sequence[Request], seed: int) -> tuple[Tensor, list[Scene]]:
    """Draw a training picture of each request, (N, 3, 128, 128) in [0, 1], and its scene."""
    scenes, looks, _ = sample_pictures(requests, random.Random(seed))
    return render(scenes, torch.Generator().manual_seed(seed), looks, SIZE), scenes


def collapse(
    images: Tensor, prompts: Sequence[str], count: int, features: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, float]]:
    """Compare sets of `count` images of each prompt, (P * count, 3, 128, 128), with training pictures of it."""
    asked = [prompt for prompt in prompts for _ in range(count)]
    found = {}
    for name, each in (("model", images), ("pictures", new_pictures([parse(prompt) for prompt in asked], seed=96)[0])):
        with torch.no_grad():
            seen = torch.cat([features(part) for part in each.split(32)]).unflatten(0, (-1, count))
        ground = each[:, :, :6].mean((2, 3)).unflatten(0, (-1, count))
        right = [v.correct for v in judge(each, asked)]
        found[name] = {
            "similarity": round(float(mean_pairwise_similarity(seen).mean()), 4),
            "similarity of right images": round(
                similarity_among(seen, torch.tensor(right).unflatten(0, (-1, count))), 4
            ),
            "spread of places (pixels)": round(spread(each, len(prompts)), 2),
            "spread of grounds": round(float(ground.std(1).mean()), 4),
            "right": round(sum(right) / len(right), 3),
        }
    return found
