"""Tiny stock text-to-video pipelines with random weights, built from configurations without a download."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_families import TEXT, tiny_qwen_tokenizer
from tiny_pipelines import SIZE, quiet, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_text_config
from transformers import CLIPTextModel, LlamaConfig, LlamaModel

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def wan_pipeline() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    texts: dict[str, Any] = {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}
    return WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)


def wan22_pipeline() -> WanPipeline:
    """Return a pipeline with a second transformer for the later steps."""
    second = wan_pipeline().transformer
    for parameter in second.parameters():
        parameter.data = parameter.data + 0.02 * torch.randn(parameter.shape)
    return WanPipeline(**{**wan_pipeline().components, "transformer_2": second}, boundary_ratio=0.9)


def cogvideox_pipeline(scheduler: Any = None) -> CogVideoXPipeline:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        sample_frames=5,
        temporal_compression_ratio=2,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )
    texts: dict[str, Any] = {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}
    scheduler = scheduler or CogVideoXDDIMScheduler(**ZERO_SNR)
    return CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)


def cogvideox_dpm_pipeline() -> CogVideoXPipeline:
    return cogvideox_pipeline(CogVideoXDPMScheduler(**ZERO_SNR))


def ltx_timed_pipeline() -> LTXPipeline:
    """Return a pipeline whose decoder takes a timestep, and latents with noise that is drawn after the last step."""
    return ltx_pipeline(timestep_conditioning=True)


def ltx_pipeline(**vae_changes) -> LTXPipeline:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, False, False, False),
        decoder_spatio_temporal_scaling=(True, False, False, False),
        patch_size=1,
        **vae_changes,
    )
    texts: dict[str, Any] = {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}
    return LTXPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


def hunyuan_video_pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    tokenizer = tiny_qwen_tokenizer()
    text = LlamaConfig(vocab_size=len(tokenizer), head_dim=8, **{**TEXT, "num_hidden_layers": 3})
    first: dict[str, Any] = {"text_encoder": LlamaModel(text), "tokenizer": tokenizer}
    second: dict[str, Any] = {
        "text_encoder_2": CLIPTextModel(tiny_text_config()),
        "tokenizer_2": tiny_clip_tokenizer(),
    }
    scheduler = FlowMatchEulerDiscreteScheduler()
    return HunyuanVideoPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **first, **second)


VIDEO_BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": wan_pipeline,
    "wan22": wan22_pipeline,
    "cogvideox": cogvideox_pipeline,
    "cogvideox_dpm": cogvideox_dpm_pipeline,
    "ltx": ltx_pipeline,
    "ltx_timed": ltx_timed_pipeline,
    "hunyuan_video": hunyuan_video_pipeline,
}
SHORT = {"num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
VIDEO_CALLS: dict[str, dict[str, Any]] = {
    "wan": {**SHORT, "guidance_scale": 2.0, **SIZE},
    "wan22": {**SHORT, "guidance_scale": 2.0, "guidance_scale_2": 3.0, **SIZE},
    "cogvideox": {**SHORT, "guidance_scale": 2.0, **SIZE},
    "cogvideox_dpm": {**SHORT, "guidance_scale": 2.0, **SIZE},
    "ltx": {**SHORT, "guidance_scale": 2.0, **SIZE},
    "ltx_timed": {**SHORT, "guidance_scale": 2.0, "decode_timestep": 0.05, "decode_noise_scale": 0.1, **SIZE},
    "hunyuan_video": {**SHORT, "prompt_template": {"template": "{}", "crop_start": 0}, **SIZE},
}


@functools.cache
def tiny_video(name: str) -> Any:
    """Return a stock pipeline, shared by all tests; its weights require no gradient, as those of `tiny_family`."""
    pipe = quiet(VIDEO_BUILDERS[name]())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe
