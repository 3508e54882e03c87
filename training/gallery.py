"""The trained generators as stock pipelines, and a gallery of their images as training data."""

from __future__ import annotations

import argparse
import random
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import sample_request
from noiseopt.shapes_world.embedded import MODELS

from .data import encode_pictures
from .families import SD3Generator, SDXLGenerator
from .models import Generator, VPGenerator, final_vae
from .optimization import averaged

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DiffusionPipeline
    from transformers import T5EncoderModel, T5Tokenizer

# embedded name -> (training stage, class)
GENERATORS: dict[str, tuple[str, type[VPGenerator] | type[SD3Generator]]] = {
    "turbo": ("student", Generator),
    "guided": ("guided", Generator),
    "sdxl": ("sdxl", SDXLGenerator),
    "sdxl-turbo": ("sdxl-turbo", SDXLGenerator),
    "sd3": ("sd3", SD3Generator),
}


def scaled_vae(args: argparse.Namespace) -> AutoencoderTiny:
    """Return the trained autoencoder with its `scaling_factor`."""
    vae = final_vae(args)
    vae.register_to_config(scaling_factor=round(encode_pictures(args)["scale"], 6))
    return vae


def assemble(args: argparse.Namespace, name: str, vae: AutoencoderTiny) -> DiffusionPipeline:
    """Assemble the stock pipeline of a trained generator."""
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    stage, kind = GENERATORS[name]
    model: Any = averaged(args.output / f"{stage}.pt", kind()).to(args.device)
    parts: dict[str, Any] = {"vae": vae, "scheduler": model.scheduler}
    parts |= {"text_encoder": model.text_encoder, "tokenizer": model.tokenizer}
    if isinstance(model, Generator):
        parts |= {"unet": model.unet, "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)
    parts |= {"text_encoder_2": model.text_encoder_2, "tokenizer_2": model.tokenizer}
    if isinstance(model, SD3Generator):
        encoder, tokenizer = silent_encoder(model.transformer.config["joint_attention_dim"])
        parts |= {"transformer": model.transformer, "text_encoder_3": encoder, "tokenizer_3": tokenizer}
        return StableDiffusion3Pipeline(**parts)
    if name == "sdxl-turbo":  # like SDXL-Turbo
        parts["scheduler"] = EulerAncestralDiscreteScheduler.from_config(model.scheduler.config)
    return StableDiffusionXLPipeline(**parts, unet=model.unet, add_watermarker=False)


def silent_encoder(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a T5 whose embeddings are zero, as SD3 takes them to be without its third text encoder, and a tokenizer.

    Without that encoder a saved pipeline loads only with `text_encoder_3=None, tokenizer_3=None`.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    config = T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1, use_cache=False)
    encoder = T5EncoderModel(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return encoder, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)


def gallery(args: argparse.Namespace) -> dict:
    """Return right and wrong images of the trained generators, uint8 (N, 3, 64, 64), and their N training prompts."""
    path = args.output / "gallery.pt"
    if not path.exists():
        vae = scaled_vae(args)
        rng, generator = random.Random(5), torch.Generator().manual_seed(5)
        images, asked = [], []
        for name in [name for name, (stage, _) in GENERATORS.items() if (args.output / f"{stage}.pt").exists()]:
            pipe: Any = assemble(args, name, vae)
            pipe.set_progress_bar_config(disable=True)
            count = args.gallery // (1 if MODELS[name].call["num_inference_steps"] == 1 else 4)
            for _ in tqdm(range(count // 64), desc=f"gallery of {name}", mininterval=5):
                prompts = [str(sample_request(rng)) for _ in range(16)] * 4
                output = pipe(prompts, generator=generator, output_type="pt", **MODELS[name].call)
                images.append((output.images.cpu() * 255).round().byte())
                asked += prompts
        torch.save({"images": torch.cat(images), "prompts": asked}, path)
    return torch.load(path)
