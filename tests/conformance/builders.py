"""Tiny pipelines of diffusers' classes: one recipe for each family, shared by its variants."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    Kandinsky3UNet,
    LuminaNextDiT2DModel,
    PriorTransformer,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
    SanaControlNetModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableCascadeUNet,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.models.transformers.transformer_joyimage import JoyImageEditTransformer3DModel
from diffusers.models.transformers.transformer_joyimage_edit_plus import JoyImageEditPlusTransformer3DModel
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator, OmniGenMultiModalProcessor
from diffusers.pipelines.stable_diffusion import CLIPImageProjection
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from tiny_families import (
    FAMILY_BUILDERS,
    FAMILY_CALLS,
    NO_QUANT,
    SHORT_TEXT,
    controlnet_without_zeros,
    flow_vae,
    lcm_pipeline,
    pixart_sigma_pipeline,
    random_image,
    sana_components,
    tiny_gemma,
    tiny_gemma_tokenizer,
    tiny_qwen_tokenizer,
)
from tiny_pipelines import (
    LETTERS,
    SIZE,
    flux_pipeline,
    quiet,
    sd3_pipeline,
    sd_pipeline,
    sdxl_pipeline,
    tiny_clip_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_text_config,
    tiny_unet,
    tiny_vae,
)
from tiny_videos import VIDEO_BUILDERS, VIDEO_CALLS
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen3Config,
    Qwen3Model,
)

from noiseopt.pipelines.sampling.latent_space import with_globals

Parts = dict[str, Any]
TRAILING = {"timestep_spacing": "trailing", "steps_offset": 1}
FLUX = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
FLOW = FlowMatchEulerDiscreteScheduler


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def mask_image() -> torch.Tensor:
    """Return a mask `(1, 1, 32, 32)` of the right half."""
    mask = torch.zeros(1, 1, *SIZE.values())
    mask[..., SIZE["width"] // 2 :] = 1
    return mask


def pil_image() -> Image.Image:
    return Image.fromarray(random_image(4)[0].permute(1, 2, 0).mul(255).byte().numpy())


def with_small_images(cls: Any) -> type:
    """Return a pipeline class that resizes its images to 32 × 32 pixels instead of a megapixel."""
    call = inspect.unwrap(cls.__call__)
    stock = call.__globals__["calculate_dimensions"]
    small = with_globals(call, calculate_dimensions=lambda area, ratio: stock(32 * 32, ratio), VAE_IMAGE_SIZE=32 * 32)
    return type(cls.__name__, (cls,), {"__call__": torch.no_grad()(small), "__module__": cls.__module__})


def has(cls: type, word: str) -> bool:
    return word in cls.__name__


def sd_parts(cls: type) -> Parts:
    if has(cls, "LatentConsistency"):
        return lcm_pipeline().components
    parts = sd_pipeline(scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **TRAILING)).components
    for word, count in {"InstructPix2Pix": 8, "Depth": 5}.items():
        if has(cls, word):
            parts["unet"] = tiny_unet(16, in_channels=count)
    if has(cls, "Upscale"):
        parts["unet"] = tiny_unet(16, in_channels=7, num_class_embeds=1000)
        parts["low_res_scheduler"] = DDPMScheduler()
    if has(cls, "XS"):
        parts["unet"] = two_layers(parts["unet"])
    if has(cls, "LatentUpscale"):
        parts["unet"] = tiny_unet(16, in_channels=8, out_channels=5, time_cond_proj_dim=2 * 64 + 16)
        parts["scheduler"] = EulerDiscreteScheduler(**TRAILING)
    if has(cls, "GLIGEN"):
        parts["unet"] = tiny_unet(16, attention_type="gated-text-image" if has(cls, "TextImage") else "gated")
        projection = CLIPImageProjection(16)
        parts |= {"processor": tiny_image_processor(), "image_encoder": tiny_vision(), "image_project": projection}
    return {**parts, **additions(cls, parts["unet"])}


def tiny_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE)


def tiny_vision(patch_size: int = 8) -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=32, patch_size=patch_size, projection_dim=16, **sizes)
    return CLIPVisionModelWithProjection(config)


def unclip_parts(cls: type) -> Parts:
    prior = PriorTransformer(num_layers=1, embedding_dim=16, **HEADS)
    solver = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return {
        **sd_parts(cls),
        "unet": tiny_unet(16, class_embed_type="projection", projection_class_embeddings_input_dim=2 * 16),
        "prior_tokenizer": tiny_clip_tokenizer(),
        "prior_text_encoder": CLIPTextModelWithProjection(tiny_text_config()),
        "prior": prior,
        "prior_scheduler": solver,
        "image_encoder": tiny_vision(),
        "image_normalizer": StableUnCLIPImageNormalizer(16),
        "image_noising_scheduler": DDPMScheduler(),
    }


def sdxl_parts(cls: type) -> Parts:
    parts = sdxl_pipeline(scheduler=EulerDiscreteScheduler(**TRAILING)).components
    if has(cls, "Pix2Pix"):
        time_ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        parts["unet"] = tiny_unet(32, in_channels=8, projection_class_embeddings_input_dim=6 * 4 + 16, **time_ids)
    if has(cls, "XS"):
        parts["unet"] = two_layers(parts["unet"])
    return {**parts, **additions(cls, parts["unet"])}


def two_layers(unet: UNet2DConditionModel) -> Any:
    """Return a UNet of two layers per block, the number that ControlNet-XS assumes."""
    return UNet2DConditionModel.from_config({**unet.config, "layers_per_block": 2})


def additions(cls: type, unet: Any) -> Parts:
    """Return what variants have beside the parts of their family."""
    parts = {}
    if has(cls, "ControlNetXS"):
        small = {"block_out_channels": [4, 8], "conditioning_embedding_out_channels": (8, 8)}
        parts["controlnet"] = ControlNetXSAdapter.from_unet(unet, **small)
    elif has(cls, "ControlNetUnion"):
        names = ("block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim")
        names += ("norm_num_groups", "layers_per_block", "addition_embed_type", "addition_time_embed_dim")
        shared = {name: unet.config[name] for name in (*names, "projection_class_embeddings_input_dim")}
        union = {"conditioning_embedding_out_channels": (8, 8), "num_trans_channel": 8, "num_proj_channel": 8}
        parts["controlnet"] = ControlNetUnionModel(**shared, **union, num_trans_head=2)
    elif has(cls, "ControlNet"):
        parts["controlnet"] = controlnet_without_zeros(ControlNetModel.from_unet(unet, conditioning_channels=3))
    if has(cls, "Adapter"):
        kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 4}
        parts["adapter"] = T2IAdapter(channels=[8, 16], num_res_blocks=1, **kind)
    return parts


def sd3_parts(cls: type) -> Parts:
    parts = {**sd3_pipeline().components}
    deeper = {**parts["transformer"].config, "num_layers": 2}  # the last block takes nothing from a ControlNet
    parts["transformer"] = SD3Transformer2DModel.from_config(deeper)
    if has(cls, "3Inpaint"):  # that pipeline asks for 16 channels
        config = {**parts["transformer"].config, "in_channels": 16, "out_channels": 16}
        parts["transformer"] = SD3Transformer2DModel.from_config(config)
        parts["vae"] = tiny_vae(16, shift_factor=0.06, **NO_QUANT)
    if has(cls, "ControlNet"):
        shared = {name: parts["transformer"].config[name] for name in ("patch_size", "in_channels", "num_layers")}
        shared |= {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32, **HEADS}
        extra = {"extra_conditioning_channels": 1} if has(cls, "Inpainting") else {}
        parts["controlnet"] = SD3ControlNetModel(**shared, out_channels=4, sample_size=16, **extra)
    return parts


def flux_parts(cls: type) -> Parts:
    parts = {**flux_pipeline().components}
    channels = 48 if has(cls, "Fill") else 32 if has(cls, "FluxControl") and not has(cls, "ControlNet") else 16
    parts["transformer"] = FluxTransformer2DModel(in_channels=channels, out_channels=16, **FLUX)
    if has(cls, "ControlNet"):
        parts["controlnet"] = FluxControlNetModel(in_channels=16, **FLUX)
    return parts


def chroma_parts(cls: type) -> Parts:
    sizes = {name: FLUX[name] for name in FLUX if name != "pooled_projection_dim"}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return {
        "transformer": ChromaTransformer2DModel(in_channels=16, **sizes, **approximator),
        "vae": flow_vae(),
        "text_encoder": tiny_t5(),
        "tokenizer": tiny_t5_tokenizer(),
        "scheduler": FLOW(),
    }


def bria_parts(cls: type) -> Parts:
    sizes = {**FLUX, "pooled_projection_dim": None}
    transformer = BriaTransformer2DModel(in_channels=16, **sizes)
    return {**chroma_parts(cls), "transformer": transformer, "vae": flow_vae()}


def qwen_parts(cls: type) -> Parts:
    parts = {**FAMILY_BUILDERS["qwen_image"]().components}
    if has(cls, "Layered"):
        layered = {**parts["transformer"].config, "use_additional_t_cond": True, "use_layer3d_rope": True}
        parts["transformer"] = QwenImageTransformer2DModel.from_config(layered)
    if has(cls, "ControlNet"):
        sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16}
        extra = {"extra_condition_channels": 4} if has(cls, "Inpaint") else {}
        parts["controlnet"] = QwenImageControlNetModel(
            in_channels=16, out_channels=4, axes_dims_rope=(8, 4, 4), **sizes, **extra
        )
    return parts


def family_parts(family: str) -> Callable[[type], Parts]:
    return lambda cls: dict(FAMILY_BUILDERS[family]().components)


def pixart_parts(cls: type) -> Parts:
    return pixart_sigma_pipeline().components


def sana_parts(cls: type) -> Parts:
    if has(cls, "Sprint"):
        return FAMILY_BUILDERS["sana_sprint"]().components
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    parts = {**sana_components(), "scheduler": solver}
    if has(cls, "ControlNet"):
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
        sizes |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "num_layers": 1}
        parts["controlnet"] = SanaControlNetModel(in_channels=4, out_channels=4, sample_size=16, **sizes)
    return parts


def lumina_parts(cls: type) -> Parts:
    denoiser = LuminaNextDiT2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )
    text = {"text_encoder": tiny_gemma(), "tokenizer": tiny_gemma_tokenizer()}
    return {"transformer": denoiser, "vae": flow_vae(), "scheduler": FLOW(), **text}


def hunyuan_dit_parts(cls: type) -> Parts:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    shared = {
        **HEADS,
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 16,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
        "text_len": 77,
        "text_len_t5": 256,
    }
    parts = {
        "transformer": HunyuanDiT2DModel(num_layers=2, **shared),
        "vae": tiny_vae(4, (8, 8, 8, 8)),  # the pipeline assumes 8 pixels a latent
        "text_encoder": BertModel(BertConfig(vocab_size=len(tokens), **sizes)),
        "tokenizer": BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}),
        "text_encoder_2": tiny_t5(),
        "tokenizer_2": tiny_t5_tokenizer(),
        "scheduler": DDPMScheduler(),
    }
    if has(cls, "ControlNet"):
        parts["controlnet"] = HunyuanDiT2DControlNetModel(transformer_num_layers=2, **shared)
    return parts


def aura_flow_parts(cls: type) -> Parts:
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 16, "pos_embed_max_size": 256}
    denoiser = AuraFlowTransformer2DModel(sample_size=16, patch_size=1, caption_projection_dim=16, **sizes, **HEADS)
    return {"transformer": denoiser, "vae": tiny_vae(), "scheduler": FLOW()}


def cogview3_parts(cls: type) -> Parts:
    denoiser = CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=1,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        **HEADS,
    )
    text = {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}
    scheduler = CogVideoXDDIMScheduler(rescale_betas_zero_snr=False, prediction_type="v_prediction")
    return {"transformer": denoiser, "vae": tiny_vae(), "scheduler": scheduler, **text}


def cogview4_parts(cls: type) -> Parts:
    denoiser = CogView4Transformer2DModel(
        in_channels=8 if has(cls, "Control") else 4,
        num_layers=1,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(64, 64),
        **HEADS,
    )
    return {"transformer": denoiser, "vae": tiny_vae(), "scheduler": FLOW(base_shift=0.25, max_shift=0.75)}


def kandinsky_parts(cls: type) -> Parts:
    tokenizer = tiny_t5_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = MCLIPConfig(transformerDimSize=16, imageDimSize=16, vocab_size=len(tokenizer), **sizes)
    denoiser = UNet2DConditionModel(
        in_channels=9 if has(cls, "Inpaint") else 4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **TRAILING)
    encoder = MultilingualCLIP(text)
    return {
        "unet": denoiser,
        "movq": tiny_movq(),
        "scheduler": scheduler,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }


def tiny_movq() -> VQModel:
    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
    )


def kandinsky3_parts(cls: type) -> Parts:
    sizes = {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3}
    blocks = {"block_out_channels": (16, 32), "cross_attention_dim": 8, "encoder_hid_dim": 16}
    text = {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}
    return {"unet": Kandinsky3UNet(**sizes, **blocks), "movq": tiny_movq(), "scheduler": DDPMScheduler(), **text}


def cascade_parts(cls: type) -> Parts:
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        patch_size=2,
        clip_text_pooled_in_channels=16,
        effnet_in_channels=4,
        timestep_ratio_embedding_dim=8,
        dropout=(0.0, 0.0),
        timestep_conditioning_type=("sca",),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
    )
    return {
        "decoder": decoder,
        "vqgan": tiny_paella(),
        "text_encoder": CLIPTextModelWithProjection(tiny_text_config()),
        "tokenizer": tiny_clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def wuerstchen_parts(cls: type) -> Parts:
    decoder = WuerstchenDiffNeXt(
        c_cond=16, c_hidden=[8, 16], nhead=[-1, 2], blocks=[1, 1], level_config=["CT", "CTA"], clip_embd=16,
        inject_effnet=[False, True], effnet_embd=4, dropout=0.0,
    )  # fmt: skip
    return {**cascade_parts(cls), "decoder": decoder}


def tiny_paella() -> PaellaVQModel:
    return PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=16)


def ovis_parts(cls: type) -> Parts:
    sizes = {name: FLUX[name] for name in FLUX if name != "pooled_projection_dim"}
    tokenizer = tiny_qwen_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    return {
        "transformer": diffusers.OvisImageTransformer2DModel(in_channels=16, out_channels=16, **sizes),
        "vae": flow_vae(),
        "text_encoder": Qwen3Model(Qwen3Config(**text)),
        "tokenizer": tokenizer,
        "scheduler": FLOW(),
    }


def krea_parts(cls: type) -> Parts:
    denoiser = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return {"transformer": denoiser, "vae": FAMILY_BUILDERS["qwen_image"]().vae, "scheduler": FLOW()}


def hunyuan_image_parts(cls: type) -> Parts:
    denoiser = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
        **HEADS,
    )
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32}
    vae = diffusers.AutoencoderKLHunyuanImage(3, 3, 4, scaling_factor=0.5, **sizes)
    return {"transformer": denoiser, "vae": vae, "scheduler": FLOW()}


def kandinsky5_parts(cls: type) -> Parts:
    denoiser = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 8),
        visual_cond=has(cls, "I2I"),
    )
    return {"transformer": denoiser, "vae": tiny_vae(4, (8, 8, 8, 8), layers_per_block=1), "scheduler": FLOW()}


class NoProcessor:
    """Processor of a text encoder that is left out; the pipeline reads its image processor."""

    image_processor = None


def long_cat_parts(cls: type) -> Parts:
    sizes = {**FLUX, "axes_dims_rope": [4, 4, 8]}
    denoiser = diffusers.LongCatImageTransformer2DModel(in_channels=64, **sizes)
    vae = tiny_vae(16, shift_factor=0.06, **NO_QUANT)
    return {"transformer": denoiser, "vae": vae, "scheduler": FLOW(), "text_processor": NoProcessor()}


def flux2_parts(cls: type) -> Parts:
    return {**FAMILY_BUILDERS["flux2_klein"]().components, "text_encoder": None, "tokenizer": None}


def prx_parts(cls: type) -> Parts:
    pixels = has(cls, "Pixel")
    denoiser = diffusers.PRXTransformer2DModel(
        in_channels=3 if pixels else 4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=1.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    return {"transformer": denoiser, "vae": flow_vae(), "scheduler": FLOW(), "default_sample_size": None}


def nucleus_parts(cls: type) -> Parts:
    denoiser = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[1.0],
    )
    return {"transformer": denoiser, "vae": FAMILY_BUILDERS["qwen_image"]().vae, "scheduler": FLOW()}


def hidream_parts(cls: type) -> Parts:
    denoiser = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
        **HEADS,
    )
    return {"transformer": denoiser, "vae": flow_vae(), "scheduler": FLOW()}


def bria_fibo_parts(cls: type) -> Parts:
    sizes = {**FLUX, "axes_dims_rope": [4, 4, 8], "pooled_projection_dim": None}
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    return {
        "transformer": diffusers.BriaFiboTransformer2DModel(in_channels=4, text_encoder_dim=16, **sizes),
        "vae": vae,
        "scheduler": FLOW(),
    }


def hunyuan_refiner_parts(cls: type) -> Parts:
    denoiser = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=16,
        rope_axes_dim=(4, 2, 2),
        **HEADS,
    )
    sizes = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "spatial_compression_ratio": 4}
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(3, 3, 4, scaling_factor=0.5, **sizes)
    return {"transformer": denoiser, "vae": vae, "scheduler": FLOW()}


def ideogram_parts(cls: type) -> Parts:
    sizes = {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 16, "mrope_section": (4, 2, 2)}
    denoisers = [diffusers.Ideogram4Transformer2DModel(**sizes) for _ in range(2)]
    both = dict(zip(("transformer", "unconditional_transformer"), denoisers, strict=True))
    return {**both, "vae": FAMILY_BUILDERS["flux2_klein"]().vae, "scheduler": FLOW()}


def bria_fibo2_parts(cls: type) -> Parts:
    gist = {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2}
    denoiser = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        gist_min_text_len=4,
        gist_max_text_len=8,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 64, 64),
        **gist,
    )
    return {"transformer": denoiser, "vae": FAMILY_BUILDERS["flux2_klein"]().vae, "scheduler": FLOW()}


STATISTICS = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.0, 2.0, 0.5, 1.5]}


def joy_image_parts(cls: type) -> Parts:
    kind = JoyImageEditPlusTransformer3DModel if has(cls, "Plus") else JoyImageEditTransformer3DModel
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 1}
    blocks = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    return {
        "transformer": kind(in_channels=4, rope_dim_list=[8, 4, 4], **sizes),
        "vae": diffusers.AutoencoderKLWan(base_dim=8, decoder_base_dim=8, z_dim=4, **blocks, **STATISTICS),
        "scheduler": FLOW(),
    }


class Guardrail(torch.nn.Module):
    """Stands for the one that diffusers takes from another package; finds everything safe."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos_parts(cls: type) -> Parts:
    sizes = {"num_layers": 1, "mlp_ratio": 1.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (1, 16, 16)}
    sizes |= {"extra_pos_embed_type": None, "concat_padding_mask": False}  # a mask would need torchvision
    denoiser = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, **sizes
    )
    return {**joy_image_parts(cls), "transformer": denoiser, "safety_checker": Guardrail()}


