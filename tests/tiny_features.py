"""Every registered feature map with weights as a tiny random model of its real layout, built or written to disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_clip_rewards import randomized
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from noiseopt.rewards import (
    AutoFeatures,
    CLIPFeatures,
    DINOv2Features,
    DINOv2PatchFeatures,
    DreamSimDINOFeatures,
    DreamSimFeatures,
    Features,
    ImageTransform,
    LPIPSAlexFeatures,
    LPIPSFeatures,
)

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SHORTEST = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
# the whole image, resized to what the processor in `publish_dinov2` crops the center of
TRANSFORM = ImageTransform(
    size=(36, 36), crop=None, mean=(0.4,) * 3, std=(0.3,) * 3, resample="bilinear", single_pass=True
)


class FakeLinear(nn.Module):
    """Non-negative weights of channels, behind the dropout of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
        nn.init.uniform_(self.model[-1].weight)


class FakeLPIPS(nn.Module):
    """Stand-in for `lpips.LPIPS`: `scaling_layer`, `net`, and `lins` whose `model` ends in a 1 × 1 convolution."""

    def __init__(self, net: str = "vgg", version: str = "0.1", verbose: bool = True) -> None:
        super().__init__()
        self.kind, self.version = net, version
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.lins = nn.ModuleList(FakeLinear(channels) for channels in (6, 8))

    def scaling_layer(self, images: Tensor) -> Tensor:
        return (images - torch.tensor([-0.030, -0.088, -0.188]).to(images)[:, None, None]) / 0.45

    def net(self, pixels: Tensor) -> list[Tensor]:
        shallow = F.relu(self.first(pixels))
        return [shallow, F.relu(self.second(shallow))]


class FakeDreamSim(nn.Module):
    """Stand-in for DreamSim's model: `embed` takes pixels of 224² and squeezes a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = randomized(lambda: nn.Conv2d(3, 12, 32, stride=32))

    def embed(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 224, 224)
        return (8 * self.trunk(pixels - 0.5)).tanh().mean((-2, -1)).squeeze() + 0.3


def build_dinov2() -> Dinov2Model:
    return randomized(lambda: Dinov2Model(Dinov2Config(**TOWER, image_size=32, patch_size=8)))


def build_whole_clip() -> CLIPModel:
    text = TOWER | {"vocab_size": 9, "max_position_embeddings": 4}
    vision = TOWER | {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    return randomized(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def build_clip_tower() -> CLIPVisionModelWithProjection:
    """The image side of `build_whole_clip`."""
    model = build_whole_clip()
    tower = CLIPVisionModelWithProjection(model.config.vision_config).eval()
    tower.load_state_dict({name: value for name, value in model.state_dict().items() if name in tower.state_dict()})
    return tower


TINY_FEATURES: dict[str, Callable[[], Features]] = {
    "clip": lambda: CLIPFeatures(build_clip_tower(), ImageTransform(size=32, crop=(32, 32))),
    "dinov2": lambda: DINOv2Features(build_dinov2(), TRANSFORM),
    "dinov2_patch": lambda: DINOv2PatchFeatures(build_dinov2(), TRANSFORM),
    "dreamsim": lambda: DreamSimFeatures(FakeDreamSim()),
    "dreamsim_dino": lambda: DreamSimDINOFeatures(FakeDreamSim()),
    "lpips": lambda: LPIPSFeatures(FakeLPIPS()),
    "lpips_alex": lambda: LPIPSAlexFeatures(FakeLPIPS()),
}


def build_features(name: str) -> Features:
    """Features with weights from tiny random modules; those without are loaded as a user would."""
    return TINY_FEATURES[name]() if name in TINY_FEATURES else AutoFeatures.from_pretrained(name)


def publish_dinov2(root: Path) -> None:
    folder = root / "facebook/dinov2-base"
    build_dinov2().save_pretrained(folder)
    BitImageProcessorPil(**SHORTEST, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)


def publish_clip(root: Path) -> None:
    """The whole model, as it is published: both towers."""
    folder = root / "openai/clip-vit-large-patch14"
    build_whole_clip().save_pretrained(folder)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)


# Hub id -> what writes the same tiny model to `root/<Hub id>`, in the published layout
PUBLISHED_FEATURES: dict[str, Callable[[Path], None]] = {
    "facebook/dinov2-base": publish_dinov2,
    "openai/clip-vit-large-patch14": publish_clip,
}
