"""Tiny modular pipelines of diffusers, built like those of `tiny_pipelines`, on the same components where they can."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKLQwenImage21,
    ClassifierFreeGuidance,
    CosmosTransformer3DModel,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    QwenImage21Transformer2DModel,
)
from diffusers.modular_pipelines import Krea2TurboModularPipeline
from tiny_families import FAMILY_BUILDERS, TEXT, tiny_qwen_tokenizer
from tiny_pipelines import SIZE, quiet, tiny_t5_tokenizer
from tiny_vlm_rewards import build_word_tokenizer
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

Parts = dict[str, Any]
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


class TextProcessor:
    """Stands for a processor of texts and images, without the images."""

    def __init__(self) -> None:
        self.tokenizer = tiny_word_tokenizer()
        self.apply_chat_template = self.apply

    def apply(self, conversation: Any, **arguments: Any) -> Any:
        found = self.tokenizer.apply_chat_template(conversation, **arguments)
        return [found] if arguments.get("tokenize") and not arguments.get("return_dict", True) else found

    def __call__(self, text: list[str], **arguments: Any) -> Any:
        return self.tokenizer(text, **arguments)


def tiny_word_tokenizer() -> Any:
    """One token per word, with the chat format of Qwen."""
    return build_word_tokenizer("<|im_start|> <|im_end|> <|image_pad|>", chat_template=CHAT)


def tiny_qwen3_vl(cls: Any = Qwen3VLForConditionalGeneration, layers: int = 2) -> Any:
    """Return the text encoder of a family; several take states of far layers by fixed numbers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    text = {**TEXT, "num_hidden_layers": layers, "head_dim": 8, "vocab_size": 128, "rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 8, "hidden_size": 16, "out_hidden_size": 16}
    vision |= {"intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return cls(Qwen3VLConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision))


def tiny_mistral(cls: Any) -> Any:
    text = {"model_type": "mistral", **TEXT, "head_dim": 8, "vocab_size": 128}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return cls(Mistral3Config(text_config=text, vision_config=vision))


def of_family(family: str) -> Parts:
    """Return the components of a tiny stock pipeline."""
    return FAMILY_BUILDERS[family]().components


def without_guidance(parts: Parts) -> Parts:
    return {**parts, "guider": ClassifierFreeGuidance(guidance_scale=1.0, enabled=False)}


def packed_vae() -> Parts:
    """Return the autoencoder of FLUX.2, which packs 2 × 2 latents, and a scheduler."""
    stock = of_family("flux2_klein")
    return {"vae": stock["vae"], "scheduler": FlowMatchEulerDiscreteScheduler()}


def flux2_parts() -> Parts:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48}
    sizes |= {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    encoder = {"text_encoder": tiny_mistral(Mistral3ForConditionalGeneration), "tokenizer": tiny_word_tokenizer()}
    return {"transformer": Flux2Transformer2DModel(**sizes, **HEADS), **encoder, **packed_vae()}


def flux3_parts(**changes: Any) -> Parts:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"joint_attention_dim": 32, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    encoder = {"text_encoder": tiny_qwen3_vl(), "tokenizer": TextProcessor()}
    return {"transformer": Flux3Transformer2DModel(**sizes, **HEADS, **changes), **encoder, **packed_vae()}


def ernie_parts() -> Parts:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "text_in_dim": 16}
    transformer = ErnieImageTransformer2DModel(in_channels=16, out_channels=16, rope_axes_dim=(8, 4, 4), **sizes)
    encoder = {"text_encoder": tiny_mistral(Mistral3Model), "tokenizer": tiny_word_tokenizer()}
    return {"transformer": transformer, **encoder, **packed_vae()}


def ideogram_parts() -> Parts:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_layers": 1, "intermediate_size": 16, "adaln_dim": 8, "mrope_section": (4, 2, 2)}
    sizes |= {"llm_features_dim": 13 * 16, **HEADS}
    names = ("transformer", "unconditional_transformer")
    encoder = {"text_encoder": tiny_qwen3_vl(Qwen3VLModel, layers=36), "tokenizer": tiny_word_tokenizer()}
    return {**{name: Ideogram4Transformer2DModel(**sizes) for name in names}, **encoder, **packed_vae()}


def krea_parts() -> Parts:
    torch.manual_seed(0)
    text = {"hidden_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    sizes = {f"text_{name}": value for name, value in text.items()} | {"in_channels": 16, "num_layers": 1}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8, "num_text_layers": 12}
    sizes |= {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (8, 4, 4)}
    encoder = {"text_encoder": tiny_qwen3_vl(Qwen3VLModel, layers=36), "tokenizer": tiny_word_tokenizer()}
    return {"transformer": Krea2Transformer2DModel(**sizes, **HEADS), **encoder, **video_vae()}


def video_vae() -> Parts:
    """Return the autoencoder of Qwen-Image, with an axis of frames, and a scheduler."""
    return {"vae": of_family("qwen_image")["vae"], "scheduler": FlowMatchEulerDiscreteScheduler()}


def qwen_image21_parts() -> Parts:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "context_in_dim": 16, "mlp_ratio": 1}
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    blocks = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1] * 5, "num_res_blocks": 1}
    return {
        "transformer": QwenImage21Transformer2DModel(axes_dims_rope=(8, 4, 4), **sizes, **HEADS),
        "vae": AutoencoderKLQwenImage21(**blocks, **statistics),
        "text_encoder": tiny_qwen3_vl(),
        "processor": TextProcessor(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def anima_parts() -> Parts:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "mlp_ratio": 1.0, "text_embed_dim": 16}
    sizes |= {"adaln_lora_dim": 4, "max_size": (1, 16, 16), "extra_pos_embed_type": None}
    sizes |= {"concat_padding_mask": False, **HEADS}  # a mask would need torchvision
    tokenizer, t5_tokenizer = tiny_qwen_tokenizer(), tiny_t5_tokenizer()
    dims = {"source_dim": 16, "target_dim": 16, "model_dim": 16, "num_layers": 1, "num_attention_heads": 2}
    dims |= {"target_vocab_size": len(t5_tokenizer), "min_sequence_length": 8}
    return {
        "transformer": CosmosTransformer3DModel(**sizes),
        "text_conditioner": AnimaTextConditioner(**dims),
        "text_encoder": Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **TEXT)),
        "tokenizer": tokenizer,
        "t5_tokenizer": t5_tokenizer,
        **video_vae(),
    }


