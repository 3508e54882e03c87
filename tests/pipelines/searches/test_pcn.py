"""pCN: the law that its chains have, told by the Kolmogorov-Smirnov test, and the rule of acceptance."""

import math
from types import SimpleNamespace

import pytest
import torch
from problems import redness
from scipy.stats import kstest
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import PCN, optimize_noise
from noiseopt.pipelines.searches.pcn import PCNState, log_acceptance

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def draws(count: int, size: int, seed: int = 0) -> SimpleNamespace:
    """Noises `(count, 1, 1, size)` of one stream for all chains: it has what a chain asks of `CandidateNoise`."""
    stream = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(count, 1, 1, size, generator=stream, dtype=torch.float64)

    def uniform() -> torch.Tensor:
        return torch.rand(count, generator=stream, dtype=torch.float64)

    return SimpleNamespace(like=draw(), draw=draw, uniform=uniform)


def run(reward, moves: int, count: int = 3000, size: int = 4, beta=0.4, temperature=1.0, acceptance=None) -> PCNState:
    """Chains from Gaussian noises on, with `reward(noise) -> (B,)`."""
    fresh = draws(count, size)
    chain = PCNState(fresh, beta, temperature, acceptance)  # pyright: ignore[reportArgumentType]
    noise, active = fresh.like, torch.ones(count, dtype=torch.bool)
    for _ in range(moves + 1):
        chain.update(noise, -reward(noise), active)
        noise = chain.propose()
    return chain


def flat(noise: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(noise), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("acceptance", [None, 0.3])
def test_a_flat_reward_leaves_the_noise_gaussian_and_accepts_all(beta, acceptance):
    chain = run(flat, 25, beta=beta, acceptance=acceptance)
    assert (chain.accepted == 25).all() and (chain.proposals == 25).all()
    assert kstest(chain.noise.flatten(), "norm").pvalue > 0.01
    radii = chain.noise.flatten(1).square().sum(1)
    assert kstest(radii, "chi2", args=(4,)).pvalue > 0.01
    assert not torch.equal(chain.noise, draws(3000, 4).like)


def test_a_linear_reward_moves_the_mean_by_its_slope_over_the_temperature():
    """N(0, I)·exp(a·z / T) is N(a / T, I)."""
    slope = 0.6
    chain = run(lambda noise: slope * noise[:, 0, 0, 0], 120, temperature=0.5)
    assert kstest(chain.noise[:, 0, 0, 0], "norm", args=(slope / 0.5, 1)).pvalue > 0.01
    assert kstest(chain.noise[:, 0, 0, 1:].flatten(), "norm").pvalue > 0.01
    assert 0.2 < (chain.accepted / chain.proposals).mean() < 0.95


def test_a_quadratic_reward_narrows_the_law():
    """N(0, 1)·exp(−z² / 2T) is N(0, T / (1 + T))."""
    chain = run(lambda noise: -noise[:, 0, 0, 0].square() / 2, 120, temperature=0.25)
    assert kstest(chain.noise[:, 0, 0, 0], "norm", args=(0, 0.2**0.5)).pvalue > 0.01


def test_at_temperature_zero_it_climbs():
    fresh = draws(50, 4)
    chain = PCNState(fresh, 0.4, 0.0, None)  # pyright: ignore[reportArgumentType]
    noise, active = fresh.like, torch.ones(50, dtype=torch.bool)
    for _ in range(30):
        before, loss = chain.loss, -noise[:, 0, 0, 0]
        chain.update(noise, loss, active)
        assert torch.equal(chain.loss, torch.minimum(before, loss))
        noise = chain.propose()
    assert 0 < chain.accepted.sum() < chain.proposals.sum()


def test_the_probability_of_a_move_is_the_exponential_of_its_loss_over_the_temperature():
    gain = torch.tensor([0.3, 0.0, -0.2, -0.2 * math.log(2), -1e9, torch.inf, torch.nan], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, math.exp(-1), 0.5, 0.0, 1.0, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(log_acceptance(gain, 0.2).exp(), expected, equal_nan=True)
    climbing = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(log_acceptance(gain, 0.0).exp(), climbing, equal_nan=True)
    count = 20_000
    chain = PCNState(draws(count, 1), 0.4, 0.2, None)  # pyright: ignore[reportArgumentType]
    active = torch.arange(count) >= 1000
    chain.update(chain.noise, torch.zeros(count), torch.ones_like(active))
    chain.update(chain.propose(), torch.full((count,), 0.3), active)
    share, rate = (chain.accepted[1000:].double().mean().item(), math.exp(-1.5))
    assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 19_000) ** 0.5)
    assert not chain.proposals[:1000].any() and not chain.loss[:1000].any()  # those that had been stopped


