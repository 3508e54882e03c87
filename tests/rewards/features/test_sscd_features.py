"""SSCD: against torchvision's ResNet written out, the published names, and how a folder is loaded."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_features import TINY_RESNET, published_sscd
from torch import Tensor

from noiseopt.rewards import AutoFeatures, SSCDFeatures, resize
from noiseopt.rewards.features import sscd_features
from noiseopt.rewards.features.sscd_features import SSCDModel, renamed

IMAGES = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0))


def described(pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The published model: torchvision's ResNet (stride in the 3 × 3 convolutions), GeM of power 3, linear, unit."""

    def step(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        moments = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *moments)

    x = F.max_pool2d(step(pixels, "backbone.conv1", "backbone.bn1", 2).relu(), 3, 2, 1)
    for stage, number in ((1, 0), (2, 0), (2, 1)):
        layer, stride = f"backbone.layer{stage}.{number}", 2 if (stage, number) == (2, 0) else 1
        inner = step(x, f"{layer}.conv1", f"{layer}.bn1").relu()
        inner = step(inner, f"{layer}.conv2", f"{layer}.bn2", stride).relu()
        inner = step(inner, f"{layer}.conv3", f"{layer}.bn3")
        if f"{layer}.downsample.0.weight" in state:
            x = step(x, f"{layer}.downsample.0", f"{layer}.downsample.1", stride)
        x = (x + inner).relu()
    pooled = x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    return F.normalize(F.linear(pooled, state["backbone.fc.weight"], state["backbone.fc.bias"]), dim=1)


def test_features_are_the_descriptor_of_images_whose_shorter_side_is_288():
    pixels = resize(IMAGES, (288, 432), "bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = described((pixels - mean[:, None, None]) / std[:, None, None], published_sscd())
    model = SSCDModel(TINY_RESNET, 12)
    model.load_published(published_sscd(), "made weights")
    found = SSCDFeatures(model)(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_the_default_is_a_resnet_50_by_the_names_of_torchvision():
    with torch.device("meta"):
        model = SSCDModel()
    assert sum(parameter.numel() for parameter in model.parameters()) == SSCDFeatures.parameter_count
    published = published_sscd((256, 512, 1024, 2048), (3, 4, 6, 3), size=512)
    assert {renamed(name) for name in published} == model.state_dict().keys() and len(published) == 320


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sscd_features, "ResNetConfig", lambda: TINY_RESNET)


@pytest.mark.usefixtures("tiny")
def test_a_folder_with_the_published_file_is_loaded(tmp_path: Path):
    state = published_sscd(size=512)
    torch.save(state, tmp_path / "sscd_disc_mixup.torchvision.pt")
    for found in (AutoFeatures.from_pretrained(tmp_path), SSCDFeatures.from_pretrained(str(tmp_path))):
        assert isinstance(found, SSCDFeatures) and found(IMAGES).shape == (2, 512)
        pixels = found.image_transform(IMAGES)
        torch.testing.assert_close(found(IMAGES), described(pixels, state), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_other_weights_are_refused_by_name(tmp_path: Path):
    state = published_sscd(size=512)
    state["backbone.layer9.0.conv1.weight"] = state.pop("backbone.fc.bias")
    torch.save(state, tmp_path / "sscd_disc_mixup.torchvision.pt")
    with pytest.raises(ValueError, match="missing: head.bias; unexpected: trunk.encoder.stages.8.layers.0.layer.0.con"):
        AutoFeatures.from_pretrained(tmp_path)
    torch.save({"model": print}, tmp_path / "sscd_disc_mixup.torchvision.pt")
    with pytest.raises(ValueError, match="cannot be read with `weights_only=True`"):
        AutoFeatures.from_pretrained(tmp_path)


def test_the_name_alone_says_where_the_weights_are(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Download sscd_disc_mixup.torchvision.pt from https://dl.* pass the folder"):
        AutoFeatures.from_pretrained("sscd")
    with pytest.raises(OSError, match="Expected the file sscd_disc_mixup.torchvision.pt in "):
        SSCDFeatures.from_pretrained(str(tmp_path))
