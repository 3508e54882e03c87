import random

import pytest
import torch

from noiseopt import shapes_world
from noiseopt.shapes_world import RELATIONS, Request, Scene, Shape
from noiseopt.shapes_world.world import GAP, LAYOUT, lay_out


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [shapes_world.sample_scene(rng) for _ in range(count)]


def test_render_is_a_function_of_the_generator():
    first, again, other = (shapes_world.render(scenes(4), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_render_gives_images_in_range():
    images = shapes_world.render(scenes(16), torch.Generator().manual_seed(0))
    assert images.shape == (16, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1


def test_render_takes_a_single_scene():
    assert shapes_world.render(Scene((Shape("star", "red", 32, 32, 12),))).shape == (1, 3, 64, 64)


def test_boxes_keep_apart_and_inside():
    for scene in scenes(300):
        for i, shape in enumerate(scene.shapes):
            assert shape.radius <= min(shape.x, shape.y, 64 - shape.x, 64 - shape.y)
            for other in scene.shapes[:i]:
                distance = max(abs(shape.x - other.x), abs(shape.y - other.y))
                assert distance >= shape.radius + other.radius + GAP - 1e-4


@pytest.mark.parametrize("relation", RELATIONS)
def test_layout_follows_the_relation(relation):
    rng = random.Random(0)
    request = Request((("red", "star"), ("blue", "cross")), relation)
    assert all(shapes_world.sample_scene(rng, request).relation == relation for _ in range(200))


def test_layout_is_continuous_in_its_chances():
    objects, chance = (("red", "star"), ("blue", "cross")), [0.4] * LAYOUT
    for i in range(LAYOUT):
        nudged = [c + 1e-4 * (i == j) for j, c in enumerate(chance)]
        for a, b in zip(
            lay_out(objects, chance, "left of").shapes, lay_out(objects, nudged, "left of").shapes, strict=True
        ):
            assert max(abs(a.x - b.x), abs(a.y - b.y), abs(a.radius - b.radius)) < 0.02
