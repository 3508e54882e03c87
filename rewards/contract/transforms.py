"""Differentiable image preprocessing that agrees with the PIL image processors to about one gray level."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, ImageProcessingMixin

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Resample = Literal["bicubic", "bilinear"]
PIL_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
PROBE_SIZES = ((512, 512), (480, 640))
OWN_TRANSFORM = (
    "Load the model yourself and pass `image_transform=`, a function from images (B, 3, H, W) in [0, 1] to the pixels "
    "that it expects."
)
GRAY_LEVELS = 2.5  # twice what Pillow's rounding makes, 1.13, and little beside another filter, size or crop
# Needs torchvision, so it cannot be compared everywhere. It resizes without rounding to gray levels.
DINOV3_PROCESSOR = "DINOv3ViTImageProcessor"
DINOV3_SETTINGS = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
}


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float64 is unchanged, for numerical checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamp to [0, 1] in the forward pass, with the gradient of the identity."""
    return x + (x.clamp(0, 1) - x).detach()


def resize(
    images: Tensor,
    size: tuple[int, int],
    resample: Resample = "bicubic",
    single_pass: bool = False,
    antialias: bool = True,
) -> Tensor:
    """Resize (B, C, H, W) images in [0, 1] to `size` = (height, width), in float32 or more.

    By default the result agrees with Pillow to 1.13/255 in the worst case. Like Pillow, it resizes the two dimensions
    in two passes and clips after each, but without rounding to uint8. A single pass without clamping
    (`single_pass=True`), as torchvision and ReNO do for float tensors, differs by up to 22/255 at sharp edges. Without
    `antialias`, which takes a single pass, a few pixels of a shrunk image count, and the others get no gradient.
    """
    images = at_least_float32(images)
    if single_pass or not antialias:
        return F.interpolate(images, size, mode=resample, antialias=antialias, align_corners=False)
    # Straight-through clamps: in saturated areas the resized values are 1 plus or minus a rounding error, and a hard
    # clamp would stop the gradient of every pixel that was rounded up, so that it could never darken again.
    for target in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        images = F.interpolate(images, target, mode=resample, antialias=True, align_corners=False)
        images = straight_through_clamp(images)
    return images


def first_pass_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) after the first of Pillow's two passes.

    The width is resized first, unless the height loses more than twice as many pixels (since Pillow 13). Because of
    the clipping in between, the order changes pixels by up to 13/255 on a checkerboard.
    """
    if height - size[0] > max(0, 2 * (width - size[1])):
        return size[0], width
    return height, size[1]


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """Return the (height, width) whose shorter side is `edge`; the longer one is rounded down as in transformers."""
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (..., H, W) to `size` at the center, and pad shorter sides with zeros, as in transformers."""
    (height, width), (crop_height, crop_width) = images.shape[-2:], size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return F.pad(images, (-left, crop_width - width + left, -top, crop_height - height + top))


def longest_edge_pad(images: Tensor, edge: int = 224) -> Tensor:
    """Resize the longer side to `edge` and pad to a square with zeros: the preprocessing of HPSv2.

    The resize is a single pass without clamping, because the original resizes float tensors.
    Source: https://github.com/tgxs002/HPSv2, `ResizeMaxSize`.
    """
    scale = edge / max(images.shape[-2:])
    size = (round(images.shape[-2] * scale), round(images.shape[-1] * scale))
    images = resize(images, size, single_pass=True)
    top, left = (edge - size[0]) // 2, (edge - size[1]) // 2
    return F.pad(images, (left, edge - size[1] - left, top, edge - size[0] - top))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return `(images - mean) / std` per channel of (B, C, H, W)."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ImageTransform:
    """Map images (B, 3, H, W) in [0, 1] to the float32 pixels that a vision tower expects. The defaults are CLIP's.

    Args:
        size: The length of the shorter side, an exact (height, width), or None for no resizing.
        crop: (height, width) of the center crop, or None.
        mean: Mean per channel, or None for no normalization.
        std: Standard deviation per channel, or None for no normalization.
        resample: The interpolation filter.
        single_pass: Resize as float tensor code does (one pass, no clamp) instead of as Pillow does.
        antialias: See `resize`.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    resample: Resample = "bicubic"
    single_pass: bool = False
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        images = at_least_float32(images)
        if not self.single_pass:
            # Decoders overshoot [0, 1]. A hard clamp would stop the gradient there, and pixels would stay saturated.
            images = straight_through_clamp(images)
        size = self.size
        if isinstance(size, int):
            size = shortest_edge(images.shape[-2], images.shape[-1], size)
        if size is not None:
            images = resize(images, size, self.resample, self.single_pass, self.antialias)
        if self.crop is not None:
            images = center_crop(images, self.crop)
        if self.mean is not None and self.std is not None:
            images = normalize(images, self.mean, self.std)
        return images

    def as_in_reno(self) -> "ImageTransform":
        """Return the transform that ReNO's released code uses instead, with a single unclamped pass."""
        return replace(self, single_pass=True)

    def of_whole_image(self) -> "ImageTransform":
        """Return a transform without a crop: the image is squeezed to the square that this one resizes a side to."""
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return replace(self, size=size, crop=None, resample="bilinear", single_pass=True)

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
        """Build the transform of an image processor.

        Args:
            config: The settings of the processor as a dict, `processor.to_dict()`, with defaults from transformers'
                CLIP processor. Or the Hub id or folder of a checkpoint: then its processor is loaded, and its pixels of
                a 512 × 512 and a 640 × 480 image are compared with those of the transform.

        Raises:
            ValueError: For a processor without a differentiable equivalent here.
            OSError: If there are no settings of a processor.
        """
        if isinstance(config, Mapping):
            return cls(**geometry_of(config), **normalization_of(config))
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        settings, _ = ImageProcessingMixin.get_image_processor_dict(config, **hub)
        if str(settings.get("image_processor_type")).removesuffix("Fast") == DINOV3_PROCESSOR:
            return cls.from_processor_config({**DINOV3_SETTINGS, **settings})
        try:
            processor = AutoImageProcessor.from_pretrained(config, backend="pil", trust_remote_code=False, **hub)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"Expected an image processor to compare with, but got: {error} {OWN_TRANSFORM}"
            ) from error
        transform = cls.from_processor_config(processor.to_dict())
        check_pixels(transform, processor)
        return transform


