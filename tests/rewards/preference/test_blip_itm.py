"""BLIP's match probability and cosine against transformers' own outputs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_blip_rewards import (
    build_bert_tokenizer,
    build_blip_itc,
    build_blip_itm,
    build_blip_retrieval,
    publish_blip_retrieval,
)
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessorPil, BlipProcessor

from noiseopt.rewards import AutoReward, BlipITC, BlipITM, ImageTransform

PROMPTS = ["a red cube", "two green cars in a row"]


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    publish_blip_retrieval(tmp_path)
    return str(tmp_path / "Salesforce/blip-itm-base-coco")


def test_match_is_the_softmax_of_the_models_own_output_per_image():
    """Of each pair alone, without padding: how transformers' processor calls the model by default."""
    reward, images = build_blip_itm(), random_images(2, 3, 48, 40)
    pixels = reward.image_transform(images)
    for index, prompt in enumerate(PROMPTS):
        tokens = build_bert_tokenizer()(prompt, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        output = reward.model(pixel_values=pixels[index : index + 1], **inputs).itm_score
        expected = output[0].exp()[1] / output[0].exp().sum()
        torch.testing.assert_close(reward(images, PROMPTS)[index], expected, rtol=0, atol=1e-5)


def test_cosine_is_the_diagonal_of_the_models_own_output():
    reward, images = build_blip_itc(), random_images(2, 3, 48, 40)
    tokens = build_bert_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    output = reward.model(
        pixel_values=reward.image_transform(images),
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        use_itm_head=False,
    ).itm_score
    torch.testing.assert_close(reward(images, PROMPTS), output.diagonal(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward_class", [BlipITM, BlipITC])
def test_equals_the_processor_and_model_of_the_published_files(reward_class: type[BlipITM], folder: str):
    """From uint8 pixels on; the difference is Pillow's rounding."""
    processor = BlipProcessor.from_pretrained(folder, backend="pil")
    model = BlipForImageTextRetrieval.from_pretrained(folder)
    pixels = torch.randint(0, 256, (3, 48, 70), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    inputs = processor(images=pixels.permute(1, 2, 0).numpy(), text="a red cube", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model(**inputs, use_itm_head=reward_class is BlipITM).itm_score
    expected = output.softmax(-1)[:, 1] if reward_class is BlipITM else output[0]
    score = reward_class.from_pretrained(folder)(pixels[None] / 255, "a red cube")
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-3)


def test_a_folder_is_recognised_by_its_architecture(folder: str):
    reward = AutoReward.from_pretrained(folder)
    assert type(reward) is BlipITM
    assert reward.image_transform == ImageTransform(size=(32, 32), crop=None)


def test_the_published_processor_squashes_to_384():
    """The defaults of transformers' processor are the checkpoint's: bicubic, 384 x 384, CLIP's constants."""
    transform = ImageTransform.from_processor_config(BlipImageProcessorPil().to_dict())
    assert transform == ImageTransform(size=(384, 384), crop=None)


def test_parameter_count_is_that_of_the_published_dimensions():
    """The defaults of `BlipConfig` are the base model's."""
    with torch.device("meta"):
        model = BlipForImageTextRetrieval(BlipConfig())
    count = sum(p.numel() for p in model.parameters())
    assert count == BlipITM.parameter_count == BlipITC.parameter_count


def test_heads_keep_float32_in_half_precision():
    match, cosine, images = build_blip_itm().bfloat16(), build_blip_itc().bfloat16(), random_images(2, 3, 32, 32)
    assert match(images, "a cat").dtype == torch.float32
    assert cosine.encode_prompt("a cat").norm() == pytest.approx(1, abs=1e-6)
    scores = cosine(images, "a cat")
    assert not torch.equal(scores, scores.bfloat16().float())


def test_captions_are_cut_to_35_tokens():
    reward, images = build_blip_itm(), random_images(1, 3, 32, 32)
    words = "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g"
    assert len(words.split()) == 33
    assert torch.equal(reward(images, f"{words} h i j"), reward(images, words))
    assert not torch.equal(reward(images, words[:-2]), reward(images, words))


def test_the_cosine_encodes_each_prompt_once(monkeypatch: pytest.MonkeyPatch):
    reward, encoded = build_blip_itc(), []
    encode_text = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda prompt: encoded.append(prompt) or encode_text(prompt))
    for _ in range(3):
        reward(random_images(2, 3, 32, 32), PROMPTS)
    assert encoded == PROMPTS


def test_default_transform_is_a_squash_to_the_models_size():
    model = build_blip_retrieval()
    assert BlipITM(model, build_bert_tokenizer()).image_transform == ImageTransform(size=(32, 32), crop=None)


def test_ascending_the_gradient_raises_both():
    for reward in (build_blip_itm(), build_blip_itc()):
        images = (0.2 + 0.6 * random_images(1, 3, 32, 32)).requires_grad_()
        before = reward(images, "a cat")
        (gradient,) = torch.autograd.grad(before.sum(), images)
        after = reward((images + 0.02 * F.normalize(gradient, dim=(1, 2, 3)) * 50).clamp(0, 1).detach(), "a cat")
        assert after > before
