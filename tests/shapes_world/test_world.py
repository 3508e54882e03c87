import random

import pytest
import torch

from noiseopt import shapes_world
from noiseopt.shapes_world import RELATIONS, Request, Scene, Shape
from noiseopt.shapes_world.world import GAP, LAYOUT, LOOKS, lay_out, usual, usual_looks


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [shapes_world.sample_scene(rng) for _ in range(count)]


def test_render_is_a_function_of_the_generator():
    first, again, other = (shapes_world.render(scenes(4), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_render_gives_images_in_range():
    images = shapes_world.render(scenes(16), torch.Generator().manual_seed(0))
    assert images.shape == (16, 3, 128, 128)
    assert images.min() >= 0
    assert images.max() <= 1


def test_render_takes_a_single_scene():
    assert shapes_world.render(Scene((Shape("star", "red", 32, 32, 12),))).shape == (1, 3, 128, 128)


def test_larger_images_show_the_same_scenes():
    scene, looks = scenes(20), torch.full((20, LOOKS), 0.4)
    small, large = (shapes_world.render(scene, torch.Generator().manual_seed(0), looks, size) for size in (64, 128))
    assert large.shape == (20, 3, 128, 128)
    pooled = torch.nn.functional.avg_pool2d(large, 2)
    assert (pooled - small).abs().mean() < 0.3 * (pooled - small.roll(1, 2)).abs().mean()


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


@pytest.mark.parametrize("words", ["a red star", "two red stars", "a red star left of a blue cross"])
def test_usual_layouts_are_alike_and_centered(words):
    request, rng = shapes_world.parse(words), random.Random(0)
    layouts = [
        lay_out(request.objects, usual(request.objects, request.relation, rng), request.relation) for _ in "abcd"
    ]
    for scene in layouts:
        assert abs(sum(s.x for s in scene.shapes) / len(scene.shapes) - 32) < 3
        assert all(abs(s.y - 32) < 4 for s in scene.shapes)
        for shape, other in zip(scene.shapes, layouts[0].shapes, strict=True):
            assert max(abs(shape.x - other.x), abs(shape.y - other.y)) < 5


@pytest.mark.parametrize("relation", RELATIONS)
def test_usual_layouts_follow_the_relation(relation):
    rng, objects = random.Random(0), (("red", "star"), ("blue", "cross"))
    assert all(lay_out(objects, usual(objects, relation, rng), relation).relation == relation for _ in range(50))


def test_usual_grounds_are_plain_and_light():
    rng = random.Random(0)
    looks = torch.tensor([usual_looks(rng) for _ in range(16)])
    corner = shapes_world.render([Scene((Shape("star", "red", 32, 32, 5),))] * 16, None, looks, 128)[:, :, :16, :16]
    assert (corner.flatten(2).std(2) < 0.02).all()
    assert corner.min() > 0.6 and corner.max() < 0.9
