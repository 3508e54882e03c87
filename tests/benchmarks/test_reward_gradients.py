"""The benchmark of reward sums: the ways agree; arithmetic of the table."""

import pytest
import reward_gradients  # pyright: ignore[reportMissingImports]
import torch

from noiseopt import RewardSum


def test_all_ways_give_the_same_gradient():
    rewards = RewardSum([(reward_gradients.build_reward("tiny", seed), 1.0 + seed) for seed in range(3)])
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = [way(rewards, images) for way in reward_gradients.WAYS.values()]
    assert found[0].norm() > 0
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-4, atol=1e-6 * found[0].abs().max().item())


def test_ratios_are_within_a_round():
    assert reward_gradients.ratio([1.0, 6.0], [2.0, 4.0]) == "1.00 [0.75–1.25]"
    assert reward_gradients.ratio([None], [None]) == "–"


@pytest.mark.slow
def test_a_short_run_has_every_row(capsys):
    found = reward_gradients.main(["--size", "tiny", "--side", "32", "--rounds", "2", "--rewards", "2"])
    printed = capsys.readouterr().out
    assert all(len(rows) == 2 and f"| {name} |" in printed for name, rows in found.items())
    difference = float(printed.split("difference of the gradients: ")[1].split()[0])
    assert difference < 1e-5
    kept = float(printed.split("text towers are dropped: ")[1].split()[0])
    assert 0.3 < kept < 1 and kept == pytest.approx(0.71, abs=0.1)
