"""ImageReward against its original towers, restated from the published tensors, and its conversion key by key."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_blip_rewards import (
    MED_CONFIG,
    build_bert_tokenizer,
    build_image_reward,
    build_image_reward_modules,
    publish_bert_tokenizer,
    publish_image_reward,
    published_image_reward,
)
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
)

from noiseopt.rewards import AutoReward, ImageRewardModel, ImageTransform
from noiseopt.rewards.preference import image_reward as module

PROMPTS = ["a red cube", "two green cars in a row"]
HUB = {"revision": None, "cache_dir": None, "token": None, "local_files_only": False}


def random_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published files, with the tokenizer's repository in a folder too."""
    publish_image_reward(tmp_path)
    monkeypatch.setattr(module, "IMAGE_REWARD_TOKENIZER", str(tmp_path / "google-bert/bert-base-uncased"))
    return tmp_path / "THUDM/ImageReward"


# The original: https://github.com/THUDM/ImageReward, a ViT of timm and BLIP's BERT, from the tensors alone.


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, on (B, L, heads * d); `mask` (B, L) is 0 where nothing may look."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


def original_vision(state: dict[str, Tensor], pixels: Tensor, heads: int, depth: int) -> Tensor:
    """timm's `VisionTransformer.forward_features`: pre-norm blocks, one projection for q, k and v, eps 1e-6."""
    state = {key.removeprefix("blip.visual_encoder."): value for key, value in state.items()}
    weight = state["patch_embed.proj.weight"]
    patches = F.conv2d(pixels, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = torch.cat([state["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1) + state["pos_embed"]
    for block in range(depth):
        name = f"blocks.{block}"
        qkv = linear(state, f"{name}.attn.qkv", layer_norm(state, f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{name}.attn.proj", attention(*qkv, heads))
        hidden = linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x, 1e-6))
        x = x + linear(state, f"{name}.mlp.fc2", F.gelu(hidden))
    return layer_norm(state, "norm", x, 1e-6)


def original_text(state: dict[str, Tensor], ids: Tensor, mask: Tensor, image: Tensor, heads: int, depth: int) -> Tensor:
    """BLIP's `BertModel`: post-norm, self-attention, then attention to the image, then the MLP, eps 1e-12."""
    state = {key.removeprefix("blip.text_encoder."): value for key, value in state.items()}
    x = state["embeddings.word_embeddings.weight"][ids]
    x = x + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = layer_norm(state, "embeddings.LayerNorm", x, 1e-12)
    for block in range(depth):
        for part, source, seen in (("attention", None, mask), ("crossattention", image, None)):
            name = f"encoder.layer.{block}.{part}"
            context = x if source is None else source
            query = linear(state, f"{name}.self.query", x)
            key, value = (linear(state, f"{name}.self.{kind}", context) for kind in ("key", "value"))
            update = linear(state, f"{name}.output.dense", attention(query, key, value, heads, seen))
            x = layer_norm(state, f"{name}.output.LayerNorm", x + update, 1e-12)
        name = f"encoder.layer.{block}"
        update = linear(state, f"{name}.output.dense", F.gelu(linear(state, f"{name}.intermediate.dense", x)))
        x = layer_norm(state, f"{name}.output.LayerNorm", x + update, 1e-12)
    return x


def original_score(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """`ImageReward.score_gard` of the released code, for the tiny dimensions."""
    image = original_vision(state, pixels, heads=2, depth=2)
    x = original_text(state, ids, mask, image, heads=2, depth=2)[:, 0]
    for layer in (0, 2, 4, 6, 7):
        x = linear(state, f"mlp.layers.{layer}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def original_tokens(prompts: list[str]) -> tuple[Tensor, Tensor]:
    tokens = build_bert_tokenizer()(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def test_equals_the_original_towers(folder: Path):
    """The score of the loaded files, to float32 rounding."""
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    reward = ImageRewardModel.from_pretrained(str(folder))
    images = random_images(2, 3, 32, 32)
    pixels = reward.image_transform(images)
    expected = original_score(state, pixels, *original_tokens(PROMPTS))
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs() > 0.01


def test_each_tower_equals_its_original_in_float64():
    """So close that an epsilon of 1e-5 in place of 1e-6 would show."""
    state = {
        key: value.double() if value.is_floating_point() else value for key, value in published_image_reward().items()
    }
    vision, text, _ = (tower.double() for tower in build_image_reward_modules())
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    image = original_vision(state, pixels, heads=2, depth=2)
    torch.testing.assert_close(vision(pixel_values=pixels).last_hidden_state, image, rtol=0, atol=1e-10)
    ids, mask = original_tokens(PROMPTS)
    ours = text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
    theirs = original_text(state, ids, mask, image, heads=2, depth=2)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-10)


def test_the_epsilon_of_the_image_tower_is_timms(folder: Path):
    assert ImageRewardModel.from_pretrained(str(folder)).vision_model.config.layer_norm_eps == 1e-6


def test_preprocessing_is_that_of_the_pil_processor(folder: Path):
    """Shorter side to the tower's size, bicubic, center crop, CLIP's constants."""
    reward = ImageRewardModel.from_pretrained(str(folder))
    image = np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = reward.image_transform(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert ((ours - theirs).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]).max() < 1.13
    assert ImageRewardModel(*build_image_reward_modules(), build_bert_tokenizer()).image_transform == ImageTransform(
        size=32, crop=(32, 32)
    )


@pytest.mark.parametrize(
    ("source", "part", "target"),
    [
        ("blip.visual_encoder.cls_token", "vision", "embeddings.class_embedding"),
        ("blip.visual_encoder.pos_embed", "vision", "embeddings.position_embedding"),
        ("blip.visual_encoder.patch_embed.proj.weight", "vision", "embeddings.patch_embedding.weight"),
        ("blip.visual_encoder.blocks.11.attn.qkv.bias", "vision", "encoder.layers.11.self_attn.qkv.bias"),
        ("blip.visual_encoder.blocks.0.attn.proj.weight", "vision", "encoder.layers.0.self_attn.projection.weight"),
        ("blip.visual_encoder.blocks.3.norm1.weight", "vision", "encoder.layers.3.layer_norm1.weight"),
        ("blip.visual_encoder.blocks.3.norm2.bias", "vision", "encoder.layers.3.layer_norm2.bias"),
        ("blip.visual_encoder.blocks.3.mlp.fc1.weight", "vision", "encoder.layers.3.mlp.fc1.weight"),
        ("blip.visual_encoder.norm.weight", "vision", "post_layernorm.weight"),
        (
            "blip.text_encoder.encoder.layer.5.crossattention.self.key.weight",
            "text",
            "encoder.layer.5.crossattention.self.key.weight",
        ),
        ("mlp.layers.7.bias", "head", "layers.7.bias"),
    ],
)
def test_converts_key_by_key(source: str, part: str, target: str):
    value = torch.ones(1)
    parts = module.convert_image_reward({source: value})
    assert parts.pop(part) == {target: value}
    assert not any(parts.values())


@pytest.mark.parametrize(
    "ignored",
    ["blip.vision_proj.weight", "blip.text_proj.bias", "blip.text_encoder.embeddings.position_ids"],
)
def test_leaves_out_what_the_score_does_not_need(ignored: str):
    assert not any(module.convert_image_reward({ignored: torch.ones(1)}).values())


@pytest.mark.parametrize("foreign", ["blip.text_decoder.x", "blip.vision_proj.extra", "mean", "clip.logit_scale"])
def test_a_key_of_no_module_is_refused(foreign: str):
    with pytest.raises(ValueError, match=f"Expected the keys of ImageReward.pt to begin with .* got '{foreign}'"):
        module.convert_image_reward({foreign: torch.ones(1)})


def change(folder: Path, removed: str = "", added: str = "", cut: str = "") -> None:
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    state.pop(removed, None)
    state |= {added: torch.ones(1)} if added else {}
    state |= {cut: state[cut][:-1]} if cut else {}
    torch.save(state, folder / "ImageReward.pt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"removed": "blip.visual_encoder.norm.bias"}, "the vision part .* missing: post_layernorm.bias"),
        ({"removed": "mlp.layers.6.weight"}, "the head part .* missing: layers.6.weight"),
        ({"removed": "blip.visual_encoder.pos_embed"}, "an image tower, but missing: embeddings.position_embedding"),
        ({"added": "blip.text_encoder.pooler.dense.bias"}, "the text part .* unexpected: pooler.dense.bias"),
        ({"added": "blip.visual_encoder.blocks.0.attn.rel"}, "unexpected: encoder.layers.0.attn.rel"),
        (
            {"cut": "blip.text_encoder.embeddings.word_embeddings.weight"},
            r"of another shape: embeddings.word_embeddings.weight \(61, 32\) for \(62, 32\)",
        ),
    ],
    ids=str,
)
def test_a_file_with_other_keys_is_refused(folder: Path, changed: dict[str, str], message: str):
    change(folder, **changed)
    with pytest.raises(ValueError, match=message):
        ImageRewardModel.from_pretrained(str(folder))


def test_a_med_config_without_a_setting_is_refused(folder: Path):
    (folder / "med_config.json").write_text(json.dumps({"vocab_size": 62, "hidden_size": 32}))
    with pytest.raises(ValueError, match="Expected med_config.json to hold a BERT config, but missing: intermediate_s"):
        ImageRewardModel.from_pretrained(str(folder))


def test_dimensions_of_the_published_tower_are_read_off_its_tensors():
    """ViT-L/16 at 224: 1024 wide, 24 blocks of 16 heads, 196 patches and [CLS]."""
    with torch.device("meta"):
        state = {
            "embeddings.position_embedding": torch.empty(1, 197, 1024),
            "embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16),
            **{f"encoder.layers.{block}.mlp.fc1.weight": torch.empty(4096, 1024) for block in range(24)},
        }
    config = module.image_reward_vision_config(state)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1024, 4096, 24)
    assert (config.num_attention_heads, config.image_size, config.patch_size) == (16, 224, 16)


def test_parameter_count_is_that_of_the_published_dimensions():
    with torch.device("meta"):
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=224,
                patch_size=16,
            )
        )
        text = BlipTextModel(module.image_reward_text_config(MED_CONFIG, 1024), add_pooling_layer=False)
        parts = (vision, text, module.ImageRewardHead(768))
    assert sum(p.numel() for part in parts for p in part.parameters()) == ImageRewardModel.parameter_count


def test_tokens_are_those_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """[DEC] is added before [ENC]; a prompt begins with [CLS], is cut to 35 tokens and padded to as many."""
    publish_bert_tokenizer(tmp_path)
    monkeypatch.setattr(module, "IMAGE_REWARD_TOKENIZER", str(tmp_path / "google-bert/bert-base-uncased"))
    tokenizer = module.image_reward_tokenizer(HUB)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[DEC]", "[ENC]"]) == [2, 60, 61]
    assert tokenizer.bos_token == "[DEC]"
    reward = ImageRewardModel(*build_image_reward_modules(), tokenizer)
    for prompt in ("a red cube", "a cube and " * 20):
        ids, mask = reward.tokens([prompt], torch.device("cpu"))
        expected_ids, expected_mask = original_tokens([prompt])
        assert torch.equal(ids, expected_ids) and torch.equal(mask, expected_mask)
        assert ids.shape == (1, 35) and ids[0, 0] == 2


def test_names_and_folders_lead_to_it(folder: Path):
    assert type(AutoReward.from_pretrained(folder)) is ImageRewardModel
    loaded = ImageRewardModel.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    images = random_images(2, 3, 40, 50)
    torch.testing.assert_close(
        ImageRewardModel.from_pretrained(str(folder))(images, PROMPTS), build_image_reward()(images, PROMPTS)
    )


def test_loading_leaves_the_callers_random_numbers_alone(folder: Path):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    ImageRewardModel.from_pretrained(str(folder))
    assert torch.equal(torch.randn(3), expected)


def test_the_revision_is_not_asked_of_the_tokenizers_repository(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(module, "image_reward_tokenizer", lambda hub: asked.append(hub) or build_bert_tokenizer())
    ImageRewardModel.from_pretrained(str(folder), revision="abc", local_files_only=True)
    assert asked == [{"revision": None, "cache_dir": None, "token": None, "local_files_only": True}]


def test_the_head_keeps_float32_in_half_precision():
    head = build_image_reward_modules()[2].bfloat16()
    features = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    scores = head(features)
    assert scores.dtype == torch.float32
    x, state = features.double(), head.double().state_dict()
    for layer in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"])
    torch.testing.assert_close(scores.double(), x, rtol=1e-5, atol=1e-5)


def test_towers_of_different_widths_are_refused():
    vision, _, head = build_image_reward_modules()
    settings = {**MED_CONFIG, "num_hidden_layers": 1, "vocab_size": 62, "hidden_size": 32, "num_attention_heads": 2}
    text = BlipTextModel(module.image_reward_text_config(settings, 64), add_pooling_layer=False)
    message = re.escape("Expected image features of width 64, the `encoder_hidden_size` of the text model, but got")
    with pytest.raises(ValueError, match=message + ".*128"):
        ImageRewardModel(vision, text, head, build_bert_tokenizer())
