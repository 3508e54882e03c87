"""SSCD, a descriptor by which copies of an image are recognized."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from ..contract.checkpoints import checkpoint_path, load_strictly, read_state_dict
from ..contract.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, at_least_float32
from .features import Features, check_folder, register_features

GEM_POWER = 3.0
# names in torchvision's ResNet, in which the weights are published -> names in that of transformers
RENAMED = (
    (r"^backbone\.fc\.", "head."),
    (r"^backbone\.conv1\.", "trunk.embedder.embedder.convolution."),
    (r"^backbone\.bn1\.", "trunk.embedder.embedder.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)
COUNTED = (  # from 1 -> from 0
    (r"\.conv(\d)\.", ".layer.{}.convolution."),
    (r"\.bn(\d)\.", ".layer.{}.normalization."),
    (r"^backbone\.layer(\d)\.", "trunk.encoder.stages.{}.layers."),
)


class SSCDModel(nn.Module):
    """A ResNet with generalized mean pooling, `(mean x³)^⅓` over positions, and a linear layer.

    Args:
        config: Of the ResNet; by default a ResNet-50, with the stride in the 3 × 3 convolutions, as in torchvision.
        dimension: The size of the descriptor.
    """

    def __init__(self, config: ResNetConfig | None = None, dimension: int = 512) -> None:
        super().__init__()
        config = config or ResNetConfig()
        widths: Any = config.hidden_sizes
        self.trunk = ResNetModel(config)
        self.head = nn.Linear(widths[-1], dimension)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels `(B, 3, H, W)` to unit descriptors `(B, D)`."""
        return F.normalize(at_least_float32(self.head(self.pooled(pixels).to(pixels.dtype))), dim=-1)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Return the generalized means over positions `(B, C)`, computed in float32 or more."""
        found = at_least_float32(self.trunk(pixels).last_hidden_state)
        return found.clamp_min(1e-6).pow(GEM_POWER).mean((-2, -1)).pow(1 / GEM_POWER)

    def load_published(self, state: dict[str, Tensor], source: str) -> None:
        """Load weights by their published names. Raises `ValueError` for others, and for missing ones."""
        load_strictly(self, {renamed(name): value for name, value in state.items()}, source)


def renamed(name: str) -> str:
    """Return the name of a published weight in `SSCDModel`."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    for pattern, replacement in COUNTED:
        if found := re.search(pattern, name):
            name = name.replace(found[0], replacement.format(int(found[1]) - 1))
    return name


@register_features("sscd")
class SSCDFeatures(Features):
    """Descriptor of SSCD, (B, 512), by which copies of an image are recognized: https://arxiv.org/abs/2202.10261.

    A similarity, that is, cosine, above 0.75 is a copy with a precision of 90% among photographs, so it tells whether
    images of a set repeat each other. The model is `sscd_disc_mixup`, which its authors recommend; the shorter side is
    resized to 288. The weights are not on the Hub: download `sscd_disc_mixup.torchvision.pt` from
    https://dl.fbaipublicfiles.com/sscd-copy-detection/ and pass the folder that contains it. Only tensors are read
    from it, so no code of the file runs.

    Args:
        model: The ResNet with its head.
    """

    name = "sscd"
    license = "mit"
    weights_file = "sscd_disc_mixup.torchvision.pt"
    published_at = "https://dl.fbaipublicfiles.com/sscd-copy-detection/"
    parameter_count = 24_557_120
    model: SSCDModel

    def __init__(self, model: SSCDModel) -> None:
        super().__init__(model=model)
        self.image_transform = ImageTransform(
            size=288, crop=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bilinear"
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.model(self.image_transform(images).to(self.dtype))

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "SSCDFeatures":
        check_folder(cls, checkpoint)
        path = checkpoint_path(str(checkpoint), str(cls.weights_file), hub)
        with torch.device("meta"):
            model = SSCDModel()
        model.to_empty(device="cpu").load_published(read_state_dict(path), path.name)
        return cls(model)