MODULAR_BUILDERS: dict[str, tuple[str, Callable[[], Parts]]] = {
    "sdxl": ("StableDiffusionXLAutoBlocks", lambda: of_family("sdxl")),
    "turbo_sdxl": ("StableDiffusionXLAutoBlocks", lambda: without_guidance(of_family("sdxl"))),
    "sd3": ("StableDiffusion3AutoBlocks", lambda: of_family("sd3")),
    "flux": ("FluxAutoBlocks", lambda: of_family("flux")),
    "flux_kontext": ("FluxKontextAutoBlocks", lambda: of_family("flux")),
    "flux2": ("Flux2AutoBlocks", flux2_parts),
    "flux2_klein": ("Flux2KleinAutoBlocks", lambda: of_family("flux2_klein")),
    "flux2_klein_base": ("Flux2KleinBaseAutoBlocks", lambda: of_family("flux2_klein")),
    "flux3": ("Flux3AutoBlocks", flux3_parts),
    "flux3_distilled": ("Flux3DistilledAutoBlocks", lambda: flux3_parts(flow_map=True)),
    "z_image": ("ZImageAutoBlocks", lambda: without_guidance(of_family("z_image"))),
    "qwen_image": ("QwenImageAutoBlocks", lambda: of_family("qwen_image")),
    "qwen_image21": ("QwenImage21AutoBlocks", qwen_image21_parts),
    "qwen_image21_turbo": ("QwenImage21TurboAutoBlocks", qwen_image21_parts),
    "krea2": ("Krea2AutoBlocks", krea_parts),
    "krea2_turbo": ("Krea2TurboAutoBlocks", krea_parts),
    "anima": ("AnimaAutoBlocks", anima_parts),
    "ernie_image": ("ErnieImageAutoBlocks", ernie_parts),
    "ideogram4": ("Ideogram4AutoBlocks", ideogram_parts),
}
"""Names of the blocks and makers of the components, by family."""

CLASSES = {"flux2_klein_base": diffusers.Flux2KleinBaseModularPipeline, "krea2_turbo": Krea2TurboModularPipeline}
UPSAMPLERS = ("prompt_upsampler", "prompt_enhancer", "prompt_upsample")
"""Names of blocks with language models of their own, which are left out as diffusers allows."""

SHORT = {"max_sequence_length": 64}
MODULAR_CALLS: dict[str, dict[str, Any]] = {
    "flux": {"guidance_scale": 3.5, "max_sequence_length": 16},
    "flux_kontext": {"guidance_scale": 3.5, "max_sequence_length": 16},
    "flux2": {"text_encoder_out_layers": (0, 1, 2)},
    "flux2_klein": {"text_encoder_out_layers": (1, 2), "max_sequence_length": 48},
    "flux2_klein_base": {"text_encoder_out_layers": (1, 2), "max_sequence_length": 48},
    "flux3": {"text_encoder_out_layers": (1, 2)},
    "flux3_distilled": {"text_encoder_out_layers": (1, 2)},
    "z_image": {"max_sequence_length": 48},
    "qwen_image": {"negative_prompt": "b"},
    "qwen_image21_turbo": {"sigmas": [1.0, 0.5]},
    "krea2": SHORT,
    "krea2_turbo": SHORT,
    "ideogram4": {"max_sequence_length": 16, "guidance_schedule": [7.0, 7.0]},
}


def build_modular(family: str) -> Any:
    """Return a new tiny modular pipeline of a family."""
    name, make = MODULAR_BUILDERS[family]
    torch.manual_seed(0)
    blocks = getattr(diffusers, name)()
    for each in UPSAMPLERS:
        blocks.sub_blocks.pop(each, None)
    hide_bars(blocks)
    cls = CLASSES.get(family)  # of checkpoints that say so in their configurations
    pipe, parts = blocks.init_pipeline() if cls is None else cls(blocks=blocks), make()
    wanted = {each.name for each in blocks.expected_components}
    pipe.update_components(**{name: part for name, part in parts.items() if name in wanted and part is not None})
    pipe = quiet(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            fill_zeros(part.requires_grad_(False))
    return pipe


def hide_bars(block: Any) -> None:
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for each in block.sub_blocks.values():
        hide_bars(each)


def fill_zeros(module: torch.nn.Module) -> None:
    """Replace weights that are zero before training, through which conditions have no effect."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


@functools.cache
def tiny_modular(family: str) -> Any:
    """Return the modular pipeline of a family, shared by all tests: they restore what they change."""
    return build_modular(family)


def modular_arguments(family: str) -> dict[str, Any]:
    """Return the arguments of a call of `tiny_modular(family)` except prompt and generator."""
    steps = {} if family == "qwen_image21_turbo" else {"num_inference_steps": 2}
    return {**steps, **SIZE, **MODULAR_CALLS.get(family, {})}
