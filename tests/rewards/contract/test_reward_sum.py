"""The forms of `rewards=`, the weighted sum and its errors."""

import importlib
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import noiseopt
from noiseopt import shapes_world
from noiseopt.rewards import (
    DPP,
    AutoReward,
    CLIPScore,
    ColorChannel,
    NonDifferentiableReward,
    NonFiniteReward,
    Reward,
    RewardSum,
    SetRewardSum,
    TinyImage,
)
from noiseopt.rewards.contract import registry

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def black_box(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


black_box.differentiable = False  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("rewards", "weights"),
    [
        ("red", {"red": 1.0}),
        (brightness, {"brightness": 1.0}),
        (ColorChannel("blue"), {"blue": 1.0}),
        ({"red": 2, brightness: 0.5}, {"red": 2.0, "brightness": 0.5}),
        ([("red", 2.0), (brightness, 0.0)], {"red": 2.0, "brightness": 0.0}),
        ([["red", 2.0], "blue"], {"red": 2.0, "blue": 1.0}),
        (("red", brightness), {"red": 1.0, "brightness": 1.0}),
        (RewardSum({"red": 3.0, "blue": 1.0}), {"red": 3.0, "blue": 1.0}),
        (["red", brightness, "red", "red"], {"red": 1.0, "brightness": 1.0, "red_2": 1.0, "red_3": 1.0}),
    ],
)
def test_accepts_every_form(rewards, weights: dict[str, float]):
    total = RewardSum(rewards)
    assert total.weights == weights
    assert total.names == list(weights)
    output = total(IMAGES, "a cat")
    expected = sum(weight * output.components[name] for name, weight in weights.items())
    torch.testing.assert_close(output.total, expected)


def test_weights_can_stand_beside_a_list():
    assert RewardSum(["red", brightness], [2.0, 3.0]).weights == {"red": 2.0, "brightness": 3.0}


def test_a_folder_is_loaded_and_named_by_its_reward(clip_folder: Path):
    total = RewardSum({str(clip_folder): 0.01, clip_folder: 1.0}, dtype=torch.bfloat16)
    assert total.names == ["clipscore", "clipscore_2"]
    assert total.rewards[0].dtype == torch.bfloat16
    assert total.requires_prompt


def test_components_are_unweighted_and_detached_and_the_gradient_is_the_weighted_sum():
    images = IMAGES.clone().requires_grad_()
    output = RewardSum({"red": 2.0, "green": 0.5, "blue": 0.0})(images, None)
    assert output.total.dtype == torch.float32
    assert not any(scores.requires_grad for scores in output.components.values())
    torch.testing.assert_close(output.components["blue"], ColorChannel("blue")(IMAGES))
    output.total.sum().backward()
    expected = torch.tensor([2.0 - 0.5, 0.5 - 2.0, -2.5])[:, None, None].expand_as(images) / 32**2
    torch.testing.assert_close(images.grad, expected)


def smooth_rewards() -> list[Callable[[Tensor, list[str]], Tensor]]:
    """Rewards without symmetry, each with a graph of its own; the last couples nothing but bends most."""
    return [
        lambda images, prompts: images.square().mean((1, 2, 3)),
        lambda images, prompts: (3 * images).sin().mean((1, 2, 3)),
        lambda images, prompts: (images[:, 0] * images[:, 1]).exp().mean((1, 2)),
    ]


