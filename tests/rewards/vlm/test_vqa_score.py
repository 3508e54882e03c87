"""VQAScore: its modes against their formulas, its text, its bad input."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_vlm_rewards import build_family, build_vqa_scorer, build_word_tokenizer, save_family, token_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from noiseopt import shapes_world
from noiseopt.rewards import AutoReward, RewardSum, VQAScorer
from noiseopt.rewards.vlm.vlm_inputs import PIXEL_TOLERANCE, VLM_FAMILIES
from noiseopt.rewards.vlm.vlm_pixels import vlm_pixels
from noiseopt.rewards.vlm.vqa_score import QUESTION, appended, first_tokens, log_probability
from training.questions import SHOWS

PROMPTS = ["a red cube", "two green cars"]


def random_images(count: int = 2) -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 40, 56, generator=torch.Generator().manual_seed(4))


def logits_of(reward: VQAScorer) -> torch.Tensor:
    return reward.next_logits(random_images(), QUESTION, PROMPTS)[:, 0].double()


def test_modes_are_functions_of_the_same_logits():
    answer, odds, yesno = (build_vqa_scorer(mode=mode) for mode in ("answer", "logodds", "yesno"))
    logits = logits_of(answer)
    p = logits.softmax(-1)
    yes, no = (
        p[:, answer.processor.tokenizer.convert_tokens_to_ids([word, word.lower()])].sum(1) for word in ("Yes", "No")
    )
    torch.testing.assert_close(answer(random_images(), PROMPTS).double(), yes, rtol=1e-5, atol=0)
    torch.testing.assert_close(odds(random_images(), PROMPTS).double(), (yes / no).log(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(yesno(random_images(), PROMPTS).double(), yes / (yes + no), rtol=1e-5, atol=0)
    assert (answer.range, odds.range, yesno.range) == ((0.0, 1.0), None, (0.0, 1.0))
    assert VQAScorer.range == (0.0, 1.0)


def test_answer_eos_is_exp_of_minus_the_loss_of_transformers():
    """Of the answer and the end, with all else masked: the definition of CLIP-FlanT5's score."""
    reward = build_vqa_scorer("llava", mode="answer_eos")
    image = random_images(1)
    inputs = reward.inputs(QUESTION, PROMPTS[0], (40, 56))
    ids = torch.cat((inputs["input_ids"], torch.tensor([reward.whole_answer])), 1)
    labels = ids.clone()
    labels[:, : -len(reward.whole_answer)] = -100
    loss = reward.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=reward.inputs.pixels(image),
        labels=labels,
    ).loss
    torch.testing.assert_close(reward(image, PROMPTS[0])[0], (-loss).exp())
    assert len(reward.whole_answer) == 2 and reward.whole_answer[1] == reward.processor.tokenizer.eos_token_id


def test_an_answer_of_several_tokens_is_forced_one_by_one():
    reward = build_vqa_scorer(mode="answer_eos", answers=["Yes it is there"])
    forced, log_p = reward.whole_answer, []
    for count in range(len(forced)):
        logits = reward.next_logits(random_images(), QUESTION, PROMPTS, forced[:count])
        assert logits.shape[:2] == (2, 1 + count)
        log_p.append(logits[:, -1].log_softmax(-1)[:, forced[count]])
    torch.testing.assert_close(reward(random_images(), PROMPTS), torch.stack(log_p).mean(0).exp())


def test_log_odds_keep_a_gradient_where_the_probability_is_1():
    logits = torch.tensor([[40.0, -40.0, 0.0]], requires_grad=True)
    p = log_probability(logits, [0])
    assert p.item() == 0 and p.exp().item() == 1
    assert torch.autograd.grad(p, logits)[0].abs().max() < 1e-15
    odds = logits[:, 0] - logits[:, 1]
    assert torch.autograd.grad(odds, logits)[0].tolist() == [[1, -1, 0]]


