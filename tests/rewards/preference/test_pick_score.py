"""PickScore: CLIPScore's formula, with the parts that its repository leaves to another."""

from pathlib import Path

import pytest
import torch
from tiny_clip_rewards import build_clip, build_pick_score, build_tokenizer, publish_clip_score
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from noiseopt.rewards import AutoReward, ImageTransform, PickScore

CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def companion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CLIP ViT-H in a folder instead of on the Hub."""
    publish_clip_score(tmp_path)
    monkeypatch.setattr("noiseopt.rewards.preference.pick_score.CLIP_VIT_H", str(tmp_path / CLIP_VIT_H))
    return tmp_path / CLIP_VIT_H


def test_equals_the_scaled_cosine_of_the_models_own_features(images: torch.Tensor):
    reward = build_pick_score()
    tokens = reward.tokenizer(["a cat", "a dog"], padding=True, return_tensors="pt")
    output = reward.model(pixel_values=reward.image_transform(images), **tokens)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    expected = reward.model.logit_scale.exp() * cosine
    torch.testing.assert_close(reward(images, ["a cat", "a dog"]), expected, rtol=1e-4, atol=1e-3)


def test_a_folder_with_the_model_alone_takes_the_rest_from_clip(companion: Path, tmp_path: Path, images: torch.Tensor):
    build_clip(seed=1).save_pretrained(tmp_path / "model")
    loaded = PickScore.from_pretrained(str(tmp_path / "model"), revision="of the model alone")
    torch.testing.assert_close(loaded(images, "a cat"), build_pick_score()(images, "a cat"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_with_everything_is_read_alone(
    whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: torch.Tensor
):
    """transformers 5 writes one file for a whole `CLIPProcessor`."""
    monkeypatch.setattr("noiseopt.rewards.preference.pick_score.CLIP_VIT_H", "no/such-repository")
    build_clip(seed=1).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    (CLIPProcessor(processor, build_tokenizer()) if whole else processor).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists() is not whole
    loaded = PickScore.from_pretrained(str(tmp_path), local_files_only=True)
    assert loaded.image_transform == ImageTransform(size=40, crop=(32, 32))
    assert loaded(images, "a cat").shape == (2,)


def test_its_id_is_known_as_pickscore_and_not_as_any_clip(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(PickScore, "load", classmethod(lambda cls, *load: asked.append(load) or build_pick_score()))
    assert type(AutoReward.from_pretrained("yuvalkirstain/PickScore_v1", revision="x")) is PickScore
    assert asked[0][0] == "yuvalkirstain/PickScore_v1" and asked[0][1]["revision"] == "x"


def test_parameter_count_is_that_of_clip_vit_h():
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 224, "patch_size": 14}, projection_dim=1024
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CLIPModel(config).parameters())
    assert PickScore.parameter_count == count
