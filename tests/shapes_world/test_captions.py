import random

import pytest

from noiseopt import shapes_world
from noiseopt.shapes_world import HELD_OUT_PROMPTS, TRAIN_PROMPTS, VALIDATION_PROMPTS, Request, parse
from noiseopt.shapes_world.captions import sample_request, trained_on

SPLITS = {"train": TRAIN_PROMPTS, "validation": VALIDATION_PROMPTS, "held_out": HELD_OUT_PROMPTS}


def asked(prompts) -> set:
    """Object pairs and counts, without order and relation."""
    requests = [parse(prompt) for prompt in prompts]
    return {(frozenset(r.objects), len(r.objects)) for r in requests if len(r.objects) > 1}


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_read_back(split):
    assert all(str(parse(prompt)) == prompt for prompt in SPLITS[split])


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a red circle", "single"),
        ("three green crosses", "counting"),
        ("a red circle and a blue star", "binding"),
        ("a red circle left of a blue star", "position"),
        (" A red circle  left of a blue star. ", "position"),
    ],
)
def test_category(prompt, category):
    assert shapes_world.category(prompt) == category


@pytest.mark.parametrize("prompt", ["", "a dog", "red circle", "four red circles", "a red circle near a blue star"])
def test_other_prompts_are_refused_with_what_can_be_drawn(prompt):
    with pytest.raises(ValueError, match="circle, square, triangle, star, cross"):
        parse(prompt)


def test_splits_share_no_pair_and_no_count():
    train, validation, held_out = (asked(prompts) for prompts in SPLITS.values())
    assert not train & validation
    assert not train & held_out
    assert not validation & held_out
    assert len(train | validation | held_out) == 435 + 60


def test_each_split_has_every_category_with_an_unseen_part():
    for split in ("validation", "held_out"):
        assert {shapes_world.category(p) for p in SPLITS[split]} == {"counting", "binding", "position"}


def test_training_never_shows_what_is_held_out():
    rng = random.Random(0)
    shown = asked(str(sample_request(rng)) for _ in range(5000))
    assert not shown & (asked(VALIDATION_PROMPTS) | asked(HELD_OUT_PROMPTS))


def test_captions_are_true_of_their_scene():
    rng = random.Random(0)
    for _ in range(300):
        scene = shapes_world.sample_scene(rng)
        request = parse(shapes_world.caption(scene, rng))
        assert sorted(request.objects) == sorted((s.color, s.kind) for s in scene.shapes)


def test_caption_without_generator_is_the_fullest():
    scene = shapes_world.sample_scene(random.Random(0), Request((("red", "star"), ("blue", "cross")), "above"))
    assert shapes_world.caption(scene) == "a red star above a blue cross"


def test_trained_on_is_all_but_validation_and_held_out():
    assert all(trained_on(parse(prompt)) for prompt in TRAIN_PROMPTS)
    assert not any(trained_on(parse(prompt)) for prompt in (*VALIDATION_PROMPTS, *HELD_OUT_PROMPTS))
