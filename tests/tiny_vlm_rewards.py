"""Tiny vision-language models of every family: the real classes and processors, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_clip_rewards import randomized
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    T5Config,
)

from noiseopt.rewards import CLIPFlanT5, Reward, VQAScorer
from noiseopt.rewards.vlm.clip_flant5 import clip_flant5_projector, untied_t5
from noiseopt.rewards.vlm.vlm_inputs import VLM_FAMILIES, TokenizerAndImageProcessor

WORDS = [
    "yes",
    "no",
    "Yes",
    "No",
    "a",
    "red",
    "blue",
    "cube",
    "two",
    "three",
    "green",
    "cars",
    "on",
    "table",
    "in",
    "room",
    "new",
    "x",
    "photo",
    "Does",
    "this",
    "figure",
    "show",
    "image",
    "Please",
    "answer",
    "or",
    "and",
    "en",
    "Question",
    "Answer",
    "User",
    "Assistant",
    "USER",
    "ASSISTANT",
    "user",
    "assistant",
    "Is",
    "the",
    "How",
    "many",
    "are",
    "there",
    "one",
    "word",
    "2",
    "Two",
    "1",
    "One",
    '"',
    "?",
    ".",
    ":",
    ",",
    "-",
]
VOCABULARY = 128
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 16}
GEMMA = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
VISION = {**TEXT, "image_size": 32, "patch_size": 8, "num_channels": 3}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
QWEN_TEXT |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
T5 = {"model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
T5 |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
QFORMER = {**TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "cross_attention_frequency": 1}
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def build_word_tokenizer(special: str = "", form: str = "$A", **arguments: Any) -> PreTrainedTokenizerFast:
    """One token per word of the tests, `special` tokens by name, and what `form` adds around a text."""
    names = ["<pad>", "</s>", "<s>", "<unk>", *special.split()]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*names, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("</s>", 1), ("<s>", 2)]
    shape = processors.TemplateProcessing(single=form, special_tokens=ends)
    tokenizer.post_processor = shape  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=special.split(),
        model_max_length=512,
        **arguments,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def chat_about(image: str) -> dict[str, str]:
    return {"chat_template": CHAT.replace("IMAGE", image)}


def build_llava() -> tuple[PreTrainedModel, Any]:
    tokenizer = build_word_tokenizer("<image>", "<s> $A")
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config=LLAMA,
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def build_blip2() -> tuple[PreTrainedModel, Any]:
    tokenizer = build_word_tokenizer("<image>", "$A </s>")
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "encoder_hidden_size": 32},
        text_config=T5,
        num_query_tokens=4,
        image_token_index=token_id(tokenizer, "<image>"),
    )
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    return Blip2ForConditionalGeneration(config), processor


def build_instructblip() -> tuple[PreTrainedModel, Any]:
    tokenizer = build_word_tokenizer("<image>", "$A </s>")
    reader = BertTokenizer(
        vocab={word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    )
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**QFORMER, "encoder_hidden_size": 32},
        text_config=T5,
        num_query_tokens=4,
        image_token_index=token_id(tokenizer, "<image>"),
    )
    pixels = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = InstructBlipProcessor(pixels, tokenizer, reader, num_query_tokens=4)
    return InstructBlipForConditionalGeneration(config), processor


def build_paligemma() -> tuple[PreTrainedModel, Any]:
    tokenizer = build_word_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    pixels.image_seq_length = 16  # pyright: ignore[reportAttributeAccessIssue]
    processor = PaliGemmaProcessor(pixels, tokenizer)
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
        text_config={**TEXT, **GEMMA, "model_type": "gemma", "vocab_size": 2048},
        image_token_index=token_id(tokenizer, "<image>"),
        projection_dim=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def build_gemma3() -> tuple[PreTrainedModel, Any]:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_word_tokenizer(" ".join(names.values()), "<s> $A", extra_special_tokens=names)
    config = Gemma3Config(
        vision_config={**SIGLIP, "vision_use_head": False},
        text_config={**TEXT, **GEMMA, "sliding_window": 64},
        mm_tokens_per_image=4,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
    )
    pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    chat = {"chat_template": "{{ bos_token }}" + CHAT.replace("IMAGE", "<start_of_image>")}
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(pixels, tokenizer, image_seq_length=4, **chat)


def build_qwen(kind: str) -> tuple[PreTrainedModel, Any]:
    names = "<|vision_start|> <|image_pad|> <|video_pad|> <|vision_end|>"
    tokenizer = build_word_tokenizer(names, **chat_about("<|vision_start|><|image_pad|><|vision_end|>"))
    ids = {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**QWEN_TEXT, "rope_parameters": rope}
    if kind == "qwen2_vl":
        config = Qwen2VLConfig(vision_config={**vision, "embed_dim": 32, "mlp_ratio": 2}, text_config=text, **ids)
        model = Qwen2VLForConditionalGeneration(config)
    elif kind == "qwen2_5_vl":
        vision |= {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 32, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision |= {"out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
        vision |= {"num_position_embeddings": 16}
        text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        config = Qwen3VLConfig(vision_config=vision, text_config=text, **ids)
        model = Qwen3VLForConditionalGeneration(config)
    pixels = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 48 * 48})
    return model, stand_in(model, tokenizer, pixels)


def build_idefics3() -> tuple[PreTrainedModel, Any]:
    names = "<fake_token_around_image> <image> <end_of_utterance> <global-img>"
    tokenizer = build_word_tokenizer(names, "<s> $A")
    config = Idefics3Config(
        vision_config=VISION, text_config=LLAMA, scale_factor=2, image_token_id=token_id(tokenizer, "<image>")
    )
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**size), tokenizer, image_seq_len=4, **chat_about("<image>")
    )
    return Idefics3ForConditionalGeneration(config), processor


def build_smolvlm() -> tuple[PreTrainedModel, Any]:
    names = "<fake_token_around_image> <image> <end_of_utterance> <global-img>"
    tokenizer = build_word_tokenizer(names, **chat_about("<image>"))
    config = SmolVLMConfig(
        vision_config=VISION, text_config=LLAMA, scale_factor=2, image_token_id=token_id(tokenizer, "<image>")
    )
    pixels = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    model = SmolVLMForConditionalGeneration(config)
    return model, stand_in(model, tokenizer, pixels)


def build_internvl() -> tuple[PreTrainedModel, Any]:
    tokenizer = build_word_tokenizer("<img> <IMG_CONTEXT> </img>", **chat_about("<IMG_CONTEXT>\n"))
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**QWEN_TEXT, "model_type": "qwen2"},
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    model = InternVLForConditionalGeneration(config)
    return model, stand_in(model, tokenizer, GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}))


def stand_in(model: PreTrainedModel, tokenizer: Any, image_processor: Any) -> TokenizerAndImageProcessor:
    placeholder = VLM_FAMILIES[model.config.model_type].placeholder
    assert placeholder is not None
    return TokenizerAndImageProcessor(tokenizer, image_processor, model.config, placeholder)


TINY_FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "blip-2": build_blip2,
    "gemma3": build_gemma3,
    "idefics3": build_idefics3,
    "instructblip": build_instructblip,
    "internvl": build_internvl,
    "llava": build_llava,
    "paligemma": build_paligemma,
    "qwen2_5_vl": lambda: build_qwen("qwen2_5_vl"),
    "qwen2_vl": lambda: build_qwen("qwen2_vl"),
    "qwen3_vl": lambda: build_qwen("qwen3_vl"),
    "smolvlm": build_smolvlm,
}


def build_family(kind: str) -> tuple[PreTrainedModel, Any]:
    """The model with weights so large that it tells images apart, and its processor."""
    processors = []

    def model() -> PreTrainedModel:
        built, processor = TINY_FAMILIES[kind]()
        processors.append(processor)
        return built

    return randomized(model), processors[0]


def build_vqa_scorer(kind: str = "qwen2_vl", **arguments: Any) -> VQAScorer:
    return VQAScorer(*build_family(kind), **arguments)


def publish_vqa_scorer(root: Path) -> None:
    model, processor = build_family("qwen2_vl")
    save_family(model, processor, root / "Qwen/Qwen2-VL-2B-Instruct")


def save_family(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Save a checkpoint as on the Hub: weights, tokenizer, chat template and settings of the processors."""
    model.save_pretrained(folder)
    if not isinstance(processor, TokenizerAndImageProcessor):
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def build_clip_flant5() -> CLIPFlanT5:
    vision = randomized(lambda: CLIPVisionModel(CLIPVisionConfig(**{**VISION, "projection_dim": 16})))
    projector = randomized(lambda: clip_flant5_projector(32, 32))
    t5 = randomized(lambda: untied_t5(T5Config.from_dict({**T5, "tie_word_embeddings": False})))
    return CLIPFlanT5(vision, projector, t5, build_word_tokenizer(form="$A </s>"))


