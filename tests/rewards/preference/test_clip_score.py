"""CLIPScore against the formula, finite differences and the CLIP model's own output."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from noiseopt.rewards import AutoReward, CLIPScore, ImageTransform


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Away from 0 and 1, so that no clamp takes part in a finite difference."""
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2)) * 0.4 + 0.3


def test_equals_the_diagonal_of_the_models_own_logits(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score()
    images, prompts = random_images(2, 3, 48, 64), ["a red cube", "two green cars in a row"]
    tokens = reward.tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    logits = reward.model(pixel_values=reward.image_transform(images), **tokens).logits_per_image
    torch.testing.assert_close(reward(images, prompts), logits.diagonal(), rtol=1e-4, atol=1e-3)


def test_equals_transformers_features_of_pil_preprocessed_images(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score()
    pixels = torch.randint(0, 256, (1, 3, 48, 64), generator=torch.Generator().manual_seed(3))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = reward.model.get_image_features(**processor(pixels[0].numpy().astype("uint8"), return_tensors="pt"))
    text = reward.model.get_text_features(**reward.tokenizer(["a cat"], return_tensors="pt"))
    assert isinstance(image, BaseModelOutputWithPooling) and image.pooler_output is not None
    assert isinstance(text, BaseModelOutputWithPooling) and text.pooler_output is not None
    naive = 100 * F.cosine_similarity(image.pooler_output, text.pooler_output)
    torch.testing.assert_close(reward(pixels / 255, "a cat"), naive, rtol=0, atol=0.2)


def test_gradient_matches_finite_differences_in_float64(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score().double()
    images = random_images(1, 3, 40, 33, dtype=torch.float64).requires_grad_()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad(reward.score(images, ["a cat"]).sum(), images)
    with torch.no_grad():
        ahead, behind = (reward.score(images + step * direction, ["a cat"]) for step in (1e-5, -1e-5))
    assert (gradient * direction).sum() == pytest.approx(((ahead - behind) / 2e-5).item(), rel=1e-6)


def test_ascending_the_gradient_raises_the_score(make_clip_score: Callable[..., CLIPScore]):
    reward, images = make_clip_score(), random_images(1, 3, 32, 32).requires_grad_()
    before = reward(images, "a cat")
    before.sum().backward()
    assert images.grad is not None
    after = reward((images + 0.02 * images.grad.sign()).detach(), "a cat")
    assert after.item() > before.item() + 1


def test_encodes_each_prompt_once(make_clip_score: Callable[..., CLIPScore], monkeypatch: pytest.MonkeyPatch):
    reward, encoded = make_clip_score(), []
    encode_text = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda prompt: encoded.append(prompt) or encode_text(prompt))
    for _ in range(3):
        reward(random_images(3, 3, 32, 32), ["a", "b", "a"])
    assert encoded == ["a", "b"]
    assert reward.encode_prompt("a").shape == (1, 16)
    assert torch.equal(reward.encode_prompt(["b", "a"])[1:], reward.encode_prompt("a"))


def test_prompts_encoded_in_inference_mode_can_enter_a_graph(make_clip_score: Callable[..., CLIPScore]):
    reward, images = make_clip_score(), random_images(1, 3, 32, 32)
    with torch.inference_mode():
        reward(images, "a cat")
    reward(images.requires_grad_(), "a cat").sum().backward()
    assert images.grad is not None and images.grad.any()


def test_long_prompts_are_truncated_to_the_models_length(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score()
    assert torch.equal(reward.encode_prompt("x" * 14 + " and more"), reward.encode_prompt("x" * 14 + " or less"))


def test_both_conventions_of_the_end_token_agree(make_clip_score: Callable[..., CLIPScore]):
    assert torch.equal(make_clip_score().encode_prompt("a cat"), make_clip_score(eos_token_id=2).encode_prompt("a cat"))


def test_refuses_a_tokenizer_without_the_models_end_token(make_clip_score: Callable[..., CLIPScore]):
    with pytest.raises(ValueError, match="Expected the tokenizer to end prompts with the model's `eos_token_id` 40"):
        make_clip_score(eos_token_id=40)(random_images(1, 3, 32, 32), "a cat")


def test_half_precision_weights_keep_the_exact_scale(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score().bfloat16()
    assert reward.logit_scale == pytest.approx(100, rel=1e-4)
    assert reward.encode_prompt("a cat").norm() == pytest.approx(1, abs=1e-6)


def test_default_transform_is_clips_at_the_models_size(make_clip_score: Callable[..., CLIPScore]):
    parts = make_clip_score()
    assert CLIPScore(parts.model, parts.tokenizer).image_transform == ImageTransform(size=32, crop=(32, 32))


def test_single_pass_can_be_chosen_from_outside(make_clip_score: Callable[..., CLIPScore]):
    reward = make_clip_score()
    checker = ((torch.arange(64)[:, None] // 8 + torch.arange(96) // 8) % 2).float().expand(1, 3, 64, 96)
    clamped = reward(checker, "a cat")
    assert isinstance(reward.image_transform, ImageTransform)
    reward.image_transform = dataclasses.replace(reward.image_transform, single_pass=True)
    assert not torch.equal(reward(checker, "a cat"), clamped)


@pytest.mark.parametrize("load", [AutoReward.from_pretrained, CLIPScore.from_pretrained])
def test_loads_a_folder_with_its_own_preprocessing(load: Callable[..., CLIPScore], clip_folder: Path):
    reward = load(str(clip_folder), dtype=torch.bfloat16)
    assert type(reward) is CLIPScore
    assert reward.dtype == torch.bfloat16
    assert reward.image_transform == ImageTransform(
        size=(32, 32), crop=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    assert reward(random_images(2, 3, 48, 64), "a cat").shape == (2,)


def test_a_loaded_folder_scores_as_its_parts_do(clip_folder: Path):
    loaded = CLIPScore.from_pretrained(str(clip_folder))
    assert loaded.dtype == torch.float32
    transform = ImageTransform.from_processor_config(clip_folder)
    built = CLIPScore(CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder), transform)
    images = random_images(2, 3, 48, 64)
    assert torch.equal(loaded(images, "a cat"), built(images, "a cat"))


def test_nothing_warns(make_clip_score: Callable[..., CLIPScore]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_clip_score()(random_images(1, 3, 48, 48), "a cat")
