"""Pixels of the downscaled image as features."""

import math

from torch import Tensor

from ..contract.transforms import resize
from .features import Features, register_features

TINY_EDGE = 32


@register_features("tiny_image")
class TinyImage(Features):
    """The image resized to 32 × 32, divided by √3072, (B, 3072); the L2 distance is at most 1, from black to white.

    `tiny_l2` of It's Never Too Late, https://arxiv.org/abs/2601.00090. Its released code, `as_released()`, resizes
    without antialiasing: of each 16 × 16 pixels of a 512 × 512 image it reads four, and the others get no gradient.
    Here all pixels count.
    """

    name = "tiny_image"
    metric = "l2"
    antialias = True

    def encode(self, images: Tensor) -> Tensor:
        size = (TINY_EDGE, TINY_EDGE)
        pixels = resize(images, size, "bilinear", single_pass=True, antialias=self.antialias).flatten(1)
        return pixels / math.sqrt(pixels.shape[1])

    def as_released(self) -> "TinyImage":
        released = TinyImage()
        released.antialias = False
        return released