class SmallJoyImages(JoyImageEditImageProcessor):
    """Resizes images to 32 × 32 pixels instead of a megapixel."""

    def get_default_height_width(self, *_, **__):
        return SIZE["height"], SIZE["width"]


class NoTemplate:
    """Processor of a text encoder that is left out; the pipeline counts the tokens of its template."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_, **__):
        return [[0]]

    def encode(self, text):
        return [0]


def qwen_image21_parts(cls: type) -> Parts:
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": 16, "mlp_ratio": 1}
    blocks = {"dim_mult": [1] * 5, "num_res_blocks": 1}
    return {
        "transformer": diffusers.QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, axes_dims_rope=(8, 4, 4), **sizes
        ),
        "vae": diffusers.AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, z_dim=4, **blocks, **STATISTICS),
        "processor": NoTemplate(),
        "scheduler": FLOW(),
    }


def glm_image_parts(cls: type) -> Parts:
    denoiser = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
        **HEADS,
    )
    return {"transformer": denoiser, "vae": tiny_vae(**STATISTICS), "scheduler": FLOW()}


def dream_lite_parts(cls: type) -> Parts:
    denoiser = DreamLiteUNetModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        addition_embed_type="time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8,
    )
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    return {"unet": denoiser, "vae": vae, "text_encoder": tiny_t5(), "scheduler": FLOW()}


class TextOnly(OmniGenMultiModalProcessor):
    """Processor of prompts without images, which needs no torchvision."""

    def __init__(self, tokenizer, max_image_size):
        self.text_tokenizer, self.max_image_size, self.collator = tokenizer, max_image_size, OmniGenCollator()


def omni_gen_parts(cls: type) -> Parts:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    tokenizer = tiny_t5_tokenizer()
    denoiser = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=1,
        pad_token_id=0,
        vocab_size=len(tokenizer),
        rope_scaling=factors,
        pos_embed_max_size=8,
        time_step_dim=8,
    )
    # the pipeline assumes 8 pixels a latent
    return {"transformer": denoiser, "vae": tiny_vae(4, (8, 8, 8, 8)), "scheduler": FLOW(), "tokenizer": tokenizer}


def versatile_parts(cls: type) -> Parts:
    parts = {**sd_parts(cls), "text_encoder": CLIPTextModelWithProjection(tiny_text_config())}
    if has(cls, "Dual"):
        parts |= {"image_feature_extractor": tiny_image_processor(), "image_encoder": tiny_vision(patch_size=2)}
    return {**parts, "image_unet": tiny_unet(16, dual_cross_attention=has(cls, "Dual"))}


class SubjectQueries(torch.nn.Module):
    """Stands for a Q-Former, which reads the vocabulary of BERT from the Hub."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, **_):
        return embeds(1, 4, 16)


