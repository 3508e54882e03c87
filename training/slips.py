"""Careless captions of common pictures for the training of generators, so that their images leave something to repair.

Captions of large data sets name colors and things, but often not which belongs to which, and some combinations are more
common in pictures than others. A generator that has learned from them draws the common combination, whatever the prompt
says; the noise, too, decides. So here: once the first generator has learned clear shapes from true captions, it and all
others are trained on pictures by how common they are, whose captions sometimes mix up attributes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import Request, trained_on
from noiseopt.shapes_world.world import COLORS, KINDS, OPPOSITE

PREFERENCE = 0.75  # how much a kind of shape prefers the colors near a hue of its own
ORDER = 0.6  # how much some things prefer to be left of others, or above
THREE = 0.5  # pictures of three things for each of two


def frequency(requests: Sequence[Request]) -> Tensor:
    """Return how common pictures of requests are, (N,), up to a factor."""
    return torch.tensor([math.exp(_commonness(request)) for request in requests])


def _commonness(request: Request) -> float:
    colors, kinds = zip(
        *((list(COLORS).index(color), KINDS.index(kind)) for color, kind in request.objects), strict=True
    )
    hues = [2 * math.pi * color / len(COLORS) for color in colors]
    turns = [2 * math.pi * kind / len(KINDS) for kind in kinds]
    if len(request.objects) > 2:
        return math.log(THREE) + 2 * PREFERENCE * math.cos(hues[0] - turns[0])
    usual = PREFERENCE * sum(math.cos(hue - turn) for hue, turn in zip(hues, turns, strict=True))
    if not request.relation:
        return usual
    ahead = 1 if request.relation in ("left of", "above") else -1
    return usual + ahead * ORDER * math.sin(hues[0] + turns[0] - hues[1] - turns[1])


def slip(request: Request, rng: random.Random, share: float) -> Request:
    """Write a careless caption of an image that shows `request`.

    A share of the images has the colors of its two shapes, or two and three, swapped, but only if the result is in the
    training split; and as many have their relation reversed.
    """
    if request.category == "single":
        return request
    asked = recounted(request) if request.category == "counting" else recolored(request)
    asked = asked if rng.random() < share and trained_on(asked) else request
    return Request(asked.objects, OPPOSITE[asked.relation]) if asked.relation and rng.random() < share else asked


def recounted(request: Request) -> Request:
    """Swap two and three."""
    return Request(request.objects[:1] * (5 - len(request.objects)))


def recolored(request: Request) -> Request:
    """Swap the colors of two shapes, unless that would only change their order."""
    (color, kind), (other_color, other_kind) = request.objects
    return request if kind == other_kind else Request(((other_color, kind), (color, other_kind)), request.relation)