@dataclass(frozen=True)
class PadTransform:
    """The preprocessing of HPSv2: `longest_edge_pad` and CLIP's normalization, in float32.

    Args:
        size: The side of the square.
        mean: Mean per channel.
        std: Standard deviation per channel.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(longest_edge_pad(images, self.size), self.mean, self.std)

    def as_in_reno(self) -> ImageTransform:
        """Return the transform that ReNO's released code uses instead: a crop, as for every other reward."""
        return ImageTransform(self.size, (self.size, self.size), self.mean, self.std, single_pass=True)


def geometry_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `size`, `crop` and `resample` of the transform for the settings of an image processor."""
    size: int | tuple[int, int] | None = processor_size(config.get("size", 224))
    # Processors that resize to an exact size (BLIP, SigLIP, ViT) omit `do_center_crop` and do not crop.
    cropped = config.get("do_center_crop", isinstance(size, int))
    crop = processor_crop(config.get("crop_size", 224)) if cropped else None
    kind = str(config.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast")
    # ConvNeXT, whose processor is that of ResNet too, LeViT and PoolFormer: the size is that of the crop.
    if isinstance(size, int) and kind == "ConvNextImageProcessor":
        size, crop = (size, size) if size >= 384 else int(size / config.get("crop_pct", 224 / 256)), (size, size)
    elif isinstance(size, int) and kind == "LevitImageProcessor":
        size = int(256 / 224 * size)
    elif isinstance(size, int) and config.get("crop_pct"):
        size = int(size / config["crop_pct"])
    if not config.get("do_resize", True):
        size = None
    return {"size": size, "crop": crop, "resample": processor_resample(config.get("resample", 3))}


def normalization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `mean` and `std` of the transform, relative to images in [0, 1]: a processor may see [0, 255]."""
    white = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    if not config.get("do_normalize", True):
        return {"mean": None, "std": None} if white == 1 else {"mean": (0.0,) * 3, "std": (1 / white,) * 3}
    given = {"mean": config.get("image_mean", CLIP_MEAN), "std": config.get("image_std", CLIP_STD)}
    each = {name: (value,) * 3 if isinstance(value, int | float) else value for name, value in given.items()}
    return {name: tuple(value / white for value in values) for name, values in each.items()}


def check_pixels(transform: ImageTransform, processor: Any) -> None:
    """Compare a transform with its image processor on noise, to which every detail of a resize matters.

    Raises:
        ValueError: If the two differ by more than the rounding of gray levels.
    """
    scale = 1.0 if transform.std is None else torch.tensor(transform.std)[:, None, None]
    for height, width in PROBE_SIZES:
        noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        try:
            theirs: Tensor = dict(processor(Image.fromarray(noise.numpy()), return_tensors="pt"))["pixel_values"]
        except Exception as error:  # of any type, from processors of pairs, videos or documents
            raise ValueError(
                f"Expected {type(processor).__name__} to make `pixel_values` of an image, but it fails with "
                f"{type(error).__name__}. {OWN_TRANSFORM}"
            ) from error
        ours = transform(noise.movedim(-1, 0)[None] / 255)
        error = float(((ours - theirs).abs() * scale).max()) if ours.shape == theirs.shape else float("inf")
        if not error * 255 <= GRAY_LEVELS:  # NaN too
            raise ValueError(
                f"Expected the pixels of {type(processor).__name__}, {tuple(theirs.shape)} for {width} × {height}, but "
                f"ours, {tuple(ours.shape)}, differ by {error * 255:.3g} of 255 gray levels. {OWN_TRANSFORM}"
            )


def processor_size(size: int | Mapping[str, int | None]) -> int | tuple[int, int]:
    """Convert the `size` of a processor config to an int for the shorter side or an exact (height, width)."""
    if isinstance(size, int):
        return size
    given = {key: value for key, value in size.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(
        f"Expected the image processor's `size` to be an int, {{'shortest_edge'}} or {{'height', 'width'}}, but got "
        f"{size}. {OWN_TRANSFORM}"
    )


def processor_crop(size: int | Mapping[str, int]) -> tuple[int, int]:
    """Convert the `crop_size` of a processor config to (height, width)."""
    if isinstance(size, int):
        return size, size
    if not {"height", "width"} <= size.keys():
        raise ValueError(
            f"Expected the image processor's `crop_size` to be an int or {{'height', 'width'}}, but got {dict(size)}. "
            f"{OWN_TRANSFORM}"
        )
    return size["height"], size["width"]


def processor_resample(resample: int) -> Resample:
    """Convert Pillow's `resample` code to a mode of `torch.nn.functional.interpolate`."""
    if resample not in PIL_RESAMPLE:
        raise ValueError(
            f"Expected the image processor's `resample` to be 2 (bilinear) or 3 (bicubic), but got {resample}. "
            f"{OWN_TRANSFORM}"
        )
    return PIL_RESAMPLE[resample]
