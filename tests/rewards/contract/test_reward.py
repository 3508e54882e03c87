"""The input and output checks of a reward, and plain callables as rewards."""

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noiseopt.rewards import (
    CallableReward,
    ColorChannel,
    NonDifferentiableReward,
    NonFiniteReward,
    Reward,
    check_gradient,
)

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.dropout(self.linear(images.mean((2, 3))))[:, 0]


class Scorer:
    differentiable = False
    requires_prompt = False
    range = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([float(image.numpy().max()) for image in images])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (brightness, "brightness"),
        (functools.partial(brightness), "brightness"),
        (lambda images, prompts: images.mean((1, 2, 3)), "reward"),
        (Scorer(), "Scorer"),
        (Head(), "Head"),
        (ColorChannel("red"), "red"),
    ],
)
def test_a_callable_is_a_reward_under_its_own_name(function, name: str):
    reward = CallableReward(function)
    assert reward.name == name
    assert reward(IMAGES, "a cat").shape == (2,)


def test_a_callable_gets_float32_pixels_and_one_prompt_per_image():
    seen = []
    CallableReward(lambda images, prompts: seen.append((images.dtype, prompts)) or images.mean((1, 2, 3)))(
        IMAGES.bfloat16(), "a cat"
    )
    assert seen == [(torch.float32, ["a cat", "a cat"])]


def test_a_callable_keeps_its_class_facts():
    reward = CallableReward(functools.partial(Scorer()))
    assert (reward.differentiable, reward.requires_prompt, reward.range) == (False, False, (0.0, 1.0))


def test_a_black_box_never_sees_a_graph():
    assert not CallableReward(Scorer())(IMAGES.clone().requires_grad_(), "a cat").requires_grad


def test_a_module_is_frozen_and_has_no_dropout():
    head = Head()
    reward = CallableReward(head)
    scores = reward(IMAGES.clone().requires_grad_(), "a cat")
    assert torch.equal(scores, reward(IMAGES, "a cat")) and reward.device == torch.device("cpu")
    scores.sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in head.parameters())
    assert head.training and head.dropout.training  # as it was


class Owner:
    """An object whose methods score with its module."""

    def __init__(self, model: Head):
        self.model = model

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.model(images, prompts)


def score_with(model: Head, images: Tensor, prompts: list[str]) -> Tensor:
    return model(images, prompts)


@pytest.mark.parametrize(
    "scorer",
    [
        lambda head: head.forward,
        lambda head: Owner(head),
        lambda head: Owner(head).__call__,
        lambda head: functools.partial(score_with, head),
        lambda head: functools.partial(Owner(head).__call__),
    ],
    ids=["method of a module", "object", "method of an object", "argument of a partial", "partial of a method"],
)
def test_a_module_behind_a_callable_is_frozen_and_has_no_dropout(scorer):
    head = Head()
    reward = CallableReward(scorer(head))
    assert torch.equal(reward(IMAGES, "a cat"), reward(IMAGES, "a cat"))
    assert list(reward.parameters()) == list(head.parameters())
    assert head.training and all(parameter.requires_grad for parameter in head.parameters())


def test_complex_scores_are_refused():
    reward = CallableReward(lambda images, prompts: torch.fft.fft2(images).mean((1, 2, 3)))
    with pytest.raises(ValueError, match="Expected real scores from reward 'reward', but got torch.complex64"):
        reward(IMAGES, "a cat")


@pytest.mark.parametrize("gradient", [False, True])
def test_a_reward_that_writes_into_its_images_has_its_own(gradient: bool):
    def writes(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mul_(3).clamp_(0, 1).mean((1, 2, 3))

    def reads(images: Tensor, prompts: list[str]) -> Tensor:
        return (3 * images).clamp(0, 1).mean((1, 2, 3))

    images, same = (IMAGES.clone().requires_grad_(gradient) for _ in range(2))
    found, expected = CallableReward(writes)(images, "a"), CallableReward(reads)(same, "a")
    assert torch.equal(found, expected) and torch.equal(images, IMAGES)
    if gradient:
        assert torch.equal(*(torch.autograd.grad(*pair)[0] for pair in ((found.sum(), images), (expected.sum(), same))))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(3, 8, 8), r"torch.float32 \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"torch.float32 \(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 \(1, 3, 8, 8\)"),
        ("image.png", "str"),
    ],
)
def test_refuses_what_is_no_image_batch(images, got: str):
    with pytest.raises(ValueError, match=rf"images for reward 'red' as a floating-point tensor .*but got {got}"):
        ColorChannel("red")(images)


def test_refuses_a_batch_without_images():
    with pytest.raises(ValueError, match=r"Expected at least one image .*reward 'red', but got \(0, 3, 4, 4\)"):
        ColorChannel("red")(torch.rand(0, 3, 4, 4))


