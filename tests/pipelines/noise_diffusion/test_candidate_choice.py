"""The choice of a candidate against the definition, and its exact law against a real pool."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from scipy.stats import ks_2samp, kstest

from noiseopt.pipelines.noise_diffusion.candidate_choice import best_of_pool, displacement, guided_gaussian, unit
from noiseopt.pipelines.problem import CandidateNoise


def fresh(noise: torch.Tensor, seed: int = 0) -> CandidateNoise:
    space = SimpleNamespace(further_draw=lambda drawn: randn_tensor)
    return CandidateNoise(SimpleNamespace(noise=noise, seeds=list(range(seed, seed + len(noise))), space=space))  # pyright: ignore[reportArgumentType]


def gaussian(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("score", "gamma", "correlation"),
    [(0.05, 0.776, 0.473), (0.2, 0.553, 0.669), (0.5, 0.293, 0.841), (0.9, 0.051, 0.974), (0.98, 0.010, 0.995)],
)
def test_the_correlation_of_old_and_new_noise_is_the_fourth_root_of_the_score(score, gamma, correlation):
    noise, sigma = gaussian(1, 4, 128, 128), gaussian(1, 4, 128, 128, seed=1)
    step = 1 - torch.tensor([score], dtype=torch.float64).sqrt()
    assert step.item() == pytest.approx(gamma, abs=5e-4)
    moved = noise + displacement(noise, sigma, step)
    found = torch.corrcoef(torch.stack((noise.flatten(), moved.flatten())))[0, 1].item()
    assert found == pytest.approx(correlation, abs=0.006) and found == pytest.approx(score**0.25, abs=0.006)


def test_the_pool_takes_the_largest_ratio_of_its_candidates_for_each_image():
    noise, ascent = gaussian(3, 2, 4, 4), gaussian(3, 2, 4, 4, seed=1)
    gamma = torch.tensor([0.776, 0.293, 0.01], dtype=torch.float64)
    chosen = best_of_pool(noise, ascent, gamma, fresh(noise), 20)
    stream = fresh(noise)
    pool = torch.stack([stream.draw() for _ in range(20)])
    for image in range(3):
        step = gamma[image]
        ways = ((1 - step).sqrt() - 1) * noise[image] + step.sqrt() * pool[:, image]
        rates = [float((ascent[image] * way).sum() / (way**2).sum()) for way in ways]
        assert torch.equal(chosen[image], pool[rates.index(max(rates)), image])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_the_choice_ignores_the_scale_of_the_gradient_and_the_rest_of_the_batch(scale):
    noise, ascent = gaussian(2, 4, 8, 8, dtype=torch.float32), gaussian(2, 4, 8, 8, seed=1, dtype=torch.float32)
    gamma = torch.tensor([0.3, 0.1])
    whole = best_of_pool(noise, ascent, gamma, fresh(noise), 10)
    scaled = best_of_pool(noise[1:], ascent[1:] * scale, gamma[1:], fresh(noise[1:], seed=1), 10)
    assert torch.equal(scaled[0], whole[1])


def test_a_score_of_one_leaves_the_noise_where_it_is():
    noise = gaussian(1, 4, 8, 8)
    zero = torch.zeros(1, dtype=torch.float64)
    chosen = best_of_pool(noise, noise, zero, fresh(noise), 5)
    assert torch.equal(noise + displacement(noise, chosen, zero), noise)


def projections(count: float, runs: int, guided: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Along the ascent, across it (one direction), and the norm, of `runs` chosen noises of 24 entries."""
    shape = (runs, 1, 4, 6)
    ascent, across = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    ascent[:, 0, 0, 0], across[:, 0, 1, 1] = 3.0, 1.0
    if guided:
        chosen = guided_gaussian(ascent, fresh(ascent, 7), count)
    else:
        pool = gaussian(runs, int(count), 24, seed=8)
        best = pool[:, :, 0].argmax(1)
        chosen = pool[torch.arange(runs), best].view(shape)
    return unit_product(chosen, ascent), unit_product(chosen, across), chosen.flatten(1).norm(dim=1)


def unit_product(noise: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (noise * unit(direction)).flatten(1).sum(1)


def test_the_exact_draw_has_the_law_of_a_real_pool():
    exact, pool = projections(50, 3000, guided=True), projections(50, 3000, guided=False)
    for name, ours, theirs in zip(("along", "across", "norm"), exact, pool, strict=True):
        assert ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3, name
    assert exact[0].mean().item() == pytest.approx(2.249, abs=0.04)


def test_a_pool_of_one_is_gaussian_noise():
    along, across, _ = projections(1, 3000, guided=True)
    assert kstest(along.numpy(), "norm").pvalue > 1e-3 and kstest(across.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("count", "mean"), [(1e3, 3.24), (1e6, 4.86), (1e12, 7.11)])
def test_a_pool_of_any_size_is_finite_and_as_far_as_its_maximum(count, mean):
    along, *_ = projections(count, 1000, guided=True)
    assert along.isfinite().all() and along.mean().item() == pytest.approx(mean, abs=0.05)


def test_without_a_gradient_the_exact_draw_is_the_plain_one():
    noise = gaussian(2, 4, 8, 8)
    assert torch.equal(guided_gaussian(torch.zeros_like(noise), fresh(noise), 50), fresh(noise).draw())


def test_both_rules_choose_the_same_candidate_in_most_draws():
    noise, ascent, same = gaussian(60, 4, 16, 16), gaussian(60, 4, 16, 16, seed=1), 0
    gamma = torch.full((60,), 0.3, dtype=torch.float64)
    chosen, stream = best_of_pool(noise, ascent, gamma, fresh(noise), 50), fresh(noise)
    pool = torch.stack([stream.draw() for _ in range(50)])
    plain = (pool * ascent).flatten(2).sum(2).argmax(0)
    same = sum(torch.equal(chosen[i], pool[plain[i], i]) for i in range(60))
    assert same >= 0.8 * 60
