"""A deterministic judge: says what a picture shows, and whether that is what the prompt asks for.

It uses no trained model, so nothing that a noise is optimised for can have learnt to please it: saturated pixels are
given the nearest hue, connected ones form an object, and its outline, scaled to a square, is compared with the shapes.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import Request, parse
from .world import COLORS, KINDS, OPPOSITE, SIZE, Scene, Shape, coverage, relation_of

CHROMA = 0.28  # the largest minus the smallest channel from which on a pixel belongs to a shape
AREA = 36  # pixels; smaller specks are overlooked
OVERLAP = 0.70  # intersection over union with the best template below which an object is no shape
ASPECT = 0.6
_SIDE = 24


@dataclass(frozen=True)
class Thing:
    """A connected region of one color: its best kind ("blob" if none fits), its box's centre in pixels and its area."""

    color: str
    kind: str
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Verdict:
    """What the judge says about a picture and a prompt.

    Args:
        correct: The picture shows exactly the requested objects, in the requested relation.
        lenient: As `correct`, but there may be more objects besides.
        shape_bound: The share of the requested objects that are there with the right shape and color, in [0, 1].
        position: Whether the requested relation holds between regions of the requested colors, of any shape;
            None if no relation is requested.
        found: What is seen, in words.
    """

    correct: bool
    lenient: bool
    shape_bound: float
    position: bool | None
    found: str


def judge(images: Tensor, prompts: str | Sequence[str]) -> list[Verdict]:
    """Judges pictures.

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        prompts: One prompt for all pictures, or B of them.

    Raises:
        ValueError: If a prompt is outside the world, or the shapes do not fit.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"Expected images of shape (B, 3, {SIZE}, {SIZE}), but got {tuple(images.shape)}.")
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(images):
        raise ValueError(f"Expected one prompt or {len(images)}, one per image, but got {len(prompts)}.")
    requests = [parse(prompt) for prompt in prompts]
    things = [found for part in images.split(32) for found in see(part)]
    return [verdict(found, request) for found, request in zip(things, requests, strict=True)]


@torch.no_grad()
def see(images: Tensor) -> list[list[Thing]]:
    """Finds the objects of each picture, the largest first; images (B, 3, 64, 64) in [0, 1]."""
    images = images.detach().float().cpu().clamp(0.0, 1.0)
    colors, chroma = _hues(images), images.amax(1) - images.amin(1)
    labels = _components(colors)
    area = torch.bincount(labels.flatten(), minlength=labels.numel())
    roots = (area >= AREA).nonzero().squeeze(1)
    found: list[list[Thing]] = [[] for _ in images]
    if len(roots) == 0:
        return found
    picture = roots // (SIZE * SIZE)
    inside = torch.where(labels[picture] == roots[:, None, None], chroma[picture], 0.0)
    # relative to its own strongest pixel: then a soft outline lies where a sharp one would, and does not fatten a star
    kinds, centres = _kinds(inside / inside.amax((1, 2), keepdim=True))
    for i in area[roots].argsort(descending=True, stable=True).tolist():
        color = list(COLORS)[int(colors.flatten()[roots[i]])]
        thing = Thing(color, kinds[i], *centres[i].tolist(), area=int(area[roots[i]]))
        found[int(picture[i])].append(thing)
    return found


def _hues(images: Tensor) -> Tensor:
    """Index of the nearest color of each pixel by hue, (B, 64, 64); -1 where the pixel is too grey."""
    saturated = images.amax(1) - images.amin(1) > CHROMA
    turn = _hue(images.movedim(1, -1)[saturated])[:, None] - _hue(torch.tensor(list(COLORS.values())))
    nearest = torch.full(saturated.shape, -1)
    nearest[saturated] = (turn - turn.round()).abs().argmin(1)
    return nearest


def _hue(pixels: Tensor) -> Tensor:
    """Hue in [0, 1) of saturated pixels, (N, 3) in [0, 1] -> (N,)."""
    high, which = pixels.max(1)
    red, green, blue = pixels.unbind(1)
    sides = torch.stack((green - blue, blue - red, red - green), 1).gather(1, which[:, None])[:, 0]
    return ((sides / (high - pixels.amin(1)) + 2.0 * which) / 6.0).remainder(1.0)


def _components(colors: Tensor) -> Tensor:
    """Labels 4-connected regions of equal color by the largest index in them; (B, H, W) in and out; no color is -1.

    Hooking and pointer jumping, as in FastSV, https://arxiv.org/abs/1910.05971.
    """
    labels = torch.arange(colors.numel())
    ends = []
    for dim in (1, 2):
        near, far = (colors.narrow(dim, start, colors.shape[dim] - 1) for start in (0, 1))
        same = (near == far) & (near >= 0)
        ends.append([labels.view_as(colors).narrow(dim, start, colors.shape[dim] - 1)[same] for start in (0, 1)])
    here, there = (torch.cat(side) for side in zip(*ends, strict=True))
    while True:
        before = labels
        highest = torch.maximum(labels[here], labels[there])
        for hooked in (here, there, labels[here], labels[there]):
            labels = labels.scatter_reduce(0, hooked, highest, "amax")
        labels = labels[labels]
        if torch.equal(labels, before):
            return labels.view_as(colors)


def _squared(covers: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts each object (N, 64, 64), its share of each pixel, to its box, scaled to a square mask (N, 24, 24).

    Also returns the boxes (N, 4): left, top, right, bottom.
    """
    rows, columns = (covers > 0.5).any(2), (covers > 0.5).any(1)
    span = torch.arange(SIZE)
    low = [torch.where(line, span, SIZE).amin(1) for line in (columns, rows)]
    high = [torch.where(line, span, -1).amax(1) + 1 for line in (columns, rows)]
    boxes = torch.stack((*low, *high), 1).float()
    steps = (torch.arange(_SIDE) + 0.5) / _SIDE
    x, y = (boxes[:, i, None] + steps * (boxes[:, i + 2] - boxes[:, i])[:, None] for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1) * (2 / SIZE) - 1
    cut = F.grid_sample(covers[:, None], grid, padding_mode="border", align_corners=False)
    return cut[:, 0] > 0.5, boxes


