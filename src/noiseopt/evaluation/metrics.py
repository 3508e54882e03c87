"""Diversity of the images of a prompt: similarity, effective number, coverage of references, and layout.

All but the spreads take features, one vector per image, and compute in float64.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rewards.sets.cosine_kernel import cosine_kernel
from ..rewards.sets.vendi import vendi_score as vendi_score
from ..shapes_world import Thing, parse, see
from ..shapes_world.judge import CHROMA, check_size
from ..shapes_world.world import SIDE

Position = tuple[float, float]


def mean_pairwise_similarity(features: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of images (MSS in CADS, https://arxiv.org/abs/2310.17347).

    Lower is more diverse.

    Args:
        features: (..., N, D), sets of at least 2 images.

    Returns:
        (...) in [-1 / (N - 1), 1], float64, differentiable.

    Raises:
        ValueError: For fewer than 2 images.
    """
    kernel = cosine_kernel(features)
    count = kernel.shape[-1]
    if count < 2:
        raise ValueError(
            f"Expected features (..., N, D) of at least 2 images, but got {tuple(features.shape)}. Generate several "
            "images of a prompt to measure their diversity."
        )
    pairs = kernel.sum((-2, -1)) - kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (count * (count - 1))


def coverage(features: Tensor, references: Tensor, k: int = 5) -> Tensor:
    """Return the share of references with an image nearby, https://arxiv.org/abs/2002.09797.

    Nearby is closer, in Euclidean distance, than the reference's k-th nearest other reference.

    Args:
        features: (N, D).
        references: (M, D), with M > k.
        k: At least 1; the paper uses 5.

    Returns:
        Scalar in [0, 1], float64, without a gradient.

    Raises:
        ValueError: For other shapes or k.
    """
    return inside_balls(features, references, k).any(1).double().mean()


@torch.no_grad()
def inside_balls(features: Tensor, references: Tensor, k: int) -> Tensor:
    """Return (M, N) bool, true where an image is closer to a reference than its k-th nearest other reference."""
    check_neighbors(features, references, k)
    features, references = features.double(), references.double()
    # k + 1 because each reference is its own nearest neighbor.
    radii = distances(references, references).kthvalue(k + 1, dim=1).values
    return distances(references, features) < radii[:, None]


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Return Euclidean distances, without a matrix product, which loses half the digits of small distances."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def check_neighbors(features: Tensor, references: Tensor, k: int) -> None:
    """Raise `ValueError` unless both are matrices of equal width and each reference has k others."""
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1] or len(features) == 0:
        raise ValueError(
            f"Expected features (N, D) and references (M, D), but got {tuple(features.shape)} and "
            f"{tuple(references.shape)}. Compute both with the same model."
        )
    if not 1 <= k < len(references):
        raise ValueError(
            f"Expected k from 1 to {len(references) - 1}, the number of the other references, but got {k}. Pass more "
            "references or a smaller k."
        )


def layout_spread(images: Tensor, prompt: str) -> float:
    """Return the spread of the positions of the requested objects over a set of images of one prompt, in pixels.

    For each requested object, the root mean square distance of its center from its mean position over the images that
    show it, averaged over the objects. An object is the largest region of its color, whatever its shape, so misshapen
    objects count. Requested objects of one color are interchangeable: each pair of images is matched optimally, and the
    mean square distance from the mean is half that of two images drawn with replacement.

    Args:
        images: (N, 3, H, H) in [0, 1], of the shapes world, with H a multiple of 64.
        prompt: A prompt of the shapes world.

    Returns:
        Pixels, nonnegative; NaN if no requested color appears in two images.
    """
    check_size(images)
    wanted = Counter(color for color, _ in parse(prompt).objects)
    pictures = [things for part in images.split(32) for things in see(part)]
    total, objects = 0.0, 0
    for color, count in wanted.items():
        shown = [found for things in pictures if (found := largest_of_color(things, color, count))]
        if len(shown) > 1:
            total, objects = total + count * spread(shown), objects + count
    return pixels(images) * total / objects if objects else math.nan


def pixels(images: Tensor) -> float:
    """Return the pixels of a unit in which the judge measures lengths."""
    return images.shape[-1] / SIDE


def largest_of_color(things: Sequence[Thing], color: str, count: int) -> list[Position]:
    """Return the centers of the `count` largest things of a color; `things` are sorted by size."""
    return [(thing.x, thing.y) for thing in things if thing.color == color][:count]


def spread(sets: Sequence[Sequence[Position]]) -> float:
    """Return the root mean square distance from the mean position, computed from the distances of all pairs."""
    squares = [matched_square(left, right) for left, right in itertools.combinations(sets, 2)]
    return math.sqrt(sum(squares)) / len(sets)


def matched_square(left: Sequence[Position], right: Sequence[Position]) -> float:
    """Return the mean square distance of the positions in two images under the best matching.

    Positions without a partner are ignored.
    """
    few, many = sorted((left, right), key=len)
    return min(
        sum(math.dist(a, b) ** 2 for a, b in zip(few, order, strict=True)) / len(few)
        for order in itertools.permutations(many, len(few))
    )


def size_spread(images: Tensor, prompt: str) -> float:
    """Return the spread of the sizes of the requested objects over a set of images of one prompt, in pixels.

    The size of an object is the radius of a disk of its area. For each requested color, the requested number of largest
    things of each image are matched by rank: the root mean square distance from the mean size over the images that show
    them, averaged over the objects. An object is any region of its color, whatever its shape.

    Args:
        images: (N, 3, H, H) in [0, 1], of the shapes world, with H a multiple of 64.
        prompt: A prompt of the shapes world.

    Returns:
        Pixels, nonnegative; NaN if no requested color appears in two images.
    """
    check_size(images)
    pictures = [things for part in images.split(32) for things in see(part)]
    found = []
    for color, count in Counter(color for color, _ in parse(prompt).objects).items():
        radii = [[math.sqrt(thing.area / math.pi) for thing in things if thing.color == color] for things in pictures]
        for rank in range(count):
            shown = torch.tensor([each[rank] for each in radii if len(each) > rank], dtype=torch.float64)
            if len(shown) > 1:
                found.append(float(shown.std(correction=0)))
    return pixels(images) * sum(found) / len(found) if found else math.nan


def ground_spread(images: Tensor) -> float:
    """Return the RMS distance of the background colors of a set of images from their mean, in [0, √3].

    The background is every pixel that the judge finds too gray for a shape; its color is the mean of these pixels.
    Images without background are ignored.

    Args:
        images: (N, 3, H, H) in [0, 1], of the shapes world, with H a multiple of 64.

    Returns:
        NaN if fewer than two images have a background.
    """
    check_size(images)
    images = images.detach().double().cpu()
    gray = (images.amax(1) - images.amin(1) <= CHROMA)[:, None]
    area = gray.sum((1, 2, 3))
    colors = ((images * gray).sum((2, 3)) / area[:, None])[area > 0]
    if len(colors) < 2:
        return math.nan
    return float((colors - colors.mean(0)).square().sum(1).mean().sqrt())
