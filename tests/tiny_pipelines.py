"""Tiny stock pipelines with random weights, built from configurations in a second and without a download."""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """Tokenize letter by letter."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_text_config(**changes) -> CLIPTextConfig:
    tokenizer = tiny_clip_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=16, **special, **{**sizes, **changes})


def tiny_vae(channels: int = 4, block_out_channels: tuple[int, ...] = (8, 16), **changes) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **changes,
    )


def tiny_unet(text_size: int, **changes) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_size,
        **changes,
    )


def sd_pipeline(cls=StableDiffusionPipeline, scheduler=None):
    torch.manual_seed(0)
    return cls(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_unet(16),
        scheduler=scheduler or EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(cls=StableDiffusionXLPipeline, scheduler=None, **vae):
    torch.manual_seed(0)
    time_ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return cls(
        vae=tiny_vae(**vae),
        text_encoder=CLIPTextModel(tiny_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()),
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_clip_tokenizer(),
        unet=tiny_unet(32, projection_class_embeddings_input_dim=6 * 4 + 16, **time_ids),
        scheduler=scheduler or EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )


def sd3_pipeline(cls=StableDiffusion3Pipeline):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    no_quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return cls(
        transformer=transformer,
        vae=tiny_vae(shift_factor=0.06, **no_quant),
        text_encoder=CLIPTextModelWithProjection(tiny_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()),
        text_encoder_3=None,
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_clip_tokenizer(),
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Tokenize letter by letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"{mark}{letter}", -1.0) for mark in ("", "▁") for letter in LETTERS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def tiny_t5() -> T5EncoderModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tiny_t5_tokenizer()), dropout_rate=0.0, **sizes))


def flux_pipeline(cls=FluxPipeline):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return cls(
        transformer=transformer,
        vae=tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(tiny_text_config()),
        text_encoder_2=tiny_t5(),
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def quiet(pipe):
    """Set all modules to eval mode and hide the progress bars."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILDERS = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline}
CALLS = {
    "sd": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "sdxl": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "sd3": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "flux": {"num_inference_steps": 2, "true_cfg_scale": 2.0, "negative_prompt": "b"},
}
SIZE = {"height": 32, "width": 32}


@functools.cache
def tiny_pipeline(family: str):
    """Return the stock pipeline of a family, shared by all tests: they restore what they change."""
    return quiet(BUILDERS[family]())


def call_arguments(family: str) -> dict:
    return {**CALLS[family], **SIZE}


def save_tiny_clip(folder) -> str:
    """Save a CLIP with random weights to `folder`, for `from_pretrained`, and return the folder."""
    torch.manual_seed(1)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    CLIPModel(
        CLIPConfig(text_config=tiny_text_config().to_dict(), vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    tiny_clip_tokenizer().save_pretrained(folder)
    edge = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=edge, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
