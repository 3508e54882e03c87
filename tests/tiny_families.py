"""Tiny stock pipelines of all other families, built like those of `tiny_pipelines`."""

import functools

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    TCDScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import (
    BUILDERS,
    CALLS,
    LETTERS,
    SIZE,
    quiet,
    sdxl_pipeline,
    tiny_clip_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_text_config,
    tiny_unet,
    tiny_vae,
)
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, **HEADS}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
BYTES = [*LETTERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:_|", "Ġ", "Ċ"]


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Tokenize letter by letter, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = {token: index for index, token in enumerate([*BYTES, *special])}
    return Qwen2Tokenizer(vocab=tokens, merges=[], chat_template=CHAT, additional_special_tokens=special[1:])


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Tokenize letter by letter."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def tiny_gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(vocab_size=len(tiny_gemma_tokenizer()), head_dim=8, **TEXT))


def flow_vae(**changes):
    return tiny_vae(shift_factor=0.06, **NO_QUANT, **changes)


def lcm_pipeline():
    torch.manual_seed(0)
    return LatentConsistencyModelPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_unet(16, time_cond_proj_dim=256),
        scheduler=LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def hyper_sdxl_pipeline():
    """Return Hyper-SDXL for one step; the model card asks for `LCMScheduler`."""
    return sdxl_pipeline(scheduler=LCMScheduler())


def tcd_sdxl_pipeline():
    """Return Hyper-SDXL for any number of steps; the card of its LoRA asks for `TCDScheduler`."""
    return sdxl_pipeline(scheduler=TCDScheduler())


def lightning_sdxl_pipeline():
    return sdxl_pipeline(scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"))


def controlnet_pipeline():
    stock = sdxl_pipeline()
    controlnet = ControlNetModel.from_unet(stock.unet, conditioning_channels=3)
    controlnet = controlnet_without_zeros(controlnet)
    return StableDiffusionXLControlNetPipeline(**stock.components, controlnet=controlnet, add_watermarker=False)


def controlnet_without_zeros(controlnet: ControlNetModel) -> ControlNetModel:
    """Replace the zero convolutions, through which no gradient would pass, by random ones as after training."""
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.2)
    conditioning = controlnet.controlnet_cond_embedding
    # real ones downsample by 8, like the real VAE
    for convolution in [block for block in conditioning.blocks if block.stride == (2, 2)][1:]:
        convolution.stride = (1, 1)
    return controlnet


def img2img_pipeline():
    components = sdxl_pipeline(scheduler=EulerDiscreteScheduler(timestep_spacing="trailing")).components
    return StableDiffusionXLImg2ImgPipeline(**components, add_watermarker=False)


def img2img_flux_pipeline():
    return FluxImg2ImgPipeline(**BUILDERS["flux"]().components)


def flux2_klein_pipeline():
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        **NO_QUANT,
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    tokenizer = tiny_qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **TEXT)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def qwen_image_pipeline():
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    tokenizer = tiny_qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0)
    text = {**TEXT, "rope_parameters": rope, "vocab_size": len(tokenizer), "pad_token_id": None}
    return QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def z_image_pipeline():
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # uninitialized memory otherwise
    tokenizer = tiny_qwen_tokenizer()
    return ZImagePipeline(
        transformer=transformer,
        vae=flow_vae(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **TEXT)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def lumina2_pipeline():
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=16,
    )
    blocks = {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
    }  # the pipeline assumes 8 pixels a latent
    return Lumina2Pipeline(
        transformer=transformer,
        vae=flow_vae(**blocks),
        text_encoder=tiny_gemma(),
        tokenizer=tiny_gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def pixart_sigma_pipeline():
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=transformer,
        vae=tiny_vae(),
        text_encoder=tiny_t5(),
        tokenizer=tiny_t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def tiny_dc_autoencoder() -> AutoencoderDC:
    half = {"layers_per_block": (1, 1), "block_out_channels": (8, 8), "qkv_multiscales": ((), (5,))}
    blocks = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()},
    )


