"""Conversion of open_clip's vision transformers to `CLIPModel` of transformers."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ..contract.checkpoints import check_weights

# open_clip -> transformers, outside of the blocks. Projections are transposed.
OPEN_CLIP_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the spelling of transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_TRANSPOSED = ("text_projection", "visual.proj")
OPEN_CLIP_BUFFERS = ("attn_mask",)  # recomputed by transformers
OPEN_CLIP_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
OPEN_CLIP_STACKED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def clip_model_from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig, source: str) -> CLIPModel:
    """Build a float32 `CLIPModel` with the weights of an open_clip model of the same shape.

    Args:
        state: The weights of open_clip in any dtype; float32 tensors are not copied.
        config: The configuration. open_clip's ViT-H has `hidden_act="gelu"`, which is not the default of `CLIPConfig`.
        source: The name of the weights in error messages.

    Raises:
        ValueError: For keys that are unknown, missing or of another shape; the message lists them.
    """
    converted = clip_state_from_open_clip(state, source)
    with torch.device("meta"):
        check_weights(CLIPModel(config), converted, source)
    converted = {key: value.float() for key, value in converted.items()}
    return CLIPModel.from_pretrained(None, config=config, state_dict=converted, dtype=torch.float32)


def clip_state_from_open_clip(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename open_clip's weights to the names of transformers.

    Raises:
        ValueError: For a key that open_clip's vision transformers do not have.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if stacked := OPEN_CLIP_STACKED.fullmatch(key):
            layer = open_clip_layer(stacked)
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{stacked[3]}"] = tensor.contiguous()
        elif (block := OPEN_CLIP_BLOCK.fullmatch(key)) and block[3] in OPEN_CLIP_BLOCK_NAMES:
            converted[f"{open_clip_layer(block)}.{OPEN_CLIP_BLOCK_NAMES[block[3]]}.{block[4]}"] = value
        elif key in OPEN_CLIP_NAMES:
            converted[OPEN_CLIP_NAMES[key]] = value.T.contiguous() if key in OPEN_CLIP_TRANSPOSED else value
        elif key not in OPEN_CLIP_BUFFERS:
            raise ValueError(
                f"Expected {source} to hold the weights of an open_clip vision transformer, but got the key '{key}'."
            )
    return converted


def open_clip_layer(match: re.Match[str]) -> str:
    """Return the name that transformers gives to a matched block of open_clip."""
    return f"{'vision_model' if match[1] else 'text_model'}.encoder.layers.{match[2]}"
