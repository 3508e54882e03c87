"""BLIP's answer probability against the loss of transformers' own model."""

from pathlib import Path

import pytest
import torch
from tiny_blip_rewards import (
    build_bert_tokenizer,
    build_blip_answering,
    build_blip_vqa,
    publish_blip_answering,
)
from transformers import BlipConfig, BlipForQuestionAnswering, PreTrainedTokenizerFast

from noiseopt.rewards import AutoReward, BlipVQA, ImageTransform

PROMPTS = ["a red cube", "two green cars in a row"]


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


def own_loss(reward: BlipVQA, image: torch.Tensor, question: str, answer: list[int]) -> torch.Tensor:
    """transformers' mean cross-entropy of the answer, for one image and an unpadded question."""
    tokens = build_bert_tokenizer()(question, return_tensors="pt")
    return reward.model(
        pixel_values=reward.image_transform(image[None]),
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        labels=torch.tensor([answer]),
    ).loss


@pytest.mark.parametrize("answer", ["yes", "no way"])
def test_is_the_exponential_of_the_models_own_loss_per_image(answer: str):
    parts, images = build_blip_vqa(), random_images(2, 3, 48, 40)
    reward = BlipVQA(parts.model, build_bert_tokenizer(), parts.image_transform, answer=answer)
    ids = build_bert_tokenizer()(answer)["input_ids"]
    scores = reward(images, PROMPTS)
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        question = f'Does this figure show "{prompt}"?'
        loss = own_loss(reward, image, question, [reward.model.decoder_start_token_id, *ids[1:]])
        torch.testing.assert_close(score.log(), -loss, rtol=0, atol=1e-5)


def test_the_answer_is_start_token_answer_end_token():
    """[DEC], the first of the two tokens that BLIP adds to BERT's, then the answer, then [SEP]."""
    reward = build_blip_vqa()
    assert reward.answer_ids == [60, 5, 3]
    assert reward.model.decoder_start_token_id == 60
    assert reward.model.config.text_config.sep_token_id == 3


def test_probabilities_of_all_answers_of_one_token_sum_to_at_most_one():
    """p(a) p(end | a) is the square of the score of a one-token answer."""
    reward, images, total = build_blip_vqa(), random_images(1, 3, 32, 32), 0.0
    for token in range(5, 60):
        reward.answer_ids = [60, token, 3]
        total += reward(images, "a cat").item() ** 2
    assert 0 < total < 1


def test_the_question_can_be_chosen():
    parts, images = build_blip_vqa(), random_images(1, 3, 32, 32)
    asked = BlipVQA(parts.model, build_bert_tokenizer(), parts.image_transform, question="{}?")
    answer = [60, 5, 3]
    torch.testing.assert_close(asked(images, "a cat").log()[0], -own_loss(asked, images[0], "a cat?", answer))
    assert not torch.equal(asked(images, "a cat"), parts(images, "a cat"))
    assert asked(images, "braces {0} and {}").isfinite()


def test_a_longer_neighbor_does_not_change_a_score():
    """To float32 rounding, in any order: a mask alone does not keep padding out of transformers' decoder."""
    reward, images = build_blip_vqa(), random_images(4, 3, 48, 40)
    prompts = ["two green cars in a row", "x", "a red cube", "b red cube"]
    singles = torch.cat([reward(image[None], prompt) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(reward(images, prompts).log(), singles.log(), rtol=0, atol=1e-5)
    assert singles.unique().numel() == 4


@pytest.mark.parametrize("question", ["Is it?", "{prompt}", ""])
def test_a_question_without_a_place_for_the_prompt_is_refused(question: str):
    with pytest.raises(ValueError, match="Expected a question with '{}' for the prompt, but got"):
        BlipVQA(build_blip_answering(), build_bert_tokenizer(), question=question)


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(ValueError, match="Expected an answer of at least one token, but got ' '"):
        BlipVQA(build_blip_answering(), build_bert_tokenizer(), answer=" ")


def test_another_models_tokenizer_is_refused():
    tokenizer = build_bert_tokenizer()
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    bare._tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"Expected the tokenizer to end texts with the model's `sep_token_id` 3, but"):
        BlipVQA(build_blip_answering(), bare)


def test_a_folder_is_recognised_by_its_architecture(tmp_path: Path):
    publish_blip_answering(tmp_path)
    reward = AutoReward.from_pretrained(tmp_path / "Salesforce/blip-vqa-base")
    assert type(reward) is BlipVQA
    assert reward.image_transform == ImageTransform(size=(32, 32), crop=None)
    images = random_images(2, 3, 40, 50)
    torch.testing.assert_close(reward(images, PROMPTS), build_blip_vqa()(images, PROMPTS))


def test_parameter_count_is_that_of_the_published_dimensions():
    """The defaults of `BlipConfig` are the base model's; the decoder's output weights are its word embeddings."""
    with torch.device("meta"):
        model = BlipForQuestionAnswering(BlipConfig())
    assert sum(p.numel() for p in model.parameters()) == BlipVQA.parameter_count


def test_a_long_question_keeps_its_end_up_to_the_models_positions():
    """35 tokens, the cut of BLIP's own code, would leave out the question mark."""
    reward, images = build_blip_vqa(), random_images(1, 3, 32, 32)
    prompt = " ".join("abcdefghijklmnop")
    question = f'Does this figure show "{prompt}"?'
    assert len(build_bert_tokenizer()(question)["input_ids"]) > 35
    torch.testing.assert_close(reward(images, prompt).log()[0], -own_loss(reward, images[0], question, [60, 5, 3]))
