"""Each family of vision-language models: real classes and processors, tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vlm_rewards import TINY_FAMILIES, build_family, build_vqa_scorer, save_family
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from noiseopt.rewards import AutoReward, VQAScorer
from noiseopt.rewards.vlm.vlm_inputs import PIXEL_TOLERANCE, VLM_FAMILIES, VLMInputs, probe_image
from noiseopt.rewards.vlm.vqa_score import QUESTION

PROMPTS = ["a red cube", "two green cars on a table"]
REAL = {
    "internvl": InternVLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "smolvlm": SmolVLMProcessor,
}

pytestmark = [
    pytest.mark.parametrize("kind", TINY_FAMILIES),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # transformers' PaliGemma processor, on NumPy 2
]


def random_images(height: int = 40, width: int = 56, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Away from 0 and 1, so that no clamp takes part in a finite difference."""
    noise = torch.rand(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return 0.3 + 0.4 * noise


def picture_of(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def plain_logits(model: PreTrainedModel, inputs: Any, written: list[int]) -> torch.Tensor:
    """(1, 1 + written, V) of a stock forward: what a user of transformers would write."""
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "num_patches")}
    count = len(written)
    if model.config.model_type in ("blip-2", "instructblip"):
        start = model.config.text_config.decoder_start_token_id
        return model(**inputs, decoder_input_ids=torch.tensor([[start, *written]])).logits
    for name, end in (("input_ids", written), ("attention_mask", [1] * count)):
        inputs[name] = torch.cat((inputs[name], torch.tensor([end], dtype=torch.long)), 1)
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        kind = 1 if model.config.model_type == "paligemma" else 0
        inputs[name] = torch.cat((inputs[name], torch.full((1, count), kind)), 1)
    if "mm_token_type_ids" in inputs and "qwen" not in model.config.model_type:
        del inputs["mm_token_type_ids"]
    return model(**inputs).logits[:, -1 - count :]


@torch.no_grad()
def test_scores_are_those_of_a_stock_forward_on_the_processors_output(kind: str):
    """From a PIL image through transformers alone: what is read off its logits is the score."""
    model, processor = build_family(kind)
    answer, end = VQAScorer(model, processor), VQAScorer(model, processor, mode="answer_eos")
    image = (random_images()[:1] * 255).round() / 255
    text = answer.inputs.surround(QUESTION.format(PROMPTS[1]))
    settings = {"add_special_tokens": False} if text.startswith("<s>") else {}
    settings |= VLM_FAMILIES[kind].settings
    inputs = processor(text=[text], images=[picture_of(image[0])], return_tensors="pt", **settings)
    pixels = answer.inputs.pixels(image)
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=PIXEL_TOLERANCE)
    inputs["pixel_values"] = pixels  # without Pillow's rounding
    yes, other = processor.tokenizer.convert_tokens_to_ids(["Yes", "yes"])
    first, second = plain_logits(model, inputs, [yes])[0].log_softmax(-1)
    expected = first[[yes, other]].exp().sum()
    torch.testing.assert_close(answer(image, PROMPTS[1])[0], expected, rtol=1e-4, atol=0)
    mean = (first[yes] + second[processor.tokenizer.eos_token_id]) / 2
    torch.testing.assert_close(end(image, PROMPTS[1])[0], mean.exp(), rtol=1e-4, atol=0)
    assert 0 < answer.inputs.pixel_errors[(40, 56)] < PIXEL_TOLERANCE


def test_the_gradient_agrees_with_finite_differences_on_an_image_that_is_not_square(kind: str):
    for mode in ("answer_eos", "logodds"):
        reward = build_vqa_scorer(kind, mode=mode).double()
        images = random_images(33, 48, torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
        assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
        direction = gradient / gradient.norm()
        with torch.no_grad():
            ahead, behind = (reward.score(images + step * direction, PROMPTS).sum() for step in (1e-3, -1e-3))
        assert ((ahead - behind) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=0.01)


def test_an_image_is_scored_as_if_it_were_alone(kind: str):
    """Also where texts of equal length are asked together, out of their order."""
    reward, images = build_vqa_scorer(kind), torch.cat((random_images(), 1 - random_images(), random_images()[:1] / 2))
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[0], "x"]
    singles = [reward(image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
    torch.testing.assert_close(reward(images, prompts), torch.cat(singles), rtol=1e-4, atol=1e-6)


def test_a_folder_as_on_the_hub_is_recognised_and_scores_the_same(kind: str, tmp_path: Path):
    model, processor = build_family(kind)
    save_family(model, processor, tmp_path)
    loaded = AutoReward.from_pretrained(tmp_path)
    assert type(loaded) is VQAScorer and loaded.dtype == torch.float32
    images = random_images()
    torch.testing.assert_close(loaded(images, PROMPTS), VQAScorer(model, processor)(images, PROMPTS))
    assert isinstance(model, type(AutoModelForImageTextToText.from_pretrained(tmp_path)))


def test_a_prompt_that_is_too_long_is_cut_to_the_context(kind: str):
    reward = build_vqa_scorer(kind)
    prompts = ["a red cube on a table " * 200, "a red cube on a table " * 200 + "and a green car"]
    scores = reward(random_images()[:1].expand(2, -1, -1, -1), prompts)
    assert scores[0] == scores[1]
    (inputs, _) = reward.inputs.cache.values()
    assert all(inputs[name].shape[1] <= limit for name, limit in reward.inputs.limits.items() if name in inputs)


def test_half_precision_leaves_the_rotary_frequencies_alone(kind: str):
    reward = build_vqa_scorer(kind)
    before = {name: buffer.clone() for name, buffer in reward.named_buffers()}
    half = reward.bfloat16()
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in half.named_buffers())
    assert half(random_images().bfloat16(), PROMPTS).isfinite().all()


def test_what_stands_in_for_a_processor_gives_its_output(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The real classes are built here without the video processor that they ask for."""
    if kind not in REAL:
        pytest.skip("its processor needs no torchvision and is used itself")
    model, stand_in = build_family(kind)
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(REAL[kind], "check_argument_for_proper_class", lambda *_: None)
    for name, token in (("start_image", "<img>"), ("end_image", "</img>"), ("context_image", "<IMG_CONTEXT>")):
        setattr(stand_in.tokenizer, f"{name}_token", token)
        setattr(stand_in.tokenizer, f"{name}_token_id", stand_in.tokenizer.convert_tokens_to_ids(token))
    stand_in.tokenizer.video_token = "<video>"
    count = {"internvl": {"image_seq_length": 4}, "smolvlm": {"image_seq_len": 4}}.get(kind, {})
    real = REAL[kind](stand_in.image_processor, stand_in.tokenizer, None, chat_template=stand_in.chat_template, **count)
    inputs = VLMInputs(model, stand_in)
    for size in ((40, 56), (64, 30)):
        picture = picture_of(probe_image(*size)[0])
        call: dict[str, Any] = {"images": [picture], "return_tensors": "pt", **inputs.family.settings}
        ours = stand_in(text=[inputs.surround("a red cube")], **call)
        theirs = real(text=[inputs.surround("a red cube")], **call)
        assert theirs.keys() >= {"input_ids", "attention_mask", "pixel_values"}
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
