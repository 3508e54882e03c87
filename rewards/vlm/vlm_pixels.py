"""Differentiable `pixel_values` of vision-language models, from the settings of their image processors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract.transforms import ImageTransform, at_least_float32, first_pass_size, straight_through_clamp


def vlm_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """Differentiable counterpart of an image processor, for (B, 3, H, W) images in [0, 1].

    Resize, crop, mean and standard deviation follow the settings of the processor. Each image is one tile: the option
    of some processors to split large images is off.

    Returns:
        `pixel_values` in the layout of the processor, in float32 or more: (B, 3, h, w); (B * patches, values per patch)
        for Qwen; (B, 1, 3, h, w) for Idefics 3 and SmolVLM.

    Raises:
        ValueError: For a processor class that is not in `PIXEL_LAYOUTS`.
    """
    return PIXEL_LAYOUTS[image_processor_kind(image_processor)](images, image_processor)


def image_processor_kind(image_processor: Any) -> str:
    """Return the class name without the backend: "CLIPImageProcessor" for `CLIPImageProcessorPil`, too.

    Raises:
        ValueError: If the class is not in `PIXEL_LAYOUTS`.
    """
    kind = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if kind not in PIXEL_LAYOUTS:
        raise ValueError(
            f"Expected an image processor out of {sorted(PIXEL_LAYOUTS)}, but got {kind}. Pass `preprocess=`, a "
            "function from images (B, 3, H, W) in [0, 1] to `pixel_values`."
        )
    return kind


def one_tile(images: Tensor, image_processor: Any) -> Tensor:
    """Map (B, 3, H, W) to (B, 3, h, w): shorter side and crop as in CLIP, or an exact size, as configured."""
    return ImageTransform.from_processor_config(image_processor.to_dict())(images)


def qwen_patches(images: Tensor, image_processor: Any) -> Tensor:
    """Map (B, 3, H, W) to the patches of Qwen2-VL and later, (B * gh * gw, 3 * 2 * p * p), image by image."""
    settings = image_processor.to_dict()
    patch, merge, bounds = settings["patch_size"], settings["merge_size"], settings["size"]
    height, width = images.shape[-2:]
    size = smart_resize(height, width, patch * merge, bounds["shortest_edge"], bounds["longest_edge"])
    settings["size"] = {"height": size[0], "width": size[1]}
    pixels = ImageTransform.from_processor_config(settings)(images)
    return patchify(pixels, patch, merge, settings["temporal_patch_size"])


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) to which Qwen-VL resizes an image.

    Both are multiples of `factor`, their area is bounded, and the aspect ratio is about that of the image.

    Source: `smart_resize` of transformers, `models/qwen2_vl/image_processing_qwen2_vl.py`.
    """
    size = (round(height / factor) * factor, round(width / factor) * factor)
    if size[0] * size[1] > max_pixels:
        shrink = factor * math.sqrt(height * width / max_pixels)
        return max(1, math.floor(height / shrink)) * factor, max(1, math.floor(width / shrink)) * factor
    if size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width)) / factor
        return math.ceil(height * grow) * factor, math.ceil(width * grow) * factor
    return size


def patchify(pixels: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Map (B, C, H, W) to (B * gh * gw, C * temporal * patch * patch), in the order of Qwen's processors.

    The `merge` × `merge` patches that the model merges are adjacent; an image is repeated as `temporal` frames.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, patch, patch)
    return blocks.reshape(batch * rows * columns, channels * temporal * patch * patch)


def idefics_tile(images: Tensor, image_processor: Any) -> Tensor:
    """Map (B, 3, H, W) to (B, 1, 3, e, e): resized to the longest edge, then to a square, without image splitting."""
    settings = image_processor.to_dict()
    edge = settings["max_image_size"]["longest_edge"]
    pixels = straight_through_clamp(at_least_float32(images))
    whole = longest_edge_even(images.shape[-2], images.shape[-1], settings["size"]["longest_edge"])
    for size in (whole, (edge, edge)):
        pixels = lanczos_resize(pixels, size)
    square = {"height": edge, "width": edge}
    finish = ImageTransform.from_processor_config({**settings, "size": square, "do_resize": False, "resample": 3})
    return finish(pixels)[:, None]


def longest_edge_even(height: int, width: int, edge: int) -> tuple[int, int]:
    """Return the (height, width) whose longer side is `edge`; the other is rounded down, then up to an even number.

    Source: `_resize_output_size_rescale_to_max_len` of transformers, `models/idefics3/image_processing_idefics3.py`.
    """
    shorter = int(edge / (width / height)) if width >= height else int(edge * (width / height))
    shorter = max(1, shorter + shorter % 2)
    return (shorter, edge) if width >= height else (edge, shorter)


def lanczos_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) in [0, 1] with Pillow's Lanczos filter, in two passes, each clamped like uint8."""
    for height, width in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        down, across = lanczos_weights(images.shape[-2], height), lanczos_weights(images.shape[-1], width)
        images = straight_through_clamp(down.to(images) @ images @ across.to(images).T)
    return images


def lanczos_weights(length: int, target: int) -> Tensor:
    """Return (target, length) float64 weights, a windowed sinc of three lobes, whose rows sum to 1."""
    scale = length / target
    centers = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    offsets = (torch.arange(length, dtype=torch.float64) + 0.5 - centers[:, None]) / max(scale, 1.0)
    weights = torch.where(offsets.abs() < 3, torch.sinc(offsets) * torch.sinc(offsets / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)


# Class name of an image processor, without its backend -> its differentiable counterpart
PIXEL_LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "BlipImageProcessor": one_tile,
    "CLIPImageProcessor": one_tile,
    "Gemma3ImageProcessor": one_tile,
    "GotOcr2ImageProcessor": one_tile,
    "Idefics3ImageProcessor": idefics_tile,
    "Qwen2VLImageProcessor": qwen_patches,
    "SiglipImageProcessor": one_tile,
    "SmolVLMImageProcessor": idefics_tile,
}
