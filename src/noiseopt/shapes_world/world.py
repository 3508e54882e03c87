"""The shapes world: scenes, and a signed-distance renderer that draws them.

An image shows one to three flat shapes on a gray, faintly tinted, possibly textured ground. The scene fixes the shapes,
their positions and sizes; color jitter and ground are free, and no caption mentions them. Lengths are in units of 1/64
of the side of an image, at any number of pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # the side of an image in units of length
SIZE = 128  # and in pixels, by default
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
GAP = 2.0  # between two bounding boxes
LAYOUT, LOOKS = 8, 12  # numbers that determine layout, and ground with brightness


@dataclass(frozen=True)
class Shape:
    """A flat shape.

    Args:
        kind: One of `KINDS`.
        color: One of `COLORS`.
        x, y: Center, in units of 1/64 of the side of the image; y grows downwards.
        radius: Half the side of its bounding box.
        towards, blend: Interpolates the signed distance to that of kind `towards` by `blend` in [0, 1].
        wobble: Amplitude of waves on the outline, relative to the radius. Blends and wobbles imitate the output of a
            weak generator; captions ignore them.
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
    """The shapes of one image, later ones in front."""

    shapes: tuple[Shape, ...]

    @property
    def relation(self) -> str | None:
        """Position of the first of two shapes relative to the second, or None if unclear (near a diagonal)."""
        if len(self.shapes) != 2:
            return None
        first, second = self.shapes
        return relation_of(first.x - second.x, first.y - second.y, ratio=1.2)


def relation_of(dx: float, dy: float, ratio: float) -> str | None:
    """Return the relation for an offset of the first center from the second, or None if no axis dominates."""
    if abs(dx) > ratio * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > ratio * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def lay_out(objects: Sequence[tuple[str, str]], chance: Sequence[float], relation: str | None = None) -> Scene:
    """Place objects so that their bounding boxes do not touch; continuous in `chance` almost everywhere.

    Args:
        objects: One to three (color, kind) pairs.
        chance: `LAYOUT` numbers in [0, 1]: x, y of the first and the second object, their radii, and the direction from
            one to the other, which is used only without a requested relation.
        relation: Position of the first of two objects relative to the second.
    """
    xa, ya, xb, yb, ra, rb, across, along = chance
    if len(objects) == 1:
        radius = _between(10.0, 15.0, ra)
        centers = [(_inside(radius, xa), _inside(radius, ya))]
        radii = [radius]
    elif len(objects) == 2:
        radii = [_between(10.0, 15.0, ra), _between(10.0, 15.0, rb)]
        relation = relation or relation_of(across - 0.5, along - 0.5, ratio=1.0) or "above"
        sideways = relation in ("left of", "right of")
        ahead, beside = ((xa, xb), (ya, yb)) if sideways else ((ya, yb), (xa, xb))
        main, cross = _in_a_row(radii, ahead, beside, turned=relation in ("right of", "below"))
        centers = list(zip(*((main, cross) if sideways else (cross, main)), strict=True))
    else:
        radii = [_between(9.0, 10.0, ra)] * 3
        (left, right), (top, bottom) = _spread(radii[:2], (xa, xb)), _spread(radii[:2], (ya, yb))
        row, other = (top, bottom) if across < 0.5 else (bottom, top)
        centers = [(left, row), (right, row), (_inside(radii[2], along), other)]
    positions = zip(objects, centers, radii, strict=True)
    return Scene(tuple(Shape(kind, color, x, y, radius) for (color, kind), (x, y), radius in positions))


def usual(objects: Sequence[tuple[str, str]], relation: str | None, rng: random.Random) -> list[float]:
    """Sample the `LAYOUT` numbers of the usual layout of objects: centered, of medium size, off by a few pixels."""
    ahead, beside = ((0.25, 0.75), (0.5, 0.5)) if len(objects) < 3 else ((0.25, 0.75), (0.25, 0.75))
    if len(objects) == 1:
        ahead = (0.5, 0.5)
    x, y = (beside, ahead) if relation in ("above", "below") else (ahead, beside)
    return [rng.gauss(mean, 0.03) for mean in (x[0], y[0], x[1], y[1], 0.6, 0.6, 0.1, 0.5)]


def usual_looks(rng: random.Random) -> list[float]:
    """Sample the `LOOKS` numbers of the usual ground: light, plain and neutral."""
    return [rng.gauss(mean, 0.02) for mean in (0.5, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.5)]


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _inside(radius: float, share: float) -> float:
    return _between(radius + 1, SIDE - radius - 1, share)


def _spread(radii: Sequence[float], chance: Sequence[float]) -> tuple[float, float]:
    """Return the centers of two shapes along an axis, the lower first, with at least `GAP` between their boxes."""
    slack = SIDE - 2 - GAP - 2 * sum(radii)
    return 1 + radii[0] + slack * min(chance), SIDE - 1 - radii[1] - slack * (1 - max(chance))


