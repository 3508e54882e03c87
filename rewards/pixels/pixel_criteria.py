"""Brightness and JPEG compressibility."""

import io

import torch
from PIL import Image
from torch import Tensor

from ..contract.registry import register_reward
from ..contract.reward import Reward

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
JPEG_QUALITY = 95


@register_reward("brightness")
class Brightness(Reward):
    """Mean luma of the pixels, `0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601, as Pillow's mode "L"), in [0, 1]."""

    name = "brightness"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((-2, -1)) @ images.new_tensor(LUMA_WEIGHTS)


@register_reward("jpeg_compressibility")
class JPEGCompressibility(Reward):
    """Negated size of the image as a JPEG file of quality 95, in kilobytes (1000 bytes). No gradient.

    DDPO: https://arxiv.org/abs/2305.13301. The size grows with the area and varies slightly with Pillow's JPEG library.
    """

    name = "jpeg_compressibility"
    requires_prompt = False
    differentiable = False

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -jpeg_kilobytes(images)


@register_reward("jpeg_incompressibility")
class JPEGIncompressibility(Reward):
    """Size of the image as a JPEG file of quality 95, in kilobytes (1000 bytes): detail or noise. No gradient.

    DDPO: https://arxiv.org/abs/2305.13301.
    """

    name = "jpeg_incompressibility"
    requires_prompt = False
    differentiable = False

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return jpeg_kilobytes(images)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Return the JPEG file sizes (B,) of (B, 3, H, W) images in [0, 1], float32, in thousands of bytes."""
    arrays = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)
