"""CLIP-FlanT5, the model of VQAScore, built from transformers' CLIP and T5."""

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from ..contract.checkpoints import checkpoint_path, load_strictly, read_settings, read_state_dict
from ..contract.registry import register_reward
from ..contract.reward import Reward, RewardT
from ..contract.transforms import ImageTransform, at_least_float32, straight_through_clamp
from .vqa_score import QUESTION

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
T5_TOKENIZER = "google/flan-t5-xl"  # the same for all sizes
T5_CONTEXT = 2048  # tokens of text, as in training


@register_reward("clip_flant5", "clip-flant5", loads="clip_t5")
class CLIPFlanT5(Reward):
    """`exp(mean log p)` of "Yes" and the end token as the answer to `Does this figure show "{prompt}"? ...`.

    VQAScore, https://arxiv.org/abs/2404.01291, with its own model: a T5 reads the projected patch tokens of the second
    to last layer of a CLIP tower among its word embeddings. Images are padded to a square with CLIP's mean color.
    Source: https://github.com/linzhiqiu/CLIP-FlanT5, `clip_t5.py`, and https://github.com/linzhiqiu/t2v_metrics 1.2.

    Args:
        vision: The CLIP tower.
        projector: Module from (B, N, width of the tower) to (B, N, width of the T5).
        t5: The T5.
        tokenizer: The tokenizer of the T5, which ends texts with the end token.
        image_transform: Map from square images in [0, 1] to pixels; by default CLIP's at the tower's size.

    Raises:
        ValueError: If the tokenizer does not end texts with its end token.
    """

    name = "clip_flant5"
    range = (0.0, 1.0)
    license = "apache-2.0"
    default_checkpoint = "zhiqiulin/clip-flant5-xl"
    parameter_count = 3_159_560_192
    vision: CLIPVisionModel
    projector: nn.Module
    t5: T5ForConditionalGeneration

    def __init__(
        self,
        vision: CLIPVisionModel,
        projector: nn.Module,
        t5: T5ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: ImageTransform | None = None,
    ):
        super().__init__(vision=vision, projector=projector, t5=t5)
        edge = cast(int, vision.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))
        self.answer: list[int] = tokenizer("Yes")["input_ids"]
        if self.answer[-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"Expected a tokenizer that ends texts with {tokenizer.eos_token!r}, but 'Yes' became {self.answer}. "
                f"Pass that of {T5_TOKENIZER}."
            )
        self.tokens: dict[str, tuple[list[int], list[int]]] = {}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        patches = self.encode_image(images)
        return torch.cat([self.answer_score(*each) for each in zip(patches, prompts, strict=True)])

    def encode_image(self, images: Tensor) -> Tensor:
        """Return projected patch tokens (B, patches, width of the T5) of (B, 3, H, W) images in [0, 1]."""
        mean = self.image_transform.mean or (0.0, 0.0, 0.0)
        square = pad_to_square(straight_through_clamp(at_least_float32(images)), [int(255 * m) / 255 for m in mean])
        pixels = self.image_transform(square).to(self.dtype)
        hidden = self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert hidden is not None
        return self.projector(hidden[-2][:, 1:])

    def answer_score(self, patches: Tensor, prompt: str) -> Tensor:
        """Return the score (1,) of one image, given its projected patch tokens (patches, width)."""
        embed = self.t5.get_input_embeddings()
        before, after = (embed(torch.tensor(ids, device=patches.device)) for ids in self.text_around_image(prompt))
        labels = torch.tensor([self.answer], device=patches.device)
        logits = self.t5(inputs_embeds=torch.cat((before, patches, after))[None], labels=labels, use_cache=False).logits
        return (-F.cross_entropy(at_least_float32(logits[0]), labels[0])).exp()[None]

    def text_around_image(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the tokens before and after the image, each with an end token; a long prompt is truncated."""
        if prompt not in self.tokens:
            before = self.tokenizer(f"{SYSTEM} USER: ")["input_ids"]
            question = f"\n{QUESTION.format(prompt)} ASSISTANT: "
            room = T5_CONTEXT - len(before) - 1  # the original counts one token for the image
            self.tokens[prompt] = before, self.tokenizer(question)["input_ids"][:room]
        return self.tokens[prompt]

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        settings, _ = PretrainedConfig.get_config_dict(checkpoint, **hub)
        tower = settings["mm_vision_tower"]
        others = {**hub, "revision": None}  # the revision belongs to the checkpoint only
        vision_config = CLIPVisionConfig.from_pretrained(tower, **others)
        state = split_clip_flant5(read_shards(checkpoint, hub))
        t5 = untied_t5(T5Config.from_dict({**settings, "model_type": "t5"}))
        projector = clip_flant5_projector(vision_config.hidden_size, t5.config.d_model)
        vision = CLIPVisionModel(vision_config)
        if not state["vision"]:
            state["vision"] = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, **others).state_dict()
        for module, name in ((t5, "t5"), (projector, "projector"), (vision, "vision")):
            load_strictly(module, state[name], f"{checkpoint} ({name})")
        tokenizer = AutoTokenizer.from_pretrained(T5_TOKENIZER, **others)
        transform = ImageTransform.from_processor_config(tower, **others)
        return cast(Any, cls)(vision, projector, t5, tokenizer, transform)


def untied_t5(config: T5Config) -> T5ForConditionalGeneration:
    """Build a T5 with random weights and an untied output layer, as Flan-T5 has.

    transformers 5 ties the output layer to the embedding in every T5, so that loading would overwrite one of them.
    """
    t5 = T5ForConditionalGeneration(config)
    t5.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return t5


def clip_flant5_projector(width: int, target: int) -> nn.Sequential:
    """Build the projector from image to text features: two linear layers with a GELU (LLaVA's "mlp2x_gelu")."""
    return nn.Sequential(nn.Linear(width, target), nn.GELU(), nn.Linear(target, target))


def pad_to_square(images: Tensor, color: list[float]) -> Tensor:
    """Pad (B, 3, H, W) images to a square with a constant color, as LLaVA's `expand2square`."""
    height, width = images.shape[-2:]
    edge = max(height, width)
    top, left = (edge - height) // 2, (edge - width) // 2
    canvas = images.new_tensor(color)[:, None, None].expand(len(images), -1, edge, edge)
    inside = F.pad(torch.ones_like(images), (left, edge - width - left, top, edge - height - top))
    padded = F.pad(images, (left, edge - width - left, top, edge - height - top))
    return torch.where(inside > 0, padded, canvas)


def read_shards(checkpoint: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read all files listed in `pytorch_model.bin.index.json`. Raises `ValueError` if it lists none."""
    listed = read_settings(checkpoint_path(checkpoint, "pytorch_model.bin.index.json", hub)).get("weight_map")
    files = list(listed.values()) if isinstance(listed, dict) else []
    if not files or not all(isinstance(name, str) and name == os.path.basename(name) for name in files):
        raise ValueError(f"Expected pytorch_model.bin.index.json to list files of its folder, but got {files[:3]}.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(files)):
        state |= read_state_dict(checkpoint_path(checkpoint, name, hub))
    return state


def split_clip_flant5(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the published tensors into "t5", "projector" and "vision".

    `mm_projector.*` is the projector and `vision_tower.vision_tower.vision_model.*` the CLIP tower, which is not
    fine-tuned and may be missing. All other keys are the T5's, whose embedding has up to four names.
    """
    prefixes = {"projector": "mm_projector.", "vision": "vision_tower.vision_tower.vision_model."}
    parts: dict[str, dict[str, Tensor]] = {"t5": {}, "projector": {}, "vision": {}}
    for key, value in state.items():
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), "t5")
        if key != "embed_tokens.weight" and not key.endswith("embeddings.position_ids"):
            parts[part][key.removeprefix(prefixes.get(part, ""))] = value
    if (shared := state.get("shared.weight")) is not None:
        for stack in ("encoder", "decoder"):
            parts["t5"].setdefault(f"{stack}.embed_tokens.weight", shared)
    return parts
