"""DiversityBoost: the first x0 estimate against the formula restated with scipy in float64; and all families."""

import functools

import numpy as np
import pytest
import scipy.fft
import torch
from conformance.matrix import FAMILIES
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from problems import generator
from tiers import slow_except
from tiny_families import family_arguments, tiny_family
from tiny_pipelines import quiet, sd_pipeline, tiny_pipeline

from noiseopt.pipelines import DiversityBoost
from noiseopt.pipelines.seed_variance.diversity_boost import smooth_field

SHARP = {"attenuation": 0.0, "boost": 0.0, "mean": 1.0}
NEUTRAL = DiversityBoost(strength=0.0, **SHARP)
SIZE = {"height": 32, "width": 32}


def draw(pipe, tool=None, **call) -> torch.Tensor:
    run = pipe if tool is None else functools.partial(tool.generate, pipe)
    return run(prompt="a b", **{"generator": generator(), "output_type": "latent", **call}).images


def factor(seeds, height, width, strength=2.0, clamp=0.5) -> np.ndarray:
    """The factor of each image, `(B, H, W)`, from the inverse DCT of scipy."""
    found = []
    for seed in seeds:
        modes = np.zeros((height, width))
        modes[:4, :4] = torch.randn(4, 4, generator=seed).numpy()
        u, v = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        modes *= np.where((u == 0) & (v == 0), 0, np.maximum(u**2 + v**2, 1) ** -0.25)
        field = np.asarray(scipy.fft.idctn(modes, norm="ortho"))
        found.append(np.clip(1 + strength * field / field.std(ddof=1), 0.1, 1 + clamp))
    return np.stack(found)


def filtered(
    x0: np.ndarray, patch: int, attenuation: float, boost: float, mean: float, transition: float
) -> np.ndarray:
    """The filter on the full spectrum."""
    height, width = x0.shape[-2:]
    rows, columns = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    r = np.sqrt((rows / patch) ** 2 + (columns / patch) ** 2)
    high, low = 1 - attenuation, 1 + boost / 2
    s = high + (low - high) * (1 - r / (1 + r)) ** transition
    s[(r > 0) & (r < 1)] = 1
    s[0, 0] = mean
    return np.fft.ifft2(np.fft.fft2(x0) * s).real


