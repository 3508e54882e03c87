"""LPIPS as features: against the formula of the paper, values of the package, and how the package is loaded.

`tests/oracles/lpips_distance.py` compares with the package itself, in an environment of its own, and writes the values.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_features import FakeLinear, FakeLPIPS
from torch import nn

from noiseopt.rewards import AutoFeatures, LPIPSAlexFeatures, LPIPSFeatures, PairwiseDistance


def published(model: FakeLPIPS, image_a: torch.Tensor, image_b: torch.Tensor) -> torch.Tensor:
    """`d(x, x0) = Σ_l 1/(H_l W_l) Σ_hw ‖w_l ⊙ (ŷ_hw − ŷ0_hw)‖²`, equation 1, with weights that are squares already.

    As in the package, version 0.0 has no scaling layer.
    """
    total = torch.zeros(())
    pixels = [2 * image[None] - 1 for image in (image_a, image_b)]
    scaled = pixels if model.version == "0.0" else [model.scaling_layer(each) for each in pixels]
    pairs = zip(*(model.net(each) for each in scaled), strict=True)
    for lin, (a, b) in zip(model.lins, pairs, strict=True):
        a, b = (y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10) for y in (a, b))
        total = total + lin.model((a - b).square()).mean()
    return total


@pytest.mark.parametrize("version", ["0.1", "0.0"])
@pytest.mark.parametrize("size", [(40, 56), (57, 33)], ids=str)
def test_squared_distance_of_the_features_is_lpips(size: tuple[int, int], version: str):
    model = FakeLPIPS(version=version).eval()
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    found = PairwiseDistance(LPIPSFeatures(model))(images[:2], images[2:])
    expected = torch.stack([torch.stack([published(model, a, b) for b in images[2:]]) for a in images[:2]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_equals_the_package_on_its_weights_of_the_channels_and_recorded_activations():
    recorded = load_file(Path(__file__).parent / "data/lpips.safetensors")
    model = FakeLPIPS()
    model.net = lambda pixels: [recorded[f"layer.{index}"] for index in range(5)]
    model.lins = nn.ModuleList(FakeLinear(recorded[f"weight.{index}"].shape[1]) for index in range(5))
    with torch.no_grad():
        for index, lin in enumerate(model.lins):
            next(lin.parameters()).copy_(recorded[f"weight.{index}"])
    found = PairwiseDistance(LPIPSFeatures(model))(recorded["images"])
    torch.testing.assert_close(found, recorded["distances"], rtol=1e-5, atol=1e-6)
    assert found[0, 1] > 0.01


def test_negative_weights_are_refused():
    model = FakeLPIPS()
    with torch.no_grad():
        next(model.lins[1].parameters())[0, 2] = -0.5
    with pytest.raises(ValueError, match=r"non-negative channel weights, but got -0.5.*pretrained=True"):
        LPIPSFeatures(model)


@pytest.mark.parametrize(("name", "net"), [("lpips", "vgg"), ("lpips_alex", "alex")])
def test_the_package_gives_the_model(monkeypatch: pytest.MonkeyPatch, name: str, net: str):
    package = types.ModuleType("lpips")
    package.LPIPS = FakeLPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    features = AutoFeatures.from_pretrained(name, dtype=torch.bfloat16)
    assert isinstance(features, LPIPSFeatures) and isinstance(features, LPIPSAlexFeatures) == (net == "alex")
    assert features.model.kind == net and features.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"Expected no checkpoint for the features '{name}', but got 'some/id'"):
        type(features).from_pretrained("some/id")


def test_without_the_package_it_says_what_to_install_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"package `lpips`.*torchvision build that matches.*noiseopt\[lpips\]"):
        AutoFeatures.from_pretrained("lpips")


def test_a_torchvision_that_does_not_match_is_named(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ImportError, match=r"cannot be imported: operator torchvision::nms does not exist\. Install"):
        LPIPSFeatures.from_pretrained()
