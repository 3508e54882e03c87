"""x0 against the schedulers that report it, and against a closed-form Gaussian denoiser for all."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from noiseopt import predict_x0

REPORTING = [
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
]
SILENT = [PNDMScheduler, LCMScheduler, TCDScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
SIGMA_SPACE = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler)
SIZE = (2, 4, 8, 8)


def make(cls, kind: str):
    unclipped = {"clip_sample": False} if cls in (DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler) else {}
    scheduler = cls(prediction_type=kind, **unclipped)
    scheduler.set_timesteps(4)
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", REPORTING)
def test_equals_what_the_scheduler_reports(cls, kind):
    scheduler = make(cls, kind)
    generator = torch.Generator().manual_seed(0)
    sample, output = torch.randn(2, *SIZE, generator=generator)
    timestep = scheduler.timesteps[0]
    sample = sample * scheduler.init_noise_sigma
    ours = predict_x0(scheduler, output, timestep, sample)
    scheduler = make(cls, kind)
    scheduler.scale_model_input(sample, timestep)
    reported = scheduler.step(output, timestep, sample).pred_original_sample
    torch.testing.assert_close(ours, reported, rtol=1e-5, atol=1e-5)


def exact_outputs(scheduler, kind: str, x0: torch.Tensor, noise: torch.Tensor):
    """The noisy sample of a known x0 at the first timestep, and the output of a denoiser that knows both."""
    timestep = scheduler.timesteps[0]
    if isinstance(scheduler, SIGMA_SPACE):
        sigma = scheduler.sigmas[0]
        return x0 + sigma * noise, {"epsilon": noise, "v_prediction": (noise - sigma * x0) / (sigma**2 + 1).sqrt()}[
            kind
        ]
    alpha_bar = scheduler.alphas_cumprod[int(timestep)]
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return a * x0 + b * noise, {"epsilon": noise, "v_prediction": a * noise - b * x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", REPORTING + SILENT)
def test_recovers_the_x0_of_a_denoiser_that_knows_it(cls, kind):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, *SIZE, generator=generator)
    scheduler = make(cls, kind)
    sample, output = exact_outputs(scheduler, kind, x0, noise)
    torch.testing.assert_close(predict_x0(scheduler, output, scheduler.timesteps[0], sample), x0, rtol=0, atol=2e-4)


def test_flow_matching_follows_the_straight_line():
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, *SIZE, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas[0]
    sample = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(predict_x0(scheduler, noise - x0, scheduler.timesteps[0], sample), x0, rtol=0, atol=1e-5)


def test_a_model_that_predicts_the_sample_is_taken_at_its_word():
    scheduler = make(DDIMScheduler, "sample")
    output = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(predict_x0(scheduler, output, scheduler.timesteps[0], torch.zeros(SIZE)), output)
