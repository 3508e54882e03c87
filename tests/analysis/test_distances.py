"""The table of distances against closed forms and plain loops."""

import itertools

import pytest
import torch

from noiseopt.analysis.distances import (
    INITIAL_IMAGE,
    INITIAL_OPTIMIZED,
    OPTIMIZED_IMAGE,
    RANDOM_IMAGE,
    TWO_INITIAL,
    l2_table,
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_random_noises_are_the_square_root_of_twice_their_size_apart():
    noise = normal(0, 32, 4, 64, 64)
    assert l2_table(noise, noise)[TWO_INITIAL] == pytest.approx((2 * 16384) ** 0.5, rel=1e-3)


def test_rows_are_means_over_samples_and_pairs():
    z, moved, before, after = (normal(seed, 5, 2, 4, 4) for seed in range(4))
    z[3] = z[0]  # one seed for two prompts: no pair of different noises
    pairs = [(i, j) for i, j in itertools.permutations(range(5), 2) if {i, j} != {0, 3}]
    rows = l2_table(z, moved, before, after)
    expected = {
        INITIAL_OPTIMIZED: [(z[i] - moved[i]).norm() for i in range(5)],
        TWO_INITIAL: [(z[i] - z[j]).norm() for i, j in pairs],
        INITIAL_IMAGE: [(z[i] - before[i]).norm() for i in range(5)],
        OPTIMIZED_IMAGE: [(moved[i] - after[i]).norm() for i in range(5)],
        RANDOM_IMAGE: [(z[i] - before[j]).norm() for i, j in pairs],
    }
    assert rows == pytest.approx({name: float(sum(each) / len(each)) for name, each in expected.items()}, rel=1e-5)


def test_rows_that_are_not_known_are_left_out():
    z = normal(0, 3, 2, 4, 4)
    assert set(l2_table(z, z)) == {INITIAL_OPTIMIZED, TWO_INITIAL}
    assert set(l2_table(z[:1], z[:1], z[:1])) == {INITIAL_OPTIMIZED, INITIAL_IMAGE}
    assert set(l2_table(z[:1].expand_as(z), z)) == {INITIAL_OPTIMIZED}
