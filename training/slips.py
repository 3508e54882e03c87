"""Wrong captions for the training of generators, so that their images leave something to repair.

A small model with little training makes mistakes, but draws unrecognizable shapes. So generators are trained until
their shapes are clear, on images whose captions sometimes mix up attributes, as those of large data sets do. Then the
noise determines whether the prompt is followed.
"""

from __future__ import annotations

import random

from noiseopt.shapes_world.captions import Request, trained_on
from noiseopt.shapes_world.world import OPPOSITE


def slip(request: Request, rng: random.Random, share: float) -> Request:
    """Write a careless caption of an image that shows `request`.

    A share of the images has the colors of its two shapes, or two and three, swapped, and half that share has the
    relation reversed, but only if the result is in the training split.
    """
    if request.category == "single":
        return request
    asked = recounted(request) if request.category == "counting" else recolored(request)
    asked = asked if rng.random() < share and trained_on(asked) else request
    return Request(asked.objects, OPPOSITE[asked.relation]) if asked.relation and rng.random() < share / 2 else asked


def recounted(request: Request) -> Request:
    """Swap two and three."""
    return Request(request.objects[:1] * (5 - len(request.objects)))


def recolored(request: Request) -> Request:
    """Swap the colors of two shapes, unless that would only change their order."""
    (color, kind), (other_color, other_kind) = request.objects
    return request if kind == other_kind else Request(((other_color, kind), (color, other_kind)), request.relation)
