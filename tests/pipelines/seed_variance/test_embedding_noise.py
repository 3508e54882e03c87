"""Embedding noise: what the denoiser is given, against the recipe; and stock pipelines of all families."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from conformance.matrix import FAMILIES
from problems import generator
from tiers import slow_except
from tiny_families import family_arguments, tiny_family
from tiny_pipelines import tiny_pipeline

from noiseopt import optimize_noise
from noiseopt.pipelines import EmbeddingNoise
from noiseopt.pipelines.baselines.plain_sampling import PlainSampling

STEPS = 5
WITHOUT_CALLBACKS = ("pixart_sigma",)
PAIRS = [family for family in FAMILIES if family != "img2img_flux"]  # which draws its image from the same streams
SETTINGS = {"strength": 0.4, "density": 0.3, "steps": 0.4}


def settings_for(family: str, **settings) -> EmbeddingNoise:
    """Return embedding noise that a family can have."""
    throughout = {"steps": 1.0} if family in WITHOUT_CALLBACKS else {}
    return EmbeddingNoise(**{"strength": 3.0, "generator": generator(3), **throughout, **settings})


def draw(pipe, tool=None, prompt="a b", **call):
    """Return the final latents of a call of a pipeline, changed by a tool or not."""
    run = pipe if tool is None else functools.partial(tool.generate, pipe)
    return run(prompt=prompt, **{"generator": generator(), "output_type": "latent", **call}).images


@contextlib.contextmanager
def embeddings_given(pipe):
    """Note the embedding of each call of the denoiser."""
    seen, denoiser = [], pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_denoiser_is_given_the_recipes_embedding_in_the_first_steps_and_then_that_of_the_prompt(family):
    pipe = tiny_pipeline(family)
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 32, "width": 32, "num_images_per_prompt": 2}
    with embeddings_given(pipe) as plain:
        draw(pipe, **call)
    with embeddings_given(pipe) as seen:
        draw(pipe, EmbeddingNoise(**SETTINGS, generator=[generator(3), generator(4)]), **call)
    assert len(seen) == STEPS and [each.equal(plain[0]) for each in seen] == [False, False, True, True, True]
    assert seen[0].equal(seen[1])
    assert seen[0][:-2].equal(plain[0][:-2])  # those of the negative prompt
    for y, given in zip(plain[0][-2:], seen[0][-2:], strict=True):
        assert given[y == 0].count_nonzero() == 0  # SD 3 has room for a text encoder that is not there
        y, given = y[y != 0].double(), given[y != 0].double()
        noise = (given - y) / (SETTINGS["strength"] * y.std(correction=0))
        changed = noise != 0
        assert changed.double().mean().item() == pytest.approx(SETTINGS["density"], abs=0.08)
        assert noise[changed].abs().max() < 1.001
        assert noise[changed].square().mean().item() == pytest.approx(1 / 3, abs=0.06)  # of a uniform number
        assert abs(noise[changed].mean().item()) < 0.1
    assert not seen[0][-2].equal(seen[0][-1])


@pytest.mark.parametrize("family", slow_except(PAIRS, "sdxl", "flux", "z_image"))
def test_images_of_one_noise_and_prompt_differ_and_the_pipeline_stays_as_it_was(family):
    pipe, call = tiny_family(family), {**family_arguments(family), "output_type": "pt"}

    def pair(tool=None):
        return draw(pipe, tool, num_images_per_prompt=2, **call, generator=[generator(), generator()])

    plain, before = pair(), set(vars(pipe))
    noised = pair(settings_for(family))
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-3, atol=1e-4)
    assert noised.isfinite().all() and noised.shape == plain.shape
    assert (noised[0] - noised[1]).abs().max() > 100 * (plain[0] - plain[1]).abs().max()
    assert noised.equal(pair(settings_for(family)))
    assert pair().equal(plain) and set(vars(pipe)) == before


@pytest.mark.parametrize("family", ["sdxl", "flux", "z_image", "pixart_sigma", "sana"])
def test_strength_zero_is_the_stock_call_also_from_given_latents_and_pink_noise(family):
    pipe, call = tiny_family(family), family_arguments(family)
    assert draw(pipe, settings_for(family, strength=0.0), **call).equal(draw(pipe, **call))
    found = optimize_noise(pipe, "a b", PlainSampling(), noise_sampler="pink", generator=generator(), **call)
    given = {**call, "latents": found.latents}
    expected = draw(pipe, **given, generator=found.generator())
    assert not expected.equal(draw(pipe, **call))
    assert draw(pipe, settings_for(family, strength=0.0), **given, generator=found.generator()).equal(expected)
    pink = draw(pipe, settings_for(family, strength=0.0), noise_sampler="pink", **call)
    torch.testing.assert_close(pink, expected)


def test_noise_stays_off_protected_and_absent_tokens():
    y, seed = torch.randn(12, 40, generator=generator()), generator(1)
    valid = torch.tensor([True] * 9 + [False] * 3)
    tool = EmbeddingNoise(density=1.0, protect_first=0.2, protect_last=0.4)

    def draws(function, *shape):
        return function(shape, generator=seed)

    changed = tool.noised(y, valid, draws).ne(y).all(1)
    assert changed.tolist() == [False, False, True, True, True, False, False, False, False, False, False, False]
    everything = dataclasses.replace(tool, protect_first=0.6)
    assert everything.noised(y, valid, draws).equal(y)


def test_the_spread_is_that_of_the_tokens():
    y = torch.cat([torch.ones(4, 50) * torch.tensor([1.0, -1.0]).repeat(25), torch.zeros(60, 50)])
    tool, noise = EmbeddingNoise(strength=2.0, density=1.0), torch.rand(64, 50, generator=generator())
    found = tool.noised(y, y.ne(0).any(1), lambda function, *shape: noise)
    torch.testing.assert_close(found[:4], y[:4] + 2.0 * 1.0 * (2 * noise[:4] - 1))
    assert found[4:].equal(y[4:])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_single_step_has_the_noise(family):
    pipe = tiny_pipeline(family)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}
    with embeddings_given(pipe) as seen:
        draw(pipe, **call)
        draw(pipe, EmbeddingNoise(generator=generator()), **call)
    assert not seen[0].equal(seen[1])


def test_the_users_callback_sees_the_tensors_that_it_asks_for_and_may_change_them():
    pipe, seen = tiny_pipeline("sd"), []
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 32, "width": 32}

    def stop(pipe, step, timestep, tensors):
        seen.append(sorted(tensors))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    asked = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["latents", "negative_prompt_embeds"]}
    assert draw(pipe, EmbeddingNoise(**SETTINGS, generator=generator()), **call, **asked).count_nonzero() == 0
    assert seen == [["latents", "negative_prompt_embeds", "prompt_embeds"]] * STEPS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -0.1}, "Expected `strength` to be a number in"),
        ({"density": 0.0}, "Expected `density` to be a number in"),
        ({"steps": 0.0}, "Expected `steps` to be a number in"),
        ({"protect_first": 1.5}, "Expected `protect_first` to be a number in"),
        ({"generator": [generator()]}, "one for each image, but got 1 for 2 images"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline("sd"), EmbeddingNoise(**settings), num_images_per_prompt=2, height=32, width=32)


@pytest.mark.parametrize("generator_", [3, ["a"], "cpu"])
def test_what_is_no_generator_is_refused_before_anything_runs(generator_):
    with pytest.raises(TypeError, match=r"Expected `generator` to be a `torch\.Generator` or a list of them, but got"):
        EmbeddingNoise(generator=generator_).generate(tiny_pipeline("sd"), "a")


def test_the_users_callback_has_the_last_word_at_the_step_that_gives_the_embedding_back():
    pipe = tiny_pipeline("sd")
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 32, "width": 32}
    asked = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    def zero(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    with embeddings_given(pipe) as seen:
        draw(
            pipe,
            EmbeddingNoise(**{**SETTINGS, "steps": 0.2}, generator=generator()),
            callback_on_step_end=zero,
            **call,
            **asked,
        )
    assert [bool(each.any()) for each in seen] == [True, False, False, False, False]


def test_embeddings_may_come_in_place_of_the_prompt():
    pipe = tiny_pipeline("sd")
    embeds, _ = pipe.encode_prompt("a b", "cpu", 1, False)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "latent"}
    given = EmbeddingNoise(generator=generator(3)).generate(pipe, prompt_embeds=embeds, generator=generator(), **call)
    assert given.images.equal(draw(pipe, EmbeddingNoise(generator=generator(3)), **call))


def test_pipelines_that_cannot_have_it_are_refused_by_name():
    pipe = tiny_family("pixart_sigma")
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline does not\. Pass `steps=1\.0`"):
        draw(pipe, EmbeddingNoise(), **family_arguments("pixart_sigma"))
    sd = tiny_pipeline("sd")
    without = type("Without", (type(sd),), {"encode_prompt": None})(**sd.components, requires_safety_checker=False)
    with pytest.raises(TypeError, match="Expected a pipeline with `encode_prompt`, but Without has none"):
        draw(without, EmbeddingNoise())
    with pytest.raises(TypeError, match=r"It changes the denoising steps .* `generate\(pipe, prompt, \.\.\.\)`"):
        optimize_noise(sd, "a", EmbeddingNoise())  # pyright: ignore[reportCallIssue, reportArgumentType]
