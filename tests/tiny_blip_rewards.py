"""Tiny rewards of BLIP's kind: the real classes, with random weights, and their published files."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_clip_rewards import randomized
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from noiseopt.rewards import BlipITC, BlipITM, BlipVQA, ImageRewardModel, ImageTransform, Reward
from noiseopt.rewards.preference.image_reward import ImageRewardHead, image_reward_text_config

MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
TEXT_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_bert_tokenizer() -> BertTokenizer:
    """One token per letter, and marks; without the two tokens that BLIP adds."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "?", '"', *string.ascii_lowercase]
    tokens += [f"##{letter}" for letter in string.ascii_lowercase]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=512)


def build_blip_config() -> BlipConfig:
    tokenizer = build_bert_tokenizer()
    special = {"bos_token_id": len(tokenizer), "sep_token_id": 3, "pad_token_id": 0}
    return BlipConfig(
        text_config={**TEXT_TOWER, **special, "vocab_size": len(tokenizer) + 2, "max_position_embeddings": 80},
        vision_config={**VISION_TOWER, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=16,
    )


def build_blip_retrieval() -> BlipForImageTextRetrieval:
    return randomized(lambda: BlipForImageTextRetrieval(build_blip_config()))


def build_blip_answering() -> BlipForQuestionAnswering:
    return randomized(lambda: BlipForQuestionAnswering(build_blip_config()))


def squash() -> ImageTransform:
    return ImageTransform(size=(32, 32), crop=None)


def build_blip_itm() -> BlipITM:
    return BlipITM(build_blip_retrieval(), build_bert_tokenizer(), squash())


def build_blip_itc() -> BlipITC:
    return BlipITC(build_blip_retrieval(), build_bert_tokenizer(), squash())


def build_blip_vqa() -> BlipVQA:
    return BlipVQA(build_blip_answering(), build_bert_tokenizer(), squash())


def tiny_med_config() -> dict[str, object]:
    return {**MED_CONFIG, **TEXT_TOWER, "vocab_size": len(build_bert_tokenizer()) + 2, "max_position_embeddings": 40}


def build_image_reward_modules() -> tuple[BlipVisionModel, BlipTextModel, ImageRewardHead]:
    """Two heads of the published width in the image tower: a loader reads their number off the width."""
    vision = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipVisionConfig(**vision, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    text = image_reward_text_config(tiny_med_config(), 128)
    return (
        randomized(lambda: BlipVisionModel(config), 0.1),
        randomized(lambda: BlipTextModel(text, add_pooling_layer=False)),
        randomized(lambda: ImageRewardHead(32), 0.1),
    )


def build_image_reward() -> ImageRewardModel:
    tokenizer = build_bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return ImageRewardModel(*build_image_reward_modules(), tokenizer, ImageTransform(size=32, crop=(32, 32)))


def published_image_reward() -> dict[str, Tensor]:
    """The tensors of the tiny model under the names of ImageReward.pt, with those that the score does not need."""
    vision, text, head = build_image_reward_modules()
    state = {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    state |= {f"mlp.{key}": value for key, value in head.state_dict().items()}
    state |= {f"blip.visual_encoder.{timm_name(key)}": value for key, value in vision.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for name, width in (("vision_proj", 128), ("text_proj", 32)):
        state |= {f"blip.{name}.{key}": value for key, value in nn.Linear(width, 16).state_dict().items()}
    return state


def timm_name(key: str) -> str:
    """Return timm's name of a tensor of `BlipVisionModel`."""
    renamed = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    }
    if key in renamed:
        return renamed[key]
    _, _, number, *rest = key.split(".")
    name = ".".join(rest).replace("layer_norm", "norm")
    return f"blocks.{number}." + name.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")


def publish_bert_tokenizer(root: Path) -> None:
    folder = root / "google-bert/bert-base-uncased"
    build_bert_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))


def publish_image_reward(root: Path) -> None:
    folder = root / "THUDM/ImageReward"
    folder.mkdir(parents=True)
    torch.save(published_image_reward(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(tiny_med_config()))
    publish_bert_tokenizer(root)


def publish_blip(folder: Path, model: BlipForImageTextRetrieval | BlipForQuestionAnswering) -> None:
    model.save_pretrained(folder)
    build_bert_tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def publish_blip_retrieval(root: Path) -> None:
    publish_blip(root / "Salesforce/blip-itm-base-coco", build_blip_retrieval())


def publish_blip_answering(root: Path) -> None:
    publish_blip(root / "Salesforce/blip-vqa-base", build_blip_answering())


TINY_BLIP_REWARDS: dict[str, Callable[[], Reward]] = {
    "blip_itc": build_blip_itc,
    "blip_itm": build_blip_itm,
    "blip_vqa": build_blip_vqa,
    "imagereward": build_image_reward,
}
PUBLISHED_BLIP_REWARDS: dict[str, Callable[[Path], None]] = {
    "blip_itc": publish_blip_retrieval,
    "blip_itm": publish_blip_retrieval,
    "blip_vqa": publish_blip_answering,
    "imagereward": publish_image_reward,
}
