"""Contract of callbacks per denoising step, in stock pipelines of four families."""

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PixArtSigmaPipeline
from diffusers.callbacks import MultiPipelineCallbacks
from stock_calls import FAMILIES, draw
from tiny_pipelines import quiet, sd_pipeline, tiny_pipeline

from noiseopt.callbacks import CADS, DenoisingCallback, IntervalGuidance, ParticleGuidance

GUIDED = ("sd", "sdxl", "sd3")  # families whose guidance can change within a call
SWITCHED_OFF = {
    "cads": lambda: CADS(noise_scale=0),
    "particles": lambda: ParticleGuidance(coefficient=0),
    "particles without noise": lambda: ParticleGuidance(min_sigma=float("inf")),
    "interval": lambda: IntervalGuidance(low=0, high=float("inf")),
}


@pytest.mark.parametrize("name", SWITCHED_OFF)
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_is_the_stock_call(family, name):
    if name == "interval" and family not in GUIDED:
        pytest.skip("its guidance is fixed for a call")
    assert draw(family, SWITCHED_OFF[name]()).equal(draw(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_call_afterwards_and_the_pipeline_are_as_before(family):
    pipe, before = tiny_pipeline(family), draw(family)
    state = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
    callbacks = [ParticleGuidance(), CADS()] + ([IntervalGuidance()] if family in GUIDED else [])
    assert not draw(family, MultiPipelineCallbacks(callbacks)).equal(before)
    assert {name: value for name, value in vars(pipe).items() if name.startswith("_")} == state
    assert draw(family).equal(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_work_together_in_any_order(family):
    """Each acts on something else, and all of them act: embeddings, guidance, latents."""

    def make(**changes):
        seed = torch.Generator().manual_seed(1)
        callbacks = {"particles": ParticleGuidance(images_per_prompt=2), "cads": CADS(generator=seed)}
        return {**callbacks, **({"interval": IntervalGuidance()} if family in GUIDED else {}), **changes}

    together = draw(family, MultiPipelineCallbacks([*make().values()]))
    assert draw(family, MultiPipelineCallbacks([*make().values()][::-1])).equal(together)
    for name in make():
        without = [callback for other, callback in make().items() if other != name]
        assert not draw(family, MultiPipelineCallbacks(without)).equal(together)


def test_one_object_serves_call_after_call_also_after_an_exception():
    class Fail(DenoisingCallback):
        def on_step(self, pipeline, index, callback_kwargs):
            if index == 3:
                raise KeyboardInterrupt

    seed = torch.Generator()
    reused = [ParticleGuidance(), CADS(generator=seed), IntervalGuidance()]
    first = draw("sd", MultiPipelineCallbacks(reused), seed=seed)
    plain = draw("sd")
    with pytest.raises(KeyboardInterrupt):
        draw("sd", MultiPipelineCallbacks([*reused, Fail([])]), prompt=["b", "c"], guidance_scale=7.0)
    assert draw("sd").equal(plain)
    assert draw("sd", MultiPipelineCallbacks(reused), seed=seed).equal(first)


def test_a_pipeline_that_brings_no_tensors_is_told_how():
    with pytest.raises(ValueError, match=r"FluxPipeline does not .* `callback_on_step_end_tensor_inputs=\['prompt"):
        draw("flux", CADS(), inputs=["latents"])


def test_a_pipeline_without_the_tensor_is_refused():
    callback = CADS(conditions=("prompt_embeds", "add_text_embeds"))
    callback.check(tiny_pipeline("sdxl"))
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not pass add_text_embeds.*out of latents, prom"):
        callback.check(tiny_pipeline("sd"))
    with pytest.raises(ValueError, match="add_text_embeds"):  # before anything runs, by the pipeline itself
        draw("sd", callback)


def test_a_pipeline_without_callbacks_is_refused():
    with pytest.raises(TypeError, match="PixArtSigmaPipeline has none"):
        CADS().check(PixArtSigmaPipeline.__new__(PixArtSigmaPipeline))


@pytest.mark.parametrize("cls", [CADS, ParticleGuidance, IntervalGuidance])
def test_a_single_step_is_refused(cls):
    with pytest.raises(ValueError, match=f"at least 2 denoising steps for {cls.__name__}"):
        draw("sd", cls(), num_inference_steps=1)


@pytest.mark.parametrize("cls", [CADS, IntervalGuidance])
def test_second_order_schedulers_count_model_calls(cls):
    """Heun calls the model twice in a step, and a callback after each."""
    pipe, indices, callback = quiet(sd_pipeline(scheduler=HeunDiscreteScheduler(steps_offset=1))), [], cls()
    callback.on_step = lambda pipe, index, kwargs: indices.append(index)
    draw(pipe, callback, num_inference_steps=3)
    assert indices == [1, 2, 3, 4, 5]


def test_latents_keep_their_precision():
    pipe = quiet(sd_pipeline(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))).to(dtype=torch.bfloat16)
    found = draw(pipe, MultiPipelineCallbacks([ParticleGuidance(), CADS()]))
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
