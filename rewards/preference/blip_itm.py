"""BLIP's two answers to whether a caption fits an image: a classifier's probability and a cosine."""

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

# Of captions in BLIP's own inference code; its retrieval models were not trained on longer ones.
BLIP_CAPTION_LENGTH = 35


@register_reward("blip_itm", loads="BlipForImageTextRetrieval")
class BlipITM(Reward):
    """`softmax(itm_head(f))[1]`, f the text tower's [CLS] feature after it has attended to the image: P(it matches).

    BLIP: https://arxiv.org/abs/2201.12086. In [0, 1]. The gradient vanishes near both ends, where that of
    `BlipITC` does not.

    Args:
        model: the BLIP model; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default a bicubic resize to the model's square image size
            with CLIP's mean and deviation.
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
        # Not through the model's own forward: it makes a mask on the CPU, wherever the images are.
        ids, mask = self.tokens(prompts, images.device)
        patches = self.encode_patches(images)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches)
        return precise_linear(self.model.itm_head, text.last_hidden_state[:, 0]).softmax(-1)[:, 1]

    def encode_patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, 1 + patches, D) features of the image tower."""
        pixels = self.image_transform(images).to(self.dtype)
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    @classmethod
    def load(cls: type[BlipITMT], checkpoint: str, hub: dict[str, Any]) -> BlipITMT:
        model = load_pretrained(BlipForImageTextRetrieval, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))


@register_reward("blip_itc")
class BlipITC(BlipITM):
    """`cos(vision_proj(image), text_proj(text))` of the same model: the towers see nothing of one another.

    BLIP: https://arxiv.org/abs/2201.12086. In [-1, 1]. The text is encoded once per prompt. The arguments are those of
    `BlipITM`.
    """

    name = "blip_itc"
    range = (-1.0, 1.0)
    text_modules = ("model.text_encoder", "model.text_proj")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        image = precise_linear(self.model.vision_proj, self.encode_patches(images)[:, 0])
        return (F.normalize(image, dim=-1) * self.encode_prompt(prompts)).sum(-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt."""
        ids, mask = self.tokens([prompt], self.model.text_proj.weight.device)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(precise_linear(self.model.text_proj, text[0, 0]), dim=-1)
