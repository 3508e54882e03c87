"""HPSv2: human preference among images of a prompt."""

import html
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from ..contract.checkpoints import checkpoint_path, holder_of, read_state_dict
from ..contract.registry import register_reward
from ..contract.transforms import PadTransform
from .clip_score import CLIP_VIT_H, CLIPScore
from .open_clip import clip_model_from_open_clip

# Typographic quotes, which open_clip's tokenizer replaces and transformers' does not.
STRAIGHT_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


@register_reward("hpsv2.1", "hps", "hpsv2")
class HPSv21(CLIPScore):
    """`cos(image, text)` of HPSv2.1, without CLIP's scale, mostly 0.2 to 0.35.

    "Human Preference Score v2", https://arxiv.org/abs/2306.09341. The published file contains the weights of an
    open_clip ViT-H-14, with the configuration and tokenizer of that CLIP. Images are padded instead of cropped, see
    `PadTransform`. Prompts are cleaned as by open_clip's tokenizer (HTML entities, typographic quotes), except for
    full-width letters, ligatures and mojibake.

    Args:
        model: The CLIP model, with GELU; it is frozen.
        tokenizer: The tokenizer of the model.
        image_transform: Map from images in [0, 1] to pixels; by default `PadTransform` at the model's image size.

    Raises:
        ValueError: For a model with another activation, such as the default of `CLIPConfig`.
    """

    name = "hpsv2.1"
    range = (-1.0, 1.0)
    license = "apache-2.0"
    default_checkpoint = "xswu/HPSv2"
    weights_file = "HPS_v2.1_compressed.pt"

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        activations = {model.text_model.config.hidden_act, model.vision_model.config.hidden_act}
        if activations != {"gelu"}:
            raise ValueError(
                f"Expected a CLIP model with `hidden_act` 'gelu' for HPSv2, but got {sorted(activations)}, which gives "
                "slightly wrong scores. Use the configuration of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
            )
        edge = cast(int, model.vision_model.config.image_size)
        super().__init__(model, tokenizer, image_transform or PadTransform(edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)

    def encode_text(self, prompt: str) -> Tensor:
        """Return the unit embedding (D,) of the cleaned and truncated prompt."""
        text = html.unescape(html.unescape(prompt)).translate(STRAIGHT_QUOTES)
        return super().encode_text(text.strip())

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "HPSv21":
        assert cls.weights_file is not None
        source, source_hub = holder_of("tokenizer_config.json", checkpoint, CLIP_VIT_H, hub)
        tokenizer = AutoTokenizer.from_pretrained(source, **source_hub)
        source, source_hub = holder_of("config.json", checkpoint, CLIP_VIT_H, hub)
        config = CLIPConfig.from_pretrained(source, **source_hub)
        path = checkpoint_path(checkpoint, cls.weights_file, hub)
        return cls(clip_model_from_open_clip(read_state_dict(path), config, path.name), tokenizer)


@register_reward("hpsv2.0")
class HPSv20(HPSv21):
    """HPSv2.0: `HPSv21` with the weights that the original package uses by default."""

    name = "hpsv2.0"
    weights_file = "HPS_v2_compressed.pt"
