"""The shape of the noise, against what a call of each family draws."""

import pytest
import torch
from conformance.matrix import FAMILIES
from diffusers import StableDiffusionXLAutoBlocks
from problems import generator
from tiers import slow_except
from tiny_families import family_arguments, tiny_family
from tiny_pipelines import SIZE, tiny_pipeline
from tiny_videos import VIDEO_CALLS, tiny_video

from noiseopt import noise_shape, optimize_noise
from noiseopt.pipelines.baselines.plain_sampling import PlainSampling

SIZES = ("height", "width", "num_inference_steps", "guidance_scale")


@pytest.mark.parametrize("family", slow_except(FAMILIES, "sdxl", "flux", "flux2_klein", "qwen_image", "z_image"))
def test_it_is_that_of_the_noise_that_a_call_draws_without_a_call_of_the_denoiser(family):
    pipe, call = tiny_family(family), family_arguments(family)
    call |= {"height": 64, "width": 32} if "img" not in family and "controlnet" not in family else {}
    drawn = optimize_noise(pipe, ["a", "b"], PlainSampling(), generator=generator(), num_images_per_prompt=2, **call)
    calls, denoiser = [], pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = set(vars(pipe))
    try:
        assert noise_shape(pipe, num_images=4, **call) == drawn.noise.shape
    finally:
        handle.remove()
    assert not calls and set(vars(pipe)) == before


def test_known_shapes():
    """Of FLUX.2, whose VAE packs 2 × 2: 4·C channels on a grid of H/(2·scale)."""
    pipe = tiny_family("flux2_klein")
    scale, channels = 2 * pipe.vae_scale_factor, pipe.transformer.config.in_channels
    sizes = {name: value for name, value in family_arguments("flux2_klein").items() if name not in SIZES}
    assert noise_shape(pipe, 64, 128, 3, **sizes) == (3, channels, 64 // scale, 128 // scale)
    assert noise_shape(tiny_pipeline("sd"), 64, 32) == (1, 4, 32, 16)
    side = tiny_pipeline("sd").unet.config.sample_size
    assert noise_shape(tiny_pipeline("sd")) == (1, 4, side, side)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_video_pipeline_tells_it_with_its_frames(name):
    pipe, call = tiny_video(name), VIDEO_CALLS[name]
    drawn = optimize_noise(pipe, "a", PlainSampling(), generator=generator(), **call)
    assert drawn.noise.ndim == 5 and noise_shape(pipe, **call) == drawn.noise.shape
    assert noise_shape(pipe, num_images=2, **call)[0] == 2


def test_a_modular_pipeline_tells_it_too():
    pipe, stock = StableDiffusionXLAutoBlocks().init_pipeline(), tiny_pipeline("sdxl")
    names = [each.name for each in pipe.blocks.expected_components]
    pipe.update_components(
        **{name: part for name, part in stock.components.items() if part is not None and name in names}
    )
    assert noise_shape(pipe, 64, 32, 2) == noise_shape(stock, 64, 32, 2) == (2, 4, 32, 16)


def test_wrong_pipelines_and_sizes_are_refused():
    with pytest.raises(TypeError, match="Expected a loaded diffusers pipeline"):
        noise_shape(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Expected `height` to be an integer from 1"):
        noise_shape(tiny_pipeline("sd"), height=0)
    with pytest.raises(ValueError, match="Expected `num_images_per_prompt` to be an integer from 1"):
        noise_shape(tiny_pipeline("sd"), **SIZE, num_images=0)
