"""Dtypes, decoders, memory formats, slices, tiles and compiled blocks, as in the stock call."""

import copy
import functools

import pytest
import torch
from compositions import capture, check_composition, draw, state_of
from diffusers import AutoencoderTiny
from problems import generator, redness
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, sdxl_pipeline

from noiseopt import ReNO, optimize_noise
from noiseopt.pipelines.sampling.first_call import stock_call

CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_bfloat16(family):
    pipe = quiet(BUILDERS[family]()).to(torch.bfloat16)
    # the stock call also encodes its prompt with a graph, which rounds differently
    result = check_composition(pipe, rtol=3e-2, **call_arguments(family))
    assert result.noise.dtype == torch.float32 and result.latents.dtype == torch.bfloat16


def test_float16_with_an_upcasting_vae_has_the_gradient_of_a_decoder_in_float32():
    pipe = quiet(sdxl_pipeline(force_upcast=True)).to(torch.float16)
    pipe.vae.decode = functools.partial(pipe.vae.decode)  # bound to the VAE, like a compiled one
    vars(pipe.vae.decode)["_torchdynamo_orig_callable"] = type(pipe.vae).decode
    arguments = call_arguments("sdxl")
    found = check_composition(pipe, oracle=None, **arguments)
    assert pipe.vae.dtype == torch.float16
    assert found.noise.dtype == torch.float32 and found.latents.dtype == torch.float16
    sampler, noise, result = capture(pipe, **arguments)
    leaf = noise.clone().requires_grad_()
    images = sampler.images(leaf, "full")
    weights = torch.randn(images.shape, generator=generator(2))
    (found,) = torch.autograd.grad((images * weights).sum(), leaf)
    vae = copy.deepcopy(pipe.vae).float()
    latents = result.latents.clone().requires_grad_()
    arguments |= {"latents": latents, "generator": result.generator(), "output_type": "latent"}
    with torch.enable_grad():
        last = stock_call(type(pipe))(pipe, "a b", **arguments).images
        decoded = vae.decode(last.float() / vae.config.scaling_factor).sample
        naive = (decoded / 2 + 0.5).clamp(0, 1)
        (expected,) = torch.autograd.grad((naive * weights).sum(), latents)
    assert torch.equal(images, naive)
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_float16_with_a_pipeline_that_does_not_upcast():
    check_composition(quiet(sd_pipeline()).to(torch.float16), rtol=1e-2, **call_arguments("sd"))


def tiny_decoder(**changes) -> AutoencoderTiny:
    """Return a decoder with the architecture of TAESD and few channels."""
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**channels, **blocks, **changes)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_tiny_autoencoder_in_the_place_of_the_vae(family):
    pipe, arguments = BUILDERS[family](), call_arguments(family)
    full = draw(quiet(pipe), **arguments)
    torch.manual_seed(1)
    pipe.vae = tiny_decoder()
    assert not torch.equal(draw(quiet(pipe), **arguments), full)
    check_composition(pipe, **arguments)


def sliced(pipe):
    pipe.vae.enable_slicing()


def tiled(pipe):
    pipe.vae.enable_tiling()


def channels_last(pipe):
    pipe.unet.to(memory_format=CHANNELS_LAST)
    pipe.vae.to(memory_format=CHANNELS_LAST)


SETTINGS = {
    "VAE slicing": sliced,
    "VAE tiling": tiled,
    "channels_last": channels_last,
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_modules_are_those_of_the_stock_call(setting):
    pipe = quiet(sd_pipeline())
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 2}
    arguments |= {"height": 40, "width": 48}  # more than one tile
    without = draw(pipe, **arguments)
    SETTINGS[setting](pipe)
    if setting not in ("VAE slicing", "fused projections"):  # which change values by rounding only
        assert not torch.equal(draw(pipe, **arguments), without)
    check_composition(pipe, **arguments)
    if setting == "channels_last":
        assert pipe.unet.conv_in.weight.is_contiguous(memory_format=CHANNELS_LAST)
        assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.slow
def test_compiled_blocks_are_run_and_stay_compiled():
    pipe, arguments = quiet(sd_pipeline()), {"num_inference_steps": 1, "guidance_scale": 1.0, **SIZE}
    method = ReNO(rewards=redness, steps=2)
    plain = optimize_noise(pipe, "a b", method, generator=generator(), **arguments)
    pipe.unet.compile_repeated_blocks(backend="aot_eager")
    compiled = {block: block._compiled_call_impl for block in pipe.unet.modules() if block._compiled_call_impl}
    state = state_of(pipe)
    result = optimize_noise(pipe, "a b", method, generator=generator(), **arguments)
    assert torch.equal(result.initial_images, draw(pipe, **arguments))
    torch.testing.assert_close(result.noise, plain.noise, rtol=0, atol=1e-4)
    assert compiled and state_of(pipe) == state
    assert all(block._compiled_call_impl is call for block, call in compiled.items())