def test_names_nan_pixels():
    with pytest.raises(NonFiniteReward, match=r"pixels in \[0, 1\] for reward 'red', but got NaN.*bfloat16"):
        ColorChannel("red")(torch.full((1, 3, 4, 4), float("nan")))


def test_refuses_images_in_minus_1_to_1_and_another_number_of_prompts():
    with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\].*-1 to 1"):
        ColorChannel("red")(torch.tensor([-1.0, 1.0, 1.0])[None, :, None, None])
    with pytest.raises(ValueError, match="Expected 2 prompts for reward 'red'.*but got 3"):
        ColorChannel("red")(torch.zeros(2, 3, 4, 4), ["a", "b", "c"])


def test_small_overshoot_is_accepted():
    assert ColorChannel("red")(torch.full((1, 3, 4, 4), 1.04)).item() == pytest.approx(-1.04)


def test_refuses_prompts_that_are_no_strings():
    with pytest.raises(ValueError, match=r"as strings, but got \['str', 'int'\]"):
        CallableReward(brightness)(IMAGES, ["a cat", 3])


def test_refuses_none_for_a_callable_unless_it_allows_it():
    with pytest.raises(ValueError, match="Expected a prompt for reward 'brightness', but got None"):
        CallableReward(brightness)(IMAGES)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(2, 1), r"\(2, 1\)\. Drop the last dimension: `scores.squeeze\(1\)`"),
        (torch.zeros(()), r"\(\)\. Average each image alone"),
        (torch.zeros(2, 4, 4), r"\(2, 4, 4\)\. Average each image's values over everything but the batch"),
        (torch.zeros(3), r"\(3,\)"),
        ([0.0, 1.0], "list. Return `torch.as_tensor"),
        (np.zeros(2), "ndarray. Return `torch.as_tensor"),
        (0.5, "float. Return `torch.as_tensor"),
        (None, "NoneType"),
        ((torch.zeros(2), {}), r"tuple\. Return the scores alone: .*\[0\]"),
    ],
)
def test_refuses_scores_of_another_shape_and_says_what_to_change(output, got: str):
    with pytest.raises(ValueError, match=rf"'reward' to return a tensor of shape \(2,\).*but got {got}"):
        CallableReward(lambda images, prompts: output)(IMAGES, "a cat")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_scores_that_are_not_finite(value: float):
    with pytest.raises(NonFiniteReward, match=r"finite scores from reward 'reward', but those of images \[1\]"):
        CallableReward(lambda images, prompts: torch.tensor([0.0, value]))(IMAGES, "a cat")


def test_integer_scores_become_float32():
    def count(images: Tensor, prompts: list[str]) -> Tensor:
        return (images > 0.5).sum((1, 2, 3))

    assert CallableReward(count)(IMAGES, "a cat").dtype == torch.float32


def test_a_cut_graph_is_reported_at_the_first_evaluation():
    def cut(images: Tensor, prompts: list[str]) -> Tensor:
        return brightness(images.detach(), prompts)

    reward = CallableReward(cut)
    assert reward(IMAGES, "a cat").shape == (2,)
    with pytest.raises(NonDifferentiableReward, match="Expected a gradient from reward 'cut'.*detached"):
        reward(IMAGES.clone().requires_grad_(), "a cat")
    with torch.no_grad():
        reward(IMAGES.clone().requires_grad_(), "a cat")


def test_check_gradient_accepts_a_good_reward_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gradient(CallableReward(brightness))
    assert torch.equal(torch.get_rng_state(), state)


def test_check_gradient_names_what_is_wrong():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(NonDifferentiableReward, match="'Scorer' is not differentiable"):
        check_gradient(CallableReward(Scorer()))
    with pytest.raises(NonDifferentiableReward, match="'reward', but its scores do not depend on the images"):
        check_gradient(CallableReward(lambda images, prompts: weight.expand(len(images))))
    with pytest.raises(NonFiniteReward, match="finite gradient from reward 'reward'"):
        check_gradient(CallableReward(lambda images, prompts: (images * 0).sum((1, 2, 3)).sqrt()))
    with pytest.warns(UserWarning, match="gradient of reward 'reward' is zero on a random image"):
        check_gradient(CallableReward(lambda images, prompts: (images * 255).round().mean((1, 2, 3))))


def test_an_unfinished_subclass_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="does not implement `score`"):
        Reward()(IMAGES, "a cat")
    with pytest.raises(NotImplementedError, match="does not implement `encode_text`"):
        Reward().encode_prompt("a cat")


def test_the_call_of_a_reward_counts_and_not_a_method_forward_of_its_own():
    class Robot:
        def __call__(self, images, prompts):
            return images.flatten(1).mean(1)

        def forward(self):
            """Take a step."""

    assert CallableReward(Robot())(torch.full((2, 3, 8, 8), 0.5), ["a", "b"]).tolist() == [0.5, 0.5]
