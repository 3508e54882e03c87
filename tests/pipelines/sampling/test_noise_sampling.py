"""Noise samplers in pipelines of every family, with and without a method, and switched off."""

import json

import pytest
import torch
from diffusers import LCMScheduler
from problems import generator, redness
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import (
    CNO,
    BestOfN,
    NoiseDiffusion,
    NoiseOptimizationMixin,
    NoiseResult,
    PinkNoise,
    ReNO,
    optimize_noise,
)
from noiseopt.pipelines import CNOStableDiffusionPipeline, NoiseDiffusionStableDiffusionPipeline
from noiseopt.pipelines import ReNOStableDiffusionPipeline as Pipeline
from noiseopt.schedulers import CoupledNoise, as_noise_sampler

FAMILIES = list(BUILDERS)
SPECS = ["pink", {"name": "pink", "alpha": 0.4, "reference_size": 64}, PinkNoise(-0.3)]


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def with_hook(family: str):
    """Return a pipeline of a family with the mixin, sharing the modules of the stock one."""
    cls = type("Hooked", (NoiseOptimizationMixin, type(tiny_pipeline(family))), {})
    pipe = cls(**tiny_pipeline(family).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a b", **kwargs) -> torch.Tensor:
    return pipe(prompt, output_type="pt", **kwargs).images


def base_noise(family: str, noise_sampler, count: int = 1, **kwargs) -> NoiseResult:
    """Run a method that evaluates the base noise only."""
    arguments = {**call_arguments(family), "num_images_per_prompt": count, **kwargs}
    method = BestOfN(rewards=redness, steps=1)
    return optimize_noise(tiny_pipeline(family), "a b", method, noise_sampler=noise_sampler, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [None, "white"])
def test_white_and_none_are_bit_identical_to_the_stock_pipeline(family, spec):
    arguments = call_arguments(family)
    stock = draw(tiny_pipeline(family), generator=generator(3), **arguments)
    assert torch.equal(draw(with_hook(family), noise_sampler=spec, generator=generator(3), **arguments), stock)
    result = base_noise(family, spec, generator=generator(3))
    assert torch.equal(result.images, stock)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_pipeline_draws_the_noise_of_the_sampler(family, spec):
    """The sampler colors the pipeline's own white noise, and the rest of the call is the stock pipeline's."""
    sampler, arguments = as_noise_sampler(spec), call_arguments(family)
    result = base_noise(family, spec, generator=generator(3))
    plain = base_noise(family, None, generator=generator(3))
    torch.testing.assert_close(result.noise, sampler.color(plain.noise), rtol=0, atol=1e-6)  # pyright: ignore[reportFunctionMemberAccess]
    stock = draw(tiny_pipeline(family), latents=result.latents, generator=result.generator(), **arguments)
    alone = draw(with_hook(family), noise_sampler=spec, generator=generator(3), **arguments)
    assert torch.equal(alone, stock) and torch.equal(result.initial_images, stock)
    assert not torch.equal(plain.images, stock)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_sampler_in_a_plain_script_draws_the_latents_that_a_pipeline_draws(family):
    latents = PinkNoise(0.2)((1, 4, 16, 16), generator(3))
    arguments = call_arguments(family)
    assert torch.equal(base_noise(family, "pink", generator=generator(3)).latents, latents)
    if family != "sdxl":  # whose sampler adds noise at each step
        alone = draw(with_hook(family), noise_sampler="pink", generator=generator(3), **arguments)
        assert torch.equal(draw(tiny_pipeline(family), latents=latents, **arguments), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_generators_make_images_independent_of_the_batch(family):
    pair = base_noise(family, "pink", 2, generator=generators(4, 5))
    for index, seed in enumerate((4, 5)):
        alone = base_noise(family, "pink", generator=generators(seed))
        torch.testing.assert_close(pair.noise[index], alone.noise[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_are_not_square(family):
    side = {"height": 48, "width": 24} if family != "flux" else {"height": 48, "width": 32}
    result = base_noise(family, "pink", generator=generator(), **side)
    assert result.noise.shape[-2:] == (side["height"] // 2, side["width"] // 2)
    torch.testing.assert_close(result.noise.var((-2, -1)), torch.ones(result.noise.shape[:2]))


def test_odd_sizes():
    """Latents of 15×13 for an autoencoder of factor 2."""
    result = base_noise("sd3", "pink", generator=generator(), height=30, width=26)
    assert result.noise.shape == (1, 4, 15, 13)
    torch.testing.assert_close(result.noise.var((-2, -1)), torch.ones(1, 4))


def test_half_precision_draws_the_stream_of_the_pipeline():
    pipe = quiet(sd_pipeline()).to(torch.bfloat16)
    method = BestOfN(rewards=redness, steps=1)
    arguments = {**call_arguments("sd"), "generator": generator(2)}
    result = optimize_noise(pipe, "a b", method, noise_sampler="pink", **arguments)
    expected = PinkNoise(0.2)((1, 4, 16, 16), generator(2), dtype=torch.bfloat16)
    assert torch.equal(result.noise, expected.float()) and result.latents.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimizer_starts_from_the_sampler_and_a_redraw_is_its_best(family):
    arguments = call_arguments(family)
    result = optimize_noise(
        tiny_pipeline(family),
        "a b",
        ReNO(rewards=redness, steps=3),
        noise_sampler="pink",
        generator=generator(),
        **arguments,
    )
    plain = draw(with_hook(family), noise_sampler="pink", generator=generator(), **arguments)
    assert torch.equal(result.initial_images, plain) and result.losses.min() < result.losses[0]
    again = draw(tiny_pipeline(family), latents=result.latents, generator=result.generator(), **arguments)
    assert torch.equal(again, result.images)


@pytest.mark.parametrize("seeded", [True, False])
def test_a_stochastic_sampler_sees_the_stream_that_the_draw_left(seeded):
    """Functions may draw more numbers than the noise."""

    def wasteful(shape, generator, device, dtype):
        torch.randn(7, generator=generator)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    scheduler = LCMScheduler(steps_offset=1)
    pipe = Pipeline(**quiet(sd_pipeline(scheduler=scheduler)).components)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "noise_sampler": wasteful, **SIZE}
    images = []
    for method in (None, BestOfN(rewards=redness, steps=1)):
        torch.manual_seed(4)
        images.append(draw(pipe, method=method, generator=generator() if seeded else None, **arguments))
    assert torch.equal(*images)


CALLS = {
    "reno": (Pipeline, {"rewards": redness, "steps": 2}, 1),
    "noise diffusion": (NoiseDiffusionStableDiffusionPipeline, {"rewards": "red", "steps": 2}, 1),
    "cno": (CNOStableDiffusionPipeline, {"steps": 1}, 2),
    "cno off": (CNOStableDiffusionPipeline, {"steps": 0}, 2),
    "nothing": (Pipeline, {}, 1),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_pipeline_takes_a_sampler(case):
    cls, settings, count = CALLS[case]
    if case == "noise diffusion":
        settings = {**settings, "method_kwargs": {"score_range": (-3.0, 3.0)}}
    pipe = cls(**tiny_pipeline("sd").components)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_arguments("sd"), "num_images_per_prompt": count, "output_type": "pt"}
    output = pipe("a b", noise_sampler="pink", generator=generator(), **settings, **call)
    pink = base_noise("sd", "pink", count, generator=generator())
    if settings.get("steps"):
        assert output.noise_result.provenance["noise_sampler"] == PinkNoise(0.2).describe()
    else:
        assert torch.equal(output.images, pink.images) and not hasattr(output, "noise_result")
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize(
    "method", [BestOfN(rewards=redness, steps=3), NoiseDiffusion(rewards=redness, score_range=(-10, 10), steps=3)]
)
def test_candidates_are_drawn_from_the_sampler(method):
    shapes = []

    def spy(shape, generator, device, dtype):
        shapes.append(shape)
        return PinkNoise(2.0)(shape, generator, device, dtype)

    result = optimize_noise(
        tiny_pipeline("sd"), "a b", method, noise_sampler=spy, generator=generator(), **call_arguments("sd")
    )
    assert set(shapes) == {(1, 4, 16, 16)} and len(shapes) > 3
    neighbors = (result.noise[..., 1:] * result.noise[..., :-1]).mean()
    assert neighbors > 0.6  # 0 for white noise, almost 1 for amplitudes (1 + f)^-2


def test_coupled_noise_is_coupled_among_the_images_of_a_prompt():
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 2}
    result = optimize_noise(
        tiny_pipeline("sd"),
        ["a", "b"],
        BestOfN(rewards=redness, steps=1),
        noise_sampler="coupled",
        generator=generators(0, 1, 2, 3),
        **arguments,
    )
    assert result.provenance["noise_sampler"] == {**CoupledNoise().describe(), "groups": [0, 0, 1, 1]}
    torch.testing.assert_close(result.noise[0::2], -result.noise[1::2])
    assert not torch.allclose(result.noise[0].abs(), result.noise[2].abs())


def test_cno_starts_from_coupled_noise():
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 3}
    result = optimize_noise(
        tiny_pipeline("sd"), "a b", CNO(steps=1), noise_sampler="coupled", generator=generator(), **arguments
    )
    assert result.norms[0] == pytest.approx(1, abs=0.1) and result.losses.isfinite().all()


def test_provenance_names_the_sampler(tmp_path):
    def mine(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    samplers = {"pink": PinkNoise(0.2).describe(), None: None, mine: {"name": mine.__qualname__}}
    for sampler, expected in samplers.items():
        result = base_noise("sd", sampler, generator=generator())
        result.save(tmp_path / "result.safetensors")
        found = NoiseResult.load(tmp_path / "result.safetensors").provenance
        assert found["noise_sampler"] == expected and json.dumps(found)


class Unrun:
    """Context that fails if the text encoder or the denoiser runs."""

    def __init__(self, pipe):
        self.parts = [pipe.text_encoder, pipe.unet]

    def __enter__(self):
        def refuse(module, *_):
            raise AssertionError(f"{type(module).__name__} ran")

        self.handles = [part.register_forward_pre_hook(refuse) for part in self.parts]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


BAD_CALLS = {
    "latents": ({"noise_sampler": "pink", "latents": torch.zeros(1, 4, 16, 16)}, ValueError, "but got both"),
    "name": ({"noise_sampler": "brown"}, ValueError, "'pink'"),
    "class": ({"noise_sampler": PinkNoise}, TypeError, "PinkNoise"),
    "one image": ({"noise_sampler": "coupled"}, ValueError, "num_images_per_prompt=2"),
    "groups": ({"noise_sampler": CoupledNoise(2), "num_images_per_prompt": 3}, ValueError, "groups of 2"),
    "no prompt": ({"noise_sampler": "pink", "prompt": None}, ValueError, "neither"),
}


@pytest.mark.parametrize("method", [None, BestOfN(rewards=redness, steps=1)], ids=["alone", "with a method"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_before_any_model_runs(case, method):
    arguments, error, message = BAD_CALLS[case]
    pipe = with_hook("sd")
    with Unrun(pipe), pytest.raises(error, match=message):
        pipe(**{"prompt": "a b", "method": method, **call_arguments("sd"), **arguments})
    assert "prepare_latents" not in vars(pipe)


def test_a_sampler_that_draws_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 16, 16\), but got \(1, 4, 8, 8\)"):
        base_noise("sd", lambda shape, **_: torch.zeros(1, 4, 8, 8))


def test_prompt_embeddings_and_a_pipeline_whose_draw_fails_leave_no_trace():
    pipe = with_hook("sd")
    embeds = torch.randn(1, 77, 16, generator=generator())
    call = {**call_arguments("sd"), "guidance_scale": 1.0, "prompt_embeds": embeds, "output_type": "pt"}
    white, pink = (pipe(noise_sampler=name, generator=generator(), **call).images for name in (None, "pink"))
    assert not torch.equal(white, pink)

    def broken(shape, **_):
        raise RuntimeError("no noise")

    with pytest.raises(RuntimeError, match="no noise"):
        pipe(noise_sampler=broken, **call)
    assert "prepare_latents" not in vars(pipe)
    assert torch.equal(pipe(generator=generator(), **call).images, white)
