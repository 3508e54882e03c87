"""Tiny autoencoders that replace the decoder of a pipeline while its noise is optimized."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from ...private_names import execution_device, name_or_path
from ...rewards.contract.checkpoints import is_checkpoint
from ..loading import loaded_models

FULL_DECODER = "full_decoder"


def as_loop_decoder(decoder: Any, pipe: Any, denoisers: Sequence[nn.Module]) -> Any:
    """Return the decoder of `decoder=`, on the pipeline's device and in the dtype of its denoiser, or `None`.

    The pipeline scales and shifts latents by the config of its decoder; that of a tiny autoencoder leaves the
    denoiser's latents unchanged.

    Args:
        decoder: A Hub id or a folder of an `AutoencoderTiny`, or a loaded module with `decode` and a `config`.
        pipe: The pipeline.
        denoisers: Its denoisers.

    Raises:
        ValueError: For a pipeline whose latents tiny autoencoders cannot decode, and for a decoder with another number
            of channels, scale, device or dtype.
        TypeError: For anything but a decoder.
    """
    if decoder is None:
        return None
    check_plain_latents(pipe)
    dtype = next(next(iter(denoisers), pipe.vae).parameters()).dtype
    device = torch.empty(0, device=execution_device(pipe)).device  # with its index
    if isinstance(decoder, str | os.PathLike):
        check_decoder_name(os.fspath(decoder))
        decoder = loaded_models(pipe).load("decoder", load_tiny_decoder, decoder, dtype, device)
    check_decoder(decoder, device, dtype)
    check_channels(decoder, pipe)
    check_scale(decoder, pipe, device, dtype)
    return decoder


def check_decoder_name(name: str) -> None:
    if not is_checkpoint(name):
        raise ValueError(
            f"Expected `decoder` to be a folder or a Hub id such as 'madebyollin/taesdxl', but got {name!r}."
        )


def load_tiny_decoder(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load an `AutoencoderTiny`, frozen."""
    found: Any = AutoencoderTiny.from_pretrained(path, torch_dtype=dtype)
    return found.to(device).requires_grad_(False).eval()


def check_plain_latents(pipe: Any) -> None:
    """Raise `ValueError` unless latents are decoded after scaling and shifting by one number each."""
    vae = getattr(pipe, "vae", None)
    normalized = isinstance(vae, AutoencoderKL) and any(
        vae.config.get(name) is not None for name in ("latents_mean", "latents_std")
    )
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny) or normalized:
        other = "one that normalizes each channel of its latents" if normalized else type(vae).__name__
        raise ValueError(
            f"Expected a pipeline whose `AutoencoderKL` scales its latents by one number, for which tiny autoencoders "
            f"exist, but {type(pipe).__name__} has {other}. Use `decoder=None`."
        )


def check_decoder(decoder: Any, device: torch.device, dtype: torch.dtype) -> None:
    if not (
        isinstance(decoder, nn.Module) and callable(getattr(decoder, "decode", None)) and hasattr(decoder, "config")
    ):
        raise TypeError(
            "Expected `decoder` to be a Hub id, a folder or a loaded `AutoencoderTiny`, with `decode` and `config`, "
            f"but got {type(decoder).__name__}."
        )
    weight = next(decoder.parameters(), None)
    if weight is not None and (weight.device, weight.dtype) != (device, dtype):
        raise ValueError(
            f"Expected the decoder in {dtype} on {device}, like the denoiser, but got {weight.dtype} on "
            f"{weight.device}. "
            f'Call `decoder.to("{device}", {dtype})`.'
        )


def check_channels(decoder: Any, pipe: Any) -> None:
    expected, found = pipe.vae.config.latent_channels, decoder.config.get("latent_channels")
    if found != expected:
        raise ValueError(
            f"Expected a decoder of latents with {expected} channels, as in {type(pipe).__name__}, but got one of "
            f"{found}. Use taesd, taesdxl, taesd3 or taef1 of `madebyollin` for SD, SDXL, SD3 or Flux."
        )


def check_scale(decoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` if the decoder enlarges 8 × 8 latents by another factor than the pipeline's VAE."""
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8, device=device, dtype=dtype)
    with torch.no_grad():
        images = decoder.decode(latents, return_dict=False)[0]
    side = 8 * pipe.vae_scale_factor
    if images.shape != (1, 3, side, side):
        raise ValueError(
            f"Expected a decoder from 8 × 8 latents to {side} × {side} pixels, as in {type(pipe).__name__}, but got "
            f"images of shape {tuple(images.shape)}."
        )


def describe_decoder(decoder: Any) -> dict[str, Any] | None:
    """Return the provenance entry of a decoder."""
    if decoder is None:
        return None
    return {
        "class": type(decoder).__name__,
        "name": name_or_path(decoder),
        "approximation": True,
        "scores": f"by this decoder; those by the pipeline's own are in reports[{FULL_DECODER!r}]",
    }
