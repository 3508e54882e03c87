"""SigLIP: the agreement of image and prompt by a model trained with a sigmoid loss per pair."""

import string
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipModel

from ..contract.checkpoints import load_pretrained
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform, at_least_float32

HALF = (0.5, 0.5, 0.5)
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@register_reward("siglip", loads="siglip")
class SigLIP(Reward):
    """`exp(logit_scale) * cos(image, text) + logit_bias`, the logit that image and text belong together.

    "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343. Norms, dot product, scale and bias
    are float32 whatever the dtype of the weights. Prompts are lowercased and padded to the context length, as in
    training; with the tokenizer of the first SigLIP punctuation is removed too, as in transformers.

    Args:
        model: The SigLIP model; it is frozen.
        tokenizer: The tokenizer of the model, with an end and a padding token.
        image_transform: Map from images in [0, 1] to pixels; by default a resize to the model's square image size.
        probability: Return the sigmoid of the logit, in [0, 1]. Its gradient nearly vanishes near 0 and 1.

    Raises:
        ValueError: If the tokenizer lacks one of the two tokens.
    """

    name = "siglip"
    license = "apache-2.0"
    default_checkpoint = "google/siglip-so400m-patch14-384"
    parameter_count = 877_960_498
    text_modules = ("model.text_model",)
    model: SiglipModel

    def __init__(
        self,
        model: SiglipModel,
        tokenizer: PreTrainedTokenizerFast,
        image_transform: Callable[[Tensor], Tensor] | None = None,
        probability: bool = False,
    ):
        super().__init__(model=model)
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                "Expected a tokenizer with an end and a padding token for SigLIP, but got "
                f"{tokenizer.eos_token!r} and {tokenizer.pad_token!r}. Use the tokenizer of this model."
            )
        edge = cast(int, model.vision_model.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None, mean=HALF, std=HALF)
        self.probability = probability
        # Floats instead of the parameters, which half precision would round.
        self.logit_scale = model.logit_scale.detach().double().exp().item()
        self.logit_bias = model.logit_bias.detach().double().item()
        bounds = (self.logit_bias - self.logit_scale, self.logit_bias + self.logit_scale)
        self.range = (0.0, 1.0) if probability else bounds

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)
        logits = self.logit_scale * cosine + self.logit_bias
        return logits.sigmoid() if self.probability else logits

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the unit embeddings (B, D), float32, of (B, 3, H, W) images in [0, 1]."""
        pixels = self.image_transform(images).to(self.dtype)
        return F.normalize(at_least_float32(self.model.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def encode_text(self, prompt: str) -> Tensor:
        """Return the unit embedding (D,) of the prompt, truncated to the context length of the model."""
        ids = torch.tensor([self.token_ids(prompt)], device=self.device)
        # No attention mask: the model was trained on padded text, and its text feature is that of the last position.
        return F.normalize(at_least_float32(self.model.text_model(input_ids=ids).pooler_output), dim=-1)[0]

    def token_ids(self, prompt: str) -> list[int]:
        """Tokenize a prompt: truncate, append the end token, and pad to the context length.

        The end token and padding are added here because tokenizers of different repositories disagree about them.
        """
        length, eos, pad = self.context_length, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        text = prompt.lower()
        # The first SigLIP pads with its end token; SigLIP 2 uses the tokenizer of Gemma.
        if eos == pad:
            text = " ".join(text.translate(WITHOUT_PUNCTUATION).split())
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1], eos]
        return ids + [pad] * (length - len(ids))

    @property
    def context_length(self) -> int:
        return self.model.text_model.config.max_position_embeddings

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "SigLIP":
        # For the first SigLIP, AutoTokenizer would require the sentencepiece package.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, **hub)
        transform = ImageTransform.from_processor_config(checkpoint, **hub)
        return cls(load_pretrained(SiglipModel, checkpoint, hub), tokenizer, transform)


@register_reward("siglip2")
class SigLIP2(SigLIP):
    """`SigLIP` with the weights of "SigLIP 2", https://arxiv.org/abs/2502.14786.

    A folder with these weights is loaded as `SigLIP`, which is equivalent because the architecture is the same.
    """

    name = "siglip2"
    default_checkpoint = "google/siglip2-so400m-patch14-384"
    parameter_count = 1_136_008_498
