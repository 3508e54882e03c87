"""What vision-language models read beside pixels: the text of each family, made once by its own processor."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .vlm_pixels import image_processor_kind, vlm_pixels

PIXEL_TOLERANCE = 0.05  # in normalised units: three grey levels
ANSWER_ROOM = 8  # tokens of the context that are kept free for an answer

Placeholder = Callable[[PretrainedConfig, Mapping[str, Tensor], str], str]


def qwen_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """One token for each patch that is left after merging."""
    merge: int = config.vision_config.spatial_merge_size
    return token * (int(pixels["image_grid_thw"].prod()) // merge**2)


def internvl_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """The tokens of one tile between those that begin and end an image."""
    return "<img>" + token * config.image_seq_length + "</img>"


def smolvlm_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """The tokens of one tile, announced as the whole image."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    return "<fake_token_around_image><global-img>" + token * count + "<fake_token_around_image>"


@dataclass(frozen=True, kw_only=True)
class VLMFamily:
    """How checkpoints of one model type are asked.

    Attributes:
        prompt: the text around a question for checkpoints that come without a chat template.
        settings: arguments of the processor, such that an image is one tile.
        placeholder: what stands in the text for an image, for families whose processor needs torchvision.
        answer_type: the `token_type_ids` of an answer.
    """

    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    placeholder: Placeholder | None = None
    answer_type: int = 0


# `model_type` of a config.json -> how it is asked
VLM_FAMILIES: dict[str, VLMFamily] = {
    "blip-2": VLMFamily(prompt="Question: {} Answer:"),
    "gemma3": VLMFamily(settings={"do_pan_and_scan": False}),
    "idefics3": VLMFamily(settings={"do_image_splitting": False}),
    "instructblip": VLMFamily(prompt="Question: {}"),
    "internvl": VLMFamily(settings={"crop_to_patches": False}, placeholder=internvl_placeholder),
    "llava": VLMFamily(prompt="USER: <image>\n{} ASSISTANT:"),
    # What the model reads is attended to in both directions (0), what it writes is causal (1).
    "paligemma": VLMFamily(prompt="<image>answer en {}", answer_type=1),
    "qwen2_5_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen2_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen3_vl": VLMFamily(placeholder=qwen_placeholder),
    "smolvlm": VLMFamily(settings={"do_image_splitting": False}, placeholder=smolvlm_placeholder),
}


def vlm_family(model_type: str) -> VLMFamily:
    """The family of a model type. Raises `ValueError` for one that is not written here."""
    if model_type not in VLM_FAMILIES:
        raise ValueError(
            f"Expected a vision-language model of the type {sorted(VLM_FAMILIES)}, but got '{model_type}', whose "
            "pixels are not written here. Load model and processor yourself and pass `VQAScorer` also `preprocess=`, "
            "images (B, 3, H, W) in [0, 1] -> `pixel_values`."
        )
    return VLM_FAMILIES[model_type]