def test_a_proposal_mixes_the_noise_with_a_fresh_one():
    fresh, known = draws(3, 5), draws(3, 5)
    chain = PCNState(fresh, 0.3, 1.0, None)  # pyright: ignore[reportArgumentType]
    expected = math.sqrt(1 - 0.09) * known.like + 0.3 * known.draw()
    torch.testing.assert_close(chain.propose(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("target", [0.2, 0.6])
def test_beta_is_adapted_until_the_share_of_accepted_moves_is_the_wanted_one(target):
    def reward(noise):
        return 3 * noise[:, 0, 0].sum(1)

    chain = run(reward, 300, count=200, size=16, beta=0.9, acceptance=target)
    accepted, moves, beta = chain.accepted.clone(), chain.proposals.clone(), chain.beta
    assert beta.std() > 0 and (beta > 0).all() and (beta < 0.9).all()
    active = torch.ones(200, dtype=torch.bool)
    for _ in range(200):
        noise = chain.propose()
        chain.update(noise, -reward(noise), active)
    share = (chain.accepted - accepted).sum() / (chain.proposals - moves).sum()
    assert share.item() == pytest.approx(target, abs=0.06)


def search(callbacks=None, rewards=redness, **settings):
    streams = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    method = PCN(rewards=rewards, **settings)
    return optimize_noise(tiny_pipeline("sd"), ["a", "b"], method, generator=streams, callbacks=callbacks, **CALL)


def test_a_run_reports_how_many_moves_were_accepted_told_from_its_noises():
    """Climbing, the next noise has the cosine √(1−β²), nearly, to the best noise so far."""
    seen, beta = [], 0.1
    result = search(lambda state: seen.append((state.noise, state.loss)), beta=beta, temperature=0.0, steps=12)
    for row in range(2):
        current, accepted = seen[0], 0
        for noise, loss in seen[1:]:
            fresh = (noise[row] - math.sqrt(1 - beta**2) * current[0][row]) / beta
            assert 0.8 < fresh.square().mean() < 1.2
            if loss[row] <= current[1][row]:
                current, accepted = (noise, loss), accepted + 1
        assert result.reports["pcn"]["acceptance"][row] == pytest.approx(accepted / 11)
        assert 0 < accepted < 11 and torch.equal(result.noise[row], current[0][row])
    assert result.reports["pcn"]["beta"] == pytest.approx([beta, beta])


def test_a_flat_reward_accepts_all_and_returns_the_plain_result():
    result = search(rewards=lambda images, prompts: torch.zeros(len(images)), acceptance=0.3, steps=4)
    assert result.reports["pcn"]["acceptance"] == [1.0, 1.0] and result.best_step.tolist() == [0, 0]
    assert min(result.reports["pcn"]["beta"]) > 0.3
    assert search(steps=1).reports["pcn"]["acceptance"] == [None, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"`beta` to be a number in"),
        ({"beta": 1.1}, "`beta`"),
        ({"temperature": -1.0}, "`temperature` to be a number in"),
        ({"temperature": math.inf}, "`temperature`"),
        ({"acceptance": 1.0}, r"`acceptance` to be a number in"),
        ({"acceptance": 0}, "`acceptance`"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        search(**settings)