def test_gradient_and_value_are_those_of_the_joint_sum():
    weights, images = [2.0, 0.3, 7.0], IMAGES.double().requires_grad_()
    upstream = torch.tensor([1.0, -3.0])
    ours = RewardSum(smooth_rewards(), weights)(images, "a cat").total
    scores = [function(images, []) for function in smooth_rewards()]
    joint = sum(weight * score for weight, score in zip(weights, scores, strict=True))
    torch.testing.assert_close(ours.double(), joint, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad((ours * upstream).sum(), images)
    (expected,) = torch.autograd.grad((joint * upstream).sum(), images)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_graph_of_one_reward_is_gone_before_the_next_begins():
    alive, seen = [], []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append([reference() is not None for reference in alive])
        hidden = images * 2
        alive.append(weakref.ref(hidden))
        return hidden.square().mean((1, 2, 3))  # keeps `hidden` for the backward pass

    total = RewardSum([reward, reward, reward])(IMAGES.clone().requires_grad_(), "a cat").total
    assert seen == [[], [False], [False, False]]
    assert alive[2]() is None and total.requires_grad


def test_it_cannot_be_differentiated_twice():
    images = IMAGES.clone().requires_grad_()
    total = RewardSum(["red", "blue"])(images).total.sum()
    with pytest.raises(RuntimeError, match="Expected a first derivative"):
        torch.autograd.grad(total, images, create_graph=True)


def test_a_preset_has_the_weights_of_its_paper(monkeypatch: pytest.MonkeyPatch):
    def named(name: str) -> type[Reward]:
        return type(name, (Reward,), {"name": name, "score": lambda self, images, prompts: images.mean((1, 2, 3))})

    names = ["hpsv2.1", "imagereward", "clipscore", "pickscore"]
    monkeypatch.setattr(registry.REWARDS, "entries", {name: named(name) for name in names})
    total = RewardSum("reno")
    assert total.weights == {"hpsv2.1": 5.0, "imagereward": 1.0, "clipscore": 0.01, "pickscore": 0.05}
    torch.testing.assert_close(total(IMAGES, "a cat").total, 6.06 * brightness(IMAGES, []))


def test_text_encoders_are_dropped_where_there_are_any(make_clip_score: Callable[..., CLIPScore]):
    total = RewardSum([make_clip_score(), brightness])
    before = total(IMAGES, "a cat").total
    total.drop_text_encoders(["a cat", "a dog"])
    assert total.rewards[0].model.text_model is None
    assert torch.equal(total(IMAGES, "a cat").total, before)


def test_rewards_run_in_their_own_precision_and_the_sum_is_float32(make_clip_score: Callable[..., CLIPScore]):
    images = IMAGES.bfloat16().requires_grad_()
    output = RewardSum([(make_clip_score().bfloat16(), 0.01), (brightness, 1.0)])(images, "a cat")
    assert output.total.dtype == torch.float32
    output.total.sum().backward()
    assert images.grad is not None and images.grad.dtype == torch.bfloat16 and images.grad.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_images_are_moved_to_the_reward_and_scores_back(make_clip_score: Callable[..., CLIPScore]):
    images = IMAGES.clone().requires_grad_()
    total = RewardSum([make_clip_score().cuda(), brightness])(images, "a cat").total
    assert total.device == images.device
    total.sum().backward()
    assert images.grad is not None and images.grad.any()


def test_a_black_box_counts_but_gives_no_gradient():
    images = IMAGES.clone().requires_grad_()
    output = RewardSum({black_box: 1.0, brightness: 1.0})(images, "a cat")
    torch.testing.assert_close(output.total, 5 + brightness(IMAGES, []))
    output.total.sum().backward()
    assert images.grad is not None


def test_check_differentiable_names_the_black_boxes_that_are_optimized():
    total = RewardSum({black_box: 1.0, "red": 1.0})
    assert not total.differentiable
    with pytest.raises(
        NonDifferentiableReward, match=r"\['black_box'\] are not differentiable. Give them weight 0.*best-of"
    ):
        total.check_differentiable()
    reported_only = RewardSum({black_box: 0.0, "red": 1.0})
    assert reported_only.differentiable
    reported_only.check_differentiable(height=16, width=16)


def test_check_differentiable_tries_callables_at_the_given_size():
    sizes = []

    def cut(images: Tensor, prompts: list[str]) -> Tensor:
        sizes.append(tuple(images.shape))
        return brightness(images.detach(), prompts)

    total = RewardSum({cut: 1.0})
    total.check_differentiable()
    assert not sizes
    with pytest.raises(NonDifferentiableReward, match="from reward 'cut'"):
        total.check_differentiable(height=16, width=24)
    assert sizes == [(1, 3, 16, 24)]


def test_names_the_component_that_is_not_finite():
    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        return brightness(images, prompts) / 0

    with pytest.raises(NonFiniteReward, match="from reward 'broken'"):
        RewardSum({"red": 1.0, broken: 1.0})(IMAGES, "a cat")


def trl_reward(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


@pytest.mark.parametrize(
    ("rewards", "weights", "error", "message"),
    [
        ("clip-score", None, ValueError, "Expected a reward out of .*Did you mean 'clipscore'"),
        ({"red": -1.0}, None, ValueError, "at least 0 for reward 'red', but got -1.0. To minimize it.*-reward"),
        ([(brightness, float("nan"))], None, ValueError, "finite number as the weight of reward 'brightness'"),
        ({"red": float("inf")}, None, ValueError, "finite number as the weight of reward 'red'"),
        ([("red", "blue")], None, ValueError, "finite number as the weight of reward 'red', but got 'blue'"),
        ({"red": 0, "blue": 0}, None, ValueError, "all weights are 0"),
        ([], None, ValueError, "Expected at least one reward"),
        ({}, None, ValueError, "Expected at least one reward"),
        (None, None, TypeError, "Expected a reward name, .*but got None"),
        (["red", 1.0], None, TypeError, r"but got 1.0. Weighted rewards are written `{reward: weight}`"),
        ([("red", 1.0, 2.0)], None, ValueError, r"Expected \(reward, weight\) pairs"),
        (CLIPScore, None, TypeError, "got the class `CLIPScore`. Pass an instance"),
        (lambda images: images, None, TypeError, r"'reward' takes \(images\)\. Wrap it"),
        ({trl_reward: 1.0}, None, TypeError, r"'trl_reward' takes \(images, prompts, metadata\).*TRL"),
        ({"red": 1.0}, [1.0], ValueError, "Expected weights once"),
        (["red", "blue"], [1.0], ValueError, "Expected 2 weights, one per reward, but got 1"),
    ],
)
def test_errors_name_the_remedy(rewards, weights, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        RewardSum(rewards, weights)


def test_everything_is_checked_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CLIPScore, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="Expected a reward out of"):
        RewardSum({"clipscore": 1.0, "hpsv9": 1.0})
    with pytest.raises(ValueError, match="at least 0"):
        RewardSum({"clipscore": 1.0, "red": -1.0})


def test_a_copy_of_the_code_accepts_rewards_and_sums_of_the_original(
    make_clip_score: Callable[..., CLIPScore], monkeypatch: pytest.MonkeyPatch
):
    """A pipeline from the Hub carries its own copy of these classes."""
    parent = ModuleType("copied")
    parent.__path__ = noiseopt.__path__
    monkeypatch.setitem(sys.modules, "copied", parent)
    try:
        module = importlib.import_module("copied.rewards")
        original = RewardSum([(make_clip_score(), 2.0), ("red", 1.0)])
        for rewards in (original, [(make_clip_score(), 2.0), (ColorChannel("red"), 1.0)]):
            copy = module.RewardSum(rewards)
            assert copy.names == ["clipscore", "red"]
            assert torch.equal(copy(IMAGES, "a cat").total, original(IMAGES, "a cat").total)
    finally:
        for name in [name for name in sys.modules if name.startswith("copied.")]:
            del sys.modules[name]


def test_a_sum_is_shown_in_a_line():
    total = RewardSum({"red": 5.0, "brightness": 1.0})
    assert repr(total) == "RewardSum({'red': 5.0, 'brightness': 1.0})"
    assert repr(list(total.rewards)) == "[ColorChannel('red'), Brightness('brightness')]"
    clip = AutoReward.from_pretrained(shapes_world.path("clip"))
    assert repr(clip) == "CLIPScore('clipscore', float32 on cpu)"
    assert repr(SetRewardSum([(DPP(TinyImage()), None, 2.0)])) == "SetRewardSum({'dpp': 2.0})"
    assert repr(DPP(TinyImage())) == "DPP(TinyImage('tiny_image'))"
