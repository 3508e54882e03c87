"""Training pictures: most of them are usual."""

import random

import pytest
import torch

from noiseopt.shapes_world import parse
from training.data import OTHER_GROUND, OTHER_LAYOUT, sample_pictures


def test_most_pictures_are_usual():
    rng = random.Random(0)
    requests = [parse("a blue star left of a green cross")] * 2000
    scenes, looks, usual = sample_pictures(requests, rng)
    assert usual.float().mean(0).tolist() == pytest.approx([1 - OTHER_LAYOUT, 1 - OTHER_GROUND], abs=0.04)
    places = torch.tensor([[s.shapes[0].x, s.shapes[0].y] for s in scenes])
    assert (places[usual[:, 0]].std(0) < 2).all() and (places[~usual[:, 0]].std(0) > 2).all()
    assert (looks[usual[:, 1]].std(0) < 0.03).all() and (looks[~usual[:, 1]].std(0) > 0.25).all()
