"""A deterministic judge: reads the objects of an image, and compares them with the prompt.

It uses no trained model, so optimized noise cannot exploit it. Images are averaged down to 64 x 64 pixels first.
Saturated pixels get the nearest hue, and connected pixels form an object. The object's mask, normalized to unit area
around its center of mass, is compared with templates of the shapes, including rounded and deformed ones as generators
draw them. Its outline, in polar coordinates around that center, is measured for number and height of tips, evenness of
turning, dents and elongation. Each kind weighs three to five of these measurements; the object is of the kind with the
highest sum, if that is positive. The weights, 21 numbers and a constant per kind, were fitted to manual labels.
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
from .world import COLORS, KINDS, OPPOSITE, SIDE, Scene, Shape, coverage, relation_of

CHROMA = 0.33  # a pixel belongs to a shape if its largest minus its smallest channel exceeds this
AREA = 36  # pixels of 64 x 64; smaller regions are ignored
OVERLAP = 0.7  # minimum intersection over union with the best template of a kind
TIPS = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}
# Weights of the measurements of `_measures`, fitted to manual labels of generated images. An object is of the kind with
# the highest sum, if that is positive. A clean shape scores 3 or more.
WEIGHTS = {
    "circle": {"always": 16.3, "overlap": 30.5, "square": -40.6, "stray": -17.5, "long": -18.7, "turns": -24.2},
    "square": {"always": -2.1, "tips": 81.6, "dents": -211.0, "bite": -23.1},
    "triangle": {"always": 22.4, "tips": 17.3, "rival": -24.9, "long": -14.6, "dents": -90.8, "bite": -20.1},
    "star": {"always": -4.7, "tips": 23.7, "rise": 4.8, "stray": -10.0, "long": -16.7},
    "cross": {"always": 13.0, "overlap": 20.3, "rival": -35.7, "stray": -4.8, "long": -11.4},
}
# Hard limits [least, most) of a kind's measurements. A 1.3:1 rectangle has an elongation of 0.155; a cross has dents of
# 0.2, a star of 0.17; a square has tips of 0.14.
LIMITS = {
    "circle": {"long": (0.0, 0.155), "dents": (0.0, 0.046)},
    "square": {"long": (0.0, 0.155), "dents": (0.0, 0.046), "tips": (0.085, math.inf)},
    "triangle": {"dents": (0.0, 0.046)},
}
ROUNDINGS = (0.0, 0.1, 0.2)  # widths of the blur that rounds the templates' corners, in radii
TURN, LEAN, STRETCH = math.radians(12), 0.15, 1.25  # deformations of a template: angle, shear, width over height
_SIDE, _RADIUS, _REACH = 32, 18.0, 16
_DIRECTIONS, _FINE, _ASIDE = 24, 7, 2  # rays; highest stray wave; half the width of a dent or turn


@dataclass(frozen=True)
class Thing:
    """A connected region of one color: its kind ("blob" if unclear), the center of its box, and its area.

    Lengths are in units of 1/64 of the side of the image, areas in their squares.
    """

    color: str
    kind: str
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on an image and a prompt.

    Args:
        correct: The image shows exactly the requested objects in the requested relation.
        lenient: Like `correct`, but additional objects are allowed.
        shape_bound: Share of the requested objects present with the right shape and color, in [0, 1].
        position: Whether the requested relation holds between regions of the requested colors, of any shape; None
            without a requested relation.
        found: The objects in words.
    """

    correct: bool
    lenient: bool
    shape_bound: float
    position: bool | None
    found: str


def judge(images: Tensor, prompts: str | Sequence[str]) -> list[Verdict]:
    """Judge images.

    Args:
        images: (B, 3, H, H) in [0, 1], with H a multiple of 64.
        prompts: One prompt for all images, or B prompts.

    Raises:
        ValueError: If a prompt is outside the world, or for wrong shapes.
    """
    check_size(images)
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(images):
        raise ValueError(f"Expected one prompt or {len(images)}, one per image, but got {len(prompts)}.")
    requests = [parse(prompt) for prompt in prompts]
    things = [found for part in images.split(32) for found in see(part)]
    return [verdict(found, request) for found, request in zip(things, requests, strict=True)]


def check_size(images: Tensor) -> None:
    """Raise a `ValueError` unless images are square, in color, and a multiple of 64 pixels wide."""
    height = images.shape[-1]
    if images.ndim != 4 or height == 0 or height % SIDE or images.shape[1:] != (3, height, height):
        raise ValueError(
            f"Expected images of shape (B, 3, H, H) with H a multiple of {SIDE}, but got {tuple(images.shape)}."
        )


@torch.no_grad()
def see(images: Tensor) -> list[list[Thing]]:
    """Find the objects of each image, largest first; images (B, 3, H, H) in [0, 1], with H a multiple of 64.

    Raises:
        ValueError: For other shapes.
    """
    check_size(images)
    images = F.avg_pool2d(images.detach().float().cpu().clamp(0.0, 1.0), images.shape[-1] // SIDE)
    colors, chroma = _hues(images), images.amax(1) - images.amin(1)
    labels = _components(colors)
    area = torch.bincount(labels.flatten(), minlength=labels.numel())
    roots = (area >= AREA).nonzero().squeeze(1)
    found: list[list[Thing]] = [[] for _ in images]
    if len(roots) == 0:
        return found
    picture = roots // (SIDE * SIDE)
    inside = torch.where(labels[picture] == roots[:, None, None], chroma[picture], 0.0)
    # relative to its strongest pixel, so that a soft outline lies where a sharp one would
    covers = inside / inside.amax((1, 2), keepdim=True)
    kinds, centers = _kinds(covers), _centers(covers)
    for i in area[roots].argsort(descending=True, stable=True).tolist():
        color = list(COLORS)[int(colors.flatten()[roots[i]])]
        thing = Thing(color, kinds[i], *centers[i].tolist(), area=int(area[roots[i]]))
        found[int(picture[i])].append(thing)
    return found


def _hues(images: Tensor) -> Tensor:
    """Return the index of the nearest color of each pixel by hue, (B, 64, 64); -1 where the pixel is too gray."""
    saturated = images.amax(1) - images.amin(1) > CHROMA
    turn = _hue(images.movedim(1, -1)[saturated])[:, None] - _hue(torch.tensor(list(COLORS.values())))
    nearest = torch.full(saturated.shape, -1)
    nearest[saturated] = (turn - turn.round()).abs().argmin(1)
    return nearest


def _hue(pixels: Tensor) -> Tensor:
    """Return the hue in [0, 1) of saturated pixels, (N, 3) in [0, 1] -> (N,)."""
    high, which = pixels.max(1)
    red, green, blue = pixels.unbind(1)
    sides = torch.stack((green - blue, blue - red, red - green), 1).gather(1, which[:, None])[:, 0]
    return ((sides / (high - pixels.amin(1)) + 2.0 * which) / 6.0).remainder(1.0)


def _components(colors: Tensor) -> Tensor:
    """Label 4-connected regions of equal color by their largest index, (B, H, W) -> (B, H, W); color -1 is ignored.

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
    """Resample objects (N, 64, 64), given as pixel coverage, at points (H, W, 2) around their center: (N, H, W).

    Points are in units of the root of the area, from the center of mass. Unlike a bounding box, both are robust to
    fading tips.
    """
    inside = (covers > 0.5).float()
    area = inside.sum((1, 2))
    pixel = torch.arange(SIDE) + 0.5
    middle = torch.stack([(inside.sum(dim) * pixel).sum(1) / area for dim in (1, 2)], 1)
    grid = (middle[:, None, None] + area.sqrt()[:, None, None, None] * points) * (2 / SIDE) - 1
    return (F.grid_sample(covers[:, None], grid, align_corners=False)[:, 0] > 0.5).float()


def _normalized(covers: Tensor) -> Tensor:
    """Crop each object (N, 64, 64) around its center of mass, scaled to unit area: masks (N, 32, 32)."""
    steps = (torch.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    return _sampled(covers, torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1))


def _rounded(covers: Tensor, width: float) -> Tensor:
    """Round the corners of shapes (N, 64, 64): a Gaussian blur of `width` pixels, then sharpening."""
    if width == 0:
        return covers
    offsets = torch.arange(-_REACH, _REACH + 1)
    weights = torch.softmax(-((offsets / width) ** 2) / 2, 0)
    blurred = F.conv2d(covers[:, None], weights.view(1, 1, -1, 1), padding=(_REACH, 0))
    blurred = F.conv2d(blurred, weights.view(1, 1, 1, -1), padding=(0, _REACH))
    return (8 * (blurred[:, 0] - 0.5) + 0.5).clamp(0.0, 1.0)


def _deformations() -> list[Tensor]:
    """Return matrices (2, 2) that shear, rotate or stretch a shape like weak generators do, at most two at a time."""
    leans = [torch.tensor([[1.0, lean], [0.0, 1.0]]) for lean in (0.0, -LEAN, LEAN)]
    turns = [torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in (0.0, -TURN, TURN)]
    stretches = [torch.tensor([[s, 0.0], [0.0, 1 / s]]) for s in (1.0, STRETCH**-0.5, STRETCH**0.5)]
    picks = [pick for pick in itertools.product(range(3), repeat=3) if 0 in pick]
    return [turns[turn] @ leans[lean] @ stretches[stretch] for turn, lean, stretch in picks]


@functools.cache
def _templates() -> Tensor:
    """Return masks (5, T, 1024) of every kind in all roundings and deformations."""
    sharp = coverage([Scene((Shape(kind, "red", SIDE / 2, SIDE / 2, _RADIUS),)) for kind in KINDS], size=SIDE)[:, 0]
    masks = []
    for rounding, matrix in itertools.product(ROUNDINGS, _deformations()):
        shapes = _rounded(sharp, rounding * _RADIUS)
        theta = torch.cat((matrix, torch.zeros(2, 1)), 1).expand(len(KINDS), 2, 3)
        grid = F.affine_grid(theta, [len(KINDS), 1, SIDE, SIDE], align_corners=False)
        masks.append(_normalized(F.grid_sample(shapes[:, None], grid, align_corners=False)[:, 0]).flatten(1))
    return torch.stack(masks, 1)


def _kinds(covers: Tensor) -> list[str]:
    """Return the kind of each object (N, 64, 64), or "blob" if no score is positive."""
    scores, best = _scores(covers).max(1)
    return [KINDS[int(kind)] if score > 0 else "blob" for score, kind in zip(scores, best, strict=True)]


def _scores(covers: Tensor) -> Tensor:
    """Return the score of each kind for each object (N, 64, 64), (N, 5); minus infinity beyond a kind's limits."""
    measures, scores = _measures(covers), []
    for i, kind in enumerate(KINDS):
        score = sum(weight * measures[name][:, i] for name, weight in WEIGHTS[kind].items())
        possible = measures["overlap"][:, i] > OVERLAP
        for name, (least, most) in LIMITS.get(kind, {}).items():
            possible &= (measures[name][:, i] >= least) & (measures[name][:, i] < most)
        scores.append(torch.where(possible, score, -math.inf))
    return torch.stack(scores, 1)


def _measures(covers: Tensor) -> dict[str, Tensor]:
    """Return the measurements of each object (N, 64, 64) with respect to each kind, (N, 5) each."""
    overlap, bite = _overlaps(_normalized(covers).flatten(1))
    radii = _radii(covers)
    first, second = overlap.topk(2, 1).values.T[:, :, None]
    alike = {
        "always": torch.ones(len(covers)),
        "square": overlap[:, KINDS.index("square")],
        "long": _waves(radii)[:, 2],  # elongation
        "dents": _dents(radii),
        "turns": _turns(radii),
        "rise": (radii.roll(-1, 1) - radii).abs().sum(1) / 2,  # total height of the tips
    }
    tips, stray = _tips(_waves(radii))
    rival = torch.where(overlap < first, first, second)  # overlap with the best other kind
    alike = {name: measure[:, None].expand_as(overlap) for name, measure in alike.items()}
    return alike | {"overlap": overlap, "rival": rival, "bite": bite, "tips": tips, "stray": stray}


def _overlaps(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU of masks (N, 1024) with the best template of each kind of shape, and their bites, (N, 5) each.

    The bite shows whether a piece is missing: in the window (a sixth of the mask wide) where most of the template is
    not covered by the mask, the share of the window that is not covered.
    """
    templates = _templates()
    both = masks @ templates.flatten(0, 1).T
    overlap = both / (masks.sum(1)[:, None] + templates.flatten(0, 1).sum(1) - both)
    overlap, closest = overlap.view(len(masks), len(KINDS), -1).max(2)
    missing = templates[torch.arange(len(KINDS)), closest] - masks[:, None]
    bite = F.avg_pool2d(missing.view(-1, len(KINDS), _SIDE, _SIDE), 5, stride=1, padding=2)
    return overlap, bite.flatten(2).amax(2)


def _tips(waves: Tensor) -> tuple[Tensor, Tensor]:
    """Return how high the wave of each kind is, and how steep the other waves are, (N, 5) each.

    A kind with k tips has wave k of the waves (N, _DIRECTIONS / 2 + 1). Its height is the amplitude of that wave and
    its overtone; the steepness is the root mean square slope of the others, up to wave _FINE and without wave 2, which
    is elongation.
    """
    heights, slopes = [], []
    for tips in (TIPS[kind] for kind in KINDS):
        heights.append((waves[:, tips] + waves[:, 2 * tips]) * (tips > 0))
        stray = [wave for wave in range(3, _FINE + 1) if not tips or wave % tips]
        slopes.append((waves[:, stray] * torch.tensor(stray)).square().sum(1).div(2).sqrt())
    return torch.stack(heights, 1), torch.stack(slopes, 1)


def _radii(covers: Tensor) -> Tensor:
    """Return the distance from the center of objects (N, 64, 64) to their outline by direction; its mean is 1."""
    turn = torch.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    rays = torch.stack((turn.cos(), turn.sin()), 1)[:, None] * torch.linspace(0.0, 1.5, 128)[:, None]
    reach = _sampled(covers, rays).mean(2)
    return reach / reach.mean(1, keepdim=True)


def _waves(radii: Tensor) -> Tensor:
    """Return the amplitudes (N, _DIRECTIONS / 2 + 1) of the Fourier components of radii (N, _DIRECTIONS)."""
    return torch.fft.rfft(radii, dim=1).abs() * (2 / _DIRECTIONS)


def _dents(radii: Tensor) -> Tensor:
    """Return the depth of dents of outlines with radii (N, _DIRECTIONS), below chords across a sixth of them, (N,)."""
    before, after = radii.roll(_ASIDE, 1), radii.roll(-_ASIDE, 1)
    straight = 2 * before * after * math.cos(2 * math.pi * _ASIDE / _DIRECTIONS) / (before + after).clamp(min=1e-6)
    return (straight - radii).clamp(min=0.0).square().mean(1).sqrt()


def _turns(radii: Tensor) -> Tensor:
    """Return the standard deviation of the turning angles of outlines with radii (N, _DIRECTIONS), (N,)."""
    ray = torch.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    corners = torch.polar(radii, ray.expand_as(radii))
    step = corners.roll(-_ASIDE, 1) - corners
    return (step * step.roll(_ASIDE, 1).conj()).angle().std(1, correction=0)


def _centers(covers: Tensor) -> Tensor:
    """Return the center (x, y) of the bounding box of each object (N, 64, 64), in pixels, (N, 2)."""
    span = torch.arange(SIDE)
    lines = [(covers > 0.5).any(dim) for dim in (1, 2)]
    low, high = ([torch.where(line, span, out) for line in lines] for out in (SIDE, -1))
    return torch.stack([(a.amin(1) + b.amax(1) + 1) / 2 for a, b in zip(low, high, strict=True)], 1)


def verdict(things: Sequence[Thing], request: Request) -> Verdict:
    """Compare the objects of an image, largest first, with a request."""
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
    """Return whether a relation describes an offset of the first center from the second; two hold near a diagonal."""
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    along = -along if relation in ("left of", "above") else along
    return along > max(4.0, 0.9 * abs(across))


def describe(things: Sequence[Thing]) -> str:
    """Describe objects in words: a prompt of the world if possible, else a list."""
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
