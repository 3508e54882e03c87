"""CLIPScore: how well CLIP finds that an image fits its prompt."""

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
    """`exp(logit_scale) * cos(image, text)` of a CLIP model: about 100 times the cosine.

    CLIPScore: https://arxiv.org/abs/2104.08718; in this form, with the raw prompt and without a clamp at 0, in ReNO:
    https://arxiv.org/abs/2406.04312. Norms, dot product and scale are float32 whatever the precision of the weights.

    Args:
        model: the CLIP model; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default CLIP's transform at the model's image size.
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
        # A number and not the parameter: bfloat16 turns a scale of 100 into 98.9.
        self.logit_scale = model.logit_scale.detach().double().exp().item()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.logit_scale * (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) unit vectors, float32."""
        pixels = self.image_transform(images).to(self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(at_least_float32(self.model.visual_projection(pooled)), dim=-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt, truncated to the length the model was trained with."""
        config = self.model.text_model.config
        # One prompt at a time: no padding, so a tokenizer without a padding token works too.
        tokens = self.tokenizer(prompt, truncation=True, max_length=config.max_position_embeddings)
        ids = torch.tensor([tokens["input_ids"]], device=self.device)
        # CLIP reads the text feature at the end token, and silently at the *first* token if there is none. (Under the
        # legacy value 2 it looks for the highest id instead.)
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
