"""How much images of one prompt differ: similarity, effective number, coverage of references, and layout.

All but the spreads work on features, one vector an image, and compute in float64 whatever the features are.
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
from ..shapes_world import SIZE, Thing, parse, see
from ..shapes_world.judge import CHROMA

Place = tuple[float, float]


def mean_pairwise_similarity(features: Tensor) -> Tensor:
    """Mean cosine of all pairs of different images, the MSS of CADS, https://arxiv.org/abs/2310.17347; lower is more
    diverse.

    Args:
        features: (..., N, D), sets of at least 2 images.

    Returns:
        (...) in [-1 / (N - 1), 1], float64, with a gradient.

    Raises:
        ValueError: for fewer than 2 images.
    """
    kernel = cosine_kernel(features)
    count = kernel.shape[-1]
    if count < 2:
        raise ValueError(
            f"Expected features (..., N, D) of at least 2 images, but got {tuple(features.shape)}. Draw several images "
            "of a prompt to measure how much they differ."
        )
    pairs = kernel.sum((-2, -1)) - kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (count * (count - 1))


def coverage(features: Tensor, references: Tensor, k: int = 5) -> Tensor:
    """The share of the references near which there is an image, https://arxiv.org/abs/2002.09797.

    Near is closer, in Euclidean distance, than the reference's k-th nearest other reference.

    Args:
        features: (N, D).
        references: (M, D), with M > k.
        k: 1 or more; the paper uses 5.

    Returns:
        A scalar in [0, 1], float64, without a gradient.
    """
    return inside_balls(features, references, k).any(1).double().mean()


def density(features: Tensor, references: Tensor, k: int = 5) -> Tensor:
    """In how many references' balls an image is on average, over k; https://arxiv.org/abs/2002.09797.

    Arguments as for `coverage`. A scalar of at least 0, and about 1 for images distributed as the references are.
    """
    return inside_balls(features, references, k).double().sum(0).mean() / k


@torch.no_grad()
def inside_balls(features: Tensor, references: Tensor, k: int) -> Tensor:
    """(M, N) booleans: whether an image is closer to a reference than the k-th nearest other reference is."""
    check_neighbours(features, references, k)
    features, references = features.double(), references.double()
    # Each reference is its own nearest: hence k + 1.
    radii = distances(references, references).kthvalue(k + 1, dim=1).values
    return distances(references, features) < radii[:, None]


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean distances; not by a matrix product, which loses half the digits of small ones."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def check_neighbours(features: Tensor, references: Tensor, k: int) -> None:
    """Raise unless both are matrices of one width, and each reference has k others."""
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1] or len(features) == 0:
        raise ValueError(
            f"Expected features (N, D) and references (M, D), but got {tuple(features.shape)} and "
            f"{tuple(references.shape)}. Take both from the same model."
        )
    if not 1 <= k < len(references):
        raise ValueError(
            f"Expected k from 1 to {len(references) - 1}, the number of the other references, but got {k}. Pass more "
            "references or a smaller k."
        )


def layout_spread(images: Tensor, prompt: str) -> float:
    """How far apart the places of the requested objects are in a set of images of one prompt, in pixels.

    For each requested object, the root mean square distance of its centre from its mean place over the images that show
    it; then the mean over the objects. An object is the largest thing of its color, whatever its shape: what is drawn
    wrongly has a place, too. Requested objects of one color are interchangeable: each two images are matched in the
    best way, and the mean square distance from the mean is half that of two images drawn with replacement.

    Args:
        images: (N, 3, 64, 64) in [0, 1], of the shapes world.
        prompt: a prompt of the shapes world.

    Returns:
        Pixels, at least 0; NaN if no requested color is in two images.
    """
    check_world(images)
    wanted = Counter(color for color, _ in parse(prompt).objects)
    pictures = [things for part in images.split(32) for things in see(part)]
    total, objects = 0.0, 0
    for color, count in wanted.items():
        shown = [found for things in pictures if (found := largest_of_color(things, color, count))]
        if len(shown) > 1:
            total, objects = total + count * spread(shown), objects + count
    return total / objects if objects else math.nan


def largest_of_color(things: Sequence[Thing], color: str, count: int) -> list[Place]:
    """The centres of the `count` largest things of a color, fewer if there are not as many; `things` are in order."""
    return [(thing.x, thing.y) for thing in things if thing.color == color][:count]


def spread(sets: Sequence[Sequence[Place]]) -> float:
    """Root mean square distance from the mean place, from the distances of all pairs of sets of places."""
    squares = [matched_square(left, right) for left, right in itertools.combinations(sets, 2)]
    return math.sqrt(sum(squares)) / len(sets)


def matched_square(left: Sequence[Place], right: Sequence[Place]) -> float:
    """Mean square distance of the places of two images under their best match; extra places of the longer are left."""
    few, many = sorted((left, right), key=len)
    return min(
        sum(math.dist(a, b) ** 2 for a, b in zip(few, order, strict=True)) / len(few)
        for order in itertools.permutations(many, len(few))
    )


def size_spread(images: Tensor, prompt: str) -> float:
    """How much the sizes of the requested objects differ in a set of images of one prompt, in pixels.

    The size of an object is the radius of the disk of its area. For each requested color, and as many of its things in
    each image as are requested, the largest with the largest: the root mean square distance from the mean size over the
    images that show it; then the mean over the objects. An object is a thing of its color, whatever its shape.

    Args:
        images: (N, 3, 64, 64) in [0, 1], of the shapes world.
        prompt: a prompt of the shapes world.

    Returns:
        Pixels, at least 0; NaN if no requested color is in two images.
    """
    check_world(images)
    pictures = [things for part in images.split(32) for things in see(part)]
    found = []
    for color, count in Counter(color for color, _ in parse(prompt).objects).items():
        radii = [[math.sqrt(thing.area / math.pi) for thing in things if thing.color == color] for things in pictures]
        for rank in range(count):
            shown = torch.tensor([each[rank] for each in radii if len(each) > rank], dtype=torch.float64)
            if len(shown) > 1:
                found.append(float(shown.std(correction=0)))
    return sum(found) / len(found) if found else math.nan


def ground_spread(images: Tensor) -> float:
    """How much the colors of the backgrounds of a set of images differ: RMS distance from their mean, in [0, √3].

    The background is what the judge finds too grey for a shape, its color the mean of these pixels. Images without any
    do not count.

    Args:
        images: (N, 3, 64, 64) in [0, 1], of the shapes world.

    Returns:
        At least 0; NaN if fewer than two images have a background.
    """
    check_world(images)
    images = images.detach().double().cpu()
    grey = (images.amax(1) - images.amin(1) <= CHROMA)[:, None]
    area = grey.sum((1, 2, 3))
    colors = ((images * grey).sum((2, 3)) / area[:, None])[area > 0]
    if len(colors) < 2:
        return math.nan
    return float((colors - colors.mean(0)).square().sum(1).mean().sqrt())


def check_world(images: Tensor) -> None:
    """Raise unless these are images of the shapes world."""
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"Expected images of shape (N, 3, {SIZE}, {SIZE}), but got {tuple(images.shape)}.")
