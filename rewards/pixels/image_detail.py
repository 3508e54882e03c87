"""Sharpness and complexity of an image, as guards against degenerate diversity.

An optimizer can increase diversity by blur (DreamSim) or plain backgrounds (color histograms); see the limitations of
It's Never Too Late, https://arxiv.org/abs/2601.00090. A lower bound on these two rewards prevents both.
"""

import torch.nn.functional as F
from torch import Tensor

from ..contract.registry import register_reward
from ..contract.reward import Reward

PLAIN_VARIANCE = 4e-4  # a standard deviation of 5 gray levels out of 255, which is barely visible
DETAIL_GRID = 16


@register_reward("sharpness")
class Sharpness(Reward):
    """Fraction of high frequencies, `Σ |∇x|² / (8 Σ (x - mean)²)` over pixels and channels, in [0, 1).

    ∇ denotes differences of neighbors. A wave of (u, v) cycles per pixel has the weight (sin² πu + sin² πv) / 2: from
    0 for the lowest frequencies to 1 for a checkerboard, whatever the contrast. Blur lowers the value because it
    attenuates high frequencies more. The variance of barely visible noise is added to the denominator, so a plain image
    is not sharp.

    Upscaling lowers the value, so compare images of the same size. Noise is sharp: the value is useful as a lower
    bound, not as a measure of quality.
    """

    name = "sharpness"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        across, down = (images.diff(dim=axis).square().sum((1, 2, 3)) for axis in (-1, -2))
        centered = images - images.mean((-2, -1), keepdim=True)
        spread = centered.square().mean((1, 2, 3)) + PLAIN_VARIANCE
        return (across + down) / (8 * spread * images[0].numel())


@register_reward("complexity")
class Complexity(Reward):
    """Fraction of the area that is not plain: the mean of `v / (v + 0.02²)` over 16 × 16 cells, in [0, 1).

    v is the variance of a cell's pixels around their mean color; cells are at least 4 × 4 pixels. An object in front of
    a plain background scores about the fraction that it covers. The value hardly depends on the resolution or on
    slight blur, which `Sharpness` detects. Noise of more than 5 gray levels counts as content.
    """

    name = "complexity"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = (max(1, min(DETAIL_GRID, side // 4)) for side in images.shape[-2:])
        centered = images - images.mean((-2, -1), keepdim=True)  # less cancellation in the variance below
        means, squares = (F.adaptive_avg_pool2d(each, (height, width)) for each in (centered, centered.square()))
        variance = (squares - means.square()).mean(1).clamp_min(0)
        return (variance / (variance + PLAIN_VARIANCE)).mean((1, 2))
