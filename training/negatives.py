"""Wrong captions and wrong images as negatives for the training of the reward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from noiseopt.shapes_world.captions import OBJECTS, Request
from noiseopt.shapes_world.world import COLORS, KINDS, OPPOSITE, RELATIONS, Scene, Shape


def _other(options: Sequence[str], value: str, rng: random.Random) -> str:
    return rng.choice([option for option in options if option != value])


def _recolored(thing: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    return _other(list(COLORS), thing[0], rng), thing[1]


def _reshaped(thing: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    return thing[0], _other(KINDS, thing[1], rng)


def wrong_request(request: Request, rng: random.Random) -> Request:
    """Return a request that is similar to the given one, but not fulfilled by its images."""
    objects, relation = request.objects, request.relation
    change = rng.choice((_recolored, _reshaped, _reshaped))
    if request.category == "single":
        if rng.random() < 0.7:
            return Request((change(objects[0], rng),))
        return Request(objects * rng.choice((2, 3)) if rng.random() < 0.5 else (objects[0], rng.choice(OBJECTS)))
    if request.category == "counting":
        if rng.random() < 0.5:
            return Request((change(objects[0], rng),) * len(objects))
        return Request(objects[:1] * rng.choice([n for n in (1, 2, 3) if n != len(objects)]))
    first, second = objects
    swapped = ((first[0], second[1]), (second[0], first[1]))
    swaps, relations = set(swapped) != set(objects), relation is not None
    kind = rng.choice(["change", "drop"] + 2 * swaps * ["swap"] + 2 * relations * ["relation"])
    if kind == "swap":
        return Request(swapped if rng.random() < 0.5 else swapped[::-1], relation)
    if kind == "relation" and relation:
        other = OPPOSITE[relation] if rng.random() < 0.6 else _other(RELATIONS, relation, rng)
        return Request(objects, other)
    if kind == "drop":
        return Request((rng.choice(objects),) * rng.choice((1, 1, 2)))
    position = rng.randrange(2)
    changed = tuple(change(thing, rng) if i == position else thing for i, thing in enumerate(objects))
    return Request(changed, relation) if len(set(changed)) > 1 else Request(changed)


def imitate_failure(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene as a weak generator might draw it.

    One shape is deformed, missing or too many, or two are merged. Mild failures can still be right; the judge decides.
    """
    shapes = list(scene.shapes)
    position = rng.randrange(len(shapes))
    shape = shapes[position]
    kind = rng.choices(("blend", "wobble", "stretch", "drop", "add", "merge", "shrink"), (5, 5, 1, 1, 1, 1, 1))[0]
    if kind == "blend":
        shape = replace(shape, towards=_other(KINDS, shape.kind, rng), blend=rng.uniform(0.25, 0.8))
        shape = replace(shape, wobble=rng.choice((0.0, rng.uniform(0.0, 0.2))))
    elif kind == "wobble":
        shape = replace(shape, wobble=rng.uniform(0.1, 0.5))
    elif kind == "stretch":
        shape = replace(shape, stretch=rng.choice((rng.uniform(1.4, 2.5), rng.uniform(0.4, 0.7))))
    elif kind == "merge" and len(shapes) > 1:
        other = shapes[position - 1]
        shape = replace(shape, x=(shape.x + 2 * other.x) / 3, y=(shape.y + 2 * other.y) / 3)
    elif kind == "shrink":
        shape = replace(shape, radius=rng.uniform(2.5, 6.0))
    shapes[position] = shape
    if kind == "drop" and len(shapes) > 1:
        shapes.pop(position)
    elif kind in ("add", "drop") and len(shapes) < 3:
        color, other_kind = rng.choice(OBJECTS)
        x, y, radius = rng.uniform(8, 56), rng.uniform(8, 56), rng.uniform(4, 11)
        shapes.insert(0, Shape(other_kind, color, x, y, radius, wobble=rng.uniform(0, 0.4)))
    return Scene(tuple(shapes))
