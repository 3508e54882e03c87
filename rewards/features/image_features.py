"""Features from any vision model of transformers."""

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModel, CLIPVisionModelWithProjection, PreTrainedModel

from ..contract.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from .features import Features, register_features

FeatureKind = Literal["cls", "patch"]

# The DINOv2 input of It's Never Too Late (https://arxiv.org/abs/2601.00090): the whole image resized to 256 × 256,
# which gives 18 × 18 patches of 14 pixels and drops the remainder. The released code does not antialias.
NEVER_TOO_LATE_TRANSFORM = ImageTransform(
    size=(256, 256), crop=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bilinear", single_pass=True
)


class ImageFeatures(Features):
    """Features of a vision model, compared by their cosine, patch by patch for kind "patch".

    "cls" is one vector per image: the image embedding of a dual encoder (CLIP, SigLIP), else the class token (ViT,
    DINOv2, DINOv3), else the pooled output if there is no class token. The pooler of a ViT is not used, because most
    checkpoints have no weights for it. "patch" is the patch tokens, without class and register tokens.

    Args:
        model: A vision model or a dual encoder.
        image_transform: Map from images in [0, 1] to the pixels that the model expects.
        kind: "cls" or "patch"; by default that of the class.

    Raises:
        ValueError: For any other kind.
    """

    kind: FeatureKind = "cls"
    model_class: Any = AutoModel
    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, image_transform: Callable[[Tensor], Tensor], kind: FeatureKind | None = None
    ) -> None:
        super().__init__(model=model)
        self.kind = checked_kind(kind or self.kind)
        self.image_transform = image_transform
        if type(self) is ImageFeatures:
            self.name = type(model).__name__

    def encode(self, images: Tensor) -> Tensor:
        pixels = self.image_transform(images).to(self.model.dtype)
        return self.pooled(pixels) if self.kind == "cls" else self.patches(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Return the "cls" features (B, D) of preprocessed images."""
        encode_image = getattr(self.model, "get_image_features", None)
        if encode_image is not None:
            return encode_image(pixel_values=pixels).pooler_output
        output = self.model(pixel_values=pixels)
        if "image_embeds" in output:  # an image tower with a projection
            return output.image_embeds
        hidden = output.last_hidden_state
        if hidden.ndim == 3 and hidden.shape[1] > self.patch_count(pixels):
            return hidden[:, 0]
        if output.pooler_output is None:
            raise ValueError(
                f"Expected a class token or a pooled output, but {type(self.model).__name__} has none. "
                "Use kind='patch'."
            )
        return output.pooler_output.flatten(1)

    def patches(self, pixels: Tensor) -> Tensor:
        """Return the patch tokens (B, P, D) of preprocessed images in row-major order.

        In `last_hidden_state` they come after the class and register tokens.
        """
        tower = getattr(self.model, "vision_model", self.model)
        hidden = tower(pixel_values=pixels).last_hidden_state
        if hidden.ndim != 3:
            raise ValueError(
                f"Expected a model with patch tokens, but {type(self.model).__name__} has none. Use kind='cls'."
            )
        return hidden[:, -self.patch_count(pixels) :]

    def patch_count(self, pixels: Tensor) -> int:
        """Return the number of whole patches in the images; the remainder at the edges is dropped."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        return (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str] | None = None,
        kind: FeatureKind | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ImageFeatures":
        """Load a model and its preprocessing from a Hub id or a folder, by default with float32 weights."""
        checked_kind(kind or cls.kind)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        source = None if checkpoint is None else os.fspath(checkpoint)
        features = super().from_pretrained(source, **hub, dtype=dtype, device=device)
        features.kind = kind or cls.kind
        return features

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "ImageFeatures":
        if checkpoint is None:
            raise ValueError(f"`{cls.__name__}` has no default checkpoint. Pass a Hub id or a folder.")
        transform = ImageTransform.from_processor_config(checkpoint, **hub)
        return cls(cls.model_class.from_pretrained(checkpoint, dtype=torch.float32, **hub), transform)


def checked_kind(kind: FeatureKind) -> FeatureKind:
    """Return `kind`. Raises `ValueError` if it is not a `FeatureKind`."""
    if kind not in get_args(FeatureKind):
        raise ValueError(f"Expected the features 'cls' or 'patch', but got {kind!r}.")
    return kind


@register_features("dinov2")
class DINOv2Features(ImageFeatures):
    """Class token of DINOv2-base, (B, 768): https://arxiv.org/abs/2304.07193.

    The whole image is resized to 256 × 256, as in It's Never Too Late. The checkpoint's own preprocessing crops the
    central 224 × 224 of 256: 23% of a square image and more of others would have no gradient. For that one,
    `ImageFeatures.from_pretrained("facebook/dinov2-base")`.
    """

    name = "dinov2"
    license = "apache-2.0"
    default_checkpoint = "facebook/dinov2-base"
    parameter_count = 86_580_480

    def as_released(self) -> "DINOv2Features":
        released = copy.copy(self)
        if isinstance(self.image_transform, ImageTransform):
            released.image_transform = dataclasses.replace(self.image_transform, antialias=False)
        return released

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "ImageFeatures":
        features = super().load(checkpoint, hub)
        assert isinstance(features.image_transform, ImageTransform)
        features.image_transform = features.image_transform.of_whole_image()
        return features


@register_features("dinov2_patch")
class DINOv2PatchFeatures(DINOv2Features):
    """Patch tokens of DINOv2-base, (B, 324, 768): the layout-aware features of It's Never Too Late.

    Preprocessed as for `DINOv2Features`: 18 × 18 patches of the whole image.
    """

    name = "dinov2_patch"
    kind = "patch"


@register_features("clip")
class CLIPFeatures(ImageFeatures):
    """Image embedding of OpenAI's CLIP ViT-L/14, (B, 768): https://arxiv.org/abs/2103.00020.

    CLIP-H is the better model, but CLIPScore, PickScore and HPSv2 are CLIP-H or fine-tuned from it, so its features
    would not be held out from the optimized rewards. The text tower is not loaded.
    """

    name = "clip"
    license = "unstated (code: mit)"
    default_checkpoint = "openai/clip-vit-large-patch14"
    parameter_count = 303_966_208
    model_class = CLIPVisionModelWithProjection
