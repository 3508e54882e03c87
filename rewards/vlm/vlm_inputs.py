"""Inputs of vision-language models: differentiable pixels, and text from the processor of each model family."""

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

PIXEL_TOLERANCE = 0.05  # in normalized units, about three gray levels
ANSWER_ROOM = 8  # tokens of the context reserved for the answer

Placeholder = Callable[[PretrainedConfig, Mapping[str, Tensor], str], str]


def qwen_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """Return one token per merged patch."""
    merge: int = config.vision_config.spatial_merge_size
    return token * (int(pixels["image_grid_thw"].prod()) // merge**2)


def internvl_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """Return the tokens of one tile between the begin and end tokens of an image."""
    return "<img>" + token * config.image_seq_length + "</img>"


def smolvlm_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """Return the tokens of one tile, marked as the global image."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    return "<fake_token_around_image><global-img>" + token * count + "<fake_token_around_image>"


@dataclass(frozen=True, kw_only=True)
class VLMFamily:
    """Query format of the checkpoints of one model type.

    Attributes:
        prompt: The text around a question, for checkpoints without a chat template.
        settings: Arguments that make the processor treat an image as one tile.
        placeholder: Function that returns the text of an image, for families whose processor requires torchvision.
        answer_type: The `token_type_ids` of answer tokens.
    """

    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    placeholder: Placeholder | None = None
    answer_type: int = 0


# `model_type` of a config.json -> its query format
VLM_FAMILIES: dict[str, VLMFamily] = {
    "blip-2": VLMFamily(prompt="Question: {} Answer:"),
    "gemma3": VLMFamily(settings={"do_pan_and_scan": False}),
    "idefics3": VLMFamily(settings={"do_image_splitting": False}),
    "instructblip": VLMFamily(prompt="Question: {}"),
    "internvl": VLMFamily(settings={"crop_to_patches": False}, placeholder=internvl_placeholder),
    "llava": VLMFamily(prompt="USER: <image>\n{} ASSISTANT:"),
    # Attention is bidirectional for the input (0) and causal for the answer (1).
    "paligemma": VLMFamily(prompt="<image>answer en {}", answer_type=1),
    "qwen2_5_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen2_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen3_vl": VLMFamily(placeholder=qwen_placeholder),
    "smolvlm": VLMFamily(settings={"do_image_splitting": False}, placeholder=smolvlm_placeholder),
}


def vlm_family(model_type: str) -> VLMFamily:
    """Return the family of a model type. Raises `ValueError` if it is not supported."""
    if model_type not in VLM_FAMILIES:
        raise ValueError(
            f"Expected a vision-language model of the type {sorted(VLM_FAMILIES)}, but got '{model_type}', whose "
            "preprocessing is not implemented. Load model and processor yourself and pass them to `VQAScorer` with "
            "`preprocess=`, a function from images (B, 3, H, W) in [0, 1] to `pixel_values`."
        )
    return VLM_FAMILIES[model_type]


class TokenizerAndImageProcessor:
    """Processor for images and text that does not require torchvision.

    The processor classes of families that also accept videos require it, even for images.
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
        """Return the model inputs for one text with one image."""
        pixels = self.image_processor(images=images, return_tensors=return_tensors, **settings)
        filled = text[0].replace(self.image_token, self.placeholder(self.config, pixels, self.image_token), 1)
        tokens = self.tokenizer([filled], return_tensors=return_tensors, add_special_tokens=add_special_tokens)
        kinds = (tokens["input_ids"] == self.config.image_token_id).long()
        return {**tokens, **pixels, "mm_token_type_ids": kinds}


def load_vlm_processor(checkpoint: str, config: PretrainedConfig, hub: Mapping[str, Any]) -> Any:
    """Load the processor of a checkpoint, or its replacement that does not require torchvision."""
    placeholder = vlm_family(config.model_type).placeholder
    if placeholder is None:
        return AutoProcessor.from_pretrained(checkpoint, **hub)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **hub)
    settings, _ = ProcessorMixin.get_processor_dict(checkpoint, **hub)
    return TokenizerAndImageProcessor(tokenizer, image_processor, config, placeholder, settings.get("chat_template"))


def probe_image(height: int, width: int) -> Tensor:
    """Return a (1, 3, height, width) image in [0, 1] with 256 levels, smooth enough for all resize filters to agree."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


class VLMInputs:
    """Inputs of a vision-language model: differentiable pixels, and other inputs cached by text and image size.

    The other inputs come from the checkpoint's own processor, called on a probe image. Its pixels for the probe are
    compared with the differentiable ones.

    Args:
        model: The model, which determines the family and the accepted inputs.
        processor: A transformers processor or a `TokenizerAndImageProcessor`.
        preprocess: Map from images (B, 3, H, W) in [0, 1] to `pixel_values`, instead of the built-in one; it is not
            compared with the processor.
        prompt_format: The text around a question, with "{}" for the question, and the image token if the family needs
            one; by default the chat template of the processor, else that of the family.

    Attributes:
        pixel_errors: (height, width) -> the largest difference from the processor's pixels, in normalized units.

    Raises:
        ValueError: For an unsupported family or image processor without `preprocess`, if there is neither a chat
            template nor a `prompt_format`, or for a `prompt_format` without "{}".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        prompt_format: str | None = None,
    ):
        if prompt_format is not None and "{}" not in prompt_format:
            raise ValueError(f"Expected a `prompt_format` with {{}} for the question, but got {prompt_format!r}.")
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
        """Return the `pixel_values`, in float32 or more, of (B, 3, H, W) images in [0, 1]."""
        if self.preprocess is not None:
            return self.preprocess(images)
        return vlm_pixels(images, self.processor.image_processor)

    def __call__(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return all inputs except pixels for one image of (height, width), each (1, ...), on the CPU.

        Args:
            template: The question, with "{}" for the prompt.
            prompt: The prompt, truncated at its end if the context is too short.
            size: (height, width) of the image.

        Raises:
            ValueError: If the differentiable pixels differ from the processor's, or no context is left for a prompt.
        """
        key = template, prompt, size
        if key not in self.cache:
            # Tensors created in inference mode could not enter a graph later.
            with torch.inference_mode(False), torch.no_grad():
                self.cache[key] = self.build(template, prompt, size)
        return self.cache[key]

    def build(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """Build the inputs without the cache."""
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
        """Return the processor's output for a question about an image (1, 3, H, W)."""
        text = self.surround(question)
        picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy())
        settings = dict(self.family.settings)
        # If the chat template already begins with the BOS token, the tokenizer must not add a second one.
        if (begin := self.processor.tokenizer.bos_token) and text.startswith(begin):
            settings["add_special_tokens"] = False
        return self.processor(text=[text], images=[picture], return_tensors="pt", **settings)

    def surround(self, question: str) -> str:
        """Return the complete text for a question."""
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
        """Return the number of tokens beyond the context length; 0 or less if the text fits."""
        lengths = {name: reference[name].shape[1] for name in self.limits if name in reference}
        return max(int(length + ANSWER_ROOM - self.limits[name]) for name, length in lengths.items())

    def shortened(self, prompt: str, excess: int) -> str:
        """Remove about the last `excess` tokens of a prompt."""
        count = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count <= excess:
            raise ValueError(
                f"Expected a context of at least {excess - count} tokens more than {self.limits} for the image and the "
                "question without a prompt. Use smaller images or a shorter question."
            )
        return prompt[: len(prompt) * (count - excess) // count]

    def check_pixels(self, image: Tensor, expected: Tensor) -> None:
        """Raise `ValueError` unless the differentiable pixels of an image agree with the processor's."""
        pixels = self.pixels(image)
        error = float((pixels - expected).abs().max()) if pixels.shape == expected.shape else float("inf")
        if not error <= PIXEL_TOLERANCE:  # NaN too
            raise ValueError(
                f"Expected the pixels of {type(self.processor.image_processor).__name__}, {tuple(expected.shape)}, but "
                f"ours, {tuple(pixels.shape)}, differ by {error:.3g} from them. Pass `preprocess=`, a function from "
                "images (B, 3, H, W) in [0, 1] to `pixel_values`."
            )
        self.pixel_errors[(image.shape[-2], image.shape[-1])] = error


def context_lengths(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return the maximum number of tokens of each text input of a model."""
    text = getattr(config, "text_config", config)
    lengths = {"input_ids": min(getattr(text, "max_position_embeddings", float("inf")), tokenizer.model_max_length)}
    if (reader := getattr(config, "qformer_config", None)) is not None:
        lengths["qformer_input_ids"] = reader.max_position_embeddings + ANSWER_ROOM  # it does not read the answer
    return lengths
