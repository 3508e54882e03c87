"""Arguments of a stock call in every evaluation: prompts, embeddings, generators, guidance, callbacks."""

import pytest
import torch
from compositions import EMBEDS, check_composition, draw, embeddings_of
from diffusers.callbacks import SDXLCFGCutoffCallback
from problems import generator, redness
from tiny_pipelines import SIZE, call_arguments, quiet, sd_pipeline, sdxl_pipeline, tiny_pipeline

from noiseopt import ReNO, ReNOTurboPipeline, optimize_noise


@pytest.mark.parametrize("family", EMBEDS)
def test_embeddings_are_the_prompt_that_they_encode(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    embeds, written = embeddings_of(pipe, family), {"negative_prompt": "c"}
    if family == "flux":
        arguments = {"num_inference_steps": 2, **SIZE}
        written = {}
    read = []

    def reward(images, prompts):
        read.append(list(prompts))
        return redness(images, prompts)

    asked = {"reward_prompt": "as it reads", "generator": generator()}
    found = optimize_noise(pipe, None, ReNO(rewards=reward, steps=2), **asked, **arguments, **embeds)
    plain = ReNO(rewards=redness, steps=2)
    expected = optimize_noise(pipe, "a b", plain, generator=generator(), **arguments, **written)
    assert torch.equal(found.noise, expected.noise)
    assert {text for texts in read for text in texts} == {"as it reads"}
    check_composition(pipe, None, **arguments, **embeds)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_negative_prompts_are_honored(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    negative = {**arguments, "negative_prompt": ["c d", "e"]}
    assert not torch.equal(draw(pipe, ["a", "b"], **negative), draw(pipe, ["a", "b"], **arguments))
    check_composition(pipe, ["a", "b"], **negative)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_images_of_a_prompt_have_generators_of_their_own(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    prompts, seeds = ["a", "b"], (3, 1, 4, 5)
    arguments |= {"num_images_per_prompt": 2}
    negative = {"negative_prompt": ["b", "b"]} if family == "flux" else {}
    streams = [generator(seed) for seed in seeds]
    result = check_composition(pipe, prompts, generator=streams, **{**arguments, **negative})
    assert result.provenance["prompts"] == ["a", "a", "b", "b"] and result.provenance["seeds"] == list(seeds)


@pytest.mark.parametrize("build", [sd_pipeline, sdxl_pipeline])
def test_guidance_rescale_is_honored(build):
    pipe, arguments = quiet(build()), {**call_arguments("sd"), "guidance_scale": 7.0}
    rescaled = {**arguments, "guidance_rescale": 0.7}
    assert not torch.equal(draw(pipe, **rescaled), draw(pipe, **arguments))
    check_composition(pipe, **rescaled)


def brighten(pipe, index, timestep, kwargs):
    return {"latents": kwargs["latents"] + 0.5}


def stop(pipe, index, timestep, kwargs):
    pipe._interrupt = True
    return kwargs


CALLBACKS = {
    "changes the latents": {"callback_on_step_end": brighten},
    "ends the run": {"callback_on_step_end": stop},
    "ends the guidance": {
        "callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
        "callback_on_step_end_tensor_inputs": SDXLCFGCutoffCallback.tensor_inputs,
    },
}


@pytest.mark.parametrize("does", CALLBACKS)
def test_a_callback_per_denoising_step_has_its_way_with_the_final_image_alone(does):
    stock, arguments = tiny_pipeline("sdxl"), call_arguments("sdxl")
    pipe = ReNOTurboPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    optimized = {**arguments, "rewards": redness, "steps": 3, "output_type": "pt"}
    output = pipe("a b", generator=generator(), **optimized, **CALLBACKS[does])
    found = output.noise_result
    assert torch.equal(found.noise, pipe("a b", generator=generator(), **optimized).noise_result.noise)
    again = {**arguments, "latents": found.latents}
    assert torch.equal(output.images, draw(stock, generator=found.generator(), **again, **CALLBACKS[does]))
    assert torch.equal(found.images, draw(stock, generator=found.generator(), **again))
    assert not torch.equal(output.images, found.images)
    assert torch.equal(draw(pipe, **arguments), draw(stock, **arguments))
