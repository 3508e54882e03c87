"""Reliability of the judge: on generated images against manual labels, and on renders."""

import json
import random
from pathlib import Path

import pytest
import torch

from noiseopt import shapes_world
from noiseopt.shapes_world import COLORS, KINDS, RELATIONS, Request, caption, judge, parse, render
from training.label_sheet import pictures_in

FOLDER = Path(__file__).parent / "generated"


def other(options, value, rng: random.Random):
    return rng.choice([option for option in options if option != value])


def changed(request: Request, attribute: str, rng: random.Random) -> Request | None:
    """The request with one attribute changed, or None if it lacks that attribute."""
    if attribute == "relation":
        return Request(request.objects, other(RELATIONS, request.relation, rng)) if request.relation else None
    first = request.objects[0]
    if attribute == "count":
        same = len(set(request.objects)) == 1
        return Request((first,) * other((1, 2, 3), len(request.objects), rng)) if same else None
    one = rng.choice(request.objects)
    color, kind = one
    new = (other(COLORS, color, rng), kind) if attribute == "color" else (color, other(KINDS, kind, rng))
    objects = tuple(new if thing == one else thing for thing in request.objects)
    return Request(objects, request.relation if len(set(objects)) > 1 else None)


@pytest.fixture(scope="module", params=[64, 128])
def renders(request) -> tuple[torch.Tensor, list[str]]:
    rng = random.Random(8)
    scenes = [shapes_world.sample_scene(rng) for _ in range(1600)]
    images = render(scenes, torch.Generator().manual_seed(8), size=request.param)
    return images, [caption(scene, rng) for scene in scenes]


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ["color", "kind", "relation", "count"])
def test_one_wrong_attribute_is_wrong(renders, attribute):
    images, prompts = renders
    rng = random.Random(9)
    wrong = [(i, ask) for i, p in enumerate(prompts) if (ask := changed(parse(p), attribute, rng))][:640]
    assert len(wrong) >= 600
    verdicts = judge(images[[i for i, _ in wrong]], [str(request) for _, request in wrong])
    assert sum(v.correct for v in verdicts) <= 0.005 * len(wrong)


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_renders_are_right(renders, noise):
    images, prompts = renders[0][:600], renders[1][:600]
    images = (images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert sum(v.correct for v in judge(images, prompts)) >= 0.995 * len(prompts)


@pytest.fixture(scope="module")
def compared() -> list[tuple[dict, shapes_world.Verdict]]:
    """Each labeled tile and the judge's verdict."""
    tiles = json.loads((FOLDER / "pictures.json").read_text())["tiles"]
    images = pictures_in(FOLDER / "pictures.webp")[: len(tiles)]
    return list(zip(tiles, judge(images, [tile["prompt"] for tile in tiles]), strict=True))


def agreed(tile: dict) -> bool:
    return not any(tile["unsure"]) and len(set(tile["right"])) == 1


def test_judge_agrees_with_labels_made_by_looking(compared):
    """On images that all readers were sure of, and said the same."""
    sure = [(i, tile, verdict) for i, (tile, verdict) in enumerate(compared) if agreed(tile)]
    assert len(compared) >= 200 and len(sure) >= 0.6 * len(compared)
    against = [(i, tile, verdict.found) for i, tile, verdict in sure if tile["right"][0] != verdict.correct]
    assert len(against) <= 0.05 * len(sure), "\n".join(map(str, against))


def test_judge_agrees_with_each_reader_on_all_images(compared):
    """Including ambiguous shapes, which readers themselves mark as disputable."""
    for reader in range(len(compared[0][0]["right"])):
        against = [tile for tile, verdict in compared if tile["right"][reader] != verdict.correct]
        assert len(against) <= 0.1 * len(compared), "\n".join(map(str, against))


def test_both_labels_are_frequent(compared):
    count = len(compared[0][0]["right"])
    for reader in range(count):
        assert 0.25 <= sum(tile["right"][reader] for tile, _ in compared) / len(compared) <= 0.75
    sure = [tile["right"][0] for tile, _ in compared if agreed(tile)]
    assert 0.25 <= sum(sure) / len(sure) <= 0.75
