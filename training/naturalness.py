"""Measures of naturalness: which part of the noise the pictures depend on, and how much seeds collapse."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import parse
from noiseopt.shapes_world.judge import judge, see
from noiseopt.shapes_world.world import render

from .data import SIZE, sample_pictures


def draw(pipe: Any, prompts: Sequence[str], noise: Tensor, **call: Any) -> Tensor:
    """Run the stock pipeline from a noise, with gradients if the noise requires them: images (B, 3, 128, 128)."""
    plain = inspect.unwrap(type(pipe).__call__)
    with torch.set_grad_enabled(noise.requires_grad):
        return plain(pipe, list(prompts), latents=noise, output_type="pt", **call).images


def gradient_shares(
    pipe: Any, denoiser: Any, prompts: Sequence[str], noise: Tensor, score: Callable[[Tensor], Tensor], **call: Any
) -> dict[str, float]:
    """Return how natural the gradient of a score of images, (B,), with respect to the noise is.

    They are the shares of its squared norm in the means of the channels, for the true gradient and for the one that
    holds the outputs of the denoiser constant ("frozen"), and the cosine of the two; medians over prompts.
    """
    forward = denoiser.forward
    gradients = []
    for frozen in (False, True):
        denoiser.forward = torch.no_grad()(forward) if frozen else forward
        z = noise.clone().requires_grad_()
        gradients.append(torch.autograd.grad(score(draw(pipe, prompts, z, **call)).sum(), z)[0])
    denoiser.forward = forward
    full, frozen = gradients
    return {
        "full, channel means": _share(full),
        "frozen, channel means": _share(frozen),
        "cosine": float(torch.cosine_similarity(full.flatten(1), frozen.flatten(1)).median()),
    }


def _share(gradient: Tensor) -> float:
    pixels = gradient[0, 0].numel()
    return float((pixels * gradient.mean((2, 3)).square().sum(1) / gradient.square().sum((1, 2, 3))).median())


def similarity(features: Tensor) -> float:
    """Return the mean cosine over pairs of each set, (P, N, D)."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    grid = unit @ unit.mT
    count = grid.shape[-1]
    return float((grid.sum((1, 2)) - count).mean() / (count * (count - 1)))


def spread(images: Tensor, sets: int) -> float:
    """Return the root mean square distance, in pixels, of objects from the mean place of their kind over a set.

    Only objects of which each image has one count.
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
                xy = torch.tensor(place, dtype=torch.float64) * SIZE / 64
                squares.append((xy - xy.mean(0)).square().sum(1).mean())
    return float(torch.stack(squares).mean().sqrt()) if squares else float("nan")


def pictures_of(prompts: Sequence[str], count: int, seed: int = 0) -> Tensor:
    """Draw `count` training pictures of each prompt, (P * count, 3, 128, 128)."""
    rng = random.Random(seed)
    scenes, looks, _ = sample_pictures([parse(prompt) for prompt in prompts for _ in range(count)], rng)
    return render(scenes, torch.Generator().manual_seed(seed), looks, SIZE)


def collapse(
    images: Tensor, prompts: Sequence[str], count: int, features: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Compare sets of `count` images of each prompt with training pictures of it."""
    found = {}
    for name, each in (("model", images), ("pictures", pictures_of(prompts, count))):
        parts = torch.cat([features(part) for part in each.split(32)])
        right = [v.correct for v in judge(each, [prompt for prompt in prompts for _ in range(count)])]
        ground = each[:, :, :6].mean((2, 3)).view(len(prompts), count, 3)
        found[name] = {
            "similarity": round(similarity(parts.view(len(prompts), count, -1)), 4),
            "spread of places (pixels)": round(spread(each, len(prompts)), 2),
            "spread of grounds": round(float(ground.std(1).mean()), 4),
            "right": round(sum(right) / len(right), 3),
        }
    return found
