"""Callbacks that watch, stop and record a run."""

import csv
import dataclasses
import io
import re
import time

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import SIZE, quiet, sd_pipeline, tiny_pipeline

from noiseopt import CNO, BestOfN, EarlyStopping, ReNO, TimeBudget, optimize_noise
from noiseopt.callbacks import History, NoiseCallback, NoiseState, StepImages
from noiseopt.callbacks.early_stopping import seconds_in

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def run(callbacks, prompt="a", method=None, **arguments):
    method = method or ReNO(rewards=brightness, steps=5)
    seed = torch.Generator().manual_seed(0)
    return optimize_noise(
        tiny_pipeline("sd"), prompt, method, callbacks=callbacks, generator=seed, **ARGUMENTS, **arguments
    )


def state_with(losses: torch.Tensor) -> NoiseState:
    state = NoiseState(None, [""] * len(losses), 10, torch.zeros(len(losses), 1, 2, 2))
    state.best = dataclasses.replace(state.best, loss=losses)
    return state


def test_a_callback_sees_each_evaluation_and_the_ends_of_the_run():
    events = []

    class Watch(NoiseCallback):
        def on_run_start(self, state):
            events.append("start")

        def on_step_end(self, state):
            assert state.images.shape == (1, 3, 32, 32) and not state.images.requires_grad
            assert state.scores["brightness"].shape == state.loss.shape == (1,)
            events.append(state.step)

        def on_run_end(self, state):
            events.append("end")

    run(Watch())
    assert events == ["start", 0, 1, 2, 3, 4, "end"]


def test_a_plain_function_may_stop_the_run():
    result = run(lambda state: state.step < 2)
    assert len(result.losses) == 3 and result.provenance["stopped"] == "callback"


@pytest.mark.parametrize("no", [False, numpy.bool_(False), torch.tensor(False)])
def test_false_of_numpy_and_torch_stops_too(no):
    assert len(run(lambda state: no).losses) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda state: state.best.noise.zero_(),
        lambda state: state.noise.add_(1),
        lambda state: state.images.mul_(255),
        lambda state: state.best.images.mul_(255),
    ],
)
def test_a_callback_that_writes_into_the_run_is_named(write):
    def meddler(state):
        write(state)

    with pytest.raises(ValueError, match="leaves noise and images as they are, but meddler wrote into them"):
        run(meddler)


def of_diffusers(pipe, step, timestep, callback_kwargs):
    return callback_kwargs


@pytest.mark.parametrize(
    ("callback", "got"),
    [
        (3, "int"),
        ([3], "int"),
        ("stop", "str"),
        (EarlyStopping, "the class EarlyStopping"),
        (of_diffusers, r"one that takes \(pipe, step, timestep, callback_kwargs\).*belongs to `callback_on_step_end=`"),
        (lambda: None, r"one that takes \(\)"),
    ],
)
def test_what_is_no_callback_is_refused_before_any_model_runs(callback, got):
    with pytest.raises(TypeError, match=rf"Expected a callback with `on_step_end\(state\)`.*but got {got}"):
        run(callback)


def test_early_stopping_counts_steps_without_progress():
    stopping, state = EarlyStopping(patience=2, min_delta=0.5), state_with(torch.tensor([5.0, 5.0]))
    stopping.on_run_start(state)
    for losses, active in [([5.0, 5.0], [1, 1]), ([4.0, 4.8], [1, 1]), ([3.0, 4.6], [1, 0]), ([2.9, 1.0], [1, 0])]:
        state.best = dataclasses.replace(state.best, loss=torch.tensor(losses))
        stopping.on_step_end(state)
        assert state.active.tolist() == [bool(flag) for flag in active]
    assert state.stopped is None
    stopping.on_step_end(state)
    assert state.stopped == "patience"


