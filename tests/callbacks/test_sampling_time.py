"""The noise level of a model call, against what the scheduler itself mixes."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from noiseopt.callbacks.sampling_time import (
    noise_ratio,
    position_of_call,
    require_training_times,
    signal_and_noise,
    training_time,
)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = [
    DDIMScheduler(**BETAS, set_alpha_to_one=False),
    DDPMScheduler(**BETAS),
    DEISMultistepScheduler(**BETAS),
    DPMSolverMultistepScheduler(**BETAS),
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    EulerAncestralDiscreteScheduler(**BETAS),
    EulerDiscreteScheduler(**BETAS),
    EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    HeunDiscreteScheduler(**BETAS),
    LCMScheduler(**BETAS),
    LMSDiscreteScheduler(**BETAS),
    PNDMScheduler(**BETAS, skip_prk_steps=True),
    TCDScheduler(**BETAS),
    UniPCMultistepScheduler(**BETAS),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_signal_and_noise_are_what_the_scheduler_mixes(scheduler):
    scheduler.set_timesteps(10)
    mix = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else None
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for index, timestep in enumerate(scheduler.timesteps):
        if mix is not None:
            expected = mix(one, timestep[None], zero), mix(zero, timestep[None], one)
        else:
            expected = scheduler.add_noise(one, zero, timestep[None]), scheduler.add_noise(zero, one, timestep[None])
        found = signal_and_noise(scheduler, index)
        torch.testing.assert_close(torch.tensor(found).double(), torch.cat(expected), rtol=2e-5, atol=1e-6)


def test_the_noise_after_the_last_step():
    for scheduler in SCHEDULERS:
        scheduler.set_timesteps(10)
        signal, noise = signal_and_noise(scheduler, len(scheduler.timesteps))
        if isinstance(scheduler, (DDIMScheduler, PNDMScheduler)):  # they end at the first training step
            assert signal**2 == pytest.approx(1 - 0.00085, rel=1e-6)
        elif not isinstance(scheduler, (DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler)):
            assert (signal, noise) == (1, 0)
        assert noise < 0.05


def test_the_published_interval_in_the_units_of_two_families():
    """(0.28, 5.42] is training timesteps 73 to 812 of Stable Diffusion, and flow times 0.219 to 0.844."""
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(1000)
    inside = [int(t) for i, t in enumerate(scheduler.timesteps) if 0.28 < noise_ratio(scheduler, i) <= 5.42]
    assert (min(inside), max(inside)) == (73, 812)  # the ends of the interval are nearest to 72 and 813
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(1000)
    inside = [float(s) for i, s in enumerate(flow.sigmas[:-1]) if 0.28 < noise_ratio(flow, i) <= 5.42]
    assert (min(inside), max(inside)) == pytest.approx((0.219, 0.844), abs=1e-3)


def test_pure_noise_has_an_infinite_ratio():
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    assert noise_ratio(flow, 0) == math.inf
    zero_snr = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero_snr.set_timesteps(4)
    assert noise_ratio(zero_snr, 0) > 1000


def test_time_is_the_timestep_of_the_training():
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert [training_time(scheduler, index) for index in range(4)] == [0.999, 0.749, 0.499, 0.249]
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    assert [training_time(flow, index) for index in range(4)] == pytest.approx(flow.sigmas[:-1].tolist())


@pytest.mark.parametrize(
    "scheduler", [SCMScheduler(), IPNDMScheduler(), EDMEulerScheduler()], ids=lambda each: type(each).__name__
)
def test_schedulers_without_training_times_are_refused(scheduler):
    with pytest.raises(TypeError, match=f"count training steps, but got {type(scheduler).__name__}"):
        require_training_times(scheduler)
    if not isinstance(scheduler, EDMEulerScheduler):
        with pytest.raises(TypeError, match="noise levels"):
            signal_and_noise(scheduler, 0)


def test_a_call_that_leaves_out_the_first_steps_is_found_at_its_place():
    scheduler = HeunDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(6)
    whole = SimpleNamespace(scheduler=scheduler, num_timesteps=len(scheduler.timesteps))
    assert position_of_call(whole, scheduler.timesteps[0]) == 0
    part = SimpleNamespace(scheduler=scheduler, num_timesteps=len(scheduler.timesteps) - 4)
    assert position_of_call(part, scheduler.timesteps[4]) == 4
    shortened = SimpleNamespace(scheduler=scheduler, num_timesteps=3)
    assert position_of_call(shortened, scheduler.timesteps[0]) == 0
