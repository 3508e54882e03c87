"""The radius of Noise Diffusion under scores whose gains are known in closed form."""

import math

import pytest
import torch
from problems import Walk, generator
from tiny_pipelines import call_arguments, tiny_pipeline

from noiseopt import NoiseDiffusion, optimize_noise
from noiseopt.pipelines.noise_diffusion.trust_region import GROWTH, SHRINKAGE, TrustRegion

SHAPE = (3, 4, 16, 16)
SLOPE = 1e-4  # of the score along a direction: so small that γ = 1 − √s is that of the first noise
DIRECTION = torch.nn.functional.normalize(torch.randn(1, *SHAPE[1:], generator=generator(3)).double(), dim=(1, 2, 3))


def along(noise: torch.Tensor) -> torch.Tensor:
    return (noise * DIRECTION).flatten(1).sum(1)


def walk_with(**settings) -> Walk:
    """A run on three noises, the first of which has been evaluated by nobody yet."""
    noise = torch.randn(SHAPE, generator=generator(2), dtype=torch.float64)
    return Walk(NoiseDiffusion(**{"rewards": "red", "selection": "exact", "gradient": "full", **settings}), noise)


def values(number: float) -> torch.Tensor:
    return torch.full((1,), number, dtype=torch.float64)


def radius_after(gain: float, predicted: float, gamma: float = 0.04, radius: float = 0.04) -> float:
    region = TrustRegion(values(0), radius, true=True)
    region.expect(values(gamma), values(predicted))
    region.learn(values(gain))
    return region.radius.item()


@pytest.mark.parametrize("selection", ["pool", "exact"])
@pytest.mark.parametrize(("gradient", "factor"), [("full", 1.0), ("frozen", 30.0), ("frozen", 1e-25)])
def test_of_a_linear_score_every_step_is_good_until_gamma_is_the_papers(selection, gradient, factor):
    """Predictions are exact, or up to an unknown factor: γ is 4^k times the first one, until 1 − √.25 = 1/2."""
    first = 0.002
    walk = walk_with(selection=selection, gradient=gradient, trust_region=first)
    for round_ in range(7):
        before = walk.noise
        walk.step(0.25 + SLOPE * along(walk.noise), -SLOPE * factor * DIRECTION.expand(SHAPE))
        assert torch.equal(walk.memory.noise, before)  # accepted
        gamma = torch.full((3,), min(first * GROWTH**round_, 0.5), dtype=torch.float64)
        torch.testing.assert_close(walk.memory.trust.gamma, gamma, rtol=1e-2, atol=0)


@pytest.mark.parametrize("first", [1e-6, 0.3])
def test_of_a_score_that_bends_the_radius_settles_near_the_best_step(first):
    """A step √γ that gains q·√γ·‖g‖ − a·γ·d gains most, and half of what is predicted, at R/2, R = q‖g‖ / (a·d).

    The radius grows up to R/4 and shrinks down to 3/4 R, between which three quarters of the largest gain are left.
    """
    reach, q = 0.1, 7.11  # the mean of the largest of 10¹² candidates
    bend = q / (reach * math.prod(SHAPE[1:]))
    walk, steps = walk_with(candidates=1e12, trust_region=first), []
    kept, score = walk.noise, torch.full((3,), 0.25, dtype=torch.float64)
    for _ in range(60):
        v = walk.noise - kept
        found = score + SLOPE * (along(v) - bend * v.square().flatten(1).sum(1))
        better = found > score
        kept, score = torch.where(better.view(-1, 1, 1, 1), walk.noise, kept), torch.maximum(found, score)
        walk.step(found, -SLOPE * DIRECTION.expand(SHAPE))
        steps.append(walk.memory.trust.gamma.sqrt() / reach)
    settled, slack = torch.stack(steps[30:]), 1.1  # q varies
    assert settled.min() > 0.25 / slack and settled.max() < 0.75 * slack


@pytest.mark.parametrize(
    ("gain", "predicted", "change"),
    [
        (1.0, 1.0, GROWTH),
        (0.76, 1.0, GROWTH),
        (0.74, 1.0, 1.0),
        (0.26, 1.0, 1.0),
        (0.24, 1.0, SHRINKAGE),
        (-1.0, 1.0, SHRINKAGE),
        (0.1, 0.0, GROWTH),  # nothing is predicted: the 1/5 success rule
        (0.0, 0.0, SHRINKAGE),
        (0.1, -1.0, GROWTH),  # a step that shrinks the noise along the gradient, and gains more than was predicted
        (-0.1, -1.0, SHRINKAGE),  # as good as was predicted, but no gain
        (math.nan, 1.0, 1.0),  # an image that was stopped
        (math.inf, 1.0, 1.0),  # the first evaluation
    ],
)
def test_the_radius_by_measured_and_predicted_gain(gain, predicted, change):
    assert radius_after(gain, predicted) == pytest.approx(0.04 * change, rel=1e-12)


