"""Tiny CLIP parts of the real classes, with random weights."""

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from noiseopt.rewards import CLIPScore, ImageTransform


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
    torch.manual_seed(0)
    model = CLIPModel(config)
    # The default initialisation is so small that all images look alike.
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def build_clip_score(eos_token_id: int = 53) -> CLIPScore:
    return CLIPScore(build_clip(eos_token_id), build_tokenizer(), ImageTransform(size=32, crop=(32, 32)))


@pytest.fixture
def make_clip_score() -> Callable[..., CLIPScore]:
    return build_clip_score


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout, with preprocessing of its own."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    build_clip().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return folder
