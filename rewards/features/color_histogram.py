"""Differentiable color histograms, to compare the palettes of images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.transforms import at_least_float32, straight_through_clamp
from .features import Features, register_features


@dataclass(frozen=True)
class SoftColorHistogram:
    """Map images (B, 3, H, W) in [0, 1] to float32 histograms (B, 3 * bins), one per channel, each with sum 1.

    Bin k of a channel is `mean(relu(1 - |(bins - 1) * x - k|))` over its pixels x: triangles around `k / (bins - 1)`.
    Each pixel contributes to two bins, so a change of its value moves mass between them; `torch.histc` has no gradient.
    With `histogram_distance` this is the color criterion of It's Never Too Late, https://arxiv.org/abs/2601.00090.

    Args:
        bins: The number of bins per channel, at least 2.

    Raises:
        ValueError: For fewer than 2 bins.
    """

    bins: int = 32

    def __post_init__(self):
        if self.bins < 2:
            raise ValueError(f"Expected at least 2 bins, but got {self.bins}.")

    def __call__(self, images: Tensor) -> Tensor:
        values = straight_through_clamp(at_least_float32(images)).flatten(2)
        positions = values * (self.bins - 1)
        # The last bin has no right neighbor: a value of 1 is entirely overflow of the second to last bin.
        left = positions.detach().floor().clamp(0, self.bins - 2)
        overflow = positions - left
        # Two entries per pixel instead of one per pixel and bin: 16 times less memory than the naive formula.
        empty = values.new_zeros(*values.shape[:2], self.bins)
        counts = empty.scatter_add(2, left.long(), 1 - overflow).scatter_add(2, left.long() + 1, overflow)
        return (counts / values.shape[-1]).flatten(1)


def histogram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return `|a - b|_2 / sqrt(6)` of two (..., 3 * bins) histograms, (...) in [0, 1].

    The distance is 1 if in every channel each image has all pixels in a single bin, and the two bins differ.
    """
    return torch.linalg.vector_norm(a - b, dim=-1) / math.sqrt(6)


@register_features("color_histogram")
class ColorHistogramFeatures(Features):
    """`SoftColorHistogram` with 32 bins, scaled so that the L2 distance of two images is `histogram_distance`."""

    name = "color_histogram"
    metric = "l2"

    def encode(self, images: Tensor) -> Tensor:
        return SoftColorHistogram()(images) / math.sqrt(6)
