"""SigLIP against the logits of transformers' own model and its PIL processor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_siglip_rewards import (
    EOS,
    build_siglip,
    build_siglip2,
    build_siglip_model,
    build_siglip_tokenizer,
    publish_siglip,
)
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from noiseopt.rewards import AutoReward, ImageTransform, SigLIP, SigLIP2

PROMPTS = ["a red cube", "two green cars"]
BUILD = pytest.mark.parametrize("build", [build_siglip, build_siglip2], ids=["siglip", "siglip2"])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(2))


@BUILD
def test_equals_the_diagonal_of_the_models_own_logits(build: Callable[[], SigLIP], images: torch.Tensor):
    reward = build()
    # As on the model cards; for the second version with the padding on the right, where training had it.
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=16, padding_side="right", return_tensors="pt")
    output = reward.model(input_ids=tokens["input_ids"], pixel_values=reward.image_transform(images))
    torch.testing.assert_close(reward(images, PROMPTS), output.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)
    assert torch.equal(reward(images, "a red cube"), reward(images, "A Red CUBE"))


def test_equals_the_model_on_pil_preprocessed_images():
    reward = build_siglip()
    pixels = torch.randint(0, 256, (1, 3, 48, 64), generator=torch.Generator().manual_seed(3))
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    inputs = processor(pixels[0].permute(1, 2, 0).numpy().astype("uint8"), return_tensors="pt")
    ids = torch.tensor([reward.token_ids("a cat")])
    expected = reward.model(input_ids=ids, **inputs).logits_per_image[0]
    # The processor's rounding, times a scale of 110.
    torch.testing.assert_close(reward(pixels / 255, "a cat"), expected, rtol=0, atol=0.005 * reward.logit_scale)


@BUILD
def test_probability_is_the_sigmoid_of_the_logit(build: Callable[[], SigLIP], images: torch.Tensor):
    reward = build()
    likely = SigLIP(reward.model, reward.tokenizer, probability=True)
    torch.testing.assert_close(likely(images, PROMPTS), reward(images, PROMPTS).sigmoid())
    assert likely.range == (0.0, 1.0)


def test_range_is_that_of_a_cosine_scaled_and_shifted():
    low, high = build_siglip().range or (0, 0)
    assert high - low == pytest.approx(2 * torch.tensor(4.7).exp().item())
    assert high + low == pytest.approx(2 * -16.5)


def test_half_precision_weights_keep_the_exact_scale_and_bias():
    exact, half = build_siglip(), build_siglip().bfloat16()
    assert (half.logit_scale, half.logit_bias) == (exact.logit_scale, exact.logit_bias)
    assert half.model.logit_scale.exp().item() != pytest.approx(exact.logit_scale, rel=1e-4)


def test_prompts_end_are_padded_and_are_cut_before_the_end_token():
    first, second = build_siglip(), build_siglip2()
    space, a, b = (first.tokenizer.convert_tokens_to_ids(token) for token in ("\u2581", "a", "b"))
    assert first.token_ids("A b")[:4] == second.token_ids("A b")[:4] == [space, a, space, b]
    assert first.token_ids("a b")[4:] == [EOS] * 12
    assert second.token_ids("a b")[4:] == [EOS] + [0] * 11
    for reward in (first, second):
        ids = reward.token_ids("a" * 40)
        assert len(ids) == 16 and ids[-1] == EOS and ids[-2] == a


def test_the_first_version_drops_punctuation_and_the_second_reads_it():
    first, second = build_siglip(), build_siglip2()
    assert first.token_ids("a cat, a dog!") == first.token_ids("a cat  a dog")
    assert second.token_ids("a cat, a dog!") != second.token_ids("a cat a dog")


@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_of_either_version_is_loaded_by_its_model_type(version: int, tmp_path: Path, images: torch.Tensor):
    publish_siglip(tmp_path, "model", version=version)
    loaded = AutoReward.from_pretrained(tmp_path / "model")
    assert type(loaded) is SigLIP
    assert loaded.image_transform == ImageTransform(size=(32, 32), crop=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    expected = build_siglip(version=version)(images, ["a cat, a dog!", "x"])
    torch.testing.assert_close(loaded(images, ["a cat, a dog!", "x"]), expected, rtol=1e-5, atol=1e-5)


def test_a_repository_with_the_slow_tokenizers_class_needs_no_sentencepiece(tmp_path: Path, images: torch.Tensor):
    """google/siglip-so400m-patch14-384 names a class that transformers refuses to import without that package."""
    publish_siglip(tmp_path, "model")
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(
        '{"tokenizer_class": "SiglipTokenizer", "do_lower_case": true, "model_input_names": ["input_ids"], '
        '"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64, "sp_model_kwargs": {}}'
    )
    loaded = SigLIP.from_pretrained(str(tmp_path / "model"))
    torch.testing.assert_close(loaded(images, PROMPTS), build_siglip()(images, PROMPTS), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = build_siglip_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="Expected a tokenizer with an end and a padding token.*'</s>' and None"):
        SigLIP(build_siglip_model(), tokenizer)


@pytest.mark.parametrize(("reward", "vocabulary"), [(SigLIP, 32_000), (SigLIP2, 256_000)])
def test_parameter_counts_are_those_of_the_published_shapes(reward: type[SigLIP], vocabulary: int):
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": vocabulary, "max_position_embeddings": 64},
        vision_config={**tower, "image_size": 384, "patch_size": 14},
    )
    with torch.device("meta"):
        model = SiglipModel(config)
    assert reward.parameter_count == sum(parameter.numel() for parameter in model.parameters())
