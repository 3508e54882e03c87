"""Interval guidance: against a denoiser whose two predictions are the same outside of the interval."""

import contextlib
import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from stock_calls import STEPS, draw
from tiny_pipelines import quiet, sd_pipeline, tiny_pipeline

from noiseopt.callbacks import IntervalGuidance

GUIDED = ("sd", "sdxl", "sd3")


@contextlib.contextmanager
def conditional_prediction_in(pipe, calls):
    """In model calls of these numbers both halves of the prediction are the conditional one: no scale matters there."""
    denoiser, count = pipe.unet if hasattr(pipe, "unet") else pipe.transformer, []

    def unguide(module, args, output):
        count.append(1)
        if len(count) - 1 in calls:
            return (output[0].chunk(2)[1].repeat(2, 1, 1, 1), *output[1:])
        return output

    handle = denoiser.register_forward_hook(unguide)
    try:
        yield
    finally:
        handle.remove()
    assert len(count) == STEPS


def levels(pipe) -> list[float]:
    """σ of each model call, by the formulas of the families that are here."""
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    return sigmas if hasattr(pipe, "unet") else [s / (1 - s) if s < 1 else math.inf for s in sigmas]


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_is_off_outside_of_the_interval(family):
    pipe = tiny_pipeline(family)
    guided = draw(family)
    sigmas = levels(pipe)
    low, high = sigmas[4], sigmas[2]  # calls 2 and 3 are inside, 4 is at the lower end, which is outside
    with conditional_prediction_in(pipe, [1, 4, 5]):
        expected = draw(family)
    found = draw(family, IntervalGuidance(low=low, high=high))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (guided - expected).abs().max() > 30 * (found - expected).abs().max()


def test_the_first_call_is_guided_whatever_its_level():
    pipe = tiny_pipeline("sd")
    with conditional_prediction_in(pipe, range(1, STEPS)):
        expected = draw("sd")
    found = draw("sd", IntervalGuidance(low=1000.0, high=1001.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with conditional_prediction_in(pipe, range(STEPS)):
        assert (draw("sd") - found).abs().max() > 1e-3


def test_rescaled_guidance_is_off_too():
    """The rescaled result of guidance without effect is the conditional prediction as well."""
    pipe = tiny_pipeline("sd")
    with conditional_prediction_in(pipe, range(1, STEPS)):
        expected = draw("sd", guidance_rescale=0.7)
    found = draw("sd", IntervalGuidance(low=1000.0, high=1001.0), guidance_rescale=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", GUIDED)
def test_the_scale_of_the_call_is_back_afterwards(family):
    draw(family, IntervalGuidance(low=1000.0, high=1001.0), guidance_scale=4.5)
    assert tiny_pipeline(family).guidance_scale == 4.5


def test_the_next_call_sets_its_own_scale_where_one_ended_in_an_exception():
    pipe = quiet(sd_pipeline())
    plain = draw(pipe)
    callback = IntervalGuidance(low=1000.0, high=1001.0)
    steered = draw(pipe, callback)

    def fail_when_off(pipeline, step, timestep, kwargs):
        callback(pipeline, step, timestep, kwargs)
        assert pipeline.guidance_scale < 1.001
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, fail_when_off, inputs=["latents"], guidance_scale=7.0)
    assert draw(pipe).equal(plain) and pipe.guidance_scale == 3.0
    assert draw(pipe, callback).equal(steered)


def test_pipelines_that_count_the_scale_from_zero_are_guided_at_none():
    """Z-Image: pos + scale·(pos - neg), with guidance above 0."""

    class CountsFromZero:
        _guidance_scale = 5.0
        num_timesteps = 3
        scheduler = DDIMScheduler()

        @property
        def do_classifier_free_guidance(self):
            return self._guidance_scale > 0

    pipe = CountsFromZero()
    pipe.scheduler.set_timesteps(3)
    callback = IntervalGuidance(low=1000.0, high=1001.0)
    callback.on_call_start(pipe, {})
    callback.on_step(pipe, 1, {})
    assert pipe.do_classifier_free_guidance and 2.0 + pipe._guidance_scale * 1e9 == 2.0
    callback.on_call_end(pipe)
    assert pipe._guidance_scale == 5.0


def test_a_call_without_guidance_is_refused():
    with pytest.raises(ValueError, match="with guidance, but got guidance_scale=1.0"):
        draw("sd", IntervalGuidance(), guidance_scale=1.0)


def test_a_pipeline_with_constant_guidance_is_refused():
    with pytest.raises(TypeError, match="reads its guidance scale at each step, but FluxPipeline"):
        IntervalGuidance().check(tiny_pipeline("flux"))
    with pytest.raises(TypeError, match="FluxPipeline"):
        draw("flux", IntervalGuidance())


@pytest.mark.parametrize("settings", [{"low": 6.0}, {"low": -1.0}, {"low": 2.0, "high": 2.0}])
def test_an_empty_interval_is_refused(settings):
    with pytest.raises(ValueError, match="0 <= low < high"):
        IntervalGuidance(**settings)


@pytest.mark.parametrize("order", [1, -1])
def test_guidance_that_another_callback_ended_stays_off(order):
    pipe, cutoff = tiny_pipeline("sd"), SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    expected = draw("sd", cutoff, images=1)
    sigmas = levels(pipe)
    interval = IntervalGuidance(low=sigmas[4], high=sigmas[0] + 1)  # would go off at call 4, and on again at the end
    found = draw("sd", MultiPipelineCallbacks([interval, cutoff][::order]), images=1)
    assert found.equal(expected)