@functools.cache
def _templates() -> Tensor:
    scenes = [Scene((Shape(kind, "red", SIZE / 2, SIZE / 2, 26.0),)) for kind in KINDS]
    return _squared(coverage(scenes)[:, 0])[0]


def _kinds(covers: Tensor) -> tuple[list[str], Tensor]:
    """The best kind of each object (N, 64, 64), or "blob"; and the centre (x, y) of its box, (N, 2)."""
    cut, boxes = _squared(covers)
    templates = _templates().flatten(1).float()
    cut = cut.flatten(1).float()
    both = cut @ templates.T
    overlap, best = (both / (cut.sum(1)[:, None] + templates.sum(1) - both)).max(1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    fits = (overlap > OVERLAP) & (torch.minimum(width, height) > ASPECT * torch.maximum(width, height))
    kinds = [KINDS[int(k)] if ok else "blob" for k, ok in zip(best, fits, strict=True)]
    return kinds, (boxes[:, :2] + boxes[:, 2:]) / 2


def verdict(things: Sequence[Thing], request: Request) -> Verdict:
    """Compares what is seen in a picture, the largest first, with what was requested."""
    wanted = collections.Counter(request.objects)
    present = collections.Counter((t.color, t.kind) for t in things)
    related = request.relation is None or _any_related(things, request, by_kind=True)
    lenient = related and not wanted - present
    return Verdict(
        correct=lenient and len(things) == len(request.objects),
        lenient=lenient,
        shape_bound=(wanted & present).total() / wanted.total(),
        position=None if request.relation is None else _any_related(things, request, by_kind=False),
        found=describe(things),
    )


def _any_related(things: Sequence[Thing], request: Request, by_kind: bool) -> bool:
    (color, kind), (other_color, other_kind) = request.objects
    return any(
        holds(request.relation, first.x - second.x, first.y - second.y)
        for first in things
        for second in things
        if first is not second
        and (first.color, second.color) == (color, other_color)
        and (not by_kind or (first.kind, second.kind) == (kind, other_kind))
    )


def holds(relation: str | None, dx: float, dy: float) -> bool:
    """Whether an offset of the first centre from the second, in pixels, can be called that; near a diagonal two can."""
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    along = -along if relation in ("left of", "above") else along
    return along > max(4.0, 0.8 * abs(across))


def describe(things: Sequence[Thing]) -> str:
    """Says what is seen in words: a prompt of the world if it is one or two objects or a count, else a list."""
    objects = tuple((t.color, t.kind) for t in things)
    if not things:
        return "nothing"
    if len(set(objects)) == 1 and len(objects) <= 3:
        return str(Request(objects))
    if len(things) == 2:
        first, second = things
        relation = relation_of(first.x - second.x, first.y - second.y, ratio=1.0)
        if relation in ("right of", "below"):
            return str(Request(objects[::-1], OPPOSITE[relation]))
        return str(Request(objects, relation))
    return " and ".join(f"a {color} {kind}" for color, kind in objects)
