"""What holds for every registered reward."""

from collections.abc import Callable

import pytest
import torch

from noiseopt.rewards import AutoReward, CLIPScore, Reward, check_gradient, list_rewards

PROMPTS = ["a red cube", "two green cars"]


@pytest.fixture(params=list_rewards())
def reward(request: pytest.FixtureRequest, make_clip_score: Callable[..., CLIPScore]) -> Reward:
    """A reward with weights is built from tiny random modules, one without is loaded as a user would."""
    tiny = {"clipscore": make_clip_score}
    return tiny[request.param]() if request.param in tiny else AutoReward.from_pretrained(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def test_scores_are_float32_one_per_image_and_within_range(reward: Reward, images: torch.Tensor):
    scores = reward(images, PROMPTS)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    assert reward(images.bfloat16(), PROMPTS).dtype == torch.float32
    assert scores[0] != scores[1]
    if reward.range is not None:
        assert reward.range[0] <= scores.min() and scores.max() <= reward.range[1]


def test_is_frozen_deterministic_and_stays_in_evaluation_mode(reward: Reward, images: torch.Tensor):
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.train().modules())
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS))


def test_gradient_is_finite_and_not_zero_for_each_image(reward: Reward, images: torch.Tensor):
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    check_gradient(reward, height=40, width=56)


def test_a_batch_scores_as_its_images_do(reward: Reward, images: torch.Tensor):
    singles = [reward(image[None], prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(reward(images, PROMPTS), torch.cat(singles), rtol=1e-5, atol=1e-5)


def test_one_prompt_serves_the_whole_batch(reward: Reward, images: torch.Tensor):
    torch.testing.assert_close(reward(images, "a red cube"), reward(images, ["a red cube"] * 2))


def test_bfloat16_weights_stay_close_to_float32(reward: Reward, images: torch.Tensor):
    exact = reward(images, PROMPTS)
    torch.testing.assert_close(reward.bfloat16()(images, PROMPTS), exact, rtol=0.02, atol=1.0)


def test_refuses_images_that_are_not_in_0_to_1(reward: Reward, images: torch.Tensor):
    with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\].*-1 to 1"):
        reward(images.round() * 2 - 1, PROMPTS)


def test_refuses_another_number_of_prompts(reward: Reward, images: torch.Tensor):
    with pytest.raises(ValueError, match=f"Expected 2 prompts for reward '{reward.name}'.*but got 3"):
        reward(images, ["a", "b", "c"])


def test_asks_for_a_prompt_exactly_if_it_requires_one(reward: Reward, images: torch.Tensor):
    if reward.requires_prompt:
        with pytest.raises(ValueError, match="Expected a prompt for reward"):
            reward(images)
    else:
        torch.testing.assert_close(reward(images), reward(images, PROMPTS))


def test_bears_its_registered_name_and_states_a_licence_for_its_weights(reward: Reward):
    assert reward.name in list_rewards()
    assert reward.default_checkpoint is None or reward.license is not None
