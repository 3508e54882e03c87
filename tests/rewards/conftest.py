"""Tiny rewards, and checkpoints of theirs in the published layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_clip_rewards import build_clip, build_clip_score, build_tokenizer
from transformers import CLIPImageProcessorPil

from noiseopt.rewards import CLIPScore


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