def test_the_radius_follows_the_step_that_was_made():
    """A γ below the radius, which is that of the paper, says nothing of larger steps that gain."""
    assert radius_after(-1.0, 1.0, gamma=0.04, radius=0.9) == pytest.approx(0.04 * SHRINKAGE)
    assert radius_after(1.0, 1.0, gamma=0.04, radius=0.9) == 0.9
    assert radius_after(1.0, 1.0, gamma=0.5, radius=0.5) == 1.0
    assert radius_after(-1.0, 1.0, gamma=0.0, radius=0.9) == 0.9  # nothing moved: s = 1
    assert pytest.approx(1.0) == GROWTH * SHRINKAGE**4  # one good step in five keeps it


@pytest.mark.parametrize(("last", "change"), [(2.2, GROWTH), (1.2, 1.0), (0.3, SHRINKAGE), (-2.2, SHRINKAGE)])
def test_the_factor_of_a_held_gradient_is_the_mean_size_of_its_gains(last, change):
    """Gains of 3, −1 and `last` times the prediction, of steps of different lengths: the factor is the mean size."""
    region = TrustRegion(values(0), 0.01, true=False)
    for factor, length in ((3.0, 0.1), (-1.0, 0.7), (last, 0.2)):
        region.radius = values(length**2)
        region.expect(values(length**2), values(1e-9 * length))
        region.learn(values(factor * 1e-9 * length))
    factor = (3 + 1 + abs(last)) / 3
    assert region.expected_gain().item() == pytest.approx(factor * 1e-9 * 0.2)
    assert region.radius.item() == pytest.approx(0.04 * change)


@pytest.mark.parametrize("selection", ["pool", "exact", "random"])
def test_a_step_without_gain_is_taken_back_and_drawn_anew_by_the_same_gradient(selection):
    walk = walk_with(selection=selection, trust_region=0.1)
    first, gradient, moves = walk.noise, torch.randn(SHAPE, generator=generator(1)).double(), []
    for score in (0.5, 0.3, 0.4):
        walk.step(score, gradient if score == 0.5 else -gradient)  # that of a noise that is not kept does not count
        moves.append(walk.noise - first)
        assert torch.equal(walk.memory.noise, first) and torch.equal(walk.memory.gradient, gradient)
    shrunk = (moves[2].flatten(1).norm(dim=1) / moves[0].flatten(1).norm(dim=1)).square()
    torch.testing.assert_close(shrunk, torch.full((3,), SHRINKAGE**2, dtype=torch.float64), rtol=0.15, atol=0)
    cosines = torch.cosine_similarity(moves[0].flatten(1), moves[1].flatten(1))
    assert cosines.abs().max() < 0.3  # other noise
    if selection == "exact":
        assert all((move * -gradient).sum((1, 2, 3)).gt(0).all() for move in moves)


def test_without_a_gradient_or_at_a_score_of_one_nothing_breaks():
    walk, zero = walk_with(selection="pool", candidates=3, trust_region=0.1), torch.zeros(SHAPE, dtype=torch.float64)
    for score in (0.5, 0.4, 1.0):
        walk.step(score, zero)
        assert walk.noise.isfinite().all() and walk.memory.trust.radius.isfinite().all()
    best, radius = walk.memory.noise, walk.memory.trust.radius
    assert torch.equal(walk.noise, best)  # γ = 0
    walk.step(1.0, zero)
    assert torch.equal(walk.noise, best) and torch.equal(walk.memory.trust.radius, radius)


def redness(images, prompts):
    red, green, blue = images.unbind(1)
    return torch.sigmoid(8 * (2 * red - green - blue).mean((1, 2)))


def find(prompt="a", latents=None, **settings):
    method = NoiseDiffusion(**{"rewards": redness, "candidates": 5, **settings})
    call = {"generator": generator(3), "latents": latents, **call_arguments("sd")}
    return optimize_noise(tiny_pipeline("sd"), prompt, method, **call)


def test_each_image_has_its_own_radius_whatever_the_rest_of_the_batch():
    latents = torch.randn(3, 4, 16, 16, generator=generator(5))
    together = find(["a", "b", "c"], latents, steps=6, trust_region=0.1)
    alone = find("b", latents[1:2], steps=6, trust_region=0.1)
    torch.testing.assert_close(together.noise[1:2], alone.noise, rtol=0, atol=2e-3)
    torch.testing.assert_close(together.losses[:, 1:2], alone.losses, rtol=0, atol=1e-4)


def test_the_first_step_within_a_radius_of_one_is_the_papers():
    limited, plain = find(steps=2, trust_region=1.0), find(steps=2)
    assert torch.equal(limited.losses, plain.losses)
