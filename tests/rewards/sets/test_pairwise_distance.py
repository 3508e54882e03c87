"""Distances of all pairs against their formulas pair by pair, in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny_features import build_features

from noiseopt.rewards import PairwiseDistance, TinyImage, cosine_distance, l2_distance, squared_l2_distance


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pair_by_pair(distance, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([distance(x, y) for y in b]) for x in a])


@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=["vectors", "patches"])
def test_cosine_is_the_mean_over_patches(shape: tuple[int, ...]):
    a, b = vectors(3, *shape), vectors(4, *shape, seed=1)
    expected = pair_by_pair(lambda x, y: (1 - F.cosine_similarity(x, y, dim=-1)).mean(), a, b)
    torch.testing.assert_close(cosine_distance(a, b), expected)
    torch.testing.assert_close(cosine_distance(a, 3 * a).diagonal(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(cosine_distance(a, -a).diagonal(), torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=["vectors", "patches"])
def test_cosine_of_images_without_a_direction(shape: tuple[int, ...]):
    """They are at 0 from one another, and at 1, a right angle, from all others."""
    zeros, others = torch.zeros(2, *shape), vectors(3, *shape, dtype=torch.float32)
    torch.testing.assert_close(cosine_distance(zeros, zeros), torch.zeros(2, 2))
    torch.testing.assert_close(cosine_distance(zeros, others), torch.ones(2, 3))


def test_l2_and_its_square():
    a, b = vectors(3, 5, 7), vectors(4, 5, 7, seed=1)
    expected = pair_by_pair(lambda x, y: (x - y).square().sum(), a, b)
    torch.testing.assert_close(squared_l2_distance(a, b), expected)
    torch.testing.assert_close(l2_distance(a, b), expected.sqrt())


def test_l2_of_nearly_equal_images_is_exact_in_float32():
    """The root of rounding errors of a product would be 1e-3 here."""
    a = 1 + vectors(2, 3072, dtype=torch.float32)
    b = a + 1e-5
    found = l2_distance(a / 3072**0.5, b / 3072**0.5).diagonal()
    torch.testing.assert_close(found, torch.full((2,), 1e-5), rtol=0.05, atol=0)


@pytest.mark.parametrize("distance", [cosine_distance, l2_distance, squared_l2_distance])
def test_gradients_are_finite_also_between_equal_images(distance):
    a = vectors(3, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, a).sum(), a)
    assert gradient.isfinite().all() and gradient.any()
    same = vectors(1, 6).expand(3, 6).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(same, same).sum(), same)
    torch.testing.assert_close(gradient, torch.zeros(3, 6, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.autograd.gradcheck(distance, (a, vectors(2, 6, seed=3).requires_grad_()))


def test_n_images_and_m_others_are_encoded_once_each():
    features, seen = build_features("dinov2_patch"), []
    features.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.last_hidden_state)))
    distance = PairwiseDistance(features)
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert distance(images[:2], images[2:]).shape == (2, 3)
    assert seen == [2, 3]
    distance(images)
    assert seen == [2, 3, 5]


def test_between_equals_a_broadcast_of_patches():
    features = build_features("dinov2_patch")
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = features(images)
    expected = (1 - F.cosine_similarity(found[:, None], found[None], dim=-1)).mean(-1)
    torch.testing.assert_close(PairwiseDistance(features)(images), expected, rtol=1e-5, atol=1e-5)


def test_features_that_do_not_fit_together_are_refused():
    distance = PairwiseDistance(build_features("lpips"))
    with pytest.raises(ValueError, match=r"Expected features of the same shape for 'lpips'.*Resize the images"):
        distance(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 48, 40))
    assert PairwiseDistance(TinyImage())(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 48, 40)).shape == (1, 1)


def test_an_empty_set_has_no_distances():
    assert cosine_distance(torch.zeros(0, 5), torch.rand(2, 5)).shape == (0, 2)
    assert cosine_distance(torch.zeros(0, 3, 5), torch.rand(2, 3, 5)).shape == (0, 2)
