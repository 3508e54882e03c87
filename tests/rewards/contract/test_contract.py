"""What holds for every registered reward."""

import copy

import pytest
import torch
from tiny_rewards import TINY, build_reward, without_tiny_model

from noiseopt.rewards import NonDifferentiableReward, Reward, check_gradient, list_rewards

PROMPTS = ["a red cube", "two green cars"]
SIZES = [(40, 56), (57, 33), (64, 64)]


@pytest.fixture(params=list_rewards())
def reward(request: pytest.FixtureRequest) -> Reward:
    return build_reward(request.param)


@pytest.fixture
def differentiable(reward: Reward) -> Reward:
    if not reward.differentiable:
        pytest.skip("gives no gradient, and says so: tested below")
    return reward


@pytest.fixture
def images() -> torch.Tensor:
    return random_images(40, 56)


def random_images(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two images away from 0 and 1, so that no clamp takes part in a finite difference."""
    noise = torch.rand(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return 0.3 + 0.4 * noise


def test_every_reward_with_weights_has_a_tiny_model():
    assert set(list_rewards()) >= TINY.keys()
    assert not without_tiny_model()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_are_float32_one_per_image_and_within_range(reward: Reward, size: tuple[int, int]):
    images = random_images(*size)
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


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_is_finite_and_not_zero_for_each_image(differentiable: Reward, size: tuple[int, int]):
    images = random_images(*size).requires_grad_()
    (gradient,) = torch.autograd.grad(differentiable(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    check_gradient(differentiable, height=size[0], width=size[1])


def test_gradient_agrees_with_finite_differences_in_float64(differentiable: Reward):
    """Along the gradient itself, where the difference is largest. Some models do part of their work in float32."""
    reward, images = differentiable.double(), random_images(40, 33, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward.score(images + step * direction, PROMPTS).sum() for step in (1e-3, -1e-3))
    assert ((ahead - behind) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_without_a_gradient_it_says_so(reward: Reward, images: torch.Tensor):
    if not reward.differentiable:
        assert not reward(images.requires_grad_(), PROMPTS).requires_grad
        with pytest.raises(NonDifferentiableReward, match=f"'{reward.name}' is not differentiable"):
            check_gradient(reward)


def test_a_score_depends_on_its_own_image_and_prompt_alone(reward: Reward, images: torch.Tensor):
    both = reward(images, PROMPTS)
    singles = [reward(image[None], prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(both, torch.cat(singles), rtol=1e-4, atol=1e-6)
    other = reward(torch.stack([images[0], 1 - images[0]]), [PROMPTS[0], "x"])
    torch.testing.assert_close(other[0], both[0], rtol=1e-4, atol=1e-6)


def test_a_prompt_longer_than_the_context_is_cut(reward: Reward, images: torch.Tensor):
    scores = reward(images, "a red cube on a table in a room " * 40)
    assert scores.isfinite().all()


def test_bfloat16_weights_stay_within_5_percent_of_float32(reward: Reward, images: torch.Tensor):
    exact = reward(images, PROMPTS)
    half = copy.deepcopy(reward).bfloat16()(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


def test_the_validation_of_the_base_class_is_not_overridden(reward: Reward):
    assert type(reward).forward is Reward.forward


def test_asks_for_a_prompt_exactly_if_it_requires_one(reward: Reward, images: torch.Tensor):
    if reward.requires_prompt:
        with pytest.raises(ValueError, match="Expected a prompt for reward"):
            reward(images)
    else:
        torch.testing.assert_close(reward(images), reward(images, PROMPTS))


def test_bears_its_registered_name_and_states_the_facts_of_its_weights(reward: Reward):
    assert reward.name in list_rewards()
    if reward.default_checkpoint is not None:
        assert reward.license and reward.parameter_count


def test_the_text_encoder_can_be_dropped_where_there_is_one(reward: Reward, images: torch.Tensor):
    before, size = reward(images, PROMPTS), sum(p.numel() for p in reward.parameters())
    reward.drop_text_encoder(PROMPTS)
    assert torch.equal(reward(images, PROMPTS), before)
    if not reward.text_modules:
        assert sum(p.numel() for p in reward.parameters()) == size
        return
    assert sum(p.numel() for p in reward.parameters()) < size
    with pytest.raises(ValueError, match=f"'{reward.name}' encoded before its text encoder was dropped, but got 'new'"):
        reward(images, "new")
