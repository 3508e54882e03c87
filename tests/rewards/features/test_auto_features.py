"""Features by name, Hub id and folder."""

from pathlib import Path

import pytest
import torch
from tiny_features import publish_clip, publish_dinov2

from noiseopt.rewards import (
    AutoFeatures,
    CLIPFeatures,
    DINOv2Features,
    Features,
    ImageFeatures,
    TinyImage,
    list_features,
    register_features,
)
from noiseopt.rewards.features.auto_features import find_features
from noiseopt.rewards.features.features import FEATURES

IMAGES = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clean_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FEATURES, "entries", dict(FEATURES.entries))


def test_the_names():
    assert set(list_features()) >= {"clip", "dinov2", "dinov2_patch", "dreamsim", "lpips", "lpips_alex", "tiny_image"}
    assert list_features() == sorted(list_features())


def test_a_folder_gives_one_vector_an_image_of_the_model_there(tmp_path: Path):
    publish_dinov2(tmp_path)
    publish_clip(tmp_path)
    dinov2 = AutoFeatures.from_pretrained(tmp_path / "facebook/dinov2-base")
    assert type(dinov2) is ImageFeatures and dinov2.name == "Dinov2Model" and dinov2(IMAGES).shape == (2, 32)
    clip = AutoFeatures.from_pretrained(tmp_path / "openai/clip-vit-large-patch14", dtype=torch.bfloat16)
    assert clip.name == "CLIPModel" and clip.dtype == torch.bfloat16
    exact = AutoFeatures.from_pretrained(tmp_path / "openai/clip-vit-large-patch14")
    tower = CLIPFeatures.from_pretrained(str(tmp_path / "openai/clip-vit-large-patch14"))
    torch.testing.assert_close(tower(IMAGES), exact(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_folder_whose_images_would_be_processed_otherwise_is_refused_before_its_weights_are_read(tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "MobileViTImageProcessor"}')
    with pytest.raises(ValueError, match="Expected the pixels of MobileViTImageProcessorPil.* Load the model yourself"):
        AutoFeatures.from_pretrained(tmp_path)


def test_a_name_wins_over_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_image").mkdir()
    assert isinstance(AutoFeatures.from_pretrained("tiny_image"), TinyImage)
    (tmp_path / "mine").mkdir()
    assert find_features("mine") is None and find_features("org/name") is None
    assert find_features("dinov2") is DINOv2Features


def test_an_unknown_name_is_refused_with_the_known_ones():
    expected = (
        r"Expected a feature map out of \['clip', .*a Hub id such as 'org/name' or a folder, but got 'dino2'.*dinov2"
    )
    with pytest.raises(ValueError, match=expected):
        AutoFeatures.from_pretrained("dino2")


def test_what_has_no_checkpoint_takes_none():
    with pytest.raises(ValueError, match="Expected no checkpoint for the features 'tiny_image', but got 'org/name'"):
        TinyImage.from_pretrained("org/name")
    with pytest.raises(ValueError, match="`ImageFeatures` has no default checkpoint. Pass a Hub id or a folder"):
        ImageFeatures.from_pretrained()


@pytest.mark.usefixtures("clean_table")
def test_a_taken_name_is_refused_and_the_same_class_may_come_again():
    @register_features("brightness")
    class Brightness(Features):
        name = "brightness"

        def encode(self, images):
            return images.mean((-2, -1))

    register_features("brightness")(Brightness)
    torch.testing.assert_close(AutoFeatures.from_pretrained("brightness")(IMAGES), IMAGES.mean((-2, -1)))
    with pytest.raises(ValueError, match="Expected a free feature map name, but 'brightness' is taken by .*Brightness"):
        register_features("brightness")(TinyImage)
    with pytest.raises(NotImplementedError, match="`Features` does not implement `encode`"):
        Features()(IMAGES)
