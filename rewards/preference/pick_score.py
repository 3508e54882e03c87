"""PickScore: a CLIP trained to predict which of two images of a prompt people prefer."""

from typing import Any

from transformers import AutoTokenizer, CLIPModel

from ..contract.checkpoints import IMAGE_PROCESSOR_FILE, holder_of, load_pretrained
from ..contract.registry import register_reward
from ..contract.transforms import ImageTransform
from .clip_score import CLIP_VIT_H, CLIPScore


@register_reward("pickscore")
class PickScore(CLIPScore):
    """`exp(logit_scale) * cos(image, text)` of a CLIP fine-tuned on human choices, mostly 17 to 24.

    "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", https://arxiv.org/abs/2305.01569.
    The formula and the arguments are those of `CLIPScore`.
    """

    name = "pickscore"
    license = "unstated (code: mit)"
    default_checkpoint = "yuvalkirstain/PickScore_v1"

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "PickScore":
        # As on the model card, tokenizer and preprocessing come from the CLIP that was fine-tuned.
        source, source_hub = holder_of("tokenizer_config.json", checkpoint, CLIP_VIT_H, hub)
        tokenizer = AutoTokenizer.from_pretrained(source, **source_hub)
        source, source_hub = holder_of(IMAGE_PROCESSOR_FILE, checkpoint, CLIP_VIT_H, hub)
        transform = ImageTransform.from_processor_config(source, **source_hub)
        return cls(load_pretrained(CLIPModel, checkpoint, hub), tokenizer, transform)
