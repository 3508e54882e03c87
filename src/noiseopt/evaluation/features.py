"""Features of images from any vision model of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ..rewards.reward import check_images
from ..rewards.transforms import ImageTransform

FeatureKind = Literal["cls", "patch"]


class ImageFeatures(nn.Module):
    """Images to features, with a gradient to the images; the model is frozen.

    "cls" is one vector an image: what the model compares with texts where it has a text side (CLIP, SigLIP), else its
    first token (ViT, DINOv2, DINOv3), else its pooled output where it has no such token. The pooler of a ViT is left
    out: most checkpoints have no weights for it. "patch" is the tokens of the patches, without class and register
    tokens.

    Args:
        model: a vision model, or a dual encoder.
        image_transform: images in [0, 1] -> the pixels that it expects.
        kind: "cls" or "patch".
    """

    def __init__(
        self, model: PreTrainedModel, image_transform: Callable[[Tensor], Tensor], kind: FeatureKind = "cls"
    ) -> None:
        super().__init__()
        if kind not in get_args(FeatureKind):
            raise ValueError(f"Expected the features 'cls' or 'patch', but got {kind!r}.")
        self.model = model.requires_grad_(False)
        self.image_transform = image_transform
        self.kind = kind
        self.eval()

    def train(self, mode: bool = True) -> ImageFeatures:
        """Stay in evaluation mode: features are measurements."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], on any device, to features (B, D) or (B, P, D), float32."""
        check_images(images, f"the features of {self.name}")
        pixels = self.image_transform(images.to(self.model.device)).to(self.model.dtype)
        features = self.pooled(pixels) if self.kind == "cls" else self.patches(pixels)
        return features.float()

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, D), the "cls" features of preprocessed images."""
        encode_image = getattr(self.model, "get_image_features", None)
        if encode_image is not None:
            return encode_image(pixel_values=pixels).pooler_output
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state
        if hidden.ndim == 3 and hidden.shape[1] > self.patch_count(pixels):
            return hidden[:, 0]
        if output.pooler_output is None:
            raise ValueError(f"Expected a class token or a pooled output, but {self.name} has none. Use kind='patch'.")
        return output.pooler_output.flatten(1)

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, P, D), the patch tokens of preprocessed images, row by row; class and register tokens come first."""
        tower = getattr(self.model, "vision_model", self.model)
        hidden = tower(pixel_values=pixels).last_hidden_state
        if hidden.ndim != 3:
            raise ValueError(f"Expected a model with patch tokens, but {self.name} has none. Use kind='cls'.")
        return hidden[:, -self.patch_count(pixels) :]

    def patch_count(self, pixels: Tensor) -> int:
        """How many patches the images are cut into; what is left over at the edges is dropped."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        return (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        kind: FeatureKind = "cls",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> ImageFeatures:
        """Load a model and its preprocessing from a Hub id or a folder; `dtype` of the weights, by default float32."""
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        transform = ImageTransform.from_processor_config(checkpoint, **hub)
        model = AutoModel.from_pretrained(checkpoint, dtype=dtype or torch.float32, **hub)
        return cls(model.to(device) if device is not None else model, transform, kind)
