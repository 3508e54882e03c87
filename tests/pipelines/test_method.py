"""The contract of all methods: what changes how a run is computed does not change what it finds."""

import pytest
import torch
from problems import generator, redness
from tiny_pipelines import BUILDERS, SIZE, quiet

from noiseopt import list_methods, optimize_noise
from noiseopt.pipelines.registry import METHODS

SETTINGS = {
    "cno": {"steps": 2, "window_size": 4},
    "group_selection": {"rewards": redness, "features": "tiny_image", "steps": 2},
    "never_too_late": {"diversity": {"pairwise": ("tiny_image", 5.0)}, "steps": 3, "chunk_size": None},
    "noise_diffusion": {"rewards": redness, "score_range": (-10.0, 10.0), "candidates": 3, "steps": 3},
}
CALL = {"num_images_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 0.0, **SIZE}


def settings_of(name: str) -> dict:
    return SETTINGS.get(name, {"rewards": redness, "steps": 3})


@pytest.fixture(scope="module")
def pipe():
    return quiet(BUILDERS["sd"]())


@pytest.mark.parametrize("name", list_methods())
def test_chunks_and_checkpoints_find_what_the_joint_run_finds(pipe, name):
    joint, split = (
        optimize_noise(pipe, "a", METHODS[name](**(settings_of(name) | other)), generator=generator(), **CALL)
        for other in ({}, {"chunk_size": 1, "checkpointing": "steps"})
    )
    torch.testing.assert_close(split.noise, joint.noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(split.losses, joint.losses, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(split.best_step, joint.best_step)


@pytest.mark.parametrize("name", list_methods())
def test_every_setting_is_checked(name):
    cls = METHODS[name]
    for wrong in ({"steps": 0}, {"chunk_size": 0}, {"checkpointing": "all"}, {"reward_device": "gpu-7"}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(wrong))}`"):
            cls(**(settings_of(name) | wrong)).check()
