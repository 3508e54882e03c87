"""Weights that depend on the prompt: alone, in a sum, and as the preset "auto"."""

import copy
import json
import pickle
from typing import get_args

import pytest
import torch
from problems import generator
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import BestOfN, ReNO, optimize_noise
from noiseopt.rewards import Reward, RewardSum, WeightByKind
from noiseopt.rewards.contract import registry
from noiseopt.rewards.contract.prompt_kind import PromptKind

COLOR, NUMBER, PLAIN = "a red cat", "three cats", "a cat"
IMAGES = torch.rand(3, 3, 8, 8, generator=generator())
BY_KIND = {**dict.fromkeys(get_args(PromptKind), 1.0), "color": 2.0, "numeracy": 0.0}


def members() -> dict[str, type[Reward]]:
    """Small rewards by the names of the preset."""
    scores = {
        "hpsv2.1": lambda self, images, prompts: images[:, 0].mean((1, 2)),
        "imagereward": lambda self, images, prompts: images[:, 1].square().mean((1, 2)),
        "clip_flant5": lambda self, images, prompts: images[:, 2].sin().mean((1, 2)),
    }
    return {name: type(name, (Reward,), {"name": name, "score": score}) for name, score in scores.items()}


@pytest.fixture
def small_members(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry.REWARDS, "entries", members())


def test_as_a_number_it_is_that_of_a_general_prompt_and_it_can_be_scaled_and_copied():
    weight = WeightByKind(BY_KIND)
    assert weight == 1.0 and weight.of([COLOR, NUMBER, PLAIN], 3) == [2.0, 0.0, 1.0]
    assert weight.of(COLOR, 2) == [2.0, 2.0] and weight.of(None, 2) == [1.0, 1.0]
    for scaled in (3 * weight, weight * 3.0):
        assert scaled == 3.0 and scaled.of(COLOR, 1) == [6.0]
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert twin.by_kind == BY_KIND


def test_it_knows_all_kinds():
    with pytest.raises(ValueError, match="Expected a weight for each of .*'general'.*but got .'color'"):
        WeightByKind({"color": 1.0})


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "2", None])
def test_its_weights_are_numbers_of_at_least_zero(bad):
    with pytest.raises(ValueError, match="finite weight of at least 0 for the kind 'color', but got"):
        WeightByKind({**BY_KIND, "color": bad})
    with pytest.raises(TypeError, match="dict of weights by the kind of the prompt, but got 0.5"):
        WeightByKind(0.5)


def test_a_weight_of_zero_for_general_prompts_is_no_weight_of_zero():
    """Neither a sum nor the gradient through views leaves the reward out."""
    weight = WeightByKind({**dict.fromkeys(BY_KIND, 0.0), "color": 2.0})
    assert weight and not WeightByKind(dict.fromkeys(BY_KIND, 0.0))
    images = IMAGES.clone().requires_grad_()
    total = RewardSum({"red": weight}).optimized()(images, [COLOR, NUMBER, PLAIN])
    total.total.sum().backward()
    assert [bool(each.any()) for each in images.grad] == [True, False, False]


@pytest.mark.parametrize("more", [{}, {"blue": 0.5}], ids=["alone", "in a sum"])
def test_each_image_has_the_weight_of_its_own_prompt(more):
    images = IMAGES.clone().requires_grad_()
    total = RewardSum({"red": WeightByKind(BY_KIND), **more})(images, [COLOR, NUMBER, PLAIN])
    red, blue = (RewardSum(name)(IMAGES).total for name in ("red", "blue"))
    torch.testing.assert_close(total.components["red"], red)  # unweighted
    torch.testing.assert_close(total.total, torch.tensor([2.0, 0.0, 1.0]) * red + more.get("blue", 0) * blue)
    total.total.sum().backward()
    of_red = torch.tensor([[[1.0]], [[-1.0]], [[-1.0]]]).expand(3, 8, 8) / 64
    expected = torch.tensor([2.0, 0.0, 1.0])[:, None, None, None] * of_red + more.get("blue", 0) * of_red.flip(0)
    torch.testing.assert_close(images.grad, expected)


