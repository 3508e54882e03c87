"""Training of the readers: which pictures are copies of one another, and what is in a picture."""

import math

import pytest
import torch
import torch.nn.functional as F

from noiseopt import shapes_world
from noiseopt.shapes_world import Scene, Shape
from training import reading
from training.readers import tower_targets

PROMPTS = ["a red circle", "a blue star left of a green cross"]


def test_copies_are_told_from_others():
    unit = torch.eye(4)[[0, 0, 1, 1]]
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    right, wrong = (float(reading.copies(unit, each)) for each in (same, same[:, [0, 2, 1, 3]]))
    chance = math.exp(10) / (math.exp(10) + 2)
    assert right == pytest.approx(-math.log(chance), abs=1e-5)
    assert wrong > right + 4


def test_only_usual_pictures_of_a_request_are_copies():
    a, b = map(shapes_world.parse, PROMPTS)
    usual = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]])
    same = reading.copy_labels([a, b, a, a, a], usual)
    assert torch.equal(same.int() - torch.eye(5).int(), F.one_hot(torch.tensor([2, 5, 0, 5, 5]), 6)[:, :5].int())


def test_targets_of_the_tower_say_what_is_where():
    scene = Scene((Shape("square", "red", 16, 16, 14), Shape("square", "red", 48, 48, 14)))
    shown, counts, where = tower_targets([scene])
    red_square = shapes_world.OBJECTS.index(("red", "square"))
    assert counts[0, red_square] == 2 and counts.sum() == 2
    grid, place = shown.view(8, 8), where.view(8, 8)
    assert (grid[:3, :3] == red_square).all() and (grid[5:, 5:] == red_square).all()
    assert (grid[:4, 4:] == len(shapes_world.OBJECTS)).all() and place[4:, :4].sum() == 0
