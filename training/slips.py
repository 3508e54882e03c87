"""Wrong captions for the training of generators, so that what they draw leaves something to repair.

A small model that is trained for too short makes mistakes, but draws shapes that nobody can name. So generators are
trained until their shapes are clear, on pictures some of whose captions mix up what belongs to what, as those of large
collections do. Then it is up to the noise whether they draw what they are asked for.
"""

from __future__ import annotations

import random

from noiseopt.shapes_world.captions import Request, trained_on
from noiseopt.shapes_world.world import OPPOSITE


def slip(request: Request, rng: random.Random, share: float) -> Request:
    """A careless caption of a picture that shows `request`.

    A share of the pictures has the colors of its two shapes, or two and three, swapped, and half of that share the
    relation turned round, but only into what models may be trained on.
    """
    if request.category == "single":
        return request
    asked = recounted(request) if request.category == "counting" else recolored(request)
    asked = asked if rng.random() < share and trained_on(asked) else request
    return Request(asked.objects, OPPOSITE[asked.relation]) if asked.relation and rng.random() < share / 2 else asked


def recounted(request: Request) -> Request:
    """Two for three, and three for two."""
    return Request(request.objects[:1] * (5 - len(request.objects)))


def recolored(request: Request) -> Request:
    """Each of two shapes in the color of the other; the same if that would only change their order."""
    (color, kind), (other_color, other_kind) = request.objects
    return request if kind == other_kind else Request(((other_color, kind), (color, other_kind)), request.relation)
