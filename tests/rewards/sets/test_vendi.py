"""Vendi as a reward: its range, closed forms, the vendi-score package, and its gradient."""

import math

import pytest
import torch
from torch import Tensor

from noiseopt.rewards import TinyImage, Vendi, VendiOrder2, VendiOrderInfinity, find_set_reward, vendi_score

ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, math.inf]


def vendi(order: float | None = None) -> Vendi:
    return Vendi(TinyImage(), order)


def random_vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def entropy_number(shares: list[float], order: float) -> float:
    """`(Σ p^q)^(1 / (1 − q))` and its limits."""
    if order == 1:
        return math.exp(-sum(p * math.log(p) for p in shares if p))
    return 1 / max(shares) if order == math.inf else sum(p**order for p in shares if p) ** (1 / (1 - order))


@pytest.mark.parametrize("order", ORDERS)
def test_it_counts_from_1_to_all(order: float):
    assert vendi(order).of_features(random_vectors(1, 9).repeat(5, 1)).item() == pytest.approx(1, rel=1e-9)
    assert vendi(order).of_features(torch.eye(5, 9)).item() == pytest.approx(5)
    assert vendi(order).bounds(5) == (1.0, 5.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cosine", [-0.7, 0.0, 0.4, 0.95])
def test_two_images_in_closed_form(order: float, cosine: float):
    """Eigenvalues (1 ± c) / 2."""
    vectors = torch.tensor([[1.0, 0.0], [3 * cosine, 3 * math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    expected = entropy_number([(1 + cosine) / 2, (1 - cosine) / 2], order)
    assert vendi(order).of_features(vectors).item() == pytest.approx(expected, rel=1e-9)


def test_the_table_of_equally_similar_images():
    """Sets of 4 of mean similarity .75, .55 and .47 are 2.0, 2.75 and 3.04 images."""
    for similarity, count in [(0.75, 2.0), (0.55, 2.75), (0.47, 3.04)]:
        kernel = (1 - similarity) * torch.eye(4, dtype=torch.float64) + similarity
        assert vendi().of_features(torch.linalg.cholesky(kernel)).item() == pytest.approx(count, abs=0.05)


def test_order_2_is_that_of_the_norm_of_the_kernel():
    vectors = random_vectors(6, 11)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    expected = 1 / (units @ units.T / 6).norm() ** 2
    torch.testing.assert_close(VendiOrder2(TinyImage()).of_features(vectors), expected, rtol=1e-12, atol=0)
    shares = torch.linalg.eigvalsh(units @ units.T / 6).tolist()
    assert vendi(2).of_features(vectors).item() == pytest.approx(entropy_number(shares, 2), rel=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_images_does_not_count(order: float):
    vectors = random_vectors(7, 10)
    value = vendi(order).of_features(vectors)
    torch.testing.assert_close(vendi(order).of_features(vectors[torch.randperm(7)]), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_the_metric_and_patches_are_averaged(order: float):
    patches = random_vectors(4, 6, 10)
    expected = torch.stack([vendi_score(patches[:, position], order) for position in range(6)]).mean()
    torch.testing.assert_close(vendi(order).of_features(patches), expected)


def test_equals_the_vendi_score_package():
    package = pytest.importorskip("vendi_score.vendi")
    for seed, (count, width) in enumerate([(2, 5), (4, 9), (12, 40), (30, 12)]):
        vectors = random_vectors(count, width, seed=seed)
        assert vendi().of_features(vectors).item() == pytest.approx(package.score_X(vectors.numpy()), rel=1e-10)
        units = vectors / vectors.norm(dim=1, keepdim=True)
        if count <= width:  # without zero eigenvalues, of which the package counts the positive rounding errors
            for order in ORDERS:
                theirs = package.score_K((units @ units.T).numpy(), q="inf" if order == math.inf else order)
                assert vendi(order).of_features(vectors).item() == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 5), (4, 6), (3, 4, 5)], ids=str)
def test_gradient_matches_finite_differences(order: float, shape: tuple[int, ...]):
    assert torch.autograd.gradcheck(vendi(order).of_features, random_vectors(*shape).requires_grad_())


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_is_finite_at_copies_and_at_right_angles(order: float):
    for vectors in (random_vectors(1, 6).repeat(4, 1), torch.eye(4, 6), torch.eye(4)[[0, 0, 1, 2]]):
        for dtype in (torch.float32, torch.float64):
            features = vectors.to(dtype).requires_grad_()
            (gradient,) = torch.autograd.grad(vendi(order).of_features(features), features)
            assert gradient.isfinite().all() and gradient.norm() < 1e-3


def test_registered_orders_and_names():
    assert [find_set_reward(name) for name in ("vendi", "vendi_2", "vendi_inf")] == [
        Vendi,
        VendiOrder2,
        VendiOrderInfinity,
    ]
    for reward, order in ((Vendi, 1.0), (VendiOrder2, 2.0), (VendiOrderInfinity, math.inf)):
        assert reward(TinyImage()).order == order and reward(TinyImage()).name == reward.name
    assert [vendi(order).name for order in (None, 0.5, 2, math.inf)] == ["vendi", "vendi_0.5", "vendi_2", "vendi_inf"]


@pytest.mark.parametrize("order", [0, -1.0, math.nan])
def test_an_order_without_a_gradient_is_refused(order: float):
    with pytest.raises(ValueError, match=r"Expected an order above 0 .*but got .*use `order=0\.1`"):
        vendi(order)
