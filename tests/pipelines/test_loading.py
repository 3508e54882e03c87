"""Rewards and models by name, loaded once for a pipeline, whichever way the run is started."""

import copy
import gc
import weakref

import pytest
from diffusers import AutoencoderTiny
from problems import generator
from tiny_pipelines import BUILDERS, SIZE, quiet

from noiseopt import (
    AutoReward,
    NeverTooLateStableDiffusionPipeline,
    ReNOStableDiffusionPipeline,
    optimize_noise,
    release_rewards,
)
from noiseopt.pipelines.loading import loaded_models
from noiseopt.rewards import AutoFeatures

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": generator(), **SIZE}


@pytest.fixture
def loads(monkeypatch):
    """Count the loads of rewards, features and decoders by name."""
    names: list[str] = []
    for owner in (AutoReward, AutoFeatures, AutoencoderTiny):
        load = owner.from_pretrained
        monkeypatch.setattr(
            owner, "from_pretrained", lambda path, load=load, **rest: names.append(path) or load(path, **rest)
        )
    return names


def by_argument(pipe, rewards):
    pipe("a", rewards=rewards, steps=1, **CALL)


def by_name_of_the_method(pipe, rewards):
    pipe("a", method="reno", method_kwargs={"rewards": rewards, "steps": 1}, **CALL)


def by_function(pipe, rewards):
    optimize_noise(pipe, "a", "reno", method_kwargs={"rewards": rewards, "steps": 1}, **CALL)


@pytest.mark.parametrize("way", [by_argument, by_name_of_the_method, by_function])
def test_rewards_by_name_are_loaded_once_until_they_are_released(way, loads):
    pipe = quiet(BUILDERS["sd"](ReNOStableDiffusionPipeline))
    way(pipe, {"red": 1.0, "sharpness": 0.1})
    way(pipe, {"sharpness": 1.0})
    assert loads == ["red", "sharpness"]
    (release_rewards if way is by_function else type(pipe).release_rewards)(pipe)
    way(pipe, "red")
    assert loads == ["red", "sharpness", "red"]


def test_the_ways_share_what_was_loaded_and_pipelines_do_not(loads):
    pipe = quiet(BUILDERS["sd"](ReNOStableDiffusionPipeline))
    for way in (by_argument, by_name_of_the_method, by_function):
        way(pipe, "red")
    assert loads == ["red"]
    by_function(copy.copy(pipe), "red")
    assert loads == ["red", "red"]


def test_everything_with_a_name_is_loaded_once(loads, tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    ).save_pretrained(tmp_path)
    pipe = quiet(BUILDERS["sd"](NeverTooLateStableDiffusionPipeline))
    settings = {
        "diversity": {"pairwise": ("tiny_image", 1.0)},
        "rewards": "red",
        "guard": {"sharpness": 1.0},
        "steps": 1,
        "decoder": str(tmp_path),
    }
    call = {"num_images_per_prompt": 2, **CALL}
    for _ in range(2):
        pipe("a", method_kwargs=settings, **call)
        optimize_noise(pipe, "a", "never_too_late", method_kwargs=settings, **call)
        pipe.grow_set("a", 2, method_kwargs=settings, **{**CALL, "generator": 0})
        chosen = {"rewards": "red", "features": "tiny_image", "steps": 1}
        optimize_noise(pipe, "a", "group_selection", method_kwargs=chosen, **call)
    assert sorted(loads) == sorted(["tiny_image", "red", "sharpness", str(tmp_path)])


def test_what_was_loaded_is_freed_with_its_pipeline():
    pipe = quiet(BUILDERS["sd"]())
    by_function(pipe, "sharpness")
    (reward,) = (weakref.ref(model) for model in loaded_models(pipe).models.values())
    assert reward() is not None
    del pipe
    gc.collect()
    assert reward() is None


@pytest.mark.parametrize("off", [True, False])
def test_loading_shows_its_bar_where_the_pipeline_does(off, tmp_path, capfd):
    from tiny_pipelines import save_tiny_clip
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    pipe = BUILDERS["sd"](ReNOStableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=off)
    by_argument(pipe, save_tiny_clip(tmp_path))
    assert ("Loading weights" in capfd.readouterr().err) is (shown and not off)
    assert logging.is_progress_bar_enabled() is shown
