"""Tiny rewards of CLIP's kind: the real classes, with random weights."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from noiseopt.rewards import CLIPScore, ImageTransform, Reward

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def build_tokenizer() -> CLIPTokenizer:
    """One token per letter, and the two that CLIP needs."""
    letters = list(string.ascii_lowercase)
    tokens = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=16)


def build_clip(eos_token_id: int = 53) -> CLIPModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**tower, **special, "vocab_size": 54, "max_position_embeddings": 16, "hidden_act": "gelu"},
        vision_config={**tower, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=16,
        logit_scale_init_value=4.6052,
    )
    return randomized(lambda: CLIPModel(config))


def randomized(build: Callable[[], ModuleT], std: float = 0.15) -> ModuleT:
    """The model with weights so large that images do not look alike to it, as they do to a freshly made one."""
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def build_clip_score(eos_token_id: int = 53) -> CLIPScore:
    return CLIPScore(build_clip(eos_token_id), build_tokenizer(), ImageTransform(size=32, crop=(32, 32)))


def publish_clip_score(root: Path) -> None:
    folder = root / "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    build_clip().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


TINY_CLIP_REWARDS: dict[str, Callable[[], Reward]] = {"clipscore": build_clip_score}
PUBLISHED_CLIP_REWARDS: dict[str, Callable[[Path], None]] = {"clipscore": publish_clip_score}
