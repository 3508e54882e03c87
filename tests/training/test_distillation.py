"""Distillation: what is kept of the teacher's way, and the loss of the student."""

import math
from types import SimpleNamespace

import pytest
import torch

from noiseopt.shapes_world import parse
from training import distillation
from training.generators import SDGenerator


def test_a_way_keeps_the_latents_of_the_students_steps():
    noise, way = torch.zeros(1), distillation.Way(torch.zeros(1))
    pipe = SimpleNamespace(scheduler=SDGenerator().scheduler)
    pipe.scheduler.set_timesteps(distillation.TEACHER["num_inference_steps"])
    for step, t in enumerate(pipe.scheduler.timesteps):
        assert way(pipe, step, t, {"latents": noise + 1 + step}) == {}
    quarter = distillation.TEACHER["num_inference_steps"] // 4
    assert [int(x) for x in way.kept] == [0, quarter, 2 * quarter, 3 * quarter, 4 * quarter]
    pipe.scheduler.set_timesteps(4)
    assert tuple(pipe.scheduler.timesteps.tolist()) == distillation.KEPT


def test_a_student_that_knows_the_end_has_no_loss():
    ends = torch.randn(8, 4, 32, 32)
    ways = torch.cat((torch.randn(8, 4, 4, 32, 32), ends[:, None]), 1)
    data = {"ways": ways, "requests": [parse("a red circle")] * 8}
    scheduler = SDGenerator().scheduler

    def predict(x, t, context):
        which = (ways.flatten(0, 1)[:, None] - x).flatten(2).norm(dim=2).argmin(0) // 5
        level = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (level.sqrt() * x - ends[which]) / (1 - level).sqrt()

    model = SimpleNamespace(
        denoiser=SimpleNamespace(device="cpu", dtype=torch.float32), embed=lambda texts: None, predict=predict
    )
    model.scheduler = scheduler
    losses = distillation.student_losses(SimpleNamespace(batch=32, fast=model), data)
    floor = math.sqrt(1e-3)
    assert float(sum(losses.values())) == pytest.approx(floor, rel=1e-3)
