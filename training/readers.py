"""The untrained readers of pictures, from stock classes: reward, held-out image encoder, vision-language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseopt.shapes_world.captions import OBJECTS
from noiseopt.shapes_world.judge import Thing
from noiseopt.shapes_world.world import LOOKS, SIDE, SIZE, Scene, coverage

from .precision import half
from .questions import PATCHES, Questions, new_question_tokenizer
from .text import new_tokenizer, text_options

if TYPE_CHECKING:
    from transformers import CLIPModel, Dinov2Model, LlavaForConditionalGeneration

PATCH = SIZE // 8  # pixels, side of a patch


def new_clip() -> CLIPModel:
    """Build an untrained dual encoder with a fixed temperature: scores are 20 times the cosine."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = new_tokenizer()
    tower = {"hidden_size": 96, "num_attention_heads": 4, "projection_dim": 96}
    config = CLIPConfig(
        text_config=tower | {"intermediate_size": 256} | text_options(tokenizer),
        vision_config=tower
        | {"intermediate_size": 288, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=96,
        logit_scale_init_value=math.log(20.0),
    )
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    return model


class Reward(nn.Module):
    """A CLIP model with a bias, the threshold score of right images; only the CLIP model is exported.

    Args:
        dtype: Precision of matrix products.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.clip = new_clip()
        self.bias = nn.Parameter(torch.tensor(10.0))
        self.tokenizer = new_tokenizer()

    def embed_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, 128, 128) in [0, 1] as (B, 96) of unit length."""
        with half(images.device.type, self.dtype):
            pooled = self.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
            return F.normalize(self.clip.visual_projection(pooled), dim=-1).float()

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as (B, 96) of unit length."""
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.bias.device)
        with half(self.bias.device.type, self.dtype):
            pooled = self.clip.text_model(input_ids=tokens.input_ids).pooler_output
            return F.normalize(self.clip.text_projection(pooled), dim=-1).float()


def new_tower() -> Dinov2Model:
    """Build an untrained DINOv2 encoder: 64 patches of 96 channels, 4 layers."""
    from transformers import Dinov2Config, Dinov2Model

    tower: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 3}
    return Dinov2Model(Dinov2Config(**tower, image_size=SIZE, patch_size=PATCH))


class TowerTraining(nn.Module):
    """The image encoder with training heads: content of each patch, count of each object, occupied patches, ground."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = new_tower()
        width = self.tower.config.hidden_size
        self.patch = nn.Linear(width, len(OBJECTS) + 1)
        self.count = nn.Linear(width, 4 * len(OBJECTS))
        self.where = nn.Linear(width, PATCHES)
        self.ground = nn.Linear(width, LOOKS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Map images (B, 3, 128, 128) in [0, 1] to logits (B, 64, 31), (B, 4, 30), (B, 64), looks and features."""
        tokens = self.tower(pixel_values=images * 2 - 1).last_hidden_state
        whole, patches = tokens[:, 0], tokens[:, 1:]
        counts = self.count(whole).unflatten(1, (4, -1))
        return self.patch(patches), counts, self.where(whole), self.ground(whole), whole


def tower_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets for image patches and for whole images.

    They are the index of the object in each patch (B, 64), `len(OBJECTS)` if there is none; the count of each object in
    the image (B, 30); and whether a patch has an object (B, 64).
    """
    cover = F.avg_pool2d(coverage(scenes, size=SIDE), SIDE // 8).flatten(2)
    names = [[OBJECTS.index((s.color, s.kind)) for s in scene.shapes] for scene in scenes]
    slots = torch.tensor([row + [0] * (3 - len(row)) for row in names])
    most, which = cover.max(1)
    shown = torch.where(most > 0.25, slots.gather(1, which), len(OBJECTS))
    counts = torch.stack([torch.bincount(torch.tensor(row), minlength=len(OBJECTS)) for row in names])
    return shown, counts, (most > 0.25).float()


def new_vlm(tokenizer: Any) -> LlavaForConditionalGeneration:
    """Build an untrained LLaVA: a CLIP vision encoder of 4 layers and a Llama of 4 layers, both of width 96."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class VLMTraining(nn.Module):
    """The vision-language model with packed questions, and training heads for each object that a question names.

    The heads tell how many of that object the image shows, and where, so that the model learns early what to look for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = new_question_tokenizer()
        self.vlm = new_vlm(self.tokenizer)
        self.questions = Questions(self.tokenizer)
        width = self.vlm.lm_head.in_features
        self.count, self.center = nn.Linear(width, 4), nn.Linear(width, 2)

    def forward(
        self, images: Tensor, asked: Sequence[Sequence[tuple[str, int]]], things: Sequence[Sequence[Thing]]
    ) -> dict[str, Tensor]:
        """Return the losses of answers, counts and centers for B times K questions on (B, 3, 128, 128)."""
        logits, ids, hidden = self.questions(self.vlm, images, asked)
        where, counts, centers = (t.to(images.device) for t in self.questions.named(ids, things))
        named, shown = hidden[where[:, 0], where[:, 1]], counts > 0
        targets = self.questions.targets(asked).flatten().to(images.device)
        return {
            "answer": 2 * F.cross_entropy(logits.float().flatten(0, 2), targets),
            "count": F.cross_entropy(self.count(named).float(), counts),
            "center": 10
            * ((self.center(named).float() - centers)[shown]).square().sum()
            / max(1, 2 * int(shown.sum())),
        }