def test_an_image_does_not_depend_on_the_rest_of_the_batch_or_on_chunks():
    rewards, prompts = RewardSum({"red": WeightByKind(BY_KIND), "blue": 1.0}), [COLOR, NUMBER, PLAIN]
    together = rewards(IMAGES, prompts).total
    torch.testing.assert_close(rewards(IMAGES, prompts, chunk_size=2).total, together)
    alone = [rewards(IMAGES[row : row + 1], prompts[row]).total for row in range(3)]
    torch.testing.assert_close(torch.cat(alone), together)


def test_a_sum_made_of_a_sum_keeps_the_weights():
    rewards = RewardSum({"red": WeightByKind(BY_KIND), "blue": 0.0})
    for twin in (RewardSum(rewards), rewards.like(dict(zip(rewards.names, rewards.rewards, strict=True)))):
        assert twin.describe() == {"red": BY_KIND, "blue": 0.0}
    assert rewards.optimized().describe() == {"red": BY_KIND}
    assert json.loads(json.dumps(rewards.describe())) == rewards.describe()


def test_auto_weighs_as_the_table_of_carinox(small_members):
    """Weights 5, 5 and 1 of 2·HPSv2.1, (ImageReward + 3) / 6 and VQAScore, times those of `assets/weights.json`."""
    hps, image_reward, vqa = (RewardSum(name)(IMAGES, "").total for name in members())
    factors = torch.tensor([[0.4, 1.06, 1.14], [1.02, 1.05, 0.93], [0.59, 0.94, 1.34]])  # color, numeracy, overall
    released = torch.stack([5 * 2 * hps, 5 * (image_reward + 3) / 6, vqa])
    found = RewardSum("auto")(IMAGES, [COLOR, NUMBER, PLAIN]).total
    offset = 5 * 3 / 6 * factors[:, 1]
    torch.testing.assert_close(found, (factors.T * released).sum(0) - offset)


def test_presets_stand_beside_other_rewards(small_members, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry.REWARDS.entries, "other", type("other", (Reward,), {"name": "other"}))
    both = RewardSum({"auto": 2.0, "other": 1.0})
    assert both.names == ["hpsv2.1", "imagereward", "clip_flant5", "other"]
    assert both.describe()["hpsv2.1"]["color"] == pytest.approx(2 * 10 * 0.4) and both.weights["other"] == 1.0
    assert RewardSum("auto", [2.0]).describe() == RewardSum({"auto": 2.0}).describe()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("atuo", "Expected a reward out of .*'auto'.*but got 'atuo'. Did you mean 'auto'"),
        ({"auto": -1.0}, "Expected a weight of at least 0 for reward 'hpsv2.1'"),
        ({"auto": "much"}, "Expected a finite number as the weight of reward 'hpsv2.1', but got 'much'"),
    ],
)
def test_mistakes_are_named(rewards, message):
    with pytest.raises(ValueError, match=message):
        RewardSum(rewards)


def test_a_run_scores_each_image_by_the_weights_of_its_prompt(small_members):
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    prompts = [COLOR, PLAIN]
    method = ReNO(rewards="auto", steps=3, views=0)
    result = optimize_noise(tiny_pipeline("sd"), prompts, method, generator=[generator(0), generator(1)], **call)
    weights = torch.tensor([[10 * 0.4, 5 / 6 * 1.06, 1.14], [10 * 0.59, 5 / 6 * 0.94, 1.34]])
    scores = torch.stack([result.scores[name] for name in members()], -1)
    torch.testing.assert_close(-result.losses, (weights * scores).sum(-1))
    assert (result.losses.amin(0) < result.losses[0]).all()
    alone = optimize_noise(tiny_pipeline("sd"), PLAIN, method, generator=generator(1), **call)
    torch.testing.assert_close(alone.noise[0], result.noise[1], atol=1e-4, rtol=1e-4)
    assert result.provenance["objective"]["clip_flant5"]["color"] == pytest.approx(1.14)


def test_methods_without_a_gradient_take_it_too(small_members):
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": generator(), **SIZE}
    result = optimize_noise(tiny_pipeline("sd"), COLOR, BestOfN(rewards="auto", steps=2), **call)
    assert list(result.scores) == list(members())
