"""PE-Spatial: its patches without the class token, and how the package is loaded."""

import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_features import FakePESpatial

from noiseopt.rewards import AutoFeatures, PESpatialFeatures, resize

IMAGES = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0))


def test_features_are_the_patches_of_the_whole_image_at_512_squares():
    model = FakePESpatial()
    tokens = model.forward_features(2 * resize(IMAGES, (512, 512)) - 1)
    found = PESpatialFeatures(model)(IMAGES)
    assert tokens.shape == (2, 1 + 64, 12) and found.shape == (2, 64, 12)
    torch.testing.assert_close(found, tokens[:, 1:], rtol=1e-4, atol=1e-5)


def test_the_package_gives_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []

    def create_model(model_name, pretrained=False, cache_dir=None, **settings):
        asked.append((model_name, pretrained, cache_dir, settings))
        return FakePESpatial()

    package = types.ModuleType("timm")
    package.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", package)
    assert isinstance(AutoFeatures.from_pretrained("pe_spatial", cache_dir=str(tmp_path)), PESpatialFeatures)
    assert asked == [("vit_pe_spatial_base_patch16_512.fb", True, str(tmp_path), {"num_classes": 0})]
    with pytest.raises(ValueError, match="Expected no checkpoint for the features 'pe_spatial'"):
        PESpatialFeatures.from_pretrained("org/name")


def test_without_the_package_it_says_what_to_install_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"package `timm`.*torchvision build that matches.*noiseopt\[timm\]"):
        AutoFeatures.from_pretrained("pe_spatial")
