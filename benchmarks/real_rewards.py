"""The four rewards of ReNO at their published sizes with random weights, to measure time and memory without downloads.

CLIPScore, HPSv2.1 and PickScore are a CLIP ViT-H/14 each, ImageReward is BLIP's ViT-L/16 with a BERT. The three CLIPs
share their weights to fit a small machine; computation and activations are those of three. `tiny=True` has the same
classes at the size of a test.
"""

import functools
import string
from collections.abc import Sequence
from typing import Any

import torch
from real_shapes import built_as, clip_tokenizer  # pyright: ignore[reportMissingImports]
from transformers import BertTokenizer, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

from noiseopt.rewards import CLIPScore, HPSv21, ImageRewardModel, PickScore, Reward, RewardSum
from noiseopt.rewards.contract.reward_sum import REWARD_PRESETS
from noiseopt.rewards.preference.image_reward import ImageRewardHead, image_reward_text_config

TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# width, hidden width, layers, heads
VIT_H, CLIP_TEXT_H = (1280, 5120, 32, 16), (1024, 4096, 24, 16)
VIT_L, BERT = (1024, 4096, 24, 16), (768, 3072, 12, 12)
TINY = (32, 64, 2, 2)


def reno_rewards(
    tiny: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    names: Sequence[str] = tuple(REWARD_PRESETS["reno"]),
) -> RewardSum:
    """Build a `RewardSum` of the four rewards, or of those named, with the weights of the paper."""
    kinds = {"hpsv2.1": HPSv21, "clipscore": CLIPScore, "pickscore": PickScore}
    shared = functools.cache(clip)
    pairs: list[tuple[Reward, float]] = []
    with built_as(dtype, device):
        for name in names:
            reward = kinds[name](shared(tiny), clip_tokenizer()) if name in kinds else image_reward(tiny)
            pairs.append((reward, REWARD_PRESETS["reno"][name]))
    return RewardSum(pairs)


def clip(tiny: bool) -> CLIPModel:
    vision = tower(TINY if tiny else VIT_H) | {"image_size": 224, "patch_size": 56 if tiny else 14}
    tokenizer = clip_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = tower(TINY if tiny else CLIP_TEXT_H) | special | {"vocab_size": 49408, "max_position_embeddings": 77}
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text}
    parts = {name: part | {"hidden_act": "gelu"} for name, part in parts.items()}
    config = CLIPConfig(**parts, projection_dim=32 if tiny else 1024, logit_scale_init_value=4.6052)
    return spread(CLIPModel(config))


def image_reward(tiny: bool) -> ImageRewardModel:
    vision: dict[str, Any] = tower(TINY if tiny else VIT_L) | {"image_size": 224, "patch_size": 56 if tiny else 16}
    vision |= {"layer_norm_eps": 1e-6}
    rest = {"vocab_size": 30524, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    rest |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0}
    text = image_reward_text_config(tower(TINY if tiny else BERT) | rest, vision["hidden_size"])
    parts = (BlipVisionModel(BlipVisionConfig(**vision)), BlipTextModel(text, add_pooling_layer=False))
    head = ImageRewardHead(text.hidden_size)
    return ImageRewardModel(spread(parts[0]), spread(parts[1]), head, bert_tokenizer())


def spread(model: Any) -> Any:
    """Scale the weights so that different images get different scores, unlike with the default initialization."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1 / parameter.shape[-1] ** 0.5)
    return model


def tower(sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(TOWER, sizes, strict=True))


def bert_tokenizer() -> BertTokenizer:
    """Build a tokenizer of single letters, with the two tokens that BLIP adds."""
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=512)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
