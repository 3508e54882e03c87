"""A deterministic judge: says what a picture shows, and whether that is what the prompt asks for.

It uses no trained model, so nothing that a noise is optimised for can have learnt to please it: saturated pixels are
given the nearest hue, connected ones form an object, and its mask, scaled to unit area around its centre of mass, is
compared with the shapes, also with their corners rounded and somewhat deformed, as generators draw them. Seen from
there, its outline must also rise and fall as often as the shape has tips, or, for a circle, hardly at all; it must not
be much longer than wide, nor dented where the shape is convex.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import Request, parse
from .world import COLORS, KINDS, OPPOSITE, SIZE, Scene, Shape, coverage, relation_of

CHROMA = 0.33  # the largest minus the smallest channel from which on a pixel belongs to a shape
AREA = 36  # pixels; smaller specks are overlooked
OVERLAP = 0.75  # intersection over union with the best template below which an object is no shape
CLEARLY = 0.75  # what the best kind misses of a full overlap, at most, relative to what the second best misses
# How many tips a kind has, and the least height of that wave in its radius, its overtone included, relative to the mean
# radius: about half of what a clean shape has, two thirds for a triangle, a third for a star, whose tips fade first.
TIPS = {"square": (4, 0.09), "triangle": (3, 0.27), "star": (5, 0.11), "cross": (4, 0.21)}
SLOPE = 0.18  # how steeply a circle's radius may rise and fall around it, as root mean square; a square's does by 0.43
LONG = 0.18  # how high the wave may be that goes around twice: a rectangle 1.35 times as long as wide has that
DENT = 0.046  # how deep a convex kind's outline may be dented, as root mean square; a cross has 0.2, a star 0.17
CONVEX = ("circle", "square", "triangle")
ROUNDINGS = (0.0, 0.1, 0.2)  # widths of the blur that rounds the templates' corners, in radii
TURN, LEAN, STRETCH = math.radians(12), 0.15, 1.25  # how far a template is deformed: angle, shear, width over height
_SIDE, _RADIUS, _REACH = 32, 18.0, 16
_DIRECTIONS, _FINE, _ASIDE = 24, 7, 2  # rays; the finest wave that counts for a slope; a dent's half width


@dataclass(frozen=True)
class Thing:
    """A connected region of one color: its kind ("blob" if none fits clearly), its box's centre and area in pixels."""

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
    covers = inside / inside.amax((1, 2), keepdim=True)
    kinds, centres = _kinds(covers), _centres(covers)
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


def _sampled(covers: Tensor, points: Tensor) -> Tensor:
    """Where objects (N, 64, 64), their share of each pixel, are: (N, H, W) at points (H, W, 2) around their middle.

    Points are in roots of the area, from the centre of mass: unlike a box, both hardly change when thin tips fade.
    """
    inside = (covers > 0.5).float()
    area = inside.sum((1, 2))
    pixel = torch.arange(SIZE) + 0.5
    middle = torch.stack([(inside.sum(dim) * pixel).sum(1) / area for dim in (1, 2)], 1)
    grid = (middle[:, None, None] + area.sqrt()[:, None, None, None] * points) * (2 / SIZE) - 1
    return (F.grid_sample(covers[:, None], grid, align_corners=False)[:, 0] > 0.5).float()


def _normalized(covers: Tensor) -> Tensor:
    """Cuts each object (N, 64, 64) out around its centre of mass, scaled to unit area: masks (N, 32, 32)."""
    steps = (torch.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    return _sampled(covers, torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1))


def _rounded(covers: Tensor, width: float) -> Tensor:
    """Rounds the corners of shapes (N, 64, 64): blurs by a Gaussian of `width` pixels and sharpens again."""
    if width == 0:
        return covers
    offsets = torch.arange(-_REACH, _REACH + 1)
    weights = torch.softmax(-((offsets / width) ** 2) / 2, 0)
    blurred = F.conv2d(covers[:, None], weights.view(1, 1, -1, 1), padding=(_REACH, 0))
    blurred = F.conv2d(blurred, weights.view(1, 1, 1, -1), padding=(0, _REACH))
    return (8 * (blurred[:, 0] - 0.5) + 0.5).clamp(0.0, 1.0)


def _deformations() -> list[Tensor]:
    """Matrices (2, 2) that lean, turn or stretch a shape as weak generators do: at most two of the three at a time."""
    leans = [torch.tensor([[1.0, lean], [0.0, 1.0]]) for lean in (0.0, -LEAN, LEAN)]
    turns = [torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in (0.0, -TURN, TURN)]
    stretches = [torch.tensor([[s, 0.0], [0.0, 1 / s]]) for s in (1.0, STRETCH**-0.5, STRETCH**0.5)]
    picks = [pick for pick in itertools.product(range(3), repeat=3) if 0 in pick]
    return [turns[turn] @ leans[lean] @ stretches[stretch] for turn, lean, stretch in picks]


