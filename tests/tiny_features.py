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
    ResNetConfig,
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
    PESpatialFeatures,
    SSCDFeatures,
)
from noiseopt.rewards.features.sscd_features import SSCDModel

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 2])
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


class FakePESpatial(nn.Module):
    """Stand-in for timm's model: a class token, then the patches of 512²."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.trunk = randomized(lambda: nn.Conv2d(3, 12, 64, stride=64))

    def forward_features(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 512, 512)
        patches = (8 * self.trunk(pixels)).tanh().flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


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


@torch.no_grad()
def build_sscd() -> SSCDModel:
    """The published weights, with a head that removes what all images have in common, as trained ones do."""
    model = randomized(lambda: SSCDModel(TINY_RESNET, 12))
    model.load_published(published_sscd(), "made weights")
    noise = torch.randn(4, 3, 288, 288, generator=torch.Generator().manual_seed(9))
    common = F.normalize(model.pooled(noise).mean(0), dim=0)
    model.head.weight -= torch.outer(model.head.weight @ common, common)
    model.head.bias.zero_()
    return model


def published_sscd(channels: tuple[int, ...] = (8, 16), depths: tuple[int, ...] = (1, 2), size: int = 12):
    """Random weights of a tiny SSCD, by the names of torchvision's ResNet."""
    generator, state = torch.Generator().manual_seed(3), {}

    def convolution(name: str, norm: str, out: int, into: int, kernel: int) -> None:
        scale = (2 / (into * kernel**2)) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(out, into, kernel, kernel, generator=generator)
        state[f"{norm}.weight"] = 0.5 + torch.rand(out, generator=generator)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(out, generator=generator)
        state[f"{norm}.running_mean"] = 0.1 * torch.randn(out, generator=generator)
        # mostly below 0, because means of many activations hardly tell noise from noise
        state[f"{norm}.bias"] = 0.1 * torch.randn(out, generator=generator) - 0.85
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("backbone.conv1", "backbone.bn1", 4, 3, 7)
    into = 4
    for stage, (out, depth) in enumerate(zip(channels, depths, strict=True), 1):
        for number in range(depth):
            layer, inner = f"backbone.layer{stage}.{number}", out // 4
            for place, (to, of, kernel) in enumerate(((inner, into, 1), (inner, inner, 3), (out, inner, 1)), 1):
                convolution(f"{layer}.conv{place}", f"{layer}.bn{place}", to, of, kernel)
            if into != out:
                convolution(f"{layer}.downsample.0", f"{layer}.downsample.1", out, into, 1)
            into = out
    state["backbone.fc.weight"] = torch.randn(size, into, generator=generator) / into**0.5
    state["backbone.fc.bias"] = 0.1 * torch.randn(size, generator=generator)
    return state


TINY_FEATURES: dict[str, Callable[[], Features]] = {
    "clip": lambda: CLIPFeatures(build_clip_tower(), ImageTransform(size=32, crop=(32, 32))),
    "dinov2": lambda: DINOv2Features(build_dinov2(), TRANSFORM),
    "dinov2_patch": lambda: DINOv2PatchFeatures(build_dinov2(), TRANSFORM),
    "dreamsim": lambda: DreamSimFeatures(FakeDreamSim()),
    "dreamsim_dino": lambda: DreamSimDINOFeatures(FakeDreamSim()),
    "lpips": lambda: LPIPSFeatures(FakeLPIPS()),
    "lpips_alex": lambda: LPIPSAlexFeatures(FakeLPIPS()),
    "pe_spatial": lambda: PESpatialFeatures(FakePESpatial()),
    "sscd": lambda: SSCDFeatures(build_sscd()),
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
