"""The shapes world: what can be in a picture, and a signed-distance renderer that draws it.

A picture shows one to three flat shapes on a grey, faintly tinted, perhaps textured ground. The scene says which shapes,
where and how large; colour jitter and ground are free, so that no caption ever mentions them and a set of pictures of one
scene can differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (0.93, 0.12, 0.12),
    "yellow": (0.95, 0.84, 0.10),
    "green": (0.12, 0.68, 0.18),
    "cyan": (0.12, 0.82, 0.88),
    "blue": (0.14, 0.26, 0.95),
    "purple": (0.60, 0.12, 0.78),
}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GAP = 2.0  # pixels between the boxes of two shapes


@dataclass(frozen=True)
class Shape:
    """One flat shape.

    Args:
        kind: One of `KINDS`.
        color: One of `COLORS`.
        x, y: Centre in pixels; y grows downwards.
        radius: Half the side of its box in pixels.
        towards, blend: The signed distance is interpolated to that of `towards` by `blend` in [0, 1].
        wobble: Amplitude, relative to the radius, of waves on the outline. Blends and wobbles imitate what a weak
            generator draws; captions know nothing of them.
        stretch: Width over height.
    """

    kind: str
    color: str
    x: float
    y: float
    radius: float
    towards: str = ""
    blend: float = 0.0
    wobble: float = 0.0
    stretch: float = 1.0


@dataclass(frozen=True)
class Scene:
    """The shapes of one picture, later ones in front, and the relation of the first to the second, if it is clear."""

    shapes: tuple[Shape, ...]

    @property
    def relation(self) -> str | None:
        """How the first of two shapes lies to the second, or None if that is not clear (near a diagonal)."""
        if len(self.shapes) != 2:
            return None
        first, second = self.shapes
        return relation_of(first.x - second.x, first.y - second.y, ratio=1.2)


def relation_of(dx: float, dy: float, ratio: float) -> str | None:
    """The relation for an offset of the first centre from the second, in pixels, or None if no axis dominates."""
    if abs(dx) > ratio * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > ratio * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sample_shapes(objects: Sequence[tuple[str, str]], rng: random.Random, relation: str | None = None) -> Scene:
    """Places the given (color, kind) objects at random so that their boxes do not touch.

    Args:
        objects: One to three (color, kind) pairs.
        rng: Source of radii and places.
        relation: If given, how the first of the two objects must lie to the second.
    """
    low, high = (10.0, 15.0) if len(objects) < 3 else (9.0, 11.0)
    while True:
        radii = [rng.uniform(low, high) for _ in objects]
        places = [(rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)) for r in radii]
        if not _apart(places, radii):
            continue
        scene = Scene(tuple(Shape(kind, color, x, y, r) for (color, kind), (x, y), r in zip(objects, places, radii)))
        if relation is None or scene.relation == relation:
            return scene


def _apart(places: Sequence[tuple[float, float]], radii: Sequence[float]) -> bool:
    return all(
        max(abs(places[i][0] - places[j][0]), abs(places[i][1] - places[j][1])) > radii[i] + radii[j] + GAP
        for i in range(len(radii))
        for j in range(i)
    )


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = (x.abs() * 1.8 - (y + 0.95)) / math.hypot(1.8, 1.0)
    return torch.maximum(side, y - 0.85)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Inigo Quilez, https://iquilezles.org/articles/distfunctions2d: fold the plane onto one half point of the star.
    x, y = x.abs(), -y - 0.05
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    for kx in (c, -c):
        d = 2.0 * torch.clamp(kx * x - s * y, min=0.0)
        x, y = x - d * kx, y + d * s
    x, y = x.abs(), y - 1.0
    inner = 0.45
    bx, by = inner * s, inner * c - 1.0
    h = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0.0, 1.0)
    return torch.hypot(x - bx * h, y - by * h) * torch.sign(y * bx - x * by)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 1.0, short - 0.34)


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def _distance(shapes: Sequence[Shape], phase: Tensor) -> Tensor:
    """Signed distances in pixels, (N, 64, 64); `phase` (N, 2) in [0, 1) turns the waves of wobbling outlines."""
    grid = torch.arange(SIZE) + 0.5
    table = torch.tensor([[s.x, s.y, s.radius, s.stretch, s.wobble, s.blend] for s in shapes])
    cx, cy, radius, stretch, wobble, blend = table[:, :, None, None].unbind(1)
    x = (grid - cx) / (radius * stretch.sqrt())
    y = (grid[:, None] - cy) * stretch.sqrt() / radius
    x, y = torch.broadcast_tensors(x, y)
    distance = _by_kind([s.kind for s in shapes], x, y)
    if any(s.towards for s in shapes):
        other = _by_kind([s.towards or s.kind for s in shapes], x, y)
        distance = torch.lerp(distance, other, blend)
    if any(s.wobble for s in shapes):
        angle = torch.atan2(y, x)
        phase = 2 * math.pi * phase[:, :, None, None]
        distance = distance + wobble * (torch.cos(2 * angle + phase[:, 0]) + torch.cos(3 * angle + phase[:, 1])) / 2
    return distance * radius


def _by_kind(kinds: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    distance = torch.empty_like(x)
    for kind in set(kinds):
        rows = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
        distance[rows] = _DISTANCES[kind](x[rows], y[rows])
    return distance


def coverage(scenes: Sequence[Scene], generator: torch.Generator | None = None) -> Tensor:
    """How much of each pixel each shape covers: (B, 3, 64, 64) in [0, 1], one channel per shape, absent shapes zero."""
    shapes = [s for scene in scenes for s in scene.shapes]
    slots = torch.tensor([3 * i + j for i, scene in enumerate(scenes) for j in range(len(scene.shapes))])
    phase = torch.rand(len(shapes), 2, generator=generator)
    alpha = torch.zeros(3 * len(scenes), SIZE, SIZE)
    alpha[slots] = (0.5 - _distance(shapes, phase)).clamp(0.0, 1.0)
    return alpha.view(len(scenes), 3, SIZE, SIZE)


def backgrounds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random grounds, (count, 3, 64, 64) in [0, 1]: grey level, tint, directional gradient and one of four textures."""

    def uniform(low: float, high: float, *channels: int) -> Tensor:
        return torch.empty(count, *(channels or (1,)), 1, 1).uniform_(low, high, generator=generator)

    axis = torch.linspace(-1.0, 1.0, SIZE)
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    angle, waves = uniform(0.0, 2 * math.pi), uniform(2.0, 4.5) * math.pi
    gradient = uniform(0.0, 0.12) * (torch.cos(angle) * x + torch.sin(angle) * y)
    along_x, along_y = torch.sin(waves * x + uniform(0.0, 6.28)), torch.sin(waves * y + uniform(0.0, 6.28))
    texture = torch.randint(0, 4, (count, 1, 1, 1), generator=generator)
    stripes = (texture == 1) * along_x + (texture == 2) * along_y + (texture == 3) * along_x * along_y
    ground = uniform(0.14, 0.92) + uniform(-0.04, 0.04, 3) + gradient + uniform(0.02, 0.07) * stripes
    return ground.clamp(0.0, 1.0)


def render(scenes: Scene | Sequence[Scene], generator: torch.Generator | None = None) -> Tensor:
    """Draws scenes.

    Args:
        scenes: One scene or several.
        generator: Source of what scenes leave open: ground and colour jitter. Same generator state, same pictures.

    Returns:
        (B, 3, 64, 64) in [0, 1]; B is 1 for a single scene.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    image = backgrounds(len(scenes), generator)
    alpha = coverage(scenes, generator)
    jitter = torch.empty(len(scenes), 3, 1).uniform_(0.92, 1.08, generator=generator)
    jitter = jitter + torch.empty(len(scenes), 3, 3).uniform_(-0.03, 0.03, generator=generator)
    black = (0.0, 0.0, 0.0)
    colors = [[COLORS[s.color] for s in scene.shapes] + [black] * (3 - len(scene.shapes)) for scene in scenes]
    colors = (torch.tensor(colors) * jitter).clamp(0.0, 1.0)
    for slot in range(3):
        image = torch.lerp(image, colors[:, slot, :, None, None], alpha[:, slot, None])
    return image
