"""Differentiable image preprocessing, equal to the PIL image processors to one grey level."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ImageProcessingMixin

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resample = Literal["bicubic", "bilinear"]
PIL_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for numerical checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamp to [0, 1] in the forward pass; the gradient passes as if there were no clamp."""
    return x + (x.clamp(0, 1) - x).detach()


def resize(images: Tensor, size: tuple[int, int], resample: Resample = "bicubic", single_pass: bool = False) -> Tensor:
    """Resize (B, C, H, W) images in [0, 1] to `size` = (height, width), antialiased, in float32 or more.

    Pillow resizes uint8 images in two passes, each of which is rounded and clipped. Doing the same on float images,
    without the rounding, agrees with it to 1.13/255 in the worst case. One unclamped pass (`single_pass=True`, what
    torchvision and ReNO do on float tensors) is off by up to 22/255 on sharp edges.
    """
    images = at_least_float32(images)
    if single_pass:
        return F.interpolate(images, size, mode=resample, antialias=True, align_corners=False)
    # The clamps are straight-through: in a saturated area the resized values lie at 1 plus or minus a rounding error,
    # and a hard clamp would drop the gradient of every pixel that was rounded up, so it could never darken again.
    for target in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        images = F.interpolate(images, target, mode=resample, antialias=True, align_corners=False)
        images = straight_through_clamp(images)
    return images


def first_pass_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """What the first of Pillow's two passes makes of (height, width) on the way to `size`.

    The width goes first, unless the height loses more than twice as many pixels (since Pillow 13). The order is visible
    because of the clipping in between: up to 13/255 on a checkerboard.
    """
    if height - size[0] > max(0, 2 * (width - size[1])):
        return size[0], width
    return height, size[1]


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """The (height, width) that brings the shorter side to `edge`; the longer one is truncated, as transformers does."""
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre crop of (..., H, W) to `size`; a side that is too short is padded with zeros, as transformers does."""
    (height, width), (crop_height, crop_width) = images.shape[-2:], size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return F.pad(images, (-left, crop_width - width + left, -top, crop_height - height + top))


def longest_edge_pad(images: Tensor, edge: int = 224) -> Tensor:
    """Bring the longer side to `edge` and pad with zeros to a square: the preprocessing of HPSv2.

    One pass without a clamp, since the original resizes float tensors.
    Source: https://github.com/tgxs002/HPSv2, `ResizeMaxSize`.
    """
    scale = edge / max(images.shape[-2:])
    size = (round(images.shape[-2] * scale), round(images.shape[-1] * scale))
    images = resize(images, size, single_pass=True)
    top, left = (edge - size[0]) // 2, (edge - size[1]) // 2
    return F.pad(images, (left, edge - size[1] - left, top, edge - size[0] - top))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images - mean) / std` per channel of (B, C, H, W)."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ImageTransform:
    """Images (B, 3, H, W) in [0, 1] -> the pixels a vision tower expects, in float32. The defaults are CLIP's.

    Args:
        size: the shorter side's length, an exact (height, width), or None not to resize.
        crop: (height, width) of the centre crop, or None.
        mean, std: per channel, or None not to normalise.
        resample: the filter, always antialiased.
        single_pass: resize as float-tensor code does (one pass, no clamp) and not as Pillow does.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    resample: Resample = "bicubic"
    single_pass: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        images = at_least_float32(images)
        if not self.single_pass:
            # Decoders overshoot. A hard clamp would give those pixels no gradient, and they would stay saturated.
            images = straight_through_clamp(images)
        size = self.size
        if isinstance(size, int):
            size = shortest_edge(images.shape[-2], images.shape[-1], size)
        if size is not None:
            images = resize(images, size, self.resample, self.single_pass)
        if self.crop is not None:
            images = center_crop(images, self.crop)
        if self.mean is not None and self.std is not None:
            images = normalize(images, self.mean, self.std)
        return images

    def as_in_reno(self) -> "ImageTransform":
        """What ReNO's released code does in place of this transform: the same in one unclamped pass."""
        return replace(self, single_pass=True)

    @classmethod
    def from_processor_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "ImageTransform":
        """Read a checkpoint's image processor settings; what they leave out is as in transformers' CLIP processor.

        Args:
            config: the settings as a dict, or the Hub id or folder that holds `preprocessor_config.json`.

        Raises:
            ValueError: for a `size` or `resample` that has no differentiable equivalent here.
            OSError: when there is no such file.
        """
        if not isinstance(config, Mapping):
            config, _ = ImageProcessingMixin.get_image_processor_dict(
                config, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        size = processor_size(config.get("size", 224))
        # Processors that squash to an exact size (BLIP, SigLIP) leave `do_center_crop` out and do not crop.
        cropped = config.get("do_center_crop", isinstance(size, int))
        return cls(
            size=size if config.get("do_resize", True) else None,
            crop=processor_crop(config.get("crop_size", 224)) if cropped else None,
            mean=tuple(config.get("image_mean", CLIP_MEAN)) if config.get("do_normalize", True) else None,
            std=tuple(config.get("image_std", CLIP_STD)) if config.get("do_normalize", True) else None,
            resample=processor_resample(config.get("resample", 3)),
        )


@dataclass(frozen=True)
class PadTransform:
    """HPSv2's pixels: the longer side to `size`, black to a square, CLIP's normalisation, float32.

    As in the original, one pass without a clamp. See `longest_edge_pad`.

    Args:
        size: the side of the square.
        mean, std: per channel.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(longest_edge_pad(images, self.size), self.mean, self.std)

    def as_in_reno(self) -> ImageTransform:
        """What ReNO's released code does in place of this transform: it crops, as for every other reward."""
        return ImageTransform(self.size, (self.size, self.size), self.mean, self.std, single_pass=True)


def processor_size(size: int | Mapping[str, int | None]) -> int | tuple[int, int]:
    """The `size` of a processor config: an int for the shorter side, a (height, width) for an exact size."""
    if isinstance(size, int):
        return size
    given = {key: value for key, value in size.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(
        f"Expected the image processor's `size` to be an int, {{'shortest_edge'}} or {{'height', 'width'}}, but got "
        f"{size}. Pass your own `image_transform` to the reward."
    )


def processor_crop(size: int | Mapping[str, int]) -> tuple[int, int]:
    """The `crop_size` of a processor config as (height, width)."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def processor_resample(resample: int) -> Resample:
    """The `resample` code of Pillow as a mode of `torch.nn.functional.interpolate`."""
    if resample not in PIL_RESAMPLE:
        raise ValueError(
            f"Expected the image processor's `resample` to be 2 (bilinear) or 3 (bicubic), but got {resample}. Pass "
            "your own `image_transform` to the reward."
        )
    return PIL_RESAMPLE[resample]