class TokenizerAndImageProcessor:
    """A tokenizer and an image processor in place of a processor class that cannot be built without torchvision.

    Those of families that also take videos ask for it, though images do not need it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        config: PretrainedConfig,
        placeholder: Placeholder,
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.placeholder = placeholder
        self.chat_template: Any = chat_template or tokenizer.chat_template
        self.image_token = str(tokenizer.convert_ids_to_tokens(config.image_token_id))

    def apply_chat_template(self, chat: list[dict[str, Any]], **arguments: Any) -> Any:
        return self.tokenizer.apply_chat_template(chat, chat_template=self.chat_template, **arguments)

    def __call__(
        self,
        *,
        text: list[str],
        images: list[Any],
        return_tensors: str,
        add_special_tokens: bool = True,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """The inputs of the model for one image in one text."""
        pixels = self.image_processor(images=images, return_tensors=return_tensors, **settings)
        filled = text[0].replace(self.image_token, self.placeholder(self.config, pixels, self.image_token), 1)
        tokens = self.tokenizer([filled], return_tensors=return_tensors, add_special_tokens=add_special_tokens)
        kinds = (tokens["input_ids"] == self.config.image_token_id).long()
        return {**tokens, **pixels, "mm_token_type_ids": kinds}


def load_vlm_processor(checkpoint: str, config: PretrainedConfig, hub: Mapping[str, Any]) -> Any:
    """The processor of a checkpoint, or what stands in for it without torchvision."""
    placeholder = vlm_family(config.model_type).placeholder
    if placeholder is None:
        return AutoProcessor.from_pretrained(checkpoint, **hub)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **hub)
    settings, _ = ProcessorMixin.get_processor_dict(checkpoint, **hub)
    return TokenizerAndImageProcessor(tokenizer, image_processor, config, placeholder, settings.get("chat_template"))


def probe_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width) in [0, 1], of 256 levels; so smooth that all antialiasing filters agree on it."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


class VLMInputs:
    """The inputs of a vision-language model: pixels with a gradient, and the rest once for each text and image size.

    The rest comes from the checkpoint's own processor, called on a probe image. On that occasion our pixels of the
    probe are compared with the processor's.

    Args:
        model: tells the family, and which inputs it takes.
        processor: a transformers processor, or `TokenizerAndImageProcessor`.
        preprocess: images (B, 3, H, W) in [0, 1] -> `pixel_values`, instead of ours; it is not compared.
        prompt_format: the text around a question, "{}", with the image token if the family writes one; by default the
            chat template of the processor, else the family's own.

    Attributes:
        pixel_errors: (height, width) -> the largest difference from the processor's pixels, in normalised units.

    Raises:
        ValueError: for a family or image processor that is not written here, unless there is a `preprocess`; without
            any text around a question, or with one that has no "{}".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        prompt_format: str | None = None,
    ):
        if prompt_format is not None and "{}" not in prompt_format:
            raise ValueError(
                f"Expected a `prompt_format` with {{}} in place of the question, but got {prompt_format!r}."
            )
        kind = model.config.model_type
        self.family = vlm_family(kind) if preprocess is None else VLM_FAMILIES.get(kind, VLMFamily())
        self.processor = processor
        self.preprocess = preprocess
        self.prompt_format = prompt_format
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.limits = context_lengths(model.config, processor.tokenizer)
        self.cache: dict[tuple[str, str, tuple[int, int]], dict[str, Tensor]] = {}
        self.pixel_errors: dict[tuple[int, int], float] = {}
        if preprocess is None:
            image_processor_kind(processor.image_processor)
        self.surround("")

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> `pixel_values` of the model, in float32 or more."""
        if self.preprocess is not None:
            return self.preprocess(images)
        return vlm_pixels(images, self.processor.image_processor)

    def __call__(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """All inputs but pixels for one image of (height, width), each (1, ...), on the CPU.

        Args:
            template: the question, "{}" for the prompt.
            prompt: cut at its end if the context is too short.
            size: (height, width) of the image.

        Raises:
            ValueError: our pixels are not the processor's, or no context is left for a prompt.
        """
        key = template, prompt, size
        if key not in self.cache:
            # Tensors made in inference mode could never enter a graph later.
            with torch.inference_mode(False), torch.no_grad():
                self.cache[key] = self.build(template, prompt, size)
        return self.cache[key]

    def build(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """The same, not from the cache."""
        token = getattr(self.processor, "image_token", None)
        if token is not None and str(token) in prompt:
            raise ValueError(
                f"Expected a prompt without the model's image token, but got {prompt!r}. Remove '{token}'."
            )
        image = probe_image(*size)
        reference = self.process(template.replace("{}", prompt), image)
        while (excess := self.excess(reference)) > 0:
            prompt = self.shortened(prompt, excess)
            reference = self.process(template.replace("{}", prompt), image)
        if self.preprocess is None:
            self.check_pixels(image, reference["pixel_values"])
        wanted = self.accepted - {"labels", "pixel_values"}
        return {name: value for name, value in reference.items() if name in wanted}

    def process(self, question: str, image: Tensor) -> Mapping[str, Tensor]:
        """The processor's output for a question about an image (1, 3, H, W)."""
        text = self.surround(question)
        picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy())
        settings = dict(self.family.settings)
        # Chat templates that begin with the token of the beginning do not want a second one.
        if (begin := self.processor.tokenizer.bos_token) and text.startswith(begin):
            settings["add_special_tokens"] = False
        return self.processor(text=[text], images=[picture], return_tensors="pt", **settings)

    def surround(self, question: str) -> str:
        """The whole text for a question."""
        if self.prompt_format is not None:
            return self.prompt_format.replace("{}", question)
        if getattr(self.processor, "chat_template", None) is not None:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if self.family.prompt is None:
            raise ValueError(
                f"Expected a chat template in {type(self.processor).__name__}, but it has none. Pass `prompt_format=`."
            )
        return self.family.prompt.replace("{}", question)

    def excess(self, reference: Mapping[str, Tensor]) -> int:
        """By how many tokens a text is too long; 0 or less if it is not."""
        lengths = {name: reference[name].shape[1] for name in self.limits if name in reference}
        return max(int(length + ANSWER_ROOM - self.limits[name]) for name, length in lengths.items())

    def shortened(self, prompt: str, excess: int) -> str:
        """A prompt without its last `excess` tokens, about."""
        count = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count <= excess:
            raise ValueError(
                f"Expected a context of at least {excess - count} tokens more than {self.limits} for the image and the "
                "question alone. Use smaller images or a shorter question."
            )
        return prompt[: len(prompt) * (count - excess) // count]

    def check_pixels(self, image: Tensor, expected: Tensor) -> None:
        """Raise unless our pixels of an image are the processor's."""
        pixels = self.pixels(image)
        error = float((pixels - expected).abs().max()) if pixels.shape == expected.shape else float("inf")
        if not error <= PIXEL_TOLERANCE:  # NaN too
            raise ValueError(
                f"Expected the pixels of {type(self.processor.image_processor).__name__}, {tuple(expected.shape)}, but "
                f"ours, {tuple(pixels.shape)}, differ by {error:.3g} from them. Pass `preprocess=`, images "
                "(B, 3, H, W) in [0, 1] -> `pixel_values`."
            )
        self.pixel_errors[(image.shape[-2], image.shape[-1])] = error


def context_lengths(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How many tokens each text input of a model may have."""
    text = getattr(config, "text_config", config)
    lengths = {"input_ids": min(getattr(text, "max_position_embeddings", float("inf")), tokenizer.model_max_length)}
    if (reader := getattr(config, "qformer_config", None)) is not None:
        lengths["qformer_input_ids"] = reader.max_position_embeddings + ANSWER_ROOM  # it reads no answer
    return lengths