def blip_parts(cls: type) -> Parts:
    processor = BlipImageProcessor(size=SIZE, do_center_crop=False)
    return {**sd_parts(cls), "qformer": SubjectQueries(), "image_processor": processor}


def z_image_parts(cls: type) -> Parts:
    parts = {**FAMILY_BUILDERS["z_image"]().components}
    if has(cls, "ControlNet"):
        parts["controlnet"] = diffusers.ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[],
            control_in_dim=9 if has(cls, "Inpaint") else 4,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
    return parts


TEXT, MASK, LAYERS = embeds(1, 8, 16), torch.ones(1, 8), embeds(3, 1, 8, 16)
EMBEDDED: dict[str, Callable[[Any], Any]] = {
    "QwenImageEdit": lambda pipe: (TEXT, MASK.long()),
    "Krea2": lambda pipe: (embeds(1, 8, 2, 16), MASK.bool()),
    "QwenImage21": lambda pipe: (TEXT, None, MASK < 0),
    "HunyuanImageRefiner": lambda pipe: (TEXT, MASK),
    "HunyuanImage": lambda pipe: (TEXT, MASK, TEXT, MASK),
    "Ideogram4": lambda pipe: (torch.cat([TEXT, torch.zeros(1, 64, 16)], 1), *pipe._prepare_ids([8], 8, 8, 8, "cpu")),
    "JoyImageEdit": lambda pipe: (TEXT, MASK),
    "GlmImage|Cosmos2Text": lambda pipe: (TEXT, -TEXT),
    "DreamLiteMobile": lambda pipe: (TEXT, MASK),
    "DreamLite": lambda pipe: (torch.cat([-TEXT, TEXT]), MASK.expand(2, -1)),
    "BlipDiffusion": lambda pipe: TEXT,
    "BriaFibo2": lambda pipe: (embeds(1, 2, 8, 16), None),
    "Kandinsky5": lambda pipe: (TEXT, embeds(1, 16), torch.tensor([0, 8], dtype=torch.int32)),
    "LongCat": lambda pipe: (TEXT, torch.zeros(8, 3)),
    "Flux2Pipeline": lambda pipe: (embeds(1, 8, 32), pipe._prepare_text_ids(embeds(1, 8, 32))),
    "PRX": lambda pipe: (TEXT, MASK, -TEXT, MASK),
    "NucleusMoE": lambda pipe: (TEXT, None),
    "HiDream": lambda pipe: (TEXT, -TEXT, LAYERS, LAYERS, embeds(1, 16), embeds(1, 16)),
    "BriaFibo": lambda pipe: (TEXT, -TEXT, torch.zeros(8, 3), MASK, MASK, [embeds(1, 8, 16)] * 2, [-TEXT] * 2),
}
"""Return values of `encode_prompt` for families whose text encoders are left out, by the beginning of their names."""


