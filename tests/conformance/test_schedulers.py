"""Schedulers with every gradient mode, refusals by name, and the README's tables."""

import copy
import dataclasses
from collections import Counter

import diffusers
import pytest
import torch
from conformance.checks import Call, check_cell
from conformance.matrix import COLUMNS, FAMILIES, GRADIENTS, REFUSED, SCHEDULERS, in_fast_tier, scheduler_in_fast_tier
from conformance.table import README, between_markers, tables
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from problems import generator, redness
from tiny_families import FAMILY_BUILDERS, family_arguments, random_image, tiny_family
from tiny_pipelines import SIZE, quiet, tiny_pipeline

from noiseopt import BestOfN, NoiseOptimizationMixin, ReNO, list_methods, optimize_noise

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLEAN = {"clip_sample": False}  # as in the configs of SD and SDXL
SETTINGS = {"ddim": CLEAN, "ddpm": CLEAN, "pndm": {"skip_prk_steps": True}, "video": {**CLEAN, "snr_shift_scale": 1.0}}
COLUMN_OF = {"full": "reno-full", "frozen": "reno-frozen", "x0": "cno-frozen", "none": "best_of_n-none"}
REFUSALS = {
    "flow_euler_stochastic": "StableDiffusion3Pipeline with FlowMatchEulerDiscreteScheduler draws",
    "zero_snr": 'zero terminal SNR.*DDIMScheduler.*gradient="full"',
}


def scheduler_call(name: str, count: int = 1) -> Call:
    """Return a call with two steps of a scheduler, of SD 3 for flow matching and of SDXL otherwise."""
    row, flow = SCHEDULERS[name], name.startswith("flow")
    stock = tiny_pipeline("sd3" if flow else "sdxl")
    settings = {} if flow else {**SD_BETAS, **SETTINGS.get(name, {})}
    scheduler = getattr(diffusers, row.name)(**settings, **row.settings)
    others = {} if flow else {"add_watermarker": False}
    pipe = quiet(type(stock)(**{**stock.components, "scheduler": scheduler}, **others))
    return Call(pipe, {"num_inference_steps": 2, "guidance_scale": 0.0, "num_images_per_prompt": count, **SIZE})


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        pytest.param(name, gradient, marks=[] if scheduler_in_fast_tier(name, gradient) else pytest.mark.slow)
        for name in SCHEDULERS
        for gradient in GRADIENTS
    ],
)
def test_scheduler(name, gradient):
    column = COLUMNS[COLUMN_OF[gradient]]
    call = scheduler_call(name, 2 if gradient == "x0" else 1)
    if (name, gradient) not in REFUSED:
        check_cell(call, column)
        return
    with pytest.raises((TypeError, ValueError), match=REFUSALS[name]):
        check_cell(call, column)


def test_zero_terminal_snr_goes_with_the_gradient_through_the_denoiser():
    check_cell(scheduler_call("zero_snr", 2), COLUMNS["cno-full"])


def test_fast_tier_has_three_columns_of_each_family_and_three_families_of_each_column():
    cells = [(family, column) for family in FAMILIES for column in COLUMNS if in_fast_tier(family, column)]
    assert set(Counter(family for family, _ in cells)) == set(FAMILIES)
    assert min(Counter(family for family, _ in cells).values()) >= 3
    assert min(Counter(column for _, column in cells).values()) >= 3
    assert {column for _, column in cells} == COLUMNS.keys()


def test_every_method_and_every_tiny_family_has_its_cells():
    assert {column.method for column in COLUMNS.values()} == set(list_methods())
    assert FAMILIES.keys() == FAMILY_BUILDERS.keys()
    assert {name for name, _ in REFUSED} == REFUSALS.keys()


class OwnLatents(StableDiffusionPipeline):
    def prepare_latents(self, batch_size, *args, **kwargs):
        return torch.randn(batch_size, 4, 16, 16)


class ScaledLatents(StableDiffusionPipeline):
    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs) * 0.9


class UnseededNoise(DDIMScheduler):
    def step(self, *args, **kwargs):
        (sample,) = super().step(*args, **kwargs)[:1]
        return (sample + torch.randn(sample.shape),)


def sd_as(cls, **components):
    stock = tiny_pipeline("sd")
    return quiet(cls(**{**stock.components, **components}, requires_safety_checker=False))


