"""Bootstrap intervals against closed forms."""

import math

import pytest
import torch

from noiseopt.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap


def binomial_quantile(level: float, count: int, share: float) -> int:
    """The least k with P(X <= k) >= level for X ~ Binomial(count, share)."""
    total = 0.0
    for k in range(count + 1):
        total += math.comb(count, k) * share**k * (1 - share) ** (count - k)
        if total >= level:
            return k
    return count


def test_equal_values_leave_no_doubt():
    assert bootstrap(torch.full((20,), 0.3, dtype=torch.float64)) == Estimate(*[pytest.approx(0.3)] * 3)


@pytest.mark.parametrize(("right", "count"), [(7, 20), (60, 100)])
def test_shares_have_binomial_intervals(right, count):
    """Resampled hits of a share p are Binomial(P, p): the interval matches its quantiles up to one hit."""
    estimate = bootstrap(torch.tensor([1.0] * right + [0.0] * (count - right)))
    assert estimate.value == pytest.approx(right / count)
    for bound, level in ((estimate.low, 0.025), (estimate.high, 0.975)):
        assert abs(bound * count - binomial_quantile(level, count, right / count)) <= 1


def test_means_have_normal_intervals():
    """For many values: mean ± 1.96 σ / √P with the sample's σ."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate, spread = bootstrap(values, resamples=4000), float(values.std(correction=0)) / 2000**0.5
    assert estimate.low == pytest.approx(float(values.mean()) - 1.96 * spread, abs=0.1 * spread)
    assert estimate.high == pytest.approx(float(values.mean()) + 1.96 * spread, abs=0.1 * spread)


def test_a_constant_advantage_is_certain_however_prompts_differ():
    theirs = torch.linspace(0, 1, 30, dtype=torch.float64)
    assert paired_bootstrap(theirs + 0.25, theirs) == Estimate(*[pytest.approx(0.25)] * 3)


def test_swapping_the_methods_mirrors_the_interval():
    ours, theirs = torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there, back = paired_bootstrap(ours, theirs), paired_bootstrap(theirs, ours)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))


def test_weights_make_a_ratio_of_sums():
    """Prompts without cases are ignored; with one value per case the ratio has no spread."""
    cases = torch.tensor([4, 0, 1, 3])
    assert bootstrap(0.5 * cases, cases) == Estimate(*[pytest.approx(0.5)] * 3)


def test_no_prompts_give_no_estimate():
    estimate = bootstrap(torch.empty(0))
    assert all(math.isnan(value) for value in (estimate.value, estimate.low, estimate.high))


def test_unpaired_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap(torch.zeros(3), torch.zeros(4))