def video_parts(name: str) -> Callable[[type], Parts]:
    return lambda cls: {**VIDEO_BUILDERS[name]().components}


RECIPES: dict[str, Callable[[type], Parts]] = {
    "StableDiffusion3": sd3_parts,
    "StableDiffusionXL": sdxl_parts,
    "StableDiffusion|LatentConsistency|SemanticStable|CycleDiffusion|AltDiffusion": sd_parts,
    "StableUnCLIP": unclip_parts,
    "Flux2Klein": family_parts("flux2_klein"),
    "Flux(?!2|Prior)": flux_parts,
    "Chroma": chroma_parts,
    "BriaPipeline": bria_parts,
    "QwenImage(?!21)": qwen_parts,
    "ZImage": z_image_parts,
    "Lumina2": family_parts("lumina2"),
    "Lumina": lumina_parts,
    "PixArt": pixart_parts,
    "Sana(?!Video|WM|ImageToVideo)": sana_parts,
    "HunyuanDiT": hunyuan_dit_parts,
    "AuraFlow": aura_flow_parts,
    "CogView3": cogview3_parts,
    "CogView4": cogview4_parts,
    "Kandinsky(Img2Img|Inpaint)?Pipeline": kandinsky_parts,
    "Kandinsky3": kandinsky3_parts,
    "StableCascadeDecoder": cascade_parts,
    "WuerstchenDecoder": wuerstchen_parts,
    "OvisImage": ovis_parts,
    "Krea2": krea_parts,
    "HunyuanImagePipeline": hunyuan_image_parts,
    "Kandinsky5[TI]2I": kandinsky5_parts,
    "LongCatImage": long_cat_parts,
    "Flux2Pipeline": flux2_parts,
    "PRX": prx_parts,
    "NucleusMoE": nucleus_parts,
    "HiDream": hidream_parts,
    "BriaFibo(?!2)": bria_fibo_parts,
    "BriaFibo2": bria_fibo2_parts,
    "QwenImage21": qwen_image21_parts,
    "HunyuanImageRefiner": hunyuan_refiner_parts,
    "Ideogram4": ideogram_parts,
    "JoyImageEdit": joy_image_parts,
    "GlmImage": glm_image_parts,
    "DreamLite": dream_lite_parts,
    "OmniGen": omni_gen_parts,
    "Cosmos2Text": cosmos_parts,
    "VersatileDiffusion(Dual|Text)": versatile_parts,
    "BlipDiffusion": blip_parts,
    "WanPipeline": video_parts("wan"),
    "CogVideoXPipeline": video_parts("cogvideox"),
    "LTXPipeline": video_parts("ltx"),
    "HunyuanVideoPipeline": video_parts("hunyuan_video"),
}
"""Parts of a family by the beginning of its classes' names; the first that matches counts."""