def test_a_stopped_sample_keeps_its_best_and_does_not_disturb_the_others():
    def stop_first(state):
        if state.step == 1:
            state.stop("callback", torch.tensor([True, False]))

    prompts, arguments = ["a", "b"], {"latents": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    stopped, whole = run(stop_first, prompts, **arguments), run(None, prompts, **arguments)
    assert stopped.losses[2:, 0].isnan().all() and not stopped.losses[:, 1].isnan().any()
    assert torch.equal(stopped.noise[1], whole.noise[1])
    assert stopped.best_step[0] <= 1
    assert stopped.best_loss[0] == stopped.losses[:2, 0].min()


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 1), (5.9, 1), (6.0, 2), (20.0, 6)])
def test_a_time_budget_begins_no_step_that_would_end_later(seconds, steps, monkeypatch):
    """Each evaluation takes 3 seconds by a clock that only they move; the first one is always made."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(images, prompts):
        now[0] += 3.0
        return images.mean((1, 2, 3))

    result = run(TimeBudget(seconds), method=BestOfN(rewards=slow, steps=50))
    assert len(result.losses) == steps and result.provenance["stopped"] == "time budget"


def test_a_time_budget_keeps_time_for_what_closes_the_run(monkeypatch):
    """Five steps of 1 second after one of 2; the time of two more like the first is kept."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    budget, state = TimeBudget(11.0, closing=2), state_with(torch.zeros(1))
    budget.on_run_start(state)
    for took in (2.0, *[1.0] * 5):
        assert not state.stopped
        now[0] += took
        budget.on_step_end(state)
    assert state.stopped == "time budget" and state.elapsed == 7.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("20s", 20), ("2min", 120), ("1.5m", 90), ("500ms", 0.5), (" .5 h ", 1800), ("3.s", 3)]
)
def test_times(text, seconds):
    assert seconds_in(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["20", "s", "", "0s", "-1s", "20 seconds", "1e3s", "nan s", "9" * 400 + "s", "1min 5s"]
)
def test_texts_that_are_no_time_are_refused(text):
    with pytest.raises(ValueError, match="Expected a time above 0 such as '20s'"):
        seconds_in(text)


def test_patience_counts_in_each_start_anew_and_not_in_a_search():
    stopping, state = EarlyStopping(patience=2), state_with(torch.tensor([1.0, 1.0]))
    state.stage = "search"
    stopping.on_run_start(state)
    for stage, losses, active in [
        *[("search", [1.0, 1.0], [1, 1])] * 5,
        ("start 1", [3.0, 3.0], [1, 1]),
        ("start 1", [3.0, 2.0], [1, 1]),
        ("start 2", [9.0, 9.0], [1, 1]),
        ("start 2", [9.0, 8.0], [1, 1]),
        ("start 2", [9.5, 7.0], [0, 1]),
    ]:
        state.stage, state.loss = stage, torch.tensor(losses)
        stopping.on_step_end(state)
        assert state.active.tolist() == [bool(flag) for flag in active]


@pytest.mark.parametrize("make", [lambda: TimeBudget(0), lambda: EarlyStopping(0), lambda: StepImages(every=0)])
def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(ValueError, match="Expected"):
        make()


def test_history_is_a_table_of_plain_numbers(tmp_path):
    history = History()
    result = run(history, ["a", "b"])
    assert len(history.rows) == 2 * 5
    assert [row["loss"] for row in history.rows if row["sample"] == 1] == result.losses[:, 1].tolist()
    with open(tmp_path / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history.rows[0].keys())
        writer.writeheader()
        writer.writerows(history.rows)
    columns = {"step", "sample", "prompt", "seconds", "loss", "norm", "brightness"}
    assert set(history.rows[0]) == columns


def test_step_images_are_kept_and_written(tmp_path):
    images = StepImages(every=2, folder=tmp_path / "steps")
    result = run(images)
    assert sorted(images.images) == [0, 2, 4]
    assert torch.equal(images.images[0], result.initial_images)
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"step_00{step}_sample_0.png" for step in (0, 2, 4)]
    with Image.open(tmp_path / "steps" / names[0]) as image:
        pixels = (
            torch.tensor(list(image.get_flattened_data()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1) / 255
        )
    assert (pixels - result.initial_images[0]).abs().max() <= 0.5 / 255 + 1e-6


def test_the_progress_bar_obeys_the_pipeline(capsys):
    pipe = quiet(sd_pipeline())
    method = ReNO(rewards=brightness, steps=2)
    optimize_noise(pipe, "a", method, **ARGUMENTS)
    assert "Optimizing" not in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=False, ncols=100)
    optimize_noise(pipe, "a", method, **ARGUMENTS)
    shown = capsys.readouterr().err
    assert "Optimizing noise" in shown and "2/2" in shown and shown.count("1/1") == 0


@pytest.mark.parametrize("method", [ReNO(rewards={"red": 2.0, "green": 1.0}, steps=4), CNO(steps=2, window_size=2)])
def test_the_bar_shows_the_scores_of_the_best(method):
    """In their own units; a method without scores shows its loss."""
    pipe, text = tiny_pipeline("sd"), io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=text, mininterval=0)
    call = {"num_inference_steps": 2, "num_images_per_prompt": 2, **SIZE}
    result = optimize_noise(pipe, "a", method, generator=torch.Generator().manual_seed(0), **call)
    last = text.getvalue().split("\r")[-1]
    shown = {name: float(value) for name, value in re.findall(r"(\w+)=([-.\de]+)", last)}
    scores = result.best_scores or {"loss": result.losses.amin(0)}
    assert shown == pytest.approx({name: values.mean().item() for name, values in scores.items()}, rel=1e-3)
