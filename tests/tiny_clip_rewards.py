"""Tiny rewards of CLIP's kind: the real classes, with random weights."""

import functools
import string
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from noiseopt.rewards import (
    Aesthetic,
    AestheticHead,
    AestheticV1,
    CLIPScore,
    HPSv20,
    HPSv21,
    ImageTransform,
    PickScore,
    Reward,
)

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def build_tokenizer() -> CLIPTokenizer:
    """One token per letter, and the two that CLIP needs."""
    letters = list(string.ascii_lowercase)
    tokens = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=16)


def build_clip(eos_token_id: int = 53, seed: int = 0) -> CLIPModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**tower, **special, "vocab_size": 54, "max_position_embeddings": 16, "hidden_act": "gelu"},
        vision_config={**tower, "image_size": 32, "patch_size": 8, "hidden_act": "gelu", "projection_dim": 16},
        projection_dim=16,
        logit_scale_init_value=4.6052,
    )
    return randomized(lambda: CLIPModel(config), seed=seed)


def randomized(build: Callable[[], ModuleT], std: float = 0.15, seed: int = 0) -> ModuleT:
    """The model with weights so large that images do not look alike to it, as they do to a freshly made one."""
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def build_clip_score(eos_token_id: int = 53) -> CLIPScore:
    return CLIPScore(build_clip(eos_token_id), build_tokenizer(), ImageTransform(size=32, crop=(32, 32)))


def build_pick_score() -> PickScore:
    return PickScore(build_clip(seed=1), build_tokenizer(), ImageTransform(size=32, crop=(32, 32)))


def build_hpsv2(reward_class: type[HPSv21] = HPSv21, seed: int = 2) -> HPSv21:
    return reward_class(build_clip(seed=seed), build_tokenizer())


def build_aesthetic() -> Aesthetic:
    return Aesthetic(build_vision_tower(), build_aesthetic_head())


def build_aesthetic_v1() -> AestheticV1:
    return AestheticV1(build_vision_tower(), randomized(lambda: torch.nn.Linear(16, 1)))


def build_vision_tower(seed: int = 4) -> CLIPVisionModelWithProjection:
    """That of `build_clip(seed)`."""
    clip = build_clip(seed=seed)
    tower = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    tower.load_state_dict({key: value for key, value in clip.state_dict().items() if key.startswith("vis")})
    return tower


def build_aesthetic_head() -> AestheticHead:
    return randomized(lambda: AestheticHead(16), std=0.08)


def publish_clip_score(root: Path, folder: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", seed: int = 0) -> None:
    build_clip(seed=seed).save_pretrained(root / folder)
    build_tokenizer().save_pretrained(root / folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(root / folder)


def publish_pick_score(root: Path) -> None:
    publish_clip_score(root)
    build_clip(seed=1).save_pretrained(root / "yuvalkirstain/PickScore_v1")


def publish_hpsv2(root: Path, filename: str = "HPS_v2.1_compressed.pt", seed: int = 2) -> None:
    publish_clip_score(root)
    (root / "xswu/HPSv2").mkdir(parents=True, exist_ok=True)
    state = open_clip_state(build_clip(seed=seed))
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, root / "xswu/HPSv2" / filename)


def publish_aesthetic(root: Path) -> None:
    publish_clip_score(root, "openai/clip-vit-large-patch14", seed=4)
    folder = root / "ttj/sac-logos-ava1-l14-linearMSE"
    folder.mkdir(parents=True)
    save_file(build_aesthetic_head().state_dict(), folder / "model.safetensors")


def open_clip_state(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights as open_clip names, stacks and transposes them: written for this test, the other way round."""
    own, state = model.state_dict(), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            block, source = f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                stacked = [own[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(stacked)
                state[f"{block}.attn.out_proj.{kind}"] = own[f"{source}.self_attn.out_proj.{kind}"]
                for number in "12":
                    state[f"{block}.ln_{number}.{kind}"] = own[f"{source}.layer_norm{number}.{kind}"]
                state[f"{block}.mlp.c_fc.{kind}"] = own[f"{source}.mlp.fc1.{kind}"]
                state[f"{block}.mlp.c_proj.{kind}"] = own[f"{source}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = own[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = own[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
    state["visual.class_embedding"] = own["vision_model.embeddings.class_embedding"]
    state["visual.positional_embedding"] = own["vision_model.embeddings.position_embedding.weight"]
    state["visual.conv1.weight"] = own["vision_model.embeddings.patch_embedding.weight"]
    state["visual.proj"] = own["visual_projection.weight"].T.contiguous()
    state["token_embedding.weight"] = own["text_model.embeddings.token_embedding.weight"]
    state["positional_embedding"] = own["text_model.embeddings.position_embedding.weight"]
    state["text_projection"] = own["text_projection.weight"].T.contiguous()
    state["logit_scale"] = own["logit_scale"]
    return state


TINY_CLIP_REWARDS: dict[str, Callable[[], Reward]] = {
    "clipscore": build_clip_score,
    "pickscore": build_pick_score,
    "hpsv2.1": build_hpsv2,
    "hpsv2.0": functools.partial(build_hpsv2, HPSv20, seed=3),
    "aesthetic": build_aesthetic,
    "aesthetic_v1": build_aesthetic_v1,
}
# aesthetic_v1 is not on the Hub
PUBLISHED_CLIP_REWARDS: dict[str, Callable[[Path], None]] = {
    "clipscore": publish_clip_score,
    "pickscore": publish_pick_score,
    "hpsv2.1": publish_hpsv2,
    "hpsv2.0": functools.partial(publish_hpsv2, filename="HPS_v2_compressed.pt", seed=3),
    "aesthetic": publish_aesthetic,
}