NOT_HERE = "LDM3D"
BROKEN_IN_DIFFUSERS = (
    "ChromaInpaintPipeline",
    "StableDiffusionParadigmsPipeline",
    "VersatileDiffusionDualGuidedPipeline",
)
"""Classes whose stock call raises an error that no argument avoids."""
PLAIN = {"num_inference_steps": 2, "guidance_scale": 3.0, **SIZE}
TEXT_IN = ("max_sequence_length", "use_resolution_binning", "clean_caption", "complex_human_instruction")
CALLS: dict[str, dict[str, Any]] = {
    "WanPipeline": VIDEO_CALLS["wan"],
    "CogVideoXPipeline": VIDEO_CALLS["cogvideox"],
    "LTXPipeline": VIDEO_CALLS["ltx"],
    "HunyuanVideoPipeline": VIDEO_CALLS["hunyuan_video"],
    "Flux2Klein(?!Inpaint)": {**FAMILY_CALLS["flux2_klein"], "image": None},
    "Flux2Klein": FAMILY_CALLS["flux2_klein"],
    "Flux2Pipeline": {"image": None},
    "LongCat": {"enable_prompt_rewrite": False, "image": pil_image()},
    "Flux": {**SHORT_TEXT, "max_area": 32 * 32, "_auto_resize": False},
    "BriaFiboEdit": {
        **SHORT_TEXT,
        "prompt": '{"edit_instruction": "a b"}',
        "image": pil_image(),
        "_auto_resize": False,
    },
    "BriaFibo2|DreamLite|GlmImage": {"image": None, "prior_token_ids": torch.arange(64)[None] % 16},
    "Chroma|Bria": SHORT_TEXT,
    "Ideogram4": {"max_sequence_length": 8, "guidance_schedule": None},
    "JoyImageEditPlus": {"images": None},
    "JoyImageEdit": {"image": pil_image()},
    "BlipDiffusion": {
        "guidance_scale": 1.0,
        "prompt_reps": 1,
        "source_subject_category": ["a"],
        "target_subject_category": ["b"],
        "reference_image": pil_image(),
        "condtioning_image": pil_image(),
    },
    "VersatileDiffusion": {"image": pil_image()},
    "QwenImageLayered": {**FAMILY_CALLS["qwen_image"], "image": pil_image(), "layers": 1},
    "QwenImageEdit": {**FAMILY_CALLS["qwen_image"], "image": pil_image()},
    "QwenImage21": {**FAMILY_CALLS["qwen_image"], "image": None},
    "QwenImage": {**FAMILY_CALLS["qwen_image"]},
    "ZImageOmni": {**FAMILY_CALLS["z_image"], "image": None},
    "ZImage": {**FAMILY_CALLS["z_image"]},
    "Lumina": {"negative_prompt": "b", "system_prompt": "", "max_sequence_length": 32, "clean_caption": False},
    "PixArt": {"use_resolution_binning": False, "clean_caption": False, **SHORT_TEXT},
    "Sana": {"use_resolution_binning": False, "complex_human_instruction": None, **SHORT_TEXT},
    "HunyuanDiT|PRX": {"use_resolution_binning": False},
    "AuraFlow": {
        "prompt": None,
        "prompt_embeds": embeds(1, 8, 16),
        "negative_prompt_embeds": embeds(1, 8, 16),
        "prompt_attention_mask": torch.ones(1, 8),
        "negative_prompt_attention_mask": torch.ones(1, 8),
    },
    "CogView3": SHORT_TEXT,
    "CogView4": {"prompt": None, "prompt_embeds": embeds(1, 16, 16), "negative_prompt_embeds": embeds(1, 16, 16)},
    "StableCascadeDecoder|WuerstchenDecoder": {"image_embeddings": embeds(1, 4, 3, 3), "guidance_scale": 2.0},
    "StableDiffusionXLControlNetUnion": {"control_mode": 0},
    "StableDiffusionDepth": {"depth_map": embeds(1, 32, 32)},
    "StableDiffusionGLIGEN": {
        "gligen_phrases": ["a"],
        "gligen_boxes": [[0.1, 0.1, 0.6, 0.8]],
        "gligen_images": [pil_image()],
        "gligen_scheduled_sampling_beta": 0.5,
    },
    "StableDiffusionAttendAndExcite": {"token_indices": [1, 2], "attn_res": (8, 8)},
    "StableDiffusionDiffEdit": {"mask_image": mask_image()[..., ::2, ::2], "image_latents": embeds(1, 1, 4, 16, 16)},
    "StableDiffusionPix2PixZero": {"source_embeds": embeds(2, 77, 16), "target_embeds": -embeds(2, 77, 16)},
    "CycleDiffusion": {"source_prompt": "b"},
    "StableUnCLIP": {"prior_num_inference_steps": 2, "noise_level": 100},
    "Kandinsky(Img2Img|Inpaint)?Pipeline": {
        "image_embeds": embeds(1, 16),
        "negative_image_embeds": -embeds(1, 16),
    },
}
"""Arguments of a family's calls beside those of `arguments_of`."""


