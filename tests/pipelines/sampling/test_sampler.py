"""Frozen model outputs: the final latents are affine in the noise with one slope per scheduler."""

import pytest
import torch
from conformance.builders import arguments_of, tiny_pipeline_of
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    PRXPipeline,
    UniPCMultistepScheduler,
)
from problems import generator, problem_of, redness
from tiny_families import FAMILY_BUILDERS, family_arguments
from tiny_pipelines import SIZE, call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import BestOfN, optimize_noise
from noiseopt.pipelines.sampling.latent_space import first_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SLOPES = {
    "PNDM": (PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False), 13.153),
    "DDIM": (DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False), 13.153),
    "DDIM v": (
        DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        0.974,
    ),
    "DPM++2M": (DPMSolverMultistepScheduler(**BETAS), 14.649),
    "UniPC": (UniPCMultistepScheduler(**BETAS), 14.649),
    "Euler": (EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"), 14.615),
    "Heun": (HeunDiscreteScheduler(**BETAS, timestep_spacing="linspace"), 14.615),
}


def sampler_of(pipe, **arguments):
    problem = problem_of(pipe, **arguments)
    return problem.sampler, problem.noise


@pytest.mark.parametrize("name", SLOPES)
def test_frozen_gradient_of_the_final_latents_is_the_slope_of_the_scheduler(name):
    scheduler, slope = SLOPES[name]
    pipe = quiet(sd_pipeline(scheduler=scheduler))
    sampler, noise = sampler_of(pipe, num_inference_steps=50, guidance_scale=1.0, height=16, width=16)
    leaf = noise.clone().requires_grad_()
    latents = sampler.run(leaf, "frozen", False, "latent")
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((latents * weights).sum(), leaf)
    torch.testing.assert_close(gradient, slope * weights, rtol=2e-3, atol=2e-3)
    assert torch.equal(latents.detach(), sampler.run(noise, None, False, "latent"))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_slope_of_flow_matching_is_one_in_the_layout_of_the_noise(family):
    sampler, noise = sampler_of(tiny_pipeline(family), **call_arguments(family))
    leaf = noise.clone().requires_grad_()
    latents = sampler.space.unpack(sampler.twin, sampler.run(leaf, "frozen", False, "latent"))
    weights = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((latents * weights).sum(), leaf)
    torch.testing.assert_close(gradient, weights, rtol=1e-4, atol=1e-4)


def test_frozen_and_full_gradients_see_the_same_images_and_only_full_passes_the_denoiser():
    pipe = tiny_pipeline("sd")
    sampler, noise = sampler_of(pipe, **call_arguments("sd"))
    graphs = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *arguments: graphs.append(arguments[-1].requires_grad))
    full, frozen = (sampler.images(noise.clone().requires_grad_(), gradient) for gradient in ("full", "frozen"))
    handle.remove()
    assert torch.equal(full, frozen) and full.requires_grad and frozen.requires_grad
    assert graphs == [True, True, False, False]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_x0_costs_one_model_call_and_has_the_layout_of_the_noise(family):
    pipe = tiny_pipeline(family)
    sampler, noise = sampler_of(pipe, **call_arguments(family))
    denoiser, calls = getattr(pipe, "unet", None) or pipe.transformer, []
    handle = denoiser.register_forward_hook(lambda *_: calls.append(1))
    x0 = sampler.x0(noise.clone().requires_grad_(), "full")
    preview = sampler.images(noise, preview=True)
    handle.remove()
    assert x0.shape == noise.shape and x0.requires_grad
    assert preview.shape == (1, 3, SIZE["height"], SIZE["width"])
    assert len(calls) == 2 * (2 if family == "flux" else 1)  # true guidance is a second pass


def test_one_step_models_have_their_result_as_preview():
    sampler, noise = sampler_of(tiny_pipeline("sd"), num_inference_steps=1, guidance_scale=0.0, **SIZE)
    torch.testing.assert_close(sampler.images(noise, preview=True), sampler.images(noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["flux", "img2img_flux", "flux2_klein", "qwen_image"])
def test_unpacking_undoes_packing_in_half_precision(family):
    pipe = quiet(FAMILY_BUILDERS[family]()).to(torch.bfloat16)
    sampler, noise = sampler_of(pipe, num_images_per_prompt=2, **family_arguments(family))
    plain, moved = (first_of(sampler.prepare(each)).double() for each in (noise * 0, noise))
    scale = (moved - plain).norm() / noise.norm()  # below 1 where the noise is mixed with an image
    unpacked = sampler.space.unpack(sampler.twin, (moved - plain) / scale)
    torch.testing.assert_close(unpacked, noise.double(), rtol=0, atol=0.05)
    assert unpacked.shape == noise.shape


def test_a_preview_of_a_pipeline_that_reads_the_result_of_a_step_by_name():
    """PRX takes `scheduler.step(...).prev_sample`."""
    arguments = {name: value for name, value in arguments_of(PRXPipeline).items() if name != "prompt"}
    method = BestOfN(rewards=redness, steps=2, preview=True)
    found = optimize_noise(tiny_pipeline_of(PRXPipeline), "a b", method, generator=generator(), **arguments)
    assert found.losses[0].isfinite().all()