@pytest.mark.parametrize("cls", [OwnLatents, ScaledLatents])
def test_latents_that_a_subclass_prepares_otherwise_are_refused_before_any_model_runs(cls):
    pipe = sd_as(cls)
    pipe.text_encoder = None  # encoding the prompt would fail
    with pytest.raises(TypeError, match=f"`prepare_latents`.*{cls.__name__}"):
        optimize_noise(pipe, "a", ReNO(rewards=redness), **SIZE)


def test_a_sampler_that_draws_from_no_generator_is_refused():
    pipe = sd_as(StableDiffusionPipeline, scheduler=UnseededNoise(**SD_BETAS, **CLEAN, steps_offset=1))
    with pytest.raises(ValueError, match="StableDiffusionPipeline with UnseededNoise draws from.*noise_sampler_seed"):
        optimize_noise(pipe, "a", BestOfN(rewards=redness), num_inference_steps=2, **SIZE)


IMAGE: dict = {"image": random_image(5), "num_inference_steps": 2, "strength": 0.5}


def test_a_pipeline_that_takes_no_latents_is_refused_and_works_as_a_class():
    pipe = sd_as(StableDiffusionImg2ImgPipeline)
    with pytest.raises(TypeError, match="StableDiffusionImg2ImgPipeline takes none.*NoiseOptimizationMixin"):
        optimize_noise(pipe, "a", ReNO(rewards=redness), **IMAGE)
    cls = type("Ours", (NoiseOptimizationMixin, StableDiffusionImg2ImgPipeline), {})
    arguments = {**IMAGE, "method": ReNO(rewards=redness, steps=3), "output_type": "pt"}
    output = sd_as(cls)("a", generator=generator(), **arguments)
    assert torch.equal(output.images, output.noise_result.images)
    assert torch.equal(
        pipe("a", generator=generator(), **IMAGE, output_type="pt").images, output.noise_result.initial_images
    )
    assert output.noise_result.best_loss < output.noise_result.losses[0]


def test_what_takes_the_place_of_the_noise_is_refused_by_name():
    pipe, arguments = tiny_family("img2img_sdxl"), family_arguments("img2img_sdxl")
    reno = ReNO(rewards=redness)
    with pytest.raises(ValueError, match="no `latents`, since in StableDiffusionXLImg2ImgPipeline.*Leave them out"):
        optimize_noise(pipe, "a", reno, latents=torch.zeros(1, 4, 16, 16), **arguments)
    with pytest.raises(ValueError, match="goes from noise to image, but `denoising_start` leaves out"):
        optimize_noise(pipe, "a", reno, denoising_start=0.5, **arguments)


def test_images_to_begin_with_are_drawn_together():
    pipe, arguments = tiny_family("img2img_sdxl"), family_arguments("img2img_sdxl")
    method = ReNO(rewards=redness, steps=2, chunk_size=1)
    with pytest.raises(ValueError, match="chunk_size=None"):
        optimize_noise(pipe, "a", method, num_images_per_prompt=2, **arguments)
    joint = dataclasses.replace(method, chunk_size="auto")
    assert len(optimize_noise(pipe, "a", joint, num_images_per_prompt=2, **arguments).noise) == 2


def test_half_precision_image_to_image_with_an_upcasting_vae_leaves_the_vae_alone():
    stock = tiny_family("img2img_sdxl")
    components = {
        name: copy.deepcopy(part).half() if isinstance(part, torch.nn.Module) else part
        for name, part in stock.components.items()
    }
    components["vae"].register_to_config(force_upcast=True)
    pipe = quiet(type(stock)(**components, add_watermarker=False))
    arguments = {**family_arguments("img2img_sdxl"), "num_inference_steps": 2, "guidance_scale": 0.0}
    result = optimize_noise(pipe, "a", ReNO(rewards=redness, steps=2), generator=generator(), **arguments)
    plain = pipe("a", output_type="pt", generator=generator(), **arguments).images
    torch.testing.assert_close(result.initial_images, plain.float(), rtol=0, atol=4e-3)
    assert result.best_loss < result.losses[0] and pipe.vae.dtype == torch.float16


def test_the_readme_has_the_tables():
    assert between_markers(README.read_text(encoding="utf-8")) == tables(), (
        "The tables of README.md are not those of tests/conformance/matrix.py: run `python tests/conformance/table.py`."
    )
