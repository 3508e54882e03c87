"""HPSv2 against open_clip and torchvision, whose results `tests/oracles/open_clip_hpsv2.py` wrote down."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_clip_rewards import build_clip, build_hpsv2, build_tokenizer, open_clip_state, publish_clip_score
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from noiseopt.rewards import AutoReward, CLIPScore, HPSv20, HPSv21, ImageTransform, PadTransform, RewardSum
from noiseopt.rewards.preference.open_clip import clip_model_from_open_clip

ORACLE = Path(__file__).parent / "data/open_clip_hpsv2.safetensors"


@dataclasses.dataclass
class Oracle:
    """open_clip's weights and what it makes of `images` and `ids`."""

    tensors: dict[str, torch.Tensor]
    text: dict[str, Any]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    with safe_open(ORACLE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Oracle(tensors, json.loads(file.metadata()["text"]))


@pytest.fixture(scope="module")
def reward(oracle: Oracle) -> HPSv21:
    config = build_clip().config
    config.vision_config.num_attention_heads = 4
    config.vision_config.intermediate_size = config.text_config.intermediate_size = 128
    return HPSv21(clip_model_from_open_clip(oracle.under("state."), config, ORACLE.name), build_tokenizer())


def images_of(oracle: Oracle) -> list[tuple[str, torch.Tensor]]:
    return [(size, image[None] / 255) for size, image in oracle.under("image.").items()]


def test_pixels_are_those_of_torchvision(oracle: Oracle, reward: HPSv21):
    for size, image in images_of(oracle):
        expected = oracle.tensors[f"pixels.{size}"][None]
        torch.testing.assert_close(reward.image_transform(image), expected, rtol=0, atol=1e-5, msg=size)


def test_features_are_those_of_open_clip(oracle: Oracle, reward: HPSv21):
    images = torch.cat([reward.encode_image(image) for _, image in images_of(oracle)])
    torch.testing.assert_close(images, oracle.tensors["image_features"], rtol=0, atol=1e-5)
    pooled = reward.model.text_model(input_ids=oracle.tensors["ids"]).pooler_output
    texts = torch.nn.functional.normalize(reward.model.text_projection(pooled), dim=-1)
    torch.testing.assert_close(texts, oracle.tensors["text_features"], rtol=0, atol=1e-5)


def test_scores_are_the_cosines_of_open_clip(oracle: Oracle, reward: HPSv21):
    for row, (_, image) in enumerate(images_of(oracle)):
        ids = oracle.tensors["ids"][row].tolist()
        scorer = HPSv21(reward.model, IdsTokenizer(ids[: ids.index(53) + 1]))
        expected = oracle.tensors["scores"][row : row + 1]
        torch.testing.assert_close(scorer(image, "any"), expected, rtol=0, atol=1e-5)


class IdsTokenizer:
    """Gives the same ids for every prompt."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def __call__(self, prompt: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


def test_prompts_get_the_ids_of_open_clips_tokenizer(oracle: Oracle, reward: HPSv21):
    """But for the last two, which need what only the ftfy package knows: ligatures, full width, wrong decoding."""
    vocab = dict(oracle.text["vocab"])
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = vocab.pop("<start_of_text>"), vocab.pop("<end_of_text>")
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in oracle.text["merges"]])
    seen: list[list[int]] = []

    def tokenize(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
        seen.append(tokenizer(text)["input_ids"])
        return {"input_ids": [53]}

    scorer = HPSv21(reward.model, tokenize)
    for prompt, ids in oracle.text["prompts"][:-2]:
        scorer.encode_text(prompt)
        assert seen[-1] == ids, prompt


def test_equals_transformers_cosine_without_its_scale():
    scorer, images = build_hpsv2(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = scorer.tokenizer(["a cat", "a dog"], padding=True, return_tensors="pt")
    output = scorer.model(pixel_values=scorer.image_transform(images), **tokens)
    expected = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(scorer(images, ["a cat", "a dog"]), expected, rtol=1e-5, atol=1e-5)


def test_the_borders_of_an_image_count_because_nothing_is_cropped():
    scorer, images = build_hpsv2(), torch.rand(1, 3, 32, 96, generator=torch.Generator().manual_seed(1))
    images.requires_grad_()
    scorer(images, "a cat").sum().backward()
    assert images.grad is not None and images.grad[..., :8].any() and images.grad[..., -8:].any()


def test_padding_is_black_before_normalization():
    pixels = PadTransform(32)(torch.full((1, 3, 16, 64), 0.5))
    normalize = ImageTransform(size=None, crop=None)
    black, gray = normalize(torch.zeros(1, 3, 1, 1)), normalize(torch.full((1, 3, 1, 1), 0.5))
    torch.testing.assert_close(pixels[..., :12, :], black.expand(1, 3, 12, 32))
    torch.testing.assert_close(pixels[..., 12:20, :], gray.expand(1, 3, 8, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_clip_score(tmp_path, "hpsv2")
    (tmp_path / "hpsv2/model.safetensors").unlink()
    return tmp_path / "hpsv2"


def save(folder: Path, filename: str, state: dict[str, torch.Tensor]) -> None:
    torch.save({"epoch": 5, "state_dict": state}, folder / filename)


def test_a_folder_is_known_by_its_file(folder: Path):
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    save(folder, "HPS_v2_compressed.pt", open_clip_state(build_clip(seed=2)))
    loaded = AutoReward.from_pretrained(folder)
    assert type(loaded) is HPSv20 and loaded.name == "hpsv2.0"
    torch.testing.assert_close(loaded(images, "a cat"), build_hpsv2()(images, "a cat"), rtol=1e-5, atol=1e-5)
    save(folder, "HPS_v2.1_compressed.pt", open_clip_state(build_clip(seed=3)))
    assert type(AutoReward.from_pretrained(folder)) is HPSv21
    assert type(HPSv20.from_pretrained(str(folder))) is HPSv20


def test_a_checkpoint_with_other_keys_is_refused_by_the_name_of_the_file(folder: Path):
    state = open_clip_state(build_clip())
    save(folder, "HPS_v2.1_compressed.pt", state | {"visual.extra": torch.ones(1)})
    with pytest.raises(ValueError, match="Expected HPS_v2.1_compressed.pt .* but got the key 'visual.extra'"):
        AutoReward.from_pretrained(folder)
    del state["logit_scale"]
    save(folder, "HPS_v2.1_compressed.pt", state)
    with pytest.raises(ValueError, match="Expected HPS_v2.1_compressed.pt .* of CLIPModel, but missing: logit_scale"):
        AutoReward.from_pretrained(folder)


def test_a_model_with_clips_default_activation_is_refused():
    config = build_clip().config
    config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match=r"Expected a CLIP model with `hidden_act` 'gelu'.*\['gelu', 'quick_gelu'\]"):
        HPSv21(CLIPModel(config), build_tokenizer())


@pytest.mark.parametrize("name", ["hps", "hpsv2", "hpsv2.1", "xswu/HPSv2"])
def test_names_and_the_hub_id_mean_version_2_1(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(HPSv21, "load", classmethod(lambda cls, checkpoint, hub: build_hpsv2(cls)))
    assert type(AutoReward.from_pretrained(name)) is HPSv21
    assert RewardSum(name).names == ["hpsv2.1"]


def test_it_is_no_clipscore_by_name_or_scale():
    assert HPSv21.range == (-1.0, 1.0) and CLIPScore.range == (-100.0, 100.0)
    assert HPSv21.text_modules == CLIPScore.text_modules


def test_parameter_count_is_that_of_open_clips_vit_h_14():
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 224, "patch_size": 14}, projection_dim=1024
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CLIPModel(config).parameters())
    assert HPSv21.parameter_count == HPSv20.parameter_count == count