SIZES = {"resolutions": [(32, 32)], "default_sample_size": 16, "vae_image_processor": SmallJoyImages()}
"""Attributes of pipelines that choose the size of an image themselves."""


def matching(table: dict[str, Any], cls: type) -> Any:
    return next((value for pattern, value in table.items() if re.match(pattern, cls.__name__)), None)


def can_build(cls: type) -> bool:
    return matching(RECIPES, cls) is not None and not re.search(NOT_HERE, cls.__name__)


def build(cls: type) -> Any:
    """Return a tiny pipeline of a class."""
    torch.manual_seed(0)
    given, parts = inspect.signature(cls.__init__).parameters, matching(RECIPES, cls)(cls)
    flags = {"requires_safety_checker": False, "add_watermarker": False, "pag_applied_layers": layers_of(cls)}
    if hasattr(sys.modules[cls.__module__], "calculate_dimensions"):
        cls = with_small_images(cls)
    if encoded := matching(EMBEDDED, cls):
        named = {"encode_prompt", "encode_prompt_multiple_images"} & set(dir(cls))
        cls = type(cls.__name__, (cls,), dict.fromkeys(named, for_each_image(encoded)))
    if has(cls, "OmniGen"):
        start = with_globals(cls.__init__, OmniGenMultiModalProcessor=TextOnly)
        cls = type(cls.__name__, (cls,), {"__init__": start, "__module__": cls.__module__})
    wanted = {name: {**flags, **parts}.get(name) for name in given if name in parts or name in flags}
    missing = {name: None for name, each in given.items() if each.default is each.empty and name != "self"}
    pipe = quiet(cls(**{**missing, **wanted}))
    for name, value in SIZES.items():
        if hasattr(pipe, name):
            vars(pipe)[name] = value
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            fill_zeros(part.requires_grad_(False))
    return pipe


