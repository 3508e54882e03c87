"""Set rewards: pairwise diversity against its formula, references, and the two passes that large sets need."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_features import build_features

from noiseopt.rewards import (
    NonFiniteReward,
    PairwiseDistance,
    PairwiseDiversity,
    SetReward,
    TinyImage,
    find_set_reward,
    list_features,
    list_set_rewards,
    register_set_reward,
)
from noiseopt.rewards.sets.set_reward import SET_REWARDS

NAMES = list_features()


def random_images(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.rand(count, 3, 40, 33, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return 0.3 + 0.4 * noise


@pytest.fixture(params=list_set_rewards())
def set_reward(request: pytest.FixtureRequest) -> SetReward:
    """Every registered set reward, on the patches of an image."""
    return find_set_reward(request.param)(build_features("dinov2_patch"))


@pytest.mark.parametrize("name", NAMES)
def test_pairwise_is_the_mean_distance_of_all_pairs(name: str):
    reward, images = PairwiseDiversity(build_features(name)), random_images(4)
    distance = PairwiseDistance(reward.features)
    expected = [distance(a[None], b[None]).item() for a, b in itertools.combinations(images, 2)]
    assert reward(images).item() == pytest.approx(sum(expected) / 6, rel=1e-4, abs=1e-6)


def test_the_objective_of_never_too_late():
    """`2 / (B (B − 1)) Σ_{i<j} 1/P Σ_p [1 − cos(f_p(x_i), f_p(x_j))]`, restated with the broadcast it avoids."""
    features, images = build_features("dinov2_patch"), random_images(4)
    patches = features(images)
    matrix = (1 - F.cosine_similarity(patches[:, None], patches[None], dim=-1)).mean(-1)
    expected = 2 / (4 * 3) * matrix.triu(1).sum()
    torch.testing.assert_close(PairwiseDiversity(features)(images), expected, rtol=1e-5, atol=1e-6)


def test_a_set_reward_is_a_scalar_that_no_order_changes(set_reward: SetReward):
    images = random_images(4)
    value = set_reward(images)
    assert value.shape == () and value.dtype == torch.float32
    torch.testing.assert_close(set_reward(images.flip(0)), value)
    torch.testing.assert_close(set_reward(images[[2, 0, 3, 1]]), value)
    assert value > set_reward(torch.cat([images[:1]] * 4))


def test_the_gradient_agrees_with_finite_differences(set_reward: SetReward):
    exact, images = set_reward.double(), random_images(3, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(exact(images), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (exact(images + step * direction) for step in (1e-4, -1e-4))
    assert ((ahead - behind) / 2e-4).item() == pytest.approx(gradient.norm().item(), rel=0.01)


def test_references_count_and_get_no_gradient(set_reward: SetReward):
    images = random_images(3).requires_grad_()
    value = set_reward(images[2:], references=images[:2])
    torch.testing.assert_close(value, set_reward(images))
    (gradient,) = torch.autograd.grad(value, images)
    assert not gradient[:2].any() and gradient[2].any()
    kept = set_reward.features(images[:2])
    torch.testing.assert_close(set_reward.of_features(set_reward.features(images[2:]), kept), value)
    (cached,) = torch.autograd.grad(set_reward.of_features(set_reward.features(images[2:]), kept), images)
    torch.testing.assert_close(cached, gradient)


def test_two_passes_give_the_gradient_of_one(set_reward: SetReward):
    """All features without a graph, the gradient with respect to them, then one image at a time."""
    images = random_images(4).requires_grad_()
    (joint,) = torch.autograd.grad(set_reward(images), images)
    with torch.no_grad():
        features = set_reward.features(images)
    (direction,) = torch.autograd.grad(set_reward.of_features(features.requires_grad_()), features)
    for index, image in enumerate(images):
        (gradient,) = torch.autograd.grad((set_reward.features(image[None]) * direction[index]).sum(), images)
        torch.testing.assert_close(gradient[index], joint[index], rtol=1e-4, atol=1e-7)


def test_one_image_alone_is_refused(set_reward: SetReward):
    with pytest.raises(ValueError, match=r"Expected at least 2 images for the set reward .*but got 1\. Generate"):
        set_reward(random_images(1))
    assert set_reward(random_images(2)[:1], random_images(2)[1:]).shape == ()


def test_the_value_is_within_its_bounds(set_reward: SetReward):
    images = random_images(5)
    for some in (images, images[:1].repeat(3, 1, 1, 1), torch.cat([images, images[:2]])):
        low, high = set_reward.bounds(len(some)) or (-torch.inf, torch.inf)
        assert low - 1e-6 <= set_reward(some).item() <= high + 1e-6


def test_half_precision_is_computed_in_float32_or_more(set_reward: SetReward):
    features = set_reward.features(random_images(4))
    exact = set_reward.of_features(features)
    for dtype in (torch.float16, torch.bfloat16):
        half = set_reward.of_features(features.to(dtype))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, set_reward.of_features(features.to(dtype).float()))
        torch.testing.assert_close(
            set_reward.of_features(features[:2], features[2:].to(dtype)), exact, rtol=0.05, atol=0
        )
    assert set_reward.of_features(features.double(), features).dtype == torch.float64


def test_features_of_references_must_fit(set_reward: SetReward):
    with pytest.raises(ValueError, match=r"features of the shape \(6, 8\) .*'\w+', but got \(6, 9\)\. Compare images"):
        set_reward.of_features(torch.ones(2, 6, 8), torch.ones(2, 6, 9))


def test_features_that_are_not_finite_are_refused(set_reward: SetReward):
    features = torch.rand(3, 6, 8)
    features[1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteReward, match=r"Expected finite features .*Load 'dinov2_patch' with"):
        set_reward.of_features(features)


def test_a_value_that_is_not_finite_is_refused():
    class Broken(SetReward):
        name = "broken"

        def score(self, features):
            return features.sum() / 0

    with pytest.raises(NonFiniteReward, match="Expected a finite value from the set reward 'broken', but got inf"):
        Broken(TinyImage())(random_images(2))
    with pytest.raises(NotImplementedError, match="`SetReward` does not implement `score`"):
        SetReward(TinyImage())(random_images(2))


def test_by_name_on_features_by_name(monkeypatch: pytest.MonkeyPatch):
    reward = find_set_reward("pairwise").from_pretrained("tiny_image")
    assert isinstance(reward, PairwiseDiversity) and isinstance(reward.features, TinyImage)
    with pytest.raises(ValueError, match=r"Expected a set reward out of \[.*'pairwise'.*Did you mean 'pairwise'"):
        find_set_reward("pairwis")
    monkeypatch.setattr(SET_REWARDS, "entries", dict(SET_REWARDS.entries))
    with pytest.raises(ValueError, match="'pairwise' is taken by `PairwiseDiversity`"):
        register_set_reward("pairwise")(SetReward)