@functools.cache
def _templates() -> Tensor:
    """Each kind, rounded and deformed in all ways: masks (5, T, 1024)."""
    sharp = coverage([Scene((Shape(kind, "red", SIZE / 2, SIZE / 2, _RADIUS),)) for kind in KINDS])[:, 0]
    masks = []
    for rounding, matrix in itertools.product(ROUNDINGS, _deformations()):
        shapes = _rounded(sharp, rounding * _RADIUS)
        theta = torch.cat((matrix, torch.zeros(2, 1)), 1).expand(len(KINDS), 2, 3)
        grid = F.affine_grid(theta, [len(KINDS), 1, SIZE, SIZE], align_corners=False)
        masks.append(_normalized(F.grid_sample(shapes[:, None], grid, align_corners=False)[:, 0]).flatten(1))
    return torch.stack(masks, 1)


def _kinds(covers: Tensor) -> list[str]:
    """The kind of each object (N, 64, 64), or "blob" if none fits well, or none clearly better than the next."""
    masks, templates = _normalized(covers).flatten(1), _templates().flatten(0, 1)
    both = masks @ templates.T
    overlap = both / (masks.sum(1)[:, None] + templates.sum(1) - both)
    overlap = overlap.view(len(masks), len(KINDS), -1).amax(2)
    (first, second), (best, _) = (part.T for part in overlap.topk(2, 1))
    clear = 1 - first < CLEARLY * (1 - second)
    radii, star = _radii(covers), KINDS.index("star")
    # a star with short or thin tips may overlap others as well, but no other has five
    five = _waves(radii)[:, 2:6].argmax(1) + 2 == TIPS["star"][0]
    suits = _suits(radii)
    starry = five & suits[:, star]
    best, clear = torch.where(starry, star, best), clear | starry
    fits, suits = (part.gather(1, best[:, None])[:, 0] for part in (overlap > OVERLAP, suits))
    return [KINDS[int(kind)] if ok else "blob" for kind, ok in zip(best, fits & suits & clear, strict=True)]


def _suits(radii: Tensor) -> Tensor:
    """Whether radii (N, _DIRECTIONS) rise and fall as those of each kind do, (N, 5)."""
    waves = _waves(radii)
    suits = {kind: waves[:, tips] + waves[:, 2 * tips] >= least for kind, (tips, least) in TIPS.items()}
    suits["circle"] = _slope(waves) < SLOPE
    for kind in CONVEX:
        suits[kind] &= _dents(radii) < DENT
    return torch.stack([suits[kind] for kind in KINDS], 1) & (waves[:, 2:3] < LONG)


def _radii(covers: Tensor) -> Tensor:
    """How far objects (N, 64, 64) reach from their centre of mass in each direction, relative to the mean of all."""
    turn = torch.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    rays = torch.stack((turn.cos(), turn.sin()), 1)[:, None] * torch.linspace(0.0, 1.5, 128)[:, None]
    reach = _sampled(covers, rays).mean(2)
    return reach / reach.mean(1, keepdim=True)


def _waves(radii: Tensor) -> Tensor:
    """Amplitudes of the waves in radii (N, _DIRECTIONS), by how many go around: (N, _DIRECTIONS / 2 + 1)."""
    return torch.fft.rfft(radii, dim=1).abs() * (2 / _DIRECTIONS)


def _slope(waves: Tensor) -> Tensor:
    """How steeply a radius with such waves (N, _DIRECTIONS / 2 + 1) rises and falls, finer ones left out, (N,)."""
    steep = waves[:, : _FINE + 1] * torch.arange(_FINE + 1)
    return steep.square().sum(1).div(2).sqrt()


def _dents(radii: Tensor) -> Tensor:
    """How deep an outline with radii (N, _DIRECTIONS) lies within lines across a sixth of it, (N,); 0 if convex."""
    before, after = radii.roll(_ASIDE, 1), radii.roll(-_ASIDE, 1)
    straight = 2 * before * after * math.cos(2 * math.pi * _ASIDE / _DIRECTIONS) / (before + after).clamp(min=1e-6)
    return (straight - radii).clamp(min=0.0).square().mean(1).sqrt()


def _centres(covers: Tensor) -> Tensor:
    """The centre (x, y) of the box of each object (N, 64, 64), in pixels, (N, 2)."""
    span = torch.arange(SIZE)
    lines = [(covers > 0.5).any(dim) for dim in (1, 2)]
    low, high = ([torch.where(line, span, out) for line in lines] for out in (SIZE, -1))
    return torch.stack([(a.amin(1) + b.amax(1) + 1) / 2 for a, b in zip(low, high, strict=True)], 1)


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
    return along > max(4.0, 0.9 * abs(across))


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
