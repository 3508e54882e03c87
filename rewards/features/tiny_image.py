"""The picture itself, very small, as its features."""

import math

from torch import Tensor

from ..contract.transforms import resize
from .features import Features, register_features

TINY_EDGE = 32


@register_features("tiny_image")
class TinyImage(Features):
    """The 32 × 32 pixels of the shrunken picture over √3072, (B, 3072): their L2 distance is at most 1, black to white.

    `tiny_l2` of It's Never Too Late (https://arxiv.org/abs/2601.00090). Its released code resizes without antialiasing,
    which reads four pixels of each 16 × 16 of a picture of 512², and gives no gradient to the others; here all count.
    """

    name = "tiny_image"
    metric = "l2"

    def encode(self, images: Tensor) -> Tensor:
        pixels = resize(images, (TINY_EDGE, TINY_EDGE), "bilinear", single_pass=True).flatten(1)
        return pixels / math.sqrt(pixels.shape[1])