def for_each_image(encoded: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return an `encode_prompt` that returns the same for each image of a prompt."""

    def repeated(value: Any, count: int) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim == 1 and value[0] == 0:  # cumulative lengths
            return torch.cat([value[:1], value.diff().repeat(count).cumsum(0).to(value)])
        if isinstance(value, torch.Tensor):
            by_layer = value.ndim == 4 and value.shape[1] == 1 < len(value)
            return value.repeat_interleave(count, int(by_layer)) if by_layer or len(value) == 1 else value
        return type(value)(repeated(each, count) for each in value) if isinstance(value, tuple | list) else value

    def encode_prompt(pipe: Any, *_: Any, num_images_per_prompt: int | None = 1, **__: Any) -> Any:
        return repeated(encoded(pipe), num_images_per_prompt or 1)

    return encode_prompt


def fill_zeros(module: torch.nn.Module) -> None:
    """Replace weights that are zero before training, through which conditions have no effect."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def layers_of(cls: type) -> str:
    return "mid" if re.match("StableDiffusion(?!3)", cls.__name__) else "blocks.0"


def arguments_of(cls: type, strength: float = 1.0) -> dict[str, Any]:
    """Return the arguments of a call, prompt included, for what its signature has."""
    arguments = {"prompt": "a b", **PLAIN, "image": random_image(4), "control_image": random_image(3)}
    arguments |= {"mask_image": mask_image(), "control_mask": mask_image(), "strength": strength}
    if strength < 1 and not has(cls, "Sprint"):
        arguments["num_inference_steps"] = 4
    arguments |= matching(CALLS, cls) or {}
    known = inspect.signature(cls.__call__).parameters
    return {name: value for name, value in arguments.items() if name in known}


@functools.cache
def tiny_pipeline_of(cls: type) -> Any:
    return build(cls)
