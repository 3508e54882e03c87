"""A tiny autoencoder that decodes in the place of a pipeline's own while its noise is optimised."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from ..sampling.internals import execution_device, name_or_path

FULL_DECODER = "full_decoder"


def as_loop_decoder(decoder: Any, pipe: Any, denoisers: Sequence[nn.Module]) -> Any:
    """What `decoder=` takes as a module on the pipeline's device, in the dtype of its denoiser; `None` stays.

    The pipeline's own call scales and shifts the latents as the configuration of the decoder says, which for a tiny
    autoencoder are those that the denoiser gives, unchanged.

    Args:
        decoder: A Hub id or a folder of an `AutoencoderTiny`, or a loaded module with `decode` and a `config`.
        pipe: The pipeline.
        denoisers: Its denoisers.

    Raises:
        ValueError: For a pipeline whose latents a tiny autoencoder does not know, and for a decoder that takes other
            latents, makes images of another size, or is elsewhere.
        TypeError: For what is no decoder.
    """
    if decoder is None:
        return None
    check_plain_latents(pipe)
    dtype = next(next(iter(denoisers), pipe.vae).parameters()).dtype
    device = torch.empty(0, device=execution_device(pipe)).device  # with its index
    if isinstance(decoder, str | os.PathLike):
        found: Any = AutoencoderTiny.from_pretrained(os.fspath(decoder), torch_dtype=dtype)
        decoder = found.to(device).requires_grad_(False).eval()
    check_decoder(decoder, device, dtype)
    check_channels(decoder, pipe)
    check_scale(decoder, pipe, device, dtype)
    return decoder


def check_plain_latents(pipe: Any) -> None:
    """Raise `ValueError` unless latents are scaled and shifted by two numbers before they are decoded."""
    vae = getattr(pipe, "vae", None)
    normalised = isinstance(vae, AutoencoderKL) and any(
        vae.config.get(name) is not None for name in ("latents_mean", "latents_std")
    )
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny) or normalised:
        other = "one that normalises each channel of its latents" if normalised else type(vae).__name__
        raise ValueError(
            f"Expected a pipeline with an `AutoencoderKL` that scales its latents by one number, for which there are "
            f"tiny autoencoders, but {type(pipe).__name__} has {other}. Use `decoder=None`."
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
            f"Expected the decoder in {dtype} on {device}, as the denoiser, but got {weight.dtype} on {weight.device}. "
            f'Call `decoder.to("{device}", {dtype})`.'
        )


def check_channels(decoder: Any, pipe: Any) -> None:
    expected, found = pipe.vae.config.latent_channels, decoder.config.get("latent_channels")
    if found != expected:
        raise ValueError(
            f"Expected a decoder of latents with {expected} channels, as those of {type(pipe).__name__}, but got one "
            f"of {found}. There are taesd, taesdxl, taesd3 and taef1 of `madebyollin` for SD, SDXL, SD3 and Flux."
        )


def check_scale(decoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless images have the size that the pipeline's own have. Decodes a few zeros."""
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8, device=device, dtype=dtype)
    with torch.no_grad():
        images = decoder.decode(latents, return_dict=False)[0]
    side = 8 * pipe.vae_scale_factor
    if images.shape != (1, 3, side, side):
        raise ValueError(
            f"Expected a decoder that makes {side} × {side} pixels of latents of 8 × 8, as that of "
            f"{type(pipe).__name__} does, but got images of shape {tuple(images.shape)}."
        )


def describe_decoder(decoder: Any) -> dict[str, Any] | None:
    """What the provenance says of a decoder."""
    if decoder is None:
        return None
    return {
        "class": type(decoder).__name__,
        "name": name_or_path(decoder),
        "approximation": True,
        "scores": f"of its images; those of the pipeline's own decoder are in reports[{FULL_DECODER!r}]",
    }
