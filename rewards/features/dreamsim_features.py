"""DreamSim embeddings. Needs the package `dreamsim`."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.transforms import ImageTransform, at_least_float32
from .features import Features, check_no_checkpoint, import_optional, register_features


@register_features("dreamsim")
class DreamSimFeatures(Features):
    """The mean-centred embedding of DreamSim's ensemble (DINO, CLIP and OpenCLIP ViT-B/16 tuned to human judgements of
    similarity), (B, 1792); DreamSim's distance is 1 - cos of two of them: https://arxiv.org/abs/2306.09344.

    Args:
        model: what `dreamsim.dreamsim(...)` returns first. Its `embed` takes pixels in [0, 1] and does not resize:
            images are squashed to 224² here, as by the function that comes with the model.
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
        # A batch of one may come back without its batch dimension.
        embedding = at_least_float32(model.embed(self.image_transform(images).to(self.dtype))).reshape(len(images), -1)
        return embedding - embedding.mean(1, keepdim=True)

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "DreamSimFeatures":
        """The package downloads its weights from GitHub, to `cache_dir` or beside what torch downloads."""
        check_no_checkpoint(cls, checkpoint)
        package, torch_cache = import_optional("dreamsim"), torch.hub.get_dir()
        folder = hub["cache_dir"] or os.path.join(torch_cache, "dreamsim")
        os.makedirs(folder, exist_ok=True)
        try:
            # Centring is done here, in float32; the package's default device is CUDA.
            model, _ = package.dreamsim(
                device="cpu", cache_dir=folder, dreamsim_type=cls.dreamsim_type, normalize_embeds=False
            )
        finally:
            torch.hub.set_dir(torch_cache)  # the package redirects it for the whole process
        return cls(model)


@register_features("dreamsim_dino")
class DreamSimDINOFeatures(DreamSimFeatures):
    """DreamSim's single DINO ViT-B/16, (B, 768): a third of the cost. The one of It's Never Too Late."""

    name = "dreamsim_dino"
    dreamsim_type = "dino_vitb16"
