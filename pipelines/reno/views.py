"""Random views of images: small changes that should not affect a reward."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

VIEW_SHIFT = 0.05  # of the image's side
VIEW_ZOOM = 0.05
VIEW_NOISE = 0.03  # standard deviation, pixels in [0, 1]


def random_views(images: Tensor, count: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Return slightly shifted, zoomed and noisy copies of the images, differentiably.

    The gradient of a reward averaged over such views lacks the patterns that please one exact grid of pixels, which is
    how reward hacking begins ("expectation over transformation", Athalye et al., https://arxiv.org/abs/1707.07397).

    Args:
        images: (B, 3, H, W) in [0, 1], or videos (B, F, 3, H, W), whose frames move together.
        count: How many views.
        seeds: B integers: the views of an image depend on its own seed alone.

    Yields:
        `count` tensors of that shape in [0, 1], moved by up to 5% of the side, zoomed by up to 5%, with noise of 0.03.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(count):
        chance = torch.stack([torch.rand(3, generator=stream) for stream in streams]) * 2 - 1
        grain = torch.stack([torch.randn(images.shape[1:], generator=stream) for stream in streams])
        pictures = images.flatten(0, -4)
        affine = torch.zeros(len(images), 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 + VIEW_ZOOM * chance[:, 0]
        affine[:, :, 2] = 2 * VIEW_SHIFT * chance[:, 1:]  # the grid of an image spans 2
        affine = affine.repeat_interleave(len(pictures) // len(images), 0)
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False).to(images)
        moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False).view(images.shape)
        yield (moved + VIEW_NOISE * grain.to(images)).clamp(0, 1)
