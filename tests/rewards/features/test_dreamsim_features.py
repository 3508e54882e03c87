"""DreamSim: its distance from its embedding, and how the package is loaded."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_features import FakeDreamSim

from noiseopt.rewards import AutoFeatures, DreamSimDINOFeatures, DreamSimFeatures, PairwiseDistance, resize

IMAGES = torch.rand(3, 3, 60, 90, generator=torch.Generator().manual_seed(0))


def test_distance_is_one_minus_the_cosine_of_centered_embeddings_of_224_squares():
    model = FakeDreamSim()
    embeddings = model.embed(resize(IMAGES, (224, 224)))
    centered = embeddings - embeddings.mean(1, keepdim=True)
    expected = 1 - F.cosine_similarity(centered[:, None], centered[None], dim=-1)
    torch.testing.assert_close(PairwiseDistance(DreamSimFeatures(model))(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_that_the_package_centered_already_stays():
    class Centered(FakeDreamSim):
        def embed(self, pixels):
            embedding = super().embed(pixels)
            return F.normalize(embedding - embedding.mean(-1, keepdim=True), dim=-1)

    found, expected = (PairwiseDistance(DreamSimFeatures(model))(IMAGES) for model in (Centered(), FakeDreamSim()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_image_keeps_its_batch_dimension():
    assert FakeDreamSim().embed(torch.rand(1, 3, 224, 224)).ndim == 1
    assert DreamSimFeatures(FakeDreamSim())(IMAGES[:1]).shape == (1, 12)


@pytest.mark.parametrize(("name", "kind"), [("dreamsim", "ensemble"), ("dreamsim_dino", "dino_vitb16")])
def test_the_package_gives_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str):
    """It writes to the folder that it is given, wants a device, and redirects torch's cache."""
    asked = {}

    def dreamsim(pretrained=True, device="cuda", cache_dir="./models", normalize_embeds=True, dreamsim_type="ensemble"):
        assert pretrained and os.path.isdir(cache_dir)
        asked.update(device=device, cache_dir=cache_dir, normalize=normalize_embeds, kind=dreamsim_type)
        torch.hub.set_dir(cache_dir)
        return FakeDreamSim(), None

    package = types.ModuleType("dreamsim")
    package.dreamsim = dreamsim
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    before, folder = torch.hub.get_dir(), str(tmp_path / "a" / "b")
    features = AutoFeatures.from_pretrained(name, cache_dir=folder)
    assert isinstance(features, DreamSimDINOFeatures) == (kind == "dino_vitb16")
    assert asked == {"device": "cpu", "cache_dir": folder, "normalize": False, "kind": kind}
    assert torch.hub.get_dir() == before
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    AutoFeatures.from_pretrained(name)
    assert asked["cache_dir"] == str(tmp_path / "torch" / "dreamsim")


def test_without_the_package_it_says_what_to_install_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ImportError, match=r"package `dreamsim`.*torchvision build that matches.*noiseopt\[dreamsim\]"):
        AutoFeatures.from_pretrained("dreamsim")
