"""Stock pipelines of the published sizes with random weights, to measure time and memory without downloads.

The configurations are those of `stabilityai/sd-turbo`, `stabilityai/sdxl-turbo` and
`black-forest-labs/FLUX.1-schnell`, with the published number of parameters. The images are meaningless. Without text
encoders, the default, a call takes `**embeddings(pipe)` in place of the prompt:

    pipe = sdxl_turbo(torch.bfloat16, "cuda")
    pipe(**embeddings(pipe), height=512, width=512, num_inference_steps=1, guidance_scale=0.0)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)

SD_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX_TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SD_VAE: dict[str, Any] = {**VAE, "sample_size": 768, "scaling_factor": 0.18215}
SDXL_VAE: dict[str, Any] = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
FLUX_VAE: dict[str, Any] = {
    **VAE,
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
FLUX_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
CLIP_L |= {"projection_dim": 768, "hidden_act": "quick_gelu"}
CLIP_H |= {"projection_dim": 512, "hidden_act": "gelu"}
CLIP_BIG_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}

NOISE_LEVELS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TWO_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def sd_turbo(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", text_encoders: bool = False
) -> StableDiffusionPipeline:
    """Build SD-Turbo: a UNet of 866 M parameters, images of 512²."""
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    with built_as(dtype, device):
        parts |= {"unet": UNet2DConditionModel(**SD_UNET), "vae": AutoencoderKL(**SD_VAE)}
        if text_encoders:
            parts |= {"text_encoder": clip_text(CLIPTextModel, CLIP_H), "tokenizer": clip_tokenizer()}
    scheduler: Any = EulerDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="trailing", steps_offset=1)
    checker: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return ready(StableDiffusionPipeline(**parts, scheduler=scheduler, **checker))


def sdxl_turbo(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", text_encoders: bool = False
) -> StableDiffusionXLPipeline:
    """Build SDXL-Turbo: the UNet of SDXL with 2.57 G parameters, images of 512² by default."""
    parts: dict[str, Any] = dict.fromkeys(TWO_ENCODERS)
    with built_as(dtype, device):
        parts |= {"unet": UNet2DConditionModel(**SDXL_UNET), "vae": AutoencoderKL(**SDXL_VAE)}
        if text_encoders:
            parts |= {"text_encoder": clip_text(CLIPTextModel, CLIP_L), "tokenizer": clip_tokenizer()}
            parts |= {"text_encoder_2": clip_text(CLIPTextModelWithProjection, CLIP_BIG_G)}
            parts |= {"tokenizer_2": clip_tokenizer()}
    scheduler: Any = EulerAncestralDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="trailing", steps_offset=1)
    return ready(StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False))


def flux(
    dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", text_encoders: bool = False
) -> FluxPipeline:
    """Build FLUX.1-schnell: a transformer of 11.9 G parameters, 24 GB in bfloat16."""
    parts: dict[str, Any] = dict.fromkeys(TWO_ENCODERS)
    with built_as(dtype, device):
        parts |= {"transformer": FluxTransformer2DModel(**FLUX_TRANSFORMER), "vae": AutoencoderKL(**FLUX_VAE)}
        if text_encoders:
            parts |= {"text_encoder": clip_text(CLIPTextModel, CLIP_L), "tokenizer": clip_tokenizer()}
            parts |= {"text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)), "tokenizer_2": t5_tokenizer()}
    return ready(FluxPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0)))


def small_sdxl(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> StableDiffusionXLPipeline:
    """Build SDXL-Turbo at a fifth of its width: the same architecture for slow machines."""
    with built_as(dtype, device):
        unet: dict[str, Any] = {"block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4)}
        unet |= {"transformer_layers_per_block": (1, 1, 2)}
        vae: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128)}
        parts: dict[str, Any] = {"unet": UNet2DConditionModel(**{**SDXL_UNET, **unet})}
        parts |= {"vae": AutoencoderKL(**{**SDXL_VAE, **vae})}
    scheduler: Any = EulerAncestralDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="trailing", steps_offset=1)
    texts: dict[str, Any] = dict.fromkeys(TWO_ENCODERS)
    return ready(StableDiffusionXLPipeline(**parts, **texts, scheduler=scheduler, add_watermarker=False))


def tiny_decoder(pipe) -> AutoencoderTiny:
    """Build a tiny autoencoder for the latents of a pipeline, with the architecture of TAESD, TAESDXL or TAEF1."""
    with built_as(pipe.vae.dtype, pipe.vae.device):
        return AutoencoderTiny(latent_channels=pipe.vae.config.latent_channels).eval()


def embeddings(pipe, batch: int = 1) -> dict[str, torch.Tensor]:
    """Return random embeddings of `batch` prompts, for a pipeline without text encoders."""
    shapes = {
        StableDiffusionPipeline: {"prompt_embeds": (77, 1024)},
        StableDiffusionXLPipeline: {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
        FluxPipeline: {"prompt_embeds": (256, 4096), "pooled_prompt_embeds": (768,)},
    }[type(pipe)]
    generator, denoiser = torch.Generator().manual_seed(0), getattr(pipe, "unet", None) or pipe.transformer
    drawn = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    return {name: values.to(denoiser.device, denoiser.dtype) for name, values in drawn.items()}


@contextlib.contextmanager
def built_as(dtype: torch.dtype, device: str | torch.device) -> Iterator[None]:
    """Create modules inside the context with this dtype on this device; torch's default initialization, seed 0."""
    before = torch.get_default_dtype()
    devices = [] if torch.device(device).type in ("cpu", "meta") else None
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def ready(pipe):
    """Prepare like a loaded pipeline, without dropout or progress bars."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip_text(cls: Any, shape: dict[str, Any]) -> Any:
    """Build a CLIP text encoder with the special tokens of `clip_tokenizer`."""
    tokenizer = clip_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return cls(CLIPTextConfig(vocab_size=49408, **special, **shape))


def clip_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer of single letters, padding to 77 tokens like the published one."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Build a tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"{mark}{letter}", -1.0) for mark in ("", "▁") for letter in LETTERS]
    return T5TokenizerFast(vocab=[*special, *pieces], extra_ids=0)
