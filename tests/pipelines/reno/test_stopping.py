"""Runs that something else than the optimized reward ends: when, with which best, and resumed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import generator, redness
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import NoiseResult, ReNO, optimize_noise, shapes_world
from noiseopt.callbacks import StepImages
from noiseopt.demo import ONE_STEP
from noiseopt.pipelines.reno import stopping
from noiseopt.pipelines.reno.objective import ViewedRewards
from noiseopt.pipelines.reno.stopping import PATIENCE, StoppingRewards
from noiseopt.pipelines.reno.views import random_views
from noiseopt.rewards import AutoReward, RewardSum

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def paleness(images, prompts):
    return -redness(images, prompts)


class Scripted:
    """A held-out reward that gives each image a score by the number of the evaluation."""

    name = "scripted"

    def __init__(self, *scores: list[float]) -> None:
        self.scores, self.calls = scores, 0

    def __call__(self, images, prompts):
        if len(images) != len(self.scores):  # the trial on a random image, before the run
            return torch.zeros(len(images))
        self.calls += 1
        return torch.tensor([each[min(self.calls, len(each)) - 1] for each in self.scores])


def run(method: ReNO, count: int = 1, **call) -> NoiseResult:
    generators = [generator(seed) for seed in range(count)]
    return optimize_noise(tiny_pipeline("sd"), ["a"] * count, method, generator=generators, **CALL, **call)


@pytest.mark.parametrize("views", [0, 2])
def test_each_image_ends_once_its_held_out_score_has_not_risen(views):
    held_out = Scripted([1.0, 0.9], [1.0, 2.0, 1.5, 3.0, 2.9])
    result = run(ReNO(rewards=redness, steps=40, search=0, views=views, stop="held_out", held_out=held_out), count=2)
    assert result.losses.isfinite().sum(0).tolist() == [1 + PATIENCE, 4 + PATIENCE]
    assert result.provenance["stopped"] == "held out" and result.complete
    assert result.reports["held out scripted"]["initial"] == [1.0, 1.0]


def test_without_views_and_with_a_held_out_reward_the_value_is_that_of_the_image():
    result = run(ReNO(rewards=redness, steps=3, views=0, stop="held_out", held_out="blue"))
    assert torch.equal(-result.losses, result.scores["redness"])


def test_held_out_rewards_are_summed_with_their_weights_and_are_not_optimized():
    held_out = RewardSum({"red": 2.0, "blue": 1.0})
    method = ReNO(rewards=redness, steps=3, stop="held_out", held_out=held_out)
    result = run(method)
    assert list(result.scores) == ["redness"]
    total = held_out(result.initial_images, "a").total
    assert result.reports["held out red + blue"]["initial"] == pytest.approx(total.tolist(), abs=1e-5)
    alone = run(ReNO(rewards=redness, steps=3))
    assert torch.equal(result.scores["redness"], alone.scores["redness"])  # the same way


def test_views_end_a_run_whose_mean_over_them_no_longer_rises():
    result = run(ReNO(rewards=redness, learning_rate=0.0, steps=200, search=0, stop="views", views=1))
    assert result.provenance["stopped"] == "patience"
    assert len(result.losses) == result.best_step.item() + 1 + PATIENCE < 200


def test_the_best_is_that_of_the_mean_over_the_views():
    images = StepImages()
    result = run(ReNO(rewards=redness, steps=4, stop="views", views=3), callbacks=images)
    own = torch.stack([redness(images.images[step], None) for step in range(4)])
    torch.testing.assert_close(result.scores["redness"], own)  # scores are those of the image
    assert not torch.allclose(-result.losses, own, atol=1e-4)  # also at the last step, which has no gradient
    assert result.best_step.item() == result.losses.argmin(0).item()


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("views", [4, 0])
def test_value_is_the_mean_over_the_views_and_the_gradient_stays(views, gradient):
    images = torch.rand(3, 3, 16, 16, generator=generator())
    sample: Any = SimpleNamespace(
        images=images.requires_grad_(gradient), prompts=["a"] * 3, seeds=[1, 2, 3], chunk_size=2
    )
    loss, scores = StoppingRewards({redness: 2.0, "blue": 0.0}, views).evaluate(sample)
    expected = torch.stack([2 * redness(view, []) for view in random_views(images, 4, sample.seeds)]).mean(0)
    torch.testing.assert_close(-loss, expected)
    torch.testing.assert_close(scores["redness"], redness(images, []))
    if gradient:
        other, _ = ViewedRewards({redness: 2.0}, views).evaluate(sample)
        found, usual = (torch.autograd.grad(each.sum(), images)[0] for each in (loss, other))
        assert torch.equal(found, usual)


def test_after_a_search_the_starts_are_stopped():
    held_out = Scripted([5.0, 4.0, 3.0, 2.0, 1.0])  # lower at each step of the search, which does not count
    method = ReNO(rewards=redness, steps=40, views=1, search=3, stop="held_out", held_out=held_out)
    result = run(method)
    (first,) = result.reports["search"]["first_steps"]
    assert first >= 3 and len(result.losses) == first + 1 + PATIENCE


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "settings", [{"stop": "views"}, {"stop": "held_out", "held_out": paleness}], ids=lambda each: each["stop"]
)
def test_a_resumed_run_ends_where_it_would_have(settings, tmp_path, monkeypatch):
    def interrupt(state):
        if state.step == 3:
            raise Stop

    monkeypatch.setattr(stopping, "PATIENCE", 4)
    rate = 0.0 if settings["stop"] == "views" else None  # then only chance lets the mean over the views rise
    method = ReNO(rewards=redness, learning_rate=rate, steps=30, views=1, **settings)
    known, path = run(method), tmp_path / "noise.safetensors"
    assert 5 <= len(known.losses) < 30
    with pytest.raises(Stop):
        run(method, callbacks=interrupt, save_noise_to=path)
    found = run(method, resume_from=path)
    assert torch.equal(found.losses, known.losses) and torch.equal(found.noise, known.noise)
    assert found.reports == known.reports and found.provenance["stopped"] == known.provenance["stopped"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "view"}, r"Expected `stop` to be one of \('held_out', 'views', None\), but got 'view'"),
        ({"stop": "held_out"}, 'Expected `stop="held_out"` and `held_out` together.*held_out=None'),
        ({"held_out": "red"}, 'Expected `stop="held_out"` and `held_out` together.*got stop=None'),
        ({"stop": "views", "held_out": "red"}, 'Expected `stop="held_out"` and `held_out` together'),
        ({"stop": "held_out", "held_out": "rde"}, "Expected a reward out of .*Did you mean 'red'"),
        ({"stop": "held_out", "held_out": {"blue": 1.0, "green": 0.1}}, "not optimized, but 'blue' is"),
        ({"stop": "held_out", "held_out": redness}, "not optimized, but <function redness"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_model_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        run(ReNO(rewards={redness: 1.0, "blue": 1.0}, **settings))


def test_a_held_out_reward_is_tried_and_asked_for_its_prompt_before_a_model_runs():
    def broken(images, prompts):
        raise RuntimeError("no such thing")

    with pytest.raises(ValueError, match="Expected reward 'broken' to score a random image.*no such thing"):
        run(ReNO(rewards=redness, stop="held_out", held_out=broken))
    asks = [StoppingRewards("red", 1, RewardSum(reward)).requires_prompt for reward in (redness, "blue")]
    assert asks == [RewardSum(redness).requires_prompt, False]


def test_a_reader_of_the_shapes_world_ends_the_run_of_its_reward():
    pipe = shapes_world.load("turbo")
    pipe.set_progress_bar_config(disable=True)
    rewards = {name: AutoReward.from_pretrained(shapes_world.path(name)) for name in ("clip", "vqa")}
    held_out = StepImages()
    method = ReNO(rewards=rewards["clip"], steps=80, search=0, stop="held_out", held_out=rewards["vqa"])
    prompt = "a red circle left of a blue star"
    result = optimize_noise(pipe, prompt, method, generator=generator(), callbacks=held_out, **ONE_STEP)
    steps = sorted(held_out.images)
    read = torch.cat([rewards["vqa"](held_out.images[step], prompt) for step in steps])
    assert len(steps) == len(result.losses) < 80
    assert read.argmax().item() == len(steps) - 1 - PATIENCE
