"""Careless captions mix up attributes within the training split."""

import random

import pytest
import torch

from noiseopt.shapes_world.captions import parse, sample_request, trained_on
from training.slips import confused, frequency, slip


def test_careless_captions_mix_up_what_is_shown_and_stay_within_the_training_split():
    rng = random.Random(2)
    shown = [sample_request(rng) for _ in range(6000)]
    asked = [slip(request, rng, 0.4) for request in shown]
    assert all(trained_on(request) for request in asked)
    assert all(slip(request, rng, 0.0) == request for request in shown[:500])
    counts = [(a, b) for a, b in zip(shown, asked, strict=True) if a.category == "counting"]
    assert all({len(a.objects), len(b.objects)} <= {2, 3} and a.objects[0] == b.objects[0] for a, b in counts)
    pairs = [(a, b) for a, b in zip(shown, asked, strict=True) if a.category in ("binding", "position")]
    for part in (0, 1):  # colors, kinds: nothing new is named, only bound or related in another way
        named = [[sorted(thing[part] for thing in request.objects) for request in pair] for pair in pairs]
        assert all(mine == theirs for mine, theirs in named)
    related = [(a, b) for a, b in pairs if a.relation]
    assert sum(a.relation != b.relation for a, b in related) / len(related) == pytest.approx(0.4, abs=0.03)
    can = [(a, b) for a, b in pairs if len({t[0] for t in a.objects}) == len({t[1] for t in a.objects}) == 2]
    assert 0.3 < sum(a.objects != b.objects for a, b in can) / len(can) < 0.4  # some swapped pairs are not trained on


def test_pictures_are_as_common_as_the_hues_of_their_shapes_and_their_order():
    def odds(*prompts):
        first, second = frequency([parse(prompt) for prompt in prompts]).log()
        return float(first - second)

    turn = torch.tensor(torch.pi * 2 / 5)  # red is the hue of circles; squares are turned by 72°
    swapped = odds("a red circle and a yellow square", "a yellow circle and a red square")
    yellow = turn * 5 / 6
    expected = 3.0 * (1 + (yellow - turn).cos() - yellow.cos() - turn.cos())
    assert swapped == pytest.approx(float(expected), abs=1e-4)
    ahead = odds("a red square left of a red circle", "a red square right of a red circle")
    assert ahead == pytest.approx(float(2 * 2.0 * (turn.cos() - 1)), abs=1e-4)
    assert odds("a red square right of a red circle", "a red circle left of a red square") == pytest.approx(0, abs=1e-5)
    assert odds("three red stars", "two red stars") == pytest.approx(float(torch.tensor(0.125).log()), abs=1e-4)


def test_pictures_that_captions_mix_up_share_one_frequency():
    rng = random.Random(3)
    for request in (sample_request(rng) for _ in range(300)):
        mixed = confused(request)
        assert frequency(mixed).sum() == pytest.approx(1.0, abs=1e-5)
        assert all(slip(request, rng, 0.5) in mixed for _ in range(8))
    assert frequency([parse("a cyan circle")]).item() == 1.0
