"""Careless captions mix up attributes within the training split."""

import random

import pytest
import torch

from noiseopt.shapes_world.captions import parse, sample_request, trained_on
from training.slips import frequency, slip


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
    def common(*prompts):
        return frequency([parse(prompt) for prompt in prompts]).log()

    # red is the hue of circles: cos 0 against cos 180°, times .75; squares are turned by 72°
    usual, opposite = common("a red circle", "a cyan circle")
    assert usual - opposite == pytest.approx(1.5, abs=1e-5)
    bound, swapped = common("a red circle and a cyan square", "a cyan circle and a red square")
    turn = torch.tensor(torch.pi * 2 / 5)
    assert bound - swapped == pytest.approx(float(0.75 * (2 - 2 * turn.cos())), abs=1e-5)
    ahead, behind, same = common(
        "a red square left of a red circle", "a red square right of a red circle", "a red circle left of a red square"
    )
    assert ahead - behind == pytest.approx(float(2 * 0.6 * turn.sin()), abs=1e-5)
    assert behind == pytest.approx(float(same), abs=1e-6)  # the same picture
    two, three = common("two red circles", "three red circles")
    assert three - two == pytest.approx(float(torch.tensor(0.5).log()), abs=1e-5)
