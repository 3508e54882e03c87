"""Reward guidance: against guided steps in closed form, and on stock pipelines that it must leave as they are."""

import functools
import itertools

import pytest
import torch
from diffusers import AmusedScheduler, DDIMScheduler, EulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import FrozenDict
from problems import generator, problem_of, redness
from tiers import slow_except
from tiny_families import FAMILY_BUILDERS, family_arguments, tiny_family
from tiny_pipelines import call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import RewardGuidance, optimize_noise
from noiseopt.pipelines.problem import CandidateNoise
from noiseopt.rewards import NonDifferentiableReward

STEPS = 4
MIXING = torch.randn(4, 4, generator=generator(5), dtype=torch.float64) / 4
TARGET = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64).view(3, 1, 1)
BRIGHT = 0.01  # of the decoder, small enough that no pixel is clamped


class LinearDenoiser(torch.nn.Module):
    """m = A·x, over the channels; it notes whether its calls had a graph."""

    config = FrozenDict(in_channels=4, sample_size=16, time_cond_proj_dim=None)
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.recorded = []

    def forward(self, sample, *_, **__):
        self.recorded.append(torch.is_grad_enabled())
        return (torch.einsum("ij,bjhw->bihw", MIXING.to(sample), sample),)


class LinearDecoder(torch.nn.Module):
    """Pixels in [-1, 1] are the first three channels, times `BRIGHT`."""

    config = FrozenDict(scaling_factor=1.0, block_out_channels=(8,), latent_channels=4, force_upcast=False)
    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents, *_, **__):
        return (latents[:, :3] * BRIGHT,)


def nearness(images, prompts):
    """A quadratic reward."""
    return -(images - TARGET.to(images)).square().sum((1, 2, 3))


def linear_pipeline(scheduler):
    pipe = quiet(sd_pipeline(scheduler=scheduler))
    pipe.unet, pipe.vae = LinearDenoiser(), LinearDecoder()
    pipe.vae_scale_factor = 1
    pipe.image_processor.config.vae_scale_factor = 1
    return pipe


def expected_latents(scheduler, prediction, noise, strength, gradient, guided_steps):
    """The guided chain in float64: x' = a'·x0 + b'·ε, with the derivatives of x0 and of the reward written out."""
    scheduler.set_timesteps(STEPS)
    bars = [float(scheduler.alphas_cumprod[timestep]) for timestep in scheduler.timesteps]
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    levels = [(bar**0.5, (1 - bar) ** 0.5) for bar in [*bars, final]]
    eye, x = torch.eye(4, dtype=torch.float64), noise.double()

    def over_channels(matrix, x):
        return torch.einsum("ij,bjhw->bihw", matrix, x)

    for call, ((a, b), (a_next, b_next)) in enumerate(itertools.pairwise(levels)):
        skip, out = {"epsilon": (1 / a, -b / a), "v_prediction": (a, -b)}[prediction]
        m = over_channels(MIXING, x)
        if call < guided_steps:
            x0 = skip * x + out * m
            pixels = x0[:, :3] * BRIGHT / 2 + 0.5
            g = torch.zeros_like(x0)
            g[:, :3] = -2 * (pixels - TARGET) * BRIGHT / 2
            if gradient == "full":
                g = over_channels((skip * eye + out * MIXING).T, g)
            g, size = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1), m.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            m = m - strength * size * g
        x0 = skip * x + out * m
        x = a_next * x0 + b_next * (x - a * x0) / b
    return x


@pytest.mark.parametrize("guided_steps", [1, 3])
@pytest.mark.parametrize("gradient", ["full", "frozen"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_linear_denoiser_and_a_quadratic_reward(prediction, gradient, guided_steps):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="leading", steps_offset=1)
    noise = torch.randn(2, 4, 16, 16, generator=generator())
    pipe = linear_pipeline(scheduler)
    guidance = RewardGuidance(rewards=nearness, strength=0.3, gradient=gradient, guided_steps=guided_steps)
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    found = guidance.generate(pipe, ["a", "b"], latents=noise, **call).images
    expected = expected_latents(scheduler, prediction, noise, 0.3, gradient, guided_steps)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    plain = expected_latents(scheduler, prediction, noise, 0.0, gradient, guided_steps)
    assert (found - plain).abs().max() > 0.005
    full = [gradient == "full"] * guided_steps
    assert pipe.unet.recorded == [*full, *[False] * (STEPS - guided_steps)]


@pytest.mark.parametrize(("spacing", "guided"), [("leading", 2), ("trailing", 3)])
def test_the_tail_begins_where_little_noise_is_left(spacing, guided):
    """Leading spacing ends in a step from timestep 1, whose ᾱ is 0.9998; trailing in one from 249, whose ᾱ is 0.53."""
    pipe = linear_pipeline(DDIMScheduler(clip_sample=False, timestep_spacing=spacing, steps_offset=1))
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 16, "width": 16}
    RewardGuidance(rewards=nearness, gradient="full").generate(pipe, "a", generator=generator(), **call)
    assert pipe.unet.recorded == [*[True] * guided, *[False] * (STEPS - guided)]


