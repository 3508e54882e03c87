"""BLIP's two measures of image-text agreement: the probability of a classifier, and a cosine."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, BlipForImageTextRetrieval, PreTrainedTokenizerBase

from ..contract.checkpoints import load_pretrained
from ..contract.image_text import PromptTokens, precise_linear
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform

BlipITMT = TypeVar("BlipITMT", bound="BlipITM")

# The caption length of BLIP's own inference code; its retrieval models were not trained on longer ones.
BLIP_CAPTION_LENGTH = 35


@register_reward("blip_itm", loads="BlipForImageTextRetrieval")
class BlipITM(Reward):
    """Probability that image and prompt match, `softmax(itm_head(f))[1]`, in [0, 1].

    f is the [CLS] feature of BLIP's text tower, which attends to the image: https://arxiv.org/abs/2201.12086. The
    gradient vanishes near 0 and 1, unlike that of `BlipITC`.

    Args:
        model: The BLIP model; it is frozen.
        tokenizer: The tokenizer of the model.
        image_transform: Map from images in [0, 1] to pixels; by default a bicubic resize to the model's square image
            size, normalized with CLIP's mean and standard deviation.
    """

    name = "blip_itm"
    range = (0.0, 1.0)
    license = "bsd-3-clause"
    default_checkpoint = "Salesforce/blip-itm-base-coco"
    parameter_count = 223_744_258
    model: BlipForImageTextRetrieval

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        self.tokens = PromptTokens(tokenizer, BLIP_CAPTION_LENGTH)
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        # The model's own forward creates a mask on the CPU, whatever the device of the images.
        ids, mask = self.tokens(prompts, images.device)
        patches = self.encode_patches(images)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches)
        return precise_linear(self.model.itm_head, text.last_hidden_state[:, 0]).softmax(-1)[:, 1]

    def encode_patches(self, images: Tensor) -> Tensor:
        """Return the image tower's features (B, 1 + patches, D) of (B, 3, H, W) images in [0, 1]."""
        pixels = self.image_transform(images).to(self.dtype)
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    @classmethod
    def load(cls: type[BlipITMT], checkpoint: str, hub: dict[str, Any]) -> BlipITMT:
        model = load_pretrained(BlipForImageTextRetrieval, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))


@register_reward("blip_itc")
class BlipITC(BlipITM):
    """`cos(vision_proj(image), text_proj(text))` of the same model, without cross-attention, in [-1, 1].

    BLIP: https://arxiv.org/abs/2201.12086. Each prompt is encoded once. The arguments are those of `BlipITM`.
    """

    name = "blip_itc"
    range = (-1.0, 1.0)
    text_modules = ("model.text_encoder", "model.text_proj")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        image = precise_linear(self.model.vision_proj, self.encode_patches(images)[:, 0])
        return (F.normalize(image, dim=-1) * self.encode_prompt(prompts)).sum(-1)

    def encode_text(self, prompt: str) -> Tensor:
        """Return the unit embedding (D,) of the prompt."""
        ids, mask = self.tokens([prompt], self.model.text_proj.weight.device)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(precise_linear(self.model.text_proj, text[0, 0]), dim=-1)