def sana_components(**transformer) -> dict:
    torch.manual_seed(0)
    denoiser = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **transformer,
    )
    text = {"text_encoder": tiny_gemma(), "tokenizer": tiny_gemma_tokenizer()}
    return {"transformer": denoiser, "vae": tiny_dc_autoencoder(), **text}


def sana_pipeline():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(scheduler=scheduler, **sana_components())


def sana_sprint_pipeline():
    components = sana_components(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return SanaSprintPipeline(
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
        **components,
    )


def random_image(seed: int) -> torch.Tensor:
    """Return uniform noise, `(1, 3, 32, 32)` in [0, 1]."""
    return torch.rand(1, 3, *SIZE.values(), generator=torch.Generator().manual_seed(seed))


FAMILY_BUILDERS = {
    **BUILDERS,
    "hyper_sdxl": hyper_sdxl_pipeline,
    "tcd_sdxl": tcd_sdxl_pipeline,
    "lightning_sdxl": lightning_sdxl_pipeline,
    "controlnet_sdxl": controlnet_pipeline,
    "img2img_sdxl": img2img_pipeline,
    "lcm": lcm_pipeline,
    "flux_distilled": BUILDERS["flux"],
    "img2img_flux": img2img_flux_pipeline,
    "flux2_klein": flux2_klein_pipeline,
    "qwen_image": qwen_image_pipeline,
    "z_image": z_image_pipeline,
    "lumina2": lumina2_pipeline,
    "pixart_sigma": pixart_sigma_pipeline,
    "sana": sana_pipeline,
    "sana_sprint": sana_sprint_pipeline,
}
SHORT_TEXT = {"max_sequence_length": 16}
FAMILY_CALLS = {
    **{family: {**arguments, **SIZE} for family, arguments in CALLS.items()},
    "flux": {**CALLS["flux"], **SHORT_TEXT, **SIZE},
    "hyper_sdxl": {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE},
    "tcd_sdxl": {"num_inference_steps": 2, "guidance_scale": 0.0, "eta": 1.0, **SIZE},
    "lightning_sdxl": {"num_inference_steps": 2, "guidance_scale": 0.0, **SIZE},
    "controlnet_sdxl": {"num_inference_steps": 2, "guidance_scale": 3.0, "image": random_image(3), **SIZE},
    "img2img_sdxl": {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0, "image": random_image(4)},
    "lcm": {"num_inference_steps": 2, "guidance_scale": 3.0, **SIZE},
    "flux_distilled": {"num_inference_steps": 1, "guidance_scale": 3.5, **SHORT_TEXT, **SIZE},
    "img2img_flux": {
        "num_inference_steps": 4,
        "strength": 0.5,
        "guidance_scale": 3.5,
        "image": random_image(4),
        **SHORT_TEXT,
        **SIZE,
    },
    "flux2_klein": {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "text_encoder_out_layers": (1, 2),
        "max_sequence_length": 48,
        **SIZE,
    },
    "qwen_image": {"num_inference_steps": 2, "true_cfg_scale": 2.0, "negative_prompt": "b", **SIZE},
    "z_image": {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 48, **SIZE},
    "lumina2": {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "system_prompt": "",
        "max_sequence_length": 32,
        **SIZE,
    },
    "pixart_sigma": {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "use_resolution_binning": False,
        "clean_caption": False,
        **SHORT_TEXT,
        **SIZE,
    },
    "sana": {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        **SHORT_TEXT,
        **SIZE,
    },
    "sana_sprint": {
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        **SHORT_TEXT,
        **SIZE,
    },
}


@functools.cache
def tiny_family(family: str):
    """Return the stock pipeline of a family, shared by all tests: they restore what they change.

    Its weights require no gradient: torch multiplies matrices with another rounding if they do, and these tests compare
    bit by bit.
    """
    pipe = quiet(FAMILY_BUILDERS[family]())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def family_arguments(family: str) -> dict:
    """Return the arguments of a call of `tiny_family(family)` except prompt and generator."""
    return dict(FAMILY_CALLS[family])
