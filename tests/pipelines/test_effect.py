"""Effect of the methods on the trained embedded model, by a judge that no method optimizes."""

import pytest
import torch

from noiseopt import BestOfN, ReNO, ReNOStableDiffusionPipeline, optimize_noise, shapes_world
from noiseopt.demo import ONE_STEP, load_pipeline, seeded

PROMPTS = shapes_world.VALIDATION_PROMPTS[:24]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("turbo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def right(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([verdict.correct for verdict in shapes_world.judge(images, PROMPTS)])


def run(pipe, method):
    return optimize_noise(pipe, list(PROMPTS), method, generator=seeded(0, len(PROMPTS)), **ONE_STEP)


@pytest.mark.slow
def test_reno_repairs_pictures_that_the_plain_model_gets_wrong(pipe):
    result = run(pipe, ReNO(rewards=shapes_world.path("clip"), steps=25))
    before, after = right(result.initial_images), right(result.images)
    assert (~before).sum() >= 4, "there must be something to repair"
    assert after[~before].float().mean() >= 0.25
    assert after.sum() > before.sum()
    assert (result.best_scores["clipscore"] >= result.initial_scores["clipscore"]).all()


def test_best_of_n_finds_a_higher_reward_for_most_prompts(pipe):
    result = run(pipe, BestOfN(rewards=shapes_world.path("clip"), steps=10))
    gain = result.best_scores["clipscore"] - result.initial_scores["clipscore"]
    assert (gain >= 0).all() and (gain > 0).float().mean() > 0.7  # the first of ten is the best in one of ten cases


@pytest.mark.slow
def test_the_multi_step_model_is_optimized_through_its_chain():
    pipe = ReNOStableDiffusionPipeline.from_pretrained(shapes_world.path("guided"))
    pipe.set_progress_bar_config(disable=True)
    settings = {**shapes_world.MODELS["guided"].call, "generator": seeded(0, 4)}
    output = pipe(list(PROMPTS[:4]), rewards=shapes_world.path("clip"), steps=8, **settings)
    found = output.noise_result
    gain = found.best_scores["clipscore"] - found.initial_scores["clipscore"]
    assert (gain > 0).all() and gain.mean() > 0.5
