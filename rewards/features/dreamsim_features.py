"""DreamSim embeddings. Requires the package `dreamsim`."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.transforms import ImageTransform, at_least_float32
from .features import Features, check_no_checkpoint, import_optional, register_features


@register_features("dreamsim")
class DreamSimFeatures(Features):
    """Mean-centered embedding of DreamSim's ensemble, (B, 1792): https://arxiv.org/abs/2306.09344.

    The ensemble has the ViT-B/16 of DINO, CLIP and OpenCLIP, fine-tuned on human judgments of similarity. DreamSim's
    distance is 1 - cos of two embeddings.

    Args:
        model: The first return value of `dreamsim.dreamsim(...)`. Its `embed` expects pixels in [0, 1] and does not
            resize, so images are resized to 224 × 224 here, as by the preprocessing that comes with the model.
    """

    name = "dreamsim"
    license = "mit"
    package = "dreamsim"
    dreamsim_type = "ensemble"
    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        self.image_transform = ImageTransform(size=(224, 224), crop=None, mean=None, std=None)

    def encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        # For a batch of one, `embed` may drop the batch dimension.
        embedding = at_least_float32(model.embed(self.image_transform(images).to(self.dtype))).reshape(len(images), -1)
        return embedding - embedding.mean(1, keepdim=True)

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "DreamSimFeatures":
        """Load the package's model, which downloads its weights from GitHub to `cache_dir` or torch's own cache."""
        check_no_checkpoint(cls, checkpoint)
        package, torch_cache = import_optional("dreamsim"), torch.hub.get_dir()
        folder = hub["cache_dir"] or os.path.join(torch_cache, "dreamsim")
        os.makedirs(folder, exist_ok=True)
        try:
            # `encode` centers in float32. The default device of the package is CUDA.
            model, _ = package.dreamsim(
                device="cpu", cache_dir=folder, dreamsim_type=cls.dreamsim_type, normalize_embeds=False
            )
        finally:
            torch.hub.set_dir(torch_cache)  # the package changes it for the whole process
        return cls(model)


@register_features("dreamsim_dino")
class DreamSimDINOFeatures(DreamSimFeatures):
    """DreamSim's single DINO ViT-B/16, (B, 768), at a third of the cost; used in It's Never Too Late."""

    name = "dreamsim_dino"
    dreamsim_type = "dino_vitb16"
