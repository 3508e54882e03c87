"""LAION's aesthetic predictors: human ratings of an image without regard to a prompt."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPVisionModelWithProjection

from ..contract.checkpoints import (
    IMAGE_PROCESSOR_FILE,
    checkpoint_path,
    is_in_folder,
    load_pretrained,
    load_strictly,
    read_settings,
    read_state_dict,
)
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform, at_least_float32

CLIP_VIT_L = "openai/clip-vit-large-patch14"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_V1_FILE = "sa_0_4_vit_l_14_linear.pth"


class CLIPVisionTower(CLIPVisionModelWithProjection):
    """Vision tower that loads from a full CLIP checkpoint without a warning about the text tower."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^text_model\.",
        r"^text_projection\.",
        r"^logit_scale$",
    ]


class AestheticHead(nn.Module):
    """Scoring head, (B, D) image embeddings -> (B, 1): five linear layers without activations.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor. Its dropout layers, which only matter in
    training, are identities here that keep the numbering of the published weights.
    """

    def __init__(self, embedding_size: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding_size, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)


def has_clip(folder: str) -> bool:
    """Return whether a folder has a CLIP or its vision tower; a Hub repository is not searched."""
    config = Path(folder) / "config.json"
    return config.is_file() and read_settings(config).get("model_type") in ("clip", "clip_vision_model")


@register_reward("aesthetic")
class Aesthetic(Reward):
    """LAION's aesthetic score v2, "sac+logos+ava1": from 1 to 10, mostly 4.5 to 7. No prompt.

    A head on the normalized image embedding of CLIP ViT-L/14, computed in float32 whatever the dtype of the weights.
    A local folder may contain the head as published, `sac+logos+ava1-l14-linearMSE.pth`, and a CLIP of its own.

    Args:
        model: The vision tower of CLIP; it is frozen.
        head: Module from (B, D) embeddings to (B, 1) scores; it is frozen.
        image_transform: Map from images in [0, 1] to pixels; by default CLIP's transform at the model's image size.
    """

    name = "aesthetic"
    requires_prompt = False
    license = "apache-2.0"
    default_checkpoint = "ttj/sac-logos-ava1-l14-linearMSE"
    weights_file = AESTHETIC_FILE
    parameter_count = 304_894_177
    model: CLIPVisionModelWithProjection
    head: nn.Module

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        head: nn.Module,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model, head=head)
        edge = cast(int, model.config.image_size)
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        weights = {name: at_least_float32(weight) for name, weight in self.head.named_parameters()}
        return functional_call(self.head, weights, self.encode_image(images))[:, 0]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the unit embeddings (B, D), float32, of (B, 3, H, W) images in [0, 1]."""
        pixels = self.image_transform(images).to(self.dtype)
        return F.normalize(at_least_float32(self.model(pixel_values=pixels).image_embeds), dim=-1)

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "Aesthetic":
        path = checkpoint_path(checkpoint, cls.head_file(checkpoint), hub)
        source, source_hub = (checkpoint, hub) if has_clip(checkpoint) else (CLIP_VIT_L, {**hub, "revision": None})
        model = load_pretrained(CLIPVisionTower, source, source_hub)
        head = cls.build_head(model.config.projection_dim)
        load_strictly(head, read_state_dict(path), path.name)
        without_processor = os.path.isdir(source) and not is_in_folder(IMAGE_PROCESSOR_FILE, source)
        transform = None if without_processor else ImageTransform.from_processor_config(source, **source_hub)
        return cls(model, head, transform)

    @classmethod
    def head_file(cls, checkpoint: str) -> str:
        """Return the file name of the head: the authors' if the folder contains it, else the default checkpoint's."""
        in_folder = os.path.isfile(os.path.join(checkpoint, AESTHETIC_FILE))
        return AESTHETIC_FILE if in_folder else "model.safetensors"

    @staticmethod
    def build_head(embedding_size: int) -> nn.Module:
        return AestheticHead(embedding_size)


@register_reward("aesthetic_v1")
class AestheticV1(Aesthetic):
    """LAION's aesthetic score v1: a linear layer on the normalized image embedding of CLIP ViT-L/14, from 1 to 10.

    The head is not on the Hub: download `sa_0_4_vit_l_14_linear.pth` from the GitHub project
    LAION-AI/aesthetic-predictor and pass the folder that contains it.
    """

    name = "aesthetic_v1"
    license = "mit"
    default_checkpoint = None
    weights_file = AESTHETIC_V1_FILE
    published_at = "the GitHub project LAION-AI/aesthetic-predictor"
    parameter_count = 303_966_977

    @classmethod
    def head_file(cls, checkpoint: str) -> str:
        return AESTHETIC_V1_FILE

    @staticmethod
    def build_head(embedding_size: int) -> nn.Module:
        return nn.Linear(embedding_size, 1)
