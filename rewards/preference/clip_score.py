"""CLIPScore: the agreement of image and prompt by CLIP."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from ..contract.checkpoints import load_pretrained
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform, at_least_float32

CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register_reward("clipscore", loads="clip")
class CLIPScore(Reward):
    """`exp(logit_scale) * cos(image, text)` of a CLIP model, about 100 times the cosine.

    CLIPScore is from https://arxiv.org/abs/2104.08718. This form, with the raw prompt and without a clamp at 0, is that
    of ReNO, https://arxiv.org/abs/2406.04312. Norms, dot product and scale are float32 whatever the dtype of the
    weights.

    Args:
        model: The CLIP model; it is frozen.
        tokenizer: The tokenizer of the model.
        image_transform: Map from images in [0, 1] to pixels; by default CLIP's transform at the model's image size.
    """

    name = "clipscore"
    range = (-100.0, 100.0)
    license = "mit"
    default_checkpoint = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # literal: Hub cards are written without imports
    parameter_count = 986_109_441
    text_modules = ("model.text_model", "model.text_projection")
    model: CLIPModel

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))
        # A float instead of the parameter, because bfloat16 would round a scale of 100 to 98.9.
        self.logit_scale = model.logit_scale.detach().double().exp().item()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.logit_scale * (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the unit embeddings (B, D), float32, of (B, 3, H, W) images in [0, 1]."""
        pixels = self.image_transform(images).to(self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(at_least_float32(self.model.visual_projection(pooled)), dim=-1)

    def encode_text(self, prompt: str) -> Tensor:
        """Return the unit embedding (D,) of the prompt, truncated to the context length of the model."""
        config = self.model.text_model.config
        # One prompt at a time needs no padding, so tokenizers without a padding token work too.
        tokens = self.tokenizer(prompt, truncation=True, max_length=config.max_position_embeddings)
        ids = torch.tensor([tokens["input_ids"]], device=self.device)
        # CLIP takes the text feature at the end token, and silently at the *first* token if there is none. (With the
        # legacy value 2 it takes the position of the highest id instead.)
        if config.eos_token_id != 2 and config.eos_token_id not in tokens["input_ids"]:
            raise ValueError(
                f"Expected the tokenizer to end prompts with the model's `eos_token_id` {config.eos_token_id}, but got "
                f"{tokens['input_ids']}. Use the tokenizer of this model, or build the model with the `eos_token_id` "
                "of this tokenizer."
            )
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(at_least_float32(self.model.text_projection(pooled)), dim=-1)[0]

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "CLIPScore":
        model = load_pretrained(CLIPModel, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))