@pytest.mark.parametrize(("height", "width", "patch"), [(16, 16, 2), (12, 20, 2), (9, 15, 4)])
def test_an_estimate_is_filtered_and_multiplied_as_the_formula_says(height, width, patch):
    x0 = torch.randn(2, 3, height, width, generator=generator())
    settings = {"attenuation": 0.8, "boost": 0.4, "mean": 0.3, "transition": 1.5}
    tool = DiversityBoost(strength=1.2, clamp=0.7, generator=[generator(1), generator(2)], **settings)
    scale = factor([generator(1), generator(2)], height, width, 1.2, 0.7)[:, None]
    expected = filtered(x0.double().numpy(), patch, **settings) * scale
    torch.testing.assert_close(tool.pushed(x0, patch).double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_defaults_are_those_of_the_node():
    assert vars(DiversityBoost()) == {
        "strength": 2.0,
        "clamp": 0.5,
        "attenuation": 1.0,
        "boost": 0.3,
        "mean": 0.0,
        "transition": 2.0,
        "generator": None,
    }


def test_the_field_has_no_mean_and_is_pink():
    fields = torch.stack([smooth_field(torch.randn(4, 4, generator=generator(seed)), 32, 32) for seed in range(400)])
    assert fields.mean((1, 2)).abs().max() < 1e-5
    modes = np.asarray(scipy.fft.dctn(fields.numpy(), axes=(1, 2), norm="ortho"))
    power = (modes**2).mean(0)
    assert power[0, 0] < 1e-8 and power[4:].max() < 1e-8 and power[:, 4:].max() < 1e-8
    assert power[0, 1] / power[0, 3] == pytest.approx(3, rel=0.4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_latents_of_a_single_step_are_the_estimate_times_the_field(family):
    """In the units of the VAE, whose latents have a mean in Flux and SD 3; Flux packs them."""
    pipe = tiny_pipeline(family)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "num_images_per_prompt": 2, **SIZE}
    tool = DiversityBoost(generator=[generator(1), generator(2)], **SHARP)
    plain, found = (draw(pipe, each, **call) for each in (None, tool))
    if family == "flux":
        plain, found = (unpacked(each) for each in (plain, found))
    shift = (pipe.vae.config.get("shift_factor") or 0.0) * pipe.vae.config.scaling_factor
    expected = (plain.double().numpy() + shift) * factor([generator(1), generator(2)], 16, 16)[:, None] - shift
    torch.testing.assert_close(found.double().numpy(), expected, rtol=2e-3, atol=2e-3 * float(plain.abs().max()))


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    """Flux's tokens of 2 × 2 as `(B, C, 16, 16)`."""
    return latents.unflatten(1, (8, 8)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def test_the_first_step_goes_on_from_the_changed_estimate_and_others_are_the_models():
    pipe = quiet(sd_pipeline(scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing")))
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tool, call = DiversityBoost(generator=generator(1)), {"num_inference_steps": 2, "guidance_scale": 1.0, **SIZE}
    try:
        draw(pipe, **call)
        draw(pipe, tool, **call)
    finally:
        handle.remove()
    noise, plain, _, boosted = (each.double() for each in seen)
    (a, b), (a_next, b_next) = (
        (bar**0.5, (1 - bar) ** 0.5) for bar in pipe.scheduler.alphas_cumprod[[999, 499]].double()
    )
    x0 = (plain - b_next / b * noise) / (a_next - b_next * a / b)  # of x' = a'·x0 + b'·(x − a·x0)/b
    new = torch.from_numpy(filtered(x0.numpy(), 2, 1.0, 0.3, 0.0, 2.0) * factor([generator(1)], 16, 16)[:, None])
    torch.testing.assert_close(boosted, a_next * new + b_next * (noise - a * new) / b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", slow_except(FAMILIES, "sdxl", "flux", "z_image"))
def test_every_family_is_changed_reproducibly_and_stays_as_it_was(family):
    pipe, call = tiny_family(family), {**family_arguments(family), "output_type": "pt"}
    plain, before = draw(pipe, **call), set(vars(pipe))
    tool = DiversityBoost if call.get("num_inference_steps", 2) > 1 else functools.partial(DiversityBoost, **SHARP)
    boosted = draw(pipe, tool(generator=generator(1)), **call)
    assert boosted.isfinite().all() and (boosted - plain).abs().max() > 1e-3
    assert boosted.equal(draw(pipe, tool(generator=generator(1)), **call))
    torch.testing.assert_close(draw(pipe, NEUTRAL, **call), plain, rtol=2e-2, atol=2e-3)
    assert draw(pipe, **call).equal(plain) and set(vars(pipe)) == before


def test_a_solver_that_remembers_outputs_gets_the_changed_one():
    pipe = quiet(sd_pipeline(scheduler=DPMSolverMultistepScheduler()))
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, **SIZE}
    assert (draw(pipe, DiversityBoost(generator=generator()), **call) - draw(pipe, **call)).abs().max() > 1e-2
    torch.testing.assert_close(draw(pipe, NEUTRAL, **call), draw(pipe, **call), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "Expected `strength` to be a number in"),
        ({"clamp": 0.0}, "Expected `clamp` to be a number in"),
        ({"attenuation": 1.1}, "Expected `attenuation` to be a number in"),
        ({"generator": [generator()] * 3}, "one for each image, but got 3 for 1 images"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline("sd"), DiversityBoost(**settings), num_inference_steps=2, **SIZE)


def test_a_blurred_single_step_and_a_scheduler_without_an_estimate_are_refused_before_a_model_runs():
    calls, pipe = [], tiny_pipeline("sd")
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError, match=r"at least 2 denoising steps .* Pass `attenuation=0\.0`"):
        draw(pipe, DiversityBoost(), num_inference_steps=1, **SIZE)
    handle.remove()
    with pytest.raises(TypeError, match="DDIMInverseScheduler, which runs from an image"):
        draw(quiet(sd_pipeline(scheduler=DDIMInverseScheduler())), DiversityBoost(), **SIZE)
    assert not calls
