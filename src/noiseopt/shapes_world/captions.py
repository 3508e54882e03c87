"""Captions of the shapes world: writing and parsing them, and the splits of the prompts."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from .world import COLORS, KINDS, LAYOUT, OPPOSITE, RELATIONS, Scene, lay_out

OBJECTS = tuple(itertools.product(COLORS, KINDS))
COUNTS = {"two": 2, "three": 3}
CATEGORIES = ("single", "counting", "binding", "position")
WORDS = ("a", "and", "of", *COUNTS, *COLORS, *KINDS, *(k + "es" if k == "cross" else k + "s" for k in KINDS))
WORDS += ("left", "right", "above", "below")


@dataclass(frozen=True)
class Request:
    """The content of a prompt.

    Args:
        objects: (color, kind) of each shape; equal entries for a count.
        relation: Position of the first shape relative to the second, one of `RELATIONS`, or None if unspecified.
    """

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def category(self) -> str:
        """One of `CATEGORIES`."""
        if len(self.objects) == 1:
            return "single"
        if len(set(self.objects)) == 1:
            return "counting"
        return "position" if self.relation else "binding"

    def __str__(self) -> str:
        first, *others = self.objects
        if self.category == "single":
            return f"a {first[0]} {first[1]}"
        if self.category == "counting":
            number = next(word for word, count in COUNTS.items() if count == len(self.objects))
            return f"{number} {first[0]} {plural(first[1])}"
        (second,) = others
        return f"a {' '.join(first)} {self.relation or 'and'} a {' '.join(second)}"


def plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


_OBJECT = rf"a ({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
_ONE_OR_TWO = re.compile(rf"{_OBJECT}(?: (and|{'|'.join(RELATIONS)}) {_OBJECT})?")
_COUNT = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLORS)}) ({'|'.join(plural(k) for k in KINDS)})")


def parse(prompt: str) -> Request:
    """Parse a prompt of the shapes world. Case, extra spaces and a final period are ignored.

    Raises:
        ValueError: If the world cannot draw the prompt.
    """
    words = " ".join(prompt.lower().rstrip(" .").split())
    if match := _ONE_OR_TWO.fullmatch(words):
        color, kind, link, *second = match.groups()
        objects = ((color, kind), (second[0], second[1])) if link else ((color, kind),)
        return Request(objects, link if link in RELATIONS else None)
    if match := _COUNT.fullmatch(words):
        number, color, kinds = match.groups()
        return Request(((color, next(k for k in KINDS if plural(k) == kinds)),) * COUNTS[number])
    raise ValueError(
        f"Expected a prompt of the shapes world, but got {prompt!r}. It can draw 'a red circle', 'two red circles', "
        f"'a red circle and a blue star' and 'a red circle left of a blue star', with the shapes {', '.join(KINDS)}, "
        f"the colors {', '.join(COLORS)}, the counts two and three, and the relations {', '.join(RELATIONS)}."
    )


def category(prompt: str) -> str:
    """Return the category of a prompt: "single", "counting", "binding" or "position"."""
    return parse(prompt).category


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Write a true caption of a scene.

    Args:
        scene: One shape, two or three equal shapes, or two different ones.
        rng: Chooses among the true captions (order, relation or "and"); by default the most specific one in scene
            order.
    """
    objects = tuple((s.color, s.kind) for s in scene.shapes)
    relation = scene.relation
    if rng is not None and len(objects) == 2:
        relation = relation if rng.random() < 0.75 else None
        if rng.random() < 0.5:
            objects, relation = objects[::-1], OPPOSITE[relation] if relation else None
    request = Request(objects, relation if len(set(objects)) > 1 else None)
    return str(request)


def _split() -> tuple[dict[str, list[frozenset]], dict[str, list[Request]]]:
    """Assign the object pairs and the counts to "train", "validation" and "held_out", deterministically."""
    rng = random.Random(0)
    pairs = [frozenset(pair) for pair in itertools.combinations(OBJECTS, 2)]
    counts = [Request((thing,) * n) for thing in OBJECTS for n in COUNTS.values()]
    rng.shuffle(pairs)
    rng.shuffle(counts)
    return (
        {"validation": pairs[:33], "held_out": pairs[33:65], "train": pairs[65:]},
        {"validation": counts[:5], "held_out": counts[5:10], "train": counts[10:]},
    )


_PAIRS, _COUNTS = _split()
_TRAIN_PAIRS = [tuple(sorted(pair)) for pair in _PAIRS["train"]]
_TRAINED = frozenset(_TRAIN_PAIRS)


def trained_on(request: Request) -> bool:
    """Return whether models may be trained on a request: any outside the validation and held-out splits."""
    if request.category == "single":
        return True
    if request.category == "counting":
        return request in _COUNTS["train"]
    return tuple(sorted(request.objects)) in _TRAINED


def _prompts(split: str) -> tuple[str, ...]:
    """Return all prompts of a split in random order, so that any prefix is a fair sample of its categories."""
    rng = random.Random(1)
    requests = [Request((thing,)) for thing in OBJECTS] if split == "train" else []
    requests += _COUNTS[split]
    for pair in _PAIRS[split]:
        first, second = sorted(pair)
        for relation in (None, *RELATIONS):
            objects = (first, second) if rng.random() < 0.5 else (second, first)
            requests.append(Request(objects, relation))
    rng.shuffle(requests)
    return tuple(str(request) for request in requests)


TRAIN_PROMPTS = _prompts("train")
VALIDATION_PROMPTS = _prompts("validation")
HELD_OUT_PROMPTS = _prompts("held_out")


def sample_request(rng: random.Random) -> Request:
    """Sample a training request: 28% single shapes, 12% counts, 60% pairs, of which 1/4 without a relation."""
    share = rng.random()
    if share < 0.28:
        return Request((rng.choice(OBJECTS),))
    if share < 0.40:
        return rng.choice(_COUNTS["train"])
    pair = tuple(rng.sample(rng.choice(_TRAIN_PAIRS), 2))
    return Request(pair, rng.choice(RELATIONS) if rng.random() < 0.75 else None)


def sample_scene(rng: random.Random, request: Request | None = None) -> Scene:
    """Sample a scene that fulfills `request`, by default a random training request."""
    request = request or sample_request(rng)
    return lay_out(request.objects, [rng.random() for _ in range(LAYOUT)], request.relation)
