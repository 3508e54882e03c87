"""ImageReward: a BLIP model trained on human rankings of generated images."""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from ..contract.checkpoints import checkpoint_path, load_strictly, read_settings, read_state_dict
from ..contract.image_text import PromptTokens, precise_linear
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform

# From the released code, https://github.com/THUDM/ImageReward
IMAGE_REWARD_MEAN = 0.16717362830052426
IMAGE_REWARD_STD = 1.0333394966054072
IMAGE_REWARD_MAX_LENGTH = 35
IMAGE_REWARD_TOKENIZER = "google-bert/bert-base-uncased"
# All ViTs of the published BLIP models have 64 channels per attention head, which the tensors do not tell.
IMAGE_REWARD_HEAD_WIDTH = 64

# Names of timm's ViT -> names of `BlipVisionModel`
IMAGE_REWARD_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
# Keys of the file that the score does not use: the projections of BLIP's contrastive loss and BERT's position ids
IMAGE_REWARD_IGNORED = re.compile(
    r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids"
)
# Settings of med_config.json that `BlipTextConfig` has under the same names
IMAGE_REWARD_TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "pad_token_id",
)


class ImageRewardHead(nn.Module):
    """Scoring head, (B, D) text features -> (B, 1): five linear layers without activations, in float32 or more."""

    def __init__(self, width: int):
        super().__init__()
        # Dropout is inactive, but the names of the published weights count these layers.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = precise_linear(layer, features) if isinstance(layer, nn.Linear) else layer(features)
        return features


@register_reward("imagereward")
class ImageRewardModel(Reward):
    """ImageReward, `(head(f) - mean) / std`: https://arxiv.org/abs/2304.05977.

    f is the [CLS] feature of the text tower, which attends to the image. Scores are standardized; most are between -2.3
    and 2. The text features depend on the image, so only token ids are cached.

    Args:
        vision_model: The image tower.
        text_model: The text tower with cross-attention, without a pooling layer.
        head: Module from (B, D) features to (B, 1).
        tokenizer: BERT's, with [DEC] and [ENC] added (see `image_reward_tokenizer`).
        image_transform: Map from images in [0, 1] to pixels; by default CLIP's transform at the image tower's size.

    Raises:
        ValueError: If the text tower expects image features of another width than the image tower's.
    """

    name = "imagereward"
    license = "apache-2.0"
    default_checkpoint = "THUDM/ImageReward"
    weights_file = "ImageReward.pt"
    parameter_count = 446_206_689
    vision_model: BlipVisionModel
    text_model: BlipTextModel
    head: nn.Module

    def __init__(
        self,
        vision_model: BlipVisionModel,
        text_model: BlipTextModel,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        width, expected = vision_model.config.hidden_size, text_model.config.encoder_hidden_size
        if width != expected:
            raise ValueError(
                f"Expected image features of width {expected}, the `encoder_hidden_size` of the text model, but got a "
                f"vision model of width {width}. Build the text model with `encoder_hidden_size={width}`."
            )
        super().__init__(vision_model=vision_model, text_model=text_model, head=head)
        edge = cast(int, vision_model.config.image_size)
        self.tokens = PromptTokens(tokenizer, IMAGE_REWARD_MAX_LENGTH)
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.image_transform(images).to(self.dtype)
        patches = self.vision_model(pixel_values=pixels).last_hidden_state
        ids, mask = self.tokens(prompts, images.device)
        text = self.text_model(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(text[:, 0])[:, 0] - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "ImageRewardModel":
        """Load the published `ImageReward.pt` and `med_config.json`, and the tokenizer from its own repository."""
        parts = convert_image_reward(read_state_dict(checkpoint_path(checkpoint, "ImageReward.pt", hub)))
        settings = read_settings(checkpoint_path(checkpoint, "med_config.json", hub))
        vision_config = image_reward_vision_config(parts["vision"])
        text_config = image_reward_text_config(settings, vision_config.hidden_size)
        # Initialization draws random weights, which must not advance the caller's random state.
        with torch.random.fork_rng(devices=[]):
            vision, head = BlipVisionModel(vision_config), ImageRewardHead(text_config.hidden_size)
            text = BlipTextModel(text_config, add_pooling_layer=False)
        for module, name in ((vision, "vision"), (text, "text"), (head, "head")):
            load_strictly(module, parts[name], f"the {name} part of ImageReward.pt")
        # The revision belongs to the repository of the weights, not to that of the tokenizer.
        return cls(vision, text, head, image_reward_tokenizer({**hub, "revision": None}))


def convert_image_reward(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the published tensors into "vision", "text" and "head", with the names of the modules here.

    Raises:
        ValueError: For a key that belongs to none of them.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    prefixes = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.": "head"}
    for key, value in state.items():
        if IMAGE_REWARD_IGNORED.fullmatch(key):
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"Expected the keys of ImageReward.pt to begin with {', '.join(prefixes)}, but got '{key}'. Pass the "
                "published file."
            )
        part, name = prefixes[prefix], key.removeprefix(prefix)
        parts[part][image_reward_vision_name(name) if part == "vision" else name] = value
    return parts


def image_reward_vision_name(name: str) -> str:
    """Convert the name of a tensor from timm's ViT to `BlipVisionModel`."""
    for pattern, replacement in IMAGE_REWARD_VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def image_reward_vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Infer the configuration of the image tower from its converted tensors; the checkpoint has none.

    Raises:
        ValueError: If tensors are missing; the message names them.
    """
    names = ("embeddings.position_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"Expected ImageReward.pt to hold an image tower, but missing: {', '.join(missing)}. Pass the published "
            "file."
        )
    positions, patches, hidden = (state[name] for name in names)
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    return BlipVisionConfig(
        hidden_size=positions.shape[-1],
        intermediate_size=hidden.shape[0],
        num_hidden_layers=depth,
        num_attention_heads=positions.shape[-1] // IMAGE_REWARD_HEAD_WIDTH,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patches.shape[-1],
        patch_size=patches.shape[-1],
        # The value of timm. The default of transformers, 1e-5, would change the features by 6e-4.
        layer_norm_eps=1e-6,
    )


def image_reward_text_config(settings: Mapping[str, Any], image_width: int) -> BlipTextConfig:
    """Convert med_config.json, a BERT config, to `BlipTextConfig`. The file's `encoder_width` is ignored.

    Raises:
        ValueError: If settings are missing; the message names them.
    """
    if missing := [name for name in IMAGE_REWARD_TEXT_SETTINGS if name not in settings]:
        raise ValueError(f"Expected med_config.json to hold a BERT config, but missing: {', '.join(missing)}.")
    own = {name: settings[name] for name in IMAGE_REWARD_TEXT_SETTINGS}
    return BlipTextConfig(**own, encoder_hidden_size=image_width, is_decoder=True)


def image_reward_tokenizer(hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load BERT's uncased tokenizer and add the two tokens of BLIP: [DEC], then [ENC]."""
    tokenizer = BertTokenizer.from_pretrained(IMAGE_REWARD_TOKENIZER, **hub)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer
