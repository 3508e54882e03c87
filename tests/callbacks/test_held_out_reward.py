"""A watched reward: what it says of runs whose outcome is known."""

import dataclasses

import pytest
import torch
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import CNO, HeldOutReward, NoiseResult, ReNO, RewardSum, optimize_noise
from noiseopt.callbacks import NoiseState
from noiseopt.rewards import ColorChannel


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def darkness(images, prompts):
    return -brightness(images, prompts)


def run(watch: HeldOutReward) -> NoiseResult:
    arguments = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": torch.Generator().manual_seed(0), **SIZE}
    return optimize_noise(tiny_pipeline("sd"), "a", ReNO(rewards=brightness, steps=5), callbacks=watch, **arguments)


def after_steps(watch: HeldOutReward, losses: list[list[float]], shades: list[list[float]]) -> NoiseState:
    """The state after steps of two images, uniform in `shades`, with these losses."""
    state = NoiseState(None, ["", ""], 10, torch.zeros(2, 1, 2, 2))
    watch.on_run_start(state)
    for step, (loss, shade) in enumerate(zip(losses, shades, strict=True)):
        state.step, state.loss = step, torch.tensor(loss)
        better = state.loss < state.best.loss
        best_step = state.best.step.where(~better, step)
        state.best = dataclasses.replace(state.best, loss=state.best.loss.where(~better, state.loss), step=best_step)
        state.images = torch.tensor(shade)[:, None, None, None].expand(2, 3, 4, 4)
        watch.on_step_end(state)
    return state


def test_hacking_is_a_lower_loss_with_a_lower_held_out_reward():
    watch = HeldOutReward(ColorChannel("red"), name="second opinion")
    # image 0 gains and its red falls (red of a gray is minus its shade); image 1 gains and its red rises
    state = after_steps(watch, [[5.0, 5.0], [4.0, 4.0]], [[0.2, 0.6], [0.5, 0.1]])
    report = state.reports["held out second opinion"]
    assert report["reward_hacking"] == [True, False]
    assert report["initial"] == pytest.approx([-0.2, -0.6]) and report["best"] == pytest.approx([-0.5, -0.1])
    assert report["loss_change"] == [-1.0, -1.0]
    with pytest.warns(UserWarning, match=r"Reward hacking in images \[0\].*'second opinion'.*fewer steps"):
        watch.on_run_end(state)


def test_the_best_image_counts_and_not_the_last():
    watch = HeldOutReward(ColorChannel("red"))
    state = after_steps(watch, [[5.0, 5.0], [4.0, 6.0], [4.5, 7.0]], [[0.2, 0.2], [0.2, 0.9], [0.9, 0.9]])
    report = state.reports["held out red"]
    assert report["best"] == pytest.approx([-0.2, -0.2])
    assert report["reward_hacking"] == [False, False]
    watch.on_run_end(state)


def test_a_sum_of_rewards_may_watch_and_be_asked_about_prompts_of_its_own():
    asked = []

    def redness(images, prompts):
        asked.append(prompts)
        return images[:, 0].mean((1, 2))

    watch = HeldOutReward(RewardSum({redness: 2.0}), prompts="a cat")
    state = after_steps(watch, [[5.0, 5.0], [4.0, 4.0]], [[0.2, 0.6], [0.5, 0.1]])
    assert state.reports["held out RewardSum"]["best"] == pytest.approx([1.0, 0.2])
    assert asked == [["a cat", "a cat"]] * 2


def test_a_sample_that_was_stopped_keeps_the_score_of_its_best_image():
    watch = HeldOutReward(ColorChannel("red"))
    state = after_steps(watch, [[5.0, 5.0], [4.0, 4.0], [float("nan"), 3.0]], [[0.2, 0.2], [0.3, 0.3], [0.9, 0.1]])
    assert state.reports["held out red"]["best"] == pytest.approx([-0.3, -0.1])
    assert state.reports["held out red"]["reward_hacking"] == [True, False]


def test_a_fall_within_the_tolerance_does_not_count():
    losses, shades = [[5.0, 5.0], [4.0, 4.0]], [[0.2, 0.2], [0.25, 0.5]]
    state = after_steps(HeldOutReward(ColorChannel("red"), tolerance=0.1), losses, shades)
    assert state.reports["held out red"]["reward_hacking"] == [False, True]


def test_an_image_whose_score_no_longer_rises_is_stopped():
    watch = HeldOutReward(lambda images, prompts: images[:, 0, 0, 0], patience=2)
    losses = [[5.0, 5.0], [4.0, 4.0], [3.0, 3.0], [2.0, 2.0]]
    shades = [[0.2, 0.2], [0.5, 0.1], [0.4, 0.1], [0.5, 0.3]]  # image 0 is highest at step 1, a tie is no rise
    assert after_steps(watch, losses[:2], shades[:2]).active.tolist() == [True, True]
    assert after_steps(watch, losses[:3], shades[:3]).active.tolist() == [True, False]
    state = after_steps(watch, losses, shades)
    assert state.active.tolist() == [False, False] and state.stopped == "held out"
    missing = [[float("nan"), 0.1], [0.5, float("nan")], [0.4, 0.2], [0.6, 0.3]]  # a score that is not a number
    assert after_steps(watch, losses, missing).active.all()
    watch.patience = None
    assert after_steps(watch, losses, shades).active.all()


def test_patience_begins_anew_with_each_start_and_not_in_the_search():
    watch, stopped = HeldOutReward(lambda images, prompts: images[:, 0, 0, 0], patience=2), []
    state = NoiseState(None, [""], 10, torch.zeros(1, 1, 2, 2))
    watch.on_run_start(state)
    stages = ["search"] * 4 + ["start 1"] * 2 + ["start 2"] * 4
    for step, (stage, shade) in enumerate(zip(stages, [9, 8, 7, 6, 1, 0, 3, 4, 4, 2], strict=True)):
        state.step, state.stage, state.loss = step, stage, torch.zeros(1)
        state.images = torch.full((1, 3, 4, 4), float(shade))
        watch.on_step_end(state)
        stopped.append(not state.active.any())
    assert stopped == [False] * 9 + [True]


def test_the_result_of_a_run_reports_it_and_keeps_it_on_disk(tmp_path):
    watch = HeldOutReward(darkness)
    with pytest.warns(UserWarning, match="Reward hacking"):
        result = run(watch)
    report = result.reports["held out darkness"]
    assert report["reward_hacking"] == [True]
    assert torch.allclose(watch.scores, -result.scores["brightness"], atol=1e-5)
    assert report["best"] == pytest.approx((-result.best_scores["brightness"]).tolist(), abs=1e-5)
    result.save(tmp_path / "found.safetensors")
    assert NoiseResult.load(tmp_path / "found.safetensors").reports == result.reports


@pytest.mark.filterwarnings("error:Reward hacking")
def test_a_reward_that_agrees_raises_no_alarm():
    result = run(HeldOutReward(brightness))
    assert result.reports["held out brightness"]["reward_hacking"] == [False]


def test_a_method_without_images_and_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="Expected a method whose objective evaluates images"):
        arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, **SIZE}
        optimize_noise(tiny_pipeline("sd"), "a", CNO(), callbacks=HeldOutReward(brightness), **arguments)
    with pytest.raises(ValueError, match=r"held-out reward 'flat' to return a tensor of shape \(1,\).*got \(1, 3\)"):
        run(HeldOutReward(lambda images, prompts: images.mean((2, 3)), name="flat"))
    with pytest.raises(TypeError, match="Expected a loaded reward .*got 'pickscore'. Load it with"):
        HeldOutReward("pickscore")
    with pytest.raises(ValueError, match="tolerance of at least 0"):
        HeldOutReward(brightness, tolerance=-1)
    with pytest.raises(ValueError, match="patience of at least 1 step, but got 0"):
        HeldOutReward(brightness, patience=0)


def test_one_object_may_watch_run_after_run():
    watch = HeldOutReward(brightness)
    run(watch)
    watch.on_run_start(NoiseState(None, [], 1, torch.zeros(1, 4, 8, 8)))
    assert watch.rows == [] and watch.initial_loss is None