def test_the_embedded_model_is_an_ordinary_scorer():
    """A plain forward of the model, on the text it was trained with, gives the score."""
    folder = shapes_world.path("vqa")
    reward = AutoReward.from_pretrained(folder)
    assert type(reward) is VQAScorer
    images, prompts = torch.rand(2, 3, 128, 128), ["a red circle", "a blue star left of a green cross"]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for image, prompt, score in zip(images, prompts, reward(images, prompts), strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SHOWS.format(prompt)}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        ids = processor.tokenizer(text.replace("<image>", "<image>" * 64), return_tensors="pt").input_ids
        logits = model(input_ids=ids, pixel_values=image[None] * 2 - 1).logits[0, -1]
        expected = logits.softmax(-1)[processor.tokenizer.convert_tokens_to_ids("yes")]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6)


def test_files_as_qwen_publishes_them(tmp_path: Path):
    """Pixel counts under their older names, and the chat template in a JSON file."""
    model, processor = build_family("qwen2_vl")
    save_family(model, processor, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    settings = {
        "min_pixels": 32 * 32,
        "max_pixels": 48 * 48,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    settings |= {key: processor.image_processor.to_dict()[key] for key in ("image_mean", "image_std")}
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    expected = VQAScorer(model, processor)(random_images(), PROMPTS)
    torch.testing.assert_close(VQAScorer.from_pretrained(str(tmp_path))(random_images(), PROMPTS), expected)


def test_the_default_checkpoint_has_as_many_parameters_as_it_says():
    """The dimensions in the config.json of Qwen/Qwen2-VL-2B-Instruct."""
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 1536}
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == VQAScorer.parameter_count


def test_works_in_a_sum_under_its_own_name():
    out = RewardSum({build_vqa_scorer(): 1.0, build_vqa_scorer(mode="logodds"): 0.5})(random_images(), PROMPTS)
    assert not isinstance(out, tuple) and list(out.components) == ["vqascore", "vqascore_2"]


def test_texts_are_made_once_and_pixels_checked_once_per_size():
    reward = build_vqa_scorer()
    calls = []
    process = reward.inputs.process
    reward.inputs.process = lambda question, image: calls.append(question) or process(question, image)
    for _ in range(3):
        reward(random_images(), PROMPTS)
    assert len(calls) == 2
    reward(random_images()[..., :40], PROMPTS)
    assert len(calls) == 4 and set(reward.inputs.pixel_errors) == {(40, 56), (40, 40)}


def test_texts_made_in_inference_mode_serve_later_gradients():
    reward, images = build_vqa_scorer(), random_images().requires_grad_()
    with torch.inference_mode():
        reward(images.detach(), PROMPTS)
    assert torch.autograd.grad(reward(images, PROMPTS).sum(), images)[0].any()


def test_pixels_that_are_not_the_processors_are_refused():
    model, processor = build_family("llava")
    reward = VQAScorer(model, processor)
    processor.image_processor.rescale = lambda image, scale, **_: image / 128  # not in its settings
    with pytest.raises(
        ValueError, match=r"pixels of CLIPImageProcessorPil, \(1, 3, 32, 32\), but .* Pass `preprocess=`"
    ):
        reward(random_images(), PROMPTS)
    own = VQAScorer(model, processor, preprocess=lambda images: images[..., :32, :32] * 4 - 2)
    assert own(random_images(), PROMPTS).shape == (2,)
    assert PIXEL_TOLERANCE == 0.05


def test_a_family_that_is_not_written_is_refused_by_name():
    config = LlavaNextConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    processor = type(
        "Processor", (), {"tokenizer": build_word_tokenizer(), "image_processor": LlavaNextImageProcessorPil()}
    )
    with pytest.raises(ValueError, match="Expected a vision-language model of the type .* got 'llava_next'"):
        VQAScorer(model, processor())


def test_a_family_that_is_not_written_is_refused_before_its_weights_are_read(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(ValueError, match="of the type .* got 'llava_next'.* with `preprocess=`"):
        VQAScorer.from_pretrained(str(tmp_path))


def test_a_family_that_is_not_written_works_with_pixels_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    model, processor = build_family("llava")
    expected = VQAScorer(model, processor)(random_images(), PROMPTS)
    own = partial(vlm_pixels, image_processor=processor.image_processor)
    monkeypatch.delitem(VLM_FAMILIES, "llava")
    with pytest.raises(ValueError, match="Expected a chat template in LlavaProcessor.*`prompt_format="):
        VQAScorer(model, processor, preprocess=own)
    reward = VQAScorer(model, processor, preprocess=own, prompt_format="USER: <image>\n{} ASSISTANT:")
    assert torch.equal(reward(random_images(), PROMPTS), expected)


def test_bad_input_is_refused_before_anything_runs():
    model, processor = build_family("qwen2_vl")
    with pytest.raises(ValueError, match=r"Expected a mode out of \('answer', .*'logits'"):
        VQAScorer(model, processor, mode="logits")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Expected a question with {} for the prompt, but got 'Is it?"):
        VQAScorer(model, processor, question="Is it there?")
    with pytest.raises(ValueError, match="Expected a `prompt_format` with {} for the question, but got '<|image"):
        VQAScorer(model, processor, prompt_format="<|image_pad|> Is it?")
    with pytest.raises(ValueError, match=r"Expected a list of answers, but got the string 'Yes'. Pass \['Yes'\]"):
        VQAScorer(model, processor, answers="Yes")
    with pytest.raises(ValueError, match=r"begin with different tokens, but both have \['Yes'\]"):
        VQAScorer(model, processor, negatives=["Yes no"], mode="yesno")
    with pytest.raises(ValueError, match=r"at least one of the answers \['maybe'\] in the model's vocabulary"):
        VQAScorer(model, processor, answers=["maybe"])
    with pytest.raises(ValueError, match=r"without the model's image token, .*Remove '<\|image_pad\|>'"):
        VQAScorer(model, processor)(random_images(), "a <|image_pad|> cube")
    with pytest.raises(ValueError, match="for the image and the question without"):
        VQAScorer(model, processor, question='"{}" ' + "a red cube " * 300)(random_images(), "x")


def test_without_a_chat_template_the_text_must_be_given():
    model, processor = build_family("internvl")
    processor.chat_template = None
    with pytest.raises(ValueError, match="Expected a chat template in TokenizerAndImageProcessor.*`prompt_format="):
        VQAScorer(model, processor)
    reward = VQAScorer(model, processor, prompt_format="User: <IMG_CONTEXT> {} Assistant:")
    assert reward.inputs.surround("Is it?") == "User: <IMG_CONTEXT> Is it? Assistant:"
    assert reward(random_images(), PROMPTS).shape == (2,)


def test_first_tokens_are_distinct_and_known():
    tokenizer = build_word_tokenizer()
    yes, no = (token_id(tokenizer, word) for word in ("Yes", "no"))
    assert first_tokens(tokenizer, ["Yes", " Yes", "Yes it is", "YES", "no"]) == [yes, no]


def test_a_space_before_an_answer_is_part_of_its_token_or_no_answer():
    """Byte-level tokenizers write " Yes" after "Assistant:"; after a lone space "No" is possible too."""
    word = [("Y", "e"), ("Ye", "s")]
    whole, apart = byte_level_tokenizer([*word, ("Ġ", "Yes")]), byte_level_tokenizer(word)
    spellings = ["Yes", " Yes"]
    assert whole.convert_ids_to_tokens(first_tokens(whole, spellings)) == ["Yes", "ĠYes"]
    assert apart.tokenize(" Yes") == ["Ġ", "Yes"]
    assert apart.convert_ids_to_tokens(first_tokens(apart, spellings)) == ["Yes"]
    with pytest.raises(ValueError, match="at least one of the answers"):
        first_tokens(apart, [" Yes"])


def byte_level_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE of bytes and what is merged of them."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_question_may_have_braces_of_its_own():
    question = 'Is {"a"} in "{}" there?'
    reward = build_vqa_scorer(question=question)
    plain = build_vqa_scorer(question="{}")
    whole = [question.replace("{}", prompt) for prompt in PROMPTS]
    assert torch.equal(reward(random_images(), PROMPTS), plain(random_images(), whole))


def test_appended_tokens_are_seen_and_typed():
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    inputs |= {"token_type_ids": torch.zeros(2, 3, dtype=torch.long), "image_grid_thw": torch.ones(2, 3)}
    longer = appended(inputs, [7, 8], 1)
    assert longer["input_ids"].tolist() == [[1, 1, 1, 7, 8]] * 2
    assert longer["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 2
    assert longer["attention_mask"].shape == (2, 5) and longer["image_grid_thw"].shape == (2, 3)
    assert torch.equal(appended(inputs, [], 0)["input_ids"], inputs["input_ids"])