def publish_clip_flant5(root: Path) -> None:
    """Weights in two files of CLIP-FlanT5's own names, tokenizer and settings of pixels in the repositories beside."""
    reward = build_clip_flant5()
    tower = root / "openai/clip-vit-large-patch14-336"
    CLIPConfig(text_config={}, vision_config=reward.vision.config.to_dict()).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tower)
    reward.tokenizer.save_pretrained(root / "google/flan-t5-xl")
    prefixes = {
        "": reward.t5,
        "mm_projector.": reward.projector,
        "vision_tower.vision_tower.vision_model.": reward.vision,
    }
    state = {prefix + key: value for prefix, part in prefixes.items() for key, value in part.state_dict().items()}
    write_shards(state, root / "zhiqiulin/clip-flant5-xl")
    settings = {**reward.t5.config.to_dict(), "model_type": "clip_t5", "tie_word_embeddings": False}
    settings |= {
        "architectures": ["CLIPT5ForConditionalGeneration"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    settings |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (root / "zhiqiulin/clip-flant5-xl/config.json").write_text(json.dumps(settings))


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Two files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, files = sorted(state), [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    halves = {files[0]: keys[::2], files[1]: keys[1::2]}
    for name, half in halves.items():
        torch.save({key: state[key] for key in half}, folder / name)
    weight_map = {key: name for name, half in halves.items() for key in half}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


TINY_VLM_REWARDS: dict[str, Callable[[], Reward]] = {"clip_flant5": build_clip_flant5, "vqascore": build_vqa_scorer}
PUBLISHED_VLM_REWARDS: dict[str, Callable[[Path], None]] = {
    "clip_flant5": publish_clip_flant5,
    "vqascore": publish_vqa_scorer,
}
