"""The contract of all methods: what changes how a run is computed does not change what it finds."""

import pytest
import torch
from problems import Clock, generator, redness
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


@pytest.mark.parametrize("name", list_methods())
def test_a_number_is_a_budget_of_evaluations_in_all(pipe, name):
    """In the place of the steps: also of what is evaluated after the last step."""
    settings = settings_of(name) | {"steps": 2, "budget": 6}
    assert len(evaluated(pipe, name, settings)) == 6
    if hasattr(METHODS[name], "keep"):
        assert len(evaluated(pipe, name, settings | {"preview": True, "keep": 3})) == 6


@pytest.mark.parametrize("name", list_methods())
def test_a_time_is_kept_and_used(pipe, name, monkeypatch):
    """Each model call takes 1 second, so an evaluation takes 2 where the whole chain is run, and only that time."""
    clock = Clock(monkeypatch)
    handle = pipe.unet.register_forward_pre_hook(clock.after(1.0))
    for more in ({}, {"preview": True, "keep": 3}) if hasattr(METHODS[name], "keep") else ({},):
        clock.now = 0.0
        result = evaluated(pipe, name, settings_of(name) | {"budget": "20.5s"} | more, result=True)
        assert 16 <= result.provenance["seconds"] <= 20.5 and result.provenance["stopped"] == "time budget"
    handle.remove()


def evaluated(pipe, name: str, settings: dict, result: bool = False):
    found = optimize_noise(pipe, "a", METHODS[name](**settings), generator=generator(), **CALL)
    return found if result else found.losses


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("20", "Expected a time above 0 such as '20s', '1.5min', '500ms' or '2h', but got '20'"),
        ("soon", "but got 'soon'"),
        ("0s", "Expected a time above 0"),
        (0, "a time such as '20s' or a number of at least 1 evaluation, but got 0"),
        (20.0, "but got 20.0. Seconds are written with their unit"),
        (True, "but got True"),
        ([3], r"but got \[3\]"),
    ],
)
def test_budgets_that_are_none_are_refused_before_any_model_runs(budget, expected, pipe, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    for name in ("best_of_n", "reno"):
        with pytest.raises(ValueError, match=expected):
            optimize_noise(pipe, "a", name, method_kwargs={"rewards": redness, "budget": budget}, **CALL)
    with pytest.raises(ValueError, match="at least 4 evaluations, of which 3 are kept for the end, but got 3"):
        METHODS["best_of_n"](rewards=redness, preview=True, budget=3).check()
