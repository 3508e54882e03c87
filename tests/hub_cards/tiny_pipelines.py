"""The two Turbo families and a CLIP with tiny random weights, built from configurations: nothing is downloaded."""

import string
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

WIDTH = 16
TRANSFORMER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
    "attention_head_dim": (2, 4),
}
SCHEDULER: dict[str, Any] = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}


def tiny_tokenizer() -> CLIPTokenizer:
    """One token for each character."""
    characters = string.digits + string.ascii_lowercase + string.punctuation
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    tokens: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return CLIPTextConfig(vocab_size=len(tokenizer), **TRANSFORMER, **tokens)


def tiny_stable_diffusion() -> StableDiffusionPipeline:
    """The parts of SD-Turbo, for 32 × 32 pixels."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**VAE),
        "unet": UNet2DConditionModel(cross_attention_dim=WIDTH, **UNET),
        "text_encoder": CLIPTextModel(text_config(tokenizer)).eval(),
        "tokenizer": tokenizer,
        "scheduler": EulerDiscreteScheduler(**SCHEDULER),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**parts)


def tiny_stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """The parts of SDXL-Turbo, for 32 × 32 pixels."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    conditioning: dict[str, Any] = {
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**VAE),
        "unet": UNet2DConditionModel(**conditioning, **UNET),
        "text_encoder": CLIPTextModel(text_config(tokenizer)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": EulerAncestralDiscreteScheduler(**SCHEDULER),
    }
    return StableDiffusionXLPipeline(**parts)


TINY_PIPELINES = {
    "StableDiffusionPipeline": tiny_stable_diffusion,
    "StableDiffusionXLPipeline": tiny_stable_diffusion_xl,
}


def save_tiny_clip(folder: str) -> None:
    """A CLIP checkpoint as rewards find it on the Hub."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **TRANSFORMER)
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=WIDTH)
    CLIPModel(config).eval().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
