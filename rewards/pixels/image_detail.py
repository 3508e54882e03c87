"""How sharp an image is, and how little of it is plain: what an optimiser may not pay for diversity with.

An objective of diversity can be raised by blur (DreamSim) and by plain backgrounds (colour histograms), see the limits
of It's Never Too Late, https://arxiv.org/abs/2601.00090. As a floor, measured on the image itself, both catch it.
"""

import torch.nn.functional as F
from torch import Tensor

from ..contract.registry import register_reward
from ..contract.reward import Reward

PLAIN_VARIANCE = 4e-4  # that of a standard deviation of 5 grey levels of 255, which is hardly seen
DETAIL_GRID = 16


@register_reward("sharpness")
class Sharpness(Reward):
    """The share of high frequencies, `Σ |∇x|² / (8 Σ (x - mean)²)` over pixels and channels, in [0, 1).

    ∇ are the differences of neighbours. A wave of (u, v) cycles per pixel counts by (sin² πu + sin² πv) / 2: 0 for the
    lowest frequencies and 1 for a checkerboard, whatever the contrast. Blur lowers it, since it takes more of the
    higher ones. The variance counts as at least that of hardly visible noise, so a plain image is not sharp.

    A picture enlarged is less sharp: compare pictures of one size. Noise is sharp, so this is a floor, and no measure
    of quality.
    """

    name = "sharpness"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        across, down = (images.diff(dim=axis).square().sum((1, 2, 3)) for axis in (-1, -2))
        centred = images - images.mean((-2, -1), keepdim=True)
        spread = centred.square().mean((1, 2, 3)) + PLAIN_VARIANCE
        return (across + down) / (8 * spread * images[0].numel())


@register_reward("complexity")
class Complexity(Reward):
    """The share of the area that is not plain: the mean of `v / (v + 0.02²)` over 16 × 16 cells, in [0, 1).

    v is the variance of a cell's pixels around their mean colour; cells have at least 4 pixels a side. An object before
    a plain background scores the share that it covers, much the same at any resolution and if it is blurred a little:
    that is what `Sharpness` is for. Noise of more than 5 grey levels counts as content.
    """

    name = "complexity"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = (max(1, min(DETAIL_GRID, side // 4)) for side in images.shape[-2:])
        centred = images - images.mean((-2, -1), keepdim=True)  # squares of smaller numbers lose fewer digits
        means, squares = (F.adaptive_avg_pool2d(each, (height, width)) for each in (centred, centred.square()))
        variance = (squares - means.square()).mean(1).clamp_min(0)
        return (variance / (variance + PLAIN_VARIANCE)).mean((1, 2))
