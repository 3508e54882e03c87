"""Patches of PE-Spatial. Requires the package `timm`."""

from typing import Any

from torch import Tensor, nn

from ..contract.transforms import ImageTransform
from .features import Features, check_no_checkpoint, import_optional, register_features


@register_features("pe_spatial")
class PESpatialFeatures(Features):
    """Patch tokens of PE-Spatial B/16, (B, 1024, 768): https://arxiv.org/abs/2504.13181.

    Meta's Perception Encoder, tuned for where things are: the features for detection, depth and tracking. The whole
    image is resized to 512 × 512, which gives 32 × 32 patches. Compared by cosine, patch by patch.

    Args:
        model: A vision transformer of timm, whose `forward_features` returns `num_prefix_tokens` tokens and then the
            patches in row-major order.
    """

    name = "pe_spatial"
    license = "apache-2.0"
    package = "timm"
    parameter_count = 86_433_792
    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        self.image_transform = ImageTransform(size=(512, 512), crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)

    def encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.forward_features(self.image_transform(images).to(self.dtype))[:, model.num_prefix_tokens :]

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "PESpatialFeatures":
        """Load the package's model, which downloads its weights from the Hub to `cache_dir` or the Hub's cache."""
        check_no_checkpoint(cls, checkpoint)
        name = "vit_pe_spatial_base_patch16_512.fb"
        return cls(
            import_optional("timm").create_model(name, pretrained=True, num_classes=0, cache_dir=hub["cache_dir"])
        )
