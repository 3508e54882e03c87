"""DPP: its range, its determinant, and where its gradient vanishes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.rewards import (
    DPP,
    DPPPatch,
    Features,
    PairwiseDiversity,
    TinyImage,
    Vendi,
    VendiOrder2,
    VendiOrderInfinity,
    cosine_kernel,
    find_set_reward,
    list_set_rewards,
)


def dpp() -> DPP:
    return DPP(TinyImage())


def random_vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair_at(cosine: float) -> Tensor:
    """Two unit vectors of a given cosine."""
    return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)


@pytest.mark.parametrize(("count", "floor"), [(2, 0.792), (4, 0.580), (8, 0.396), (16, 0.255)])
def test_copies_give_the_floor_and_right_angles_give_1(count: int, floor: float):
    copies = random_vectors(1, 20).repeat(count, 1)
    assert dpp().of_features(copies).item() == pytest.approx(floor, abs=5e-4)
    assert dpp().of_features(copies).item() == pytest.approx(dpp().bounds(count)[0], abs=2e-6)
    assert dpp().of_features(torch.eye(count, 20)).item() == pytest.approx(1, abs=1e-6)
    assert dpp().bounds(count) == (pytest.approx(math.log(1 + count) / count / math.log(2)), 1.0)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_it_is_the_determinant_of_the_cosines(count: int):
    """On numpy's LU in float64, also where there are fewer dimensions than images; lengths do not count."""
    for width in (3, 30):
        vectors = random_vectors(count, width)
        units = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
        determinant = np.linalg.det(np.eye(count) * (1 + 1e-6) + units @ units.T)
        expected = math.log(determinant) / (count * math.log(2))
        lengths = torch.linspace(0.1, 9, count, dtype=torch.float64)[:, None]
        assert dpp().of_features(lengths * vectors).item() == pytest.approx(expected, rel=1e-12)
        assert dpp().of_features(vectors.float()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reward", [DPP, Vendi, VendiOrder2, VendiOrderInfinity])
def test_black_images_equal_one_another_and_no_other(reward):
    """Their pixels have no direction. The values are those of 2 groups of 2, and a black image gets no gradient."""
    gray = TinyImage()(torch.full((2, 3, 8, 8), 0.5))
    black = TinyImage()(torch.zeros(2, 3, 8, 8)).requires_grad_()
    score, expected = reward(TinyImage()).of_features, reward(TinyImage()).of_features(torch.eye(2).repeat(2, 1))
    torch.testing.assert_close(score(torch.cat([gray, black])), expected, rtol=1e-5, atol=1e-6)
    lowest, highest = reward(TinyImage()).bounds(2)
    assert score(black).item() == pytest.approx(lowest, abs=1e-5)
    assert score(torch.cat([gray[:1], black[:1]])).item() == pytest.approx(highest, abs=1e-5)
    (gradient,) = torch.autograd.grad(score(torch.cat([gray, black])), black)
    assert not gradient.any()


def test_patches_are_averaged():
    patches = random_vectors(4, 7, 10)
    each = [dpp().of_features(patches[:, position]) for position in range(7)]
    torch.testing.assert_close(dpp().of_features(patches), torch.stack(each).mean())
    assert {"dpp", "dpp_patch"} <= set(list_set_rewards())
    assert find_set_reward("dpp_patch") is DPPPatch and DPPPatch.default_features == "dinov2_patch"
    torch.testing.assert_close(DPPPatch(TinyImage()).of_features(patches), dpp().of_features(patches))


def test_the_diagonal_of_the_kernel_is_1():
    features = torch.stack([torch.zeros(5), torch.full((5,), 1e-9), torch.ones(5)])
    torch.testing.assert_close(cosine_kernel(features).diagonal(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 5), (4, 6), (6, 3), (3, 4, 5)], ids=str)
def test_gradient_matches_finite_differences(shape: tuple[int, ...]):
    assert torch.autograd.gradcheck(dpp().of_features, random_vectors(*shape).requires_grad_())


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.3, 0.9, 0.999])
def test_gradient_of_a_pair_in_closed_form(cosine: float):
    """ln(4 − c²) / (2 ln 2) of cosine c; the gradient to each vector has the norm |c| √(1 − c²) / ((4 − c²) ln 2)."""
    vectors = pair_at(cosine).requires_grad_()
    value = dpp().of_features(vectors)
    assert value.item() == pytest.approx(math.log(4 - cosine**2) / (2 * math.log(2)), abs=2e-6)
    (gradient,) = torch.autograd.grad(value, vectors)
    expected = abs(cosine) * math.sqrt(1 - cosine**2) / ((4 - cosine**2) * math.log(2))
    assert gradient.norm(dim=1).tolist() == pytest.approx([expected, expected], rel=1e-5, abs=1e-12)


def test_at_copies_only_the_lengths_have_a_gradient():
    """2 / ((1 + B) √B ln 2) = .289 of B = 4 unit vectors, all of it along themselves: of features it is 0."""
    units = F.normalize(random_vectors(1, 9), dim=1).repeat(4, 1).requires_grad_()
    free = torch.logdet(torch.eye(4) + units @ units.T) / (4 * math.log(2))
    (along,) = torch.autograd.grad(free, units)
    assert along.norm().item() == pytest.approx(2 / (5 * 2 * math.log(2)), rel=1e-9)
    assert along.norm().item() == pytest.approx(0.29, abs=5e-3)
    (gradient,) = torch.autograd.grad(dpp().of_features(units), units)
    assert gradient.norm().item() < 1e-9
    slightly_apart = (units.detach() + 1e-3 * random_vectors(4, 9)).requires_grad_()
    (gradient,) = torch.autograd.grad(dpp().of_features(slightly_apart), slightly_apart)
    assert gradient.norm().item() > 1e-4


def test_one_image_apart_is_worth_less_than_in_the_mean_of_pairs():
    """Four images of one to four kinds at right angles to one another: det(I + K) is 5, 8, 9, 12 and 16."""
    kinds = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3]]
    scores = [dpp().of_features(torch.eye(4)[each]).item() for each in kinds]
    expected = [math.log(determinant) / (4 * math.log(2)) for determinant in (5, 8, 9, 12, 16)]
    assert scores == pytest.approx(expected, abs=2e-6)
    shares = [(score - scores[0]) / (1 - scores[0]) for score in scores]
    assert shares == pytest.approx([0, 0.40, 0.51, 0.75, 1], abs=0.005)
    pairs = [PairwiseDiversity(Features()).of_features(torch.eye(4)[each]).item() for each in kinds]
    assert pairs == pytest.approx([0, 3 / 6, 4 / 6, 5 / 6, 1])