def _in_a_row(
    radii: Sequence[float], ahead: Sequence[float], beside: Sequence[float], turned: bool
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the coordinates of two centers along the axis of their relation, and across it.

    They differ clearly less across the axis than along it.
    """
    order = slice(None, None, -1) if turned else slice(None)
    main = _spread(radii[order], ahead)[order]
    cross = [_inside(radius, share) for radius, share in zip(radii, beside, strict=True)]
    excess = abs(cross[0] - cross[1]) - abs(main[0] - main[1]) / 1.3
    if excess > 0:
        step = math.copysign(excess / 2, cross[1] - cross[0])
        cross = [_clamp(cross[0] + step, radii[0]), _clamp(cross[1] - step, radii[1])]
    return main, cross


def _clamp(center: float, radius: float) -> float:
    return min(max(center, radius + 1), SIDE - radius - 1)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = (x.abs() * 1.8 - (y + 0.95)) / math.hypot(1.8, 1.0)
    return torch.maximum(side, y - 0.85)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Inigo Quilez, https://iquilezles.org/articles/distfunctions2d: fold the plane onto one half of a tip
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


def _distance(shapes: Sequence[Shape], phase: Tensor, size: int) -> Tensor:
    """Return signed distances in pixels, (N, size, size); `phase` (N, 2) in [0, 1) shifts waves of wobbly outlines."""
    grid = (torch.arange(size) + 0.5) * (SIDE / size)
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
    return distance * radius * (size / SIDE)


def _by_kind(kinds: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    distance = torch.empty_like(x)
    for kind in set(kinds):
        rows = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
        distance[rows] = _DISTANCES[kind](x[rows], y[rows])
    return distance


def coverage(scenes: Sequence[Scene], generator: torch.Generator | None = None, size: int = SIZE) -> Tensor:
    """Return the share of each pixel that each shape covers, (B, 3, size, size) in [0, 1]; zero if there is none."""
    shapes = [s for scene in scenes for s in scene.shapes]
    slots = torch.tensor([3 * i + j for i, scene in enumerate(scenes) for j in range(len(scene.shapes))])
    phase = torch.rand(len(shapes), 2, generator=generator)
    alpha = torch.zeros(3 * len(scenes), size, size)
    alpha[slots] = (0.5 - _distance(shapes, phase, size)).clamp(0.0, 1.0)
    return alpha.view(len(scenes), 3, size, size)


def _grounds(chance: Tensor, size: int) -> Tensor:
    """Render grounds, (B, 3, size, size) in [0, 1], from (B, 11) numbers: gray, tint, gradient, one of 4 textures."""
    columns = chance[:, :, None, None].unbind(1)
    gray, red, green, blue, slope_x, slope_y, texture, waves, phase_x, phase_y, depth = columns
    axis = torch.linspace(-1.0, 1.0, size)
    x, y = axis, axis[:, None]
    gradient = 0.16 * ((slope_x - 0.5) * x + (slope_y - 0.5) * y)
    waves = (2.0 + 2.5 * waves) * math.pi
    along_x, along_y = torch.sin(waves * x + 2 * math.pi * phase_x), torch.sin(waves * y + 2 * math.pi * phase_y)
    which = (4 * texture).long()
    stripes = (which == 1) * along_x + (which == 2) * along_y + (which == 3) * along_x * along_y
    level = 0.14 + 0.78 * gray + gradient + (0.02 + 0.05 * depth) * stripes
    tint = torch.stack((red, green, blue), 1) * 0.08 - 0.04
    return (level[:, None] + tint).clamp(0.0, 1.0)


def render(
    scenes: Scene | Sequence[Scene],
    generator: torch.Generator | None = None,
    chance: Tensor | None = None,
    size: int = SIZE,
) -> Tensor:
    """Render scenes.

    Args:
        scenes: One scene or several.
        generator: Source of ground and color jitter. Equal generator states give equal images.
        chance: (B, `LOOKS`) in [0, 1], fixes ground and brightness instead.
        size: Side of the images in pixels.

    Returns:
        (B, 3, size, size) in [0, 1]; B is 1 for a single scene.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    if chance is None:
        chance = torch.rand(len(scenes), LOOKS, generator=generator)
    image = _grounds(chance[:, 1:], size)
    alpha = coverage(scenes, generator, size)
    jitter = torch.empty(len(scenes), 3, 3).uniform_(-0.03, 0.03, generator=generator)
    black = (0.0, 0.0, 0.0)
    colors = [[COLORS[s.color] for s in scene.shapes] + [black] * (3 - len(scene.shapes)) for scene in scenes]
    colors = (torch.tensor(colors) * (0.92 + 0.16 * chance[:, :1, None] + jitter)).clamp(0.0, 1.0)
    for slot in range(3):
        image = torch.lerp(image, colors[:, slot, :, None, None], alpha[:, slot, None])
    return image