def gaussian(pipe):
    """The exact denoiser of data N(0, s²): ε = b·x / (a²·s² + b²), at the level of the timestep."""
    bars, s = pipe.scheduler.alphas_cumprod, 0.5

    def forward(sample, timestep, *_, **__):
        a2 = bars[int(timestep)]
        return ((1 - a2) ** 0.5 * sample / (a2 * s**2 + 1 - a2),)

    pipe.unet.forward = forward
    return pipe


def test_gaussian_data_move_to_the_reward_by_the_length_of_the_paper():
    """For a linear reward the direction is constant: each step adds (a'·b/a − b')·strength·‖ε‖ along it."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading", steps_offset=1)
    pipe, noise = gaussian(linear_pipeline(scheduler)), torch.randn(1, 4, 16, 16, generator=generator())
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    guidance = RewardGuidance(rewards=lambda images, _: images[:, 0].sum((1, 2)), strength=0.2, gradient="frozen")
    moved = guidance.generate(pipe, "a", latents=noise, **call).images
    plain = pipe("a", latents=noise, **call).images
    first, second = (float(scheduler.alphas_cumprod[timestep]) for timestep in scheduler.timesteps)
    last = float(scheduler.final_alpha_cumprod)
    (a, b), (a1, b1), (a2, b2) = ((bar**0.5, (1 - bar) ** 0.5) for bar in (first, second, last))
    epsilon = b * noise.norm() / (a**2 / 4 + b**2)
    added = (a1 * b / a - b1) * 0.2 * epsilon / 16  # along 256 equal entries of the first channel
    slope = a2 / a1 + (b2 - a2 * b1 / a1) * b1 / (a1**2 / 4 + b1**2)  # of the second step, which is linear
    expected = torch.zeros_like(noise)
    expected[:, 0] = added * slope
    torch.testing.assert_close(moved - plain, expected, rtol=1e-3, atol=1e-4)


THREE = ("lightning_sdxl", "sd3", "flux")


def images_of(run, family):
    return run(prompt=["a b", "c"], generator=[generator(0), generator(1)], **steps_of(family, 3)).images


def steps_of(family, steps):
    """The arguments of a call of a family with another number of steps; the call of one is made for two."""
    steps = 2 if family == "sana_sprint" else steps
    return {**family_arguments(family), "num_inference_steps": steps, "output_type": "pt"}


@pytest.mark.parametrize("family", slow_except(FAMILY_BUILDERS, *THREE))
def test_without_strength_the_images_are_those_of_the_pipeline(family):
    pipe = tiny_family(family)
    if "image" in family_arguments(family):
        pytest.skip("takes an image, which the next test has")
    guidance = RewardGuidance(rewards=redness, strength=0.0)
    assert images_of(functools.partial(guidance.generate, pipe), family).equal(images_of(pipe, family))


@pytest.mark.parametrize("gradient", ["full", "frozen"])
@pytest.mark.parametrize("family", slow_except(FAMILY_BUILDERS, *THREE))
def test_every_family_is_steered_image_by_image(family, gradient):
    pipe, one = tiny_family(family), steps_of(family, 4)
    guidance = RewardGuidance(rewards=redness, strength=0.05, gradient=gradient)
    plain = pipe(prompt="a b", generator=generator(), **one).images
    moved = guidance.generate(pipe, "a b", generator=generator(), **one).images
    assert redness(moved, None) > redness(plain, None)
    assert not vars(pipe).keys() & {"encode_prompt", "prepare_latents"} and "step" not in vars(pipe.scheduler)
    assert pipe(prompt="a b", generator=generator(), **one).images.equal(plain)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_images_of_several_prompts_are_those_of_single_calls(family):
    pipe, prompts = tiny_pipeline(family), ["a b", "c"]
    noise = problem_of(pipe, prompts, **call_arguments(family)).sampler
    latents = noise.to_latents(noise.base_noise)
    call = {**call_arguments(family), "num_inference_steps": 3, "output_type": "pt"}

    def asked(images, prompts):
        return torch.stack([image[len(prompt) % 3].mean() for image, prompt in zip(images, prompts, strict=True)])

    guidance = RewardGuidance(rewards=asked, strength=0.2, gradient="full")
    together = guidance.generate(pipe, prompts, latents=latents, **call).images
    single = {**call, "negative_prompt": "b"} if family == "flux" else call
    for row, prompt in enumerate(prompts):
        alone = guidance.generate(pipe, prompt, latents=latents[row : row + 1], **single).images
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-3)
    swapped = guidance.generate(pipe, prompts, latents=latents, reward_prompt=prompts[::-1], **call).images
    assert (swapped - together).abs().max() > 0.01


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_particle_with_the_best_preview_is_taken_for_each_image(family):
    pipe, call = tiny_pipeline(family), {**call_arguments(family), "num_inference_steps": 2}
    problem = problem_of(pipe, ["a b", "c"], **call)
    candidates = CandidateNoise(problem)
    noises = torch.stack([problem.noise, *[candidates.draw() for _ in range(5)]])
    scores = torch.stack([redness(problem.sampler.images(noise, preview=True), None) for noise in noises])
    best = scores.argmax(0)
    assert best.any()
    latents = problem.sampler.to_latents(noises[best, [0, 1]])
    guidance = RewardGuidance(rewards=redness, strength=0.0, particles=6)
    found = guidance.generate(pipe, ["a b", "c"], generator=generator(), output_type="pt", **call).images
    expected = pipe(["a b", "c"], latents=latents, output_type="pt", **call).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_exception_in_the_middle_leaves_everything_as_it_was():
    pipe, call = tiny_pipeline("sd"), {**call_arguments("sd"), "num_inference_steps": 4, "output_type": "pt"}
    plain = pipe("a", generator=generator(), **call).images
    before = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    attributes, scheduler, seen = set(vars(pipe)), set(vars(pipe.scheduler)), []

    class Stop(Exception):
        pass

    def failing(images, prompts):
        seen.append(1)
        if len(seen) > 3:
            raise Stop
        return redness(images, prompts)

    with pytest.raises(Stop):
        RewardGuidance(rewards=failing, gradient="full").generate(pipe, "a", generator=generator(), **call)
    assert torch.is_grad_enabled()
    assert (set(vars(pipe)), set(vars(pipe.scheduler))) == (attributes, scheduler)
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == before
    assert pipe("a", generator=generator(), **call).images.equal(plain)


def as_arrays(pipe, step, timestep, tensors):
    assert tensors["latents"].numpy().any()
    return tensors


def in_place(pipe, step, timestep, tensors):
    tensors["latents"].mul_(1.0)
    return {}


def without_graph(pipe, step, timestep, tensors):
    with torch.inference_mode():
        return {"latents": tensors["latents"].clone()}


class OfDiffusers(PipelineCallback):
    @property
    def tensor_inputs(self) -> list[str]:
        return ["prompt_embeds", "latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert not torch.is_grad_enabled()
        return {"latents": callback_kwargs["latents"] + 0 * callback_kwargs["prompt_embeds"].sum()}


@pytest.mark.parametrize("callback", [as_arrays, in_place, without_graph, OfDiffusers(cutoff_step_ratio=1.0)])
def test_callbacks_that_change_nothing_change_nothing(callback):
    pipe, call = tiny_pipeline("sd"), {**call_arguments("sd"), "num_inference_steps": 4, "output_type": "pt"}
    guidance = RewardGuidance(rewards=redness, gradient="full")
    expected = guidance.generate(pipe, "a", generator=generator(), **call).images
    found = guidance.generate(pipe, "a", generator=generator(), callback_on_step_end=callback, **call).images
    assert found.equal(expected)


def test_callbacks_of_the_older_kind_see_no_graph():
    pipe, call, seen = tiny_family("pixart_sigma"), steps_of("pixart_sigma", 4), []

    def keep(step, timestep, latents):
        seen.append(latents.numpy())

    guidance = RewardGuidance(rewards=redness, gradient="full")
    guidance.generate(pipe, "a", generator=generator(), callback=keep, callback_steps=1, **call)
    assert len(seen) == 4


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_an_interrupted_call_returns_images_without_a_graph(returned, output_type):
    pipe, call = tiny_pipeline("sd"), {**call_arguments("sd"), "num_inference_steps": 4, "output_type": output_type}

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors if returned else {}

    guidance = RewardGuidance(rewards=redness, gradient="full")
    images = guidance.generate(pipe, "a", generator=generator(), callback_on_step_end=interrupt, **call).images
    assert not torch.as_tensor(images).requires_grad


def test_schedulers_that_add_noise_see_the_same_noise():
    pipe, call = tiny_pipeline("sdxl"), {**call_arguments("sdxl"), "num_inference_steps": 4, "output_type": "pt"}
    guidance = RewardGuidance(rewards=redness, strength=1e-4)
    plain = pipe("a", generator=generator(), **call).images
    moved = guidance.generate(pipe, "a", generator=generator(), **call).images
    assert 0 < (moved - plain).abs().max() < 0.01


def never(*_, **__):
    raise AssertionError("a model runs")


def black_box(images, prompts):
    return redness(images, prompts)


vars(black_box)["differentiable"] = False
UNSUITED = {
    "one step": ({"rewards": redness}, {"num_inference_steps": 1}, ValueError, "at least 2 denoising steps"),
    "no gradient": ({"rewards": black_box}, {}, NonDifferentiableReward, "black_box"),
    "cut graph": ({"rewards": lambda i, p: i.detach().mean((1, 2, 3))}, {}, ValueError, "gradient"),
    "strength": ({"rewards": redness, "strength": -1.0}, {}, ValueError, "`strength`"),
    "mode": ({"rewards": redness, "gradient": "ful"}, {}, ValueError, "`gradient`"),
    "steps": ({"rewards": redness, "guided_steps": 0}, {}, ValueError, "`guided_steps`"),
    "reward": ({"rewards": "clipscor"}, {}, ValueError, "clipscore"),
    "argument": ({"rewards": redness}, {"strength": 2.0}, TypeError, r"RewardGuidance\(strength=...\)`.$"),
}


@pytest.mark.parametrize("case", UNSUITED)
def test_what_cannot_work_is_refused_before_a_model_runs(case, monkeypatch):
    settings, changes, error, message = UNSUITED[case]
    pipe = tiny_pipeline("sd")
    monkeypatch.setattr(type(pipe), "encode_prompt", never)
    with pytest.raises(error, match=message):
        RewardGuidance(**settings).generate(pipe, "a", **{**call_arguments("sd"), **changes})


def test_optimize_noise_names_the_call_of_guidance():
    with pytest.raises(TypeError, match=r"call its `generate\(pipe, prompt, ...\)`"):
        optimize_noise(tiny_pipeline("sd"), "a", RewardGuidance(rewards=redness), **call_arguments("sd"))


@pytest.mark.parametrize("kind", ["scheduler", "step"])
def test_a_scheduler_that_cannot_be_steered_is_refused(kind, monkeypatch):
    pipe = quiet(sd_pipeline(scheduler=EulerDiscreteScheduler()))
    if kind == "scheduler":
        pipe.scheduler = AmusedScheduler(mask_token_id=0)
    else:
        pipe.scheduler.step = never
    monkeypatch.setattr(type(pipe), "encode_prompt", never)
    with pytest.raises((TypeError, ValueError), match="AmusedScheduler" if kind == "scheduler" else "replaced"):
        RewardGuidance(rewards=redness).generate(pipe, "a", **call_arguments("sd"))


def test_a_single_step_of_image_to_image_is_refused_with_its_strength():
    with pytest.raises(ValueError, match="image-to-image also a larger `strength`"):
        guidance = RewardGuidance(rewards=redness)
        guidance.generate(tiny_family("img2img_sdxl"), "a", **{**steps_of("img2img_sdxl", 3), "strength": 0.4})


def test_a_single_step_of_given_sigmas_is_refused():
    call = {**call_arguments("flux"), "num_inference_steps": None, "sigmas": [1.0]}
    with pytest.raises(ValueError, match="at least 2 denoising steps"):
        RewardGuidance(rewards=redness).generate(tiny_pipeline("flux"), "a", **call)


def test_a_gradient_that_is_not_finite_is_refused():
    seen = []

    def broken(images, prompts):
        seen.append(1)
        return redness(images, prompts) * (1.0 if len(seen) < 4 else float("nan"))

    with pytest.raises(ValueError, match=r"finite|NaN"):
        call = {**call_arguments("sd"), "num_inference_steps": 4}
        RewardGuidance(rewards=broken).generate(tiny_pipeline("sd"), "a", **call)
