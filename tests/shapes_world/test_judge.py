import importlib
import math
import random
from collections import Counter

import pytest
import torch

from noiseopt import shapes_world
from noiseopt.shapes_world import CATEGORIES, KINDS, Request, Scene, Shape, caption, judge, parse, render
from noiseopt.shapes_world.world import SIDE, SIZE
from training.negatives import wrong_request

# the function of that name hides the module
module = importlib.import_module("noiseopt.shapes_world.judge")


@pytest.fixture(scope="module", params=[64, 128])
def drawn(request):
    rng = random.Random(0)
    scenes = [shapes_world.sample_scene(rng) for _ in range(600)]
    images = render(scenes, torch.Generator().manual_seed(0), size=request.param)
    return images, [caption(scene, rng) for scene in scenes]


def test_clean_pictures_are_right(drawn):
    images, prompts = drawn
    verdicts = judge(images, prompts)
    assert set(map(shapes_world.category, prompts)) == set(CATEGORIES)
    assert sum(v.correct for v in verdicts) >= 0.995 * len(verdicts)
    assert all(v.lenient and v.shape_bound == 1 and v.position in (True, None) for v in verdicts if v.correct)


def test_close_but_wrong_captions_are_wrong(drawn):
    images, prompts = drawn
    rng = random.Random(1)
    wrong = [str(wrong_request(parse(prompt), rng)) for prompt in prompts]
    assert sum(v.correct for v in judge(images, wrong)) <= 0.005 * len(prompts)


def picture(*shapes: Shape, size: int = SIZE) -> torch.Tensor:
    return render(Scene(shapes), torch.Generator().manual_seed(0), size=size)


STAR, CROSS = Shape("star", "red", 16, 32, 12), Shape("cross", "blue", 48, 32, 12)


@pytest.mark.parametrize(
    ("prompt", "correct", "lenient", "shape_bound", "position"),
    [
        ("a red star left of a blue cross", True, True, 1.0, True),
        ("a blue cross right of a red star", True, True, 1.0, True),
        ("a red star right of a blue cross", False, False, 1.0, False),
        ("a red star above a blue cross", False, False, 1.0, False),
        ("a red star and a blue cross", True, True, 1.0, None),
        ("a red cross left of a blue star", False, False, 0.0, True),
        ("a red star left of a blue circle", False, False, 0.5, True),
        ("a red star", False, True, 1.0, None),
        ("two red stars", False, False, 0.5, None),
    ],
)
def test_verdict(prompt, correct, lenient, shape_bound, position):
    (verdict,) = judge(picture(STAR, CROSS), prompt)
    assert (verdict.correct, verdict.lenient, verdict.shape_bound) == (correct, lenient, shape_bound)
    assert verdict.position is position
    assert verdict.found == "a red star left of a blue cross"


def test_an_empty_picture_shows_nothing():
    (verdict,) = judge(torch.full((1, 3, 64, 64), 0.5), "a red star")
    assert not verdict.correct
    assert verdict.found == "nothing"


def test_a_shape_without_form_is_a_blob():
    (verdict,) = judge(picture(Shape("circle", "red", 32, 32, 12, stretch=3.0)), "a red circle")
    assert not verdict.correct
    assert verdict.found == "a red blob"


def kinds_seen(*shapes: Shape, size: int = SIZE) -> list[str]:
    (things,) = shapes_world.see(picture(*shapes, size=size))
    return [thing.kind for thing in things]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", [0.0, 0.5])
@pytest.mark.parametrize("radius", [9.0, 15.0])
def test_clean_shapes_are_seen_at_any_place_between_pixels(kind, turn, radius):
    assert kinds_seen(Shape(kind, "red", 32 + turn, 32 + turn / 2, radius)) == [kind]


@pytest.mark.parametrize("size", [SIDE, SIZE])
@pytest.mark.parametrize(
    "shape",
    [
        Shape("circle", "red", 32, 32, 13, towards="square", blend=0.2),
        Shape("circle", "red", 32, 32, 13, wobble=0.05),
        Shape("circle", "red", 32, 32, 13, stretch=1.15),
        Shape("square", "red", 32, 32, 13, towards="circle", blend=0.3),
        Shape("square", "red", 32, 32, 13, stretch=1.3),
        Shape("triangle", "red", 32, 32, 13, towards="circle", blend=0.1),
        Shape("star", "red", 32, 32, 13, towards="circle", blend=0.4),
        Shape("cross", "red", 32, 32, 13, towards="circle", blend=0.2),
    ],
    ids=str,
)
def test_soft_and_slightly_lumpy_shapes_are_recognized(shape, size):
    assert kinds_seen(shape, size=size) == [shape.kind]


@pytest.mark.parametrize("size", [SIDE, SIZE])
@pytest.mark.parametrize(
    "shape",
    [
        *(Shape("circle", "red", 32, 32, 13, towards=other, blend=0.4) for other in KINDS[1:]),
        Shape("circle", "red", 32, 32, 13, wobble=0.2),
        Shape("circle", "red", 32, 32, 13, stretch=1.4),
        Shape("square", "red", 32, 32, 13, towards="circle", blend=0.6),
        Shape("square", "red", 32, 32, 13, stretch=1.4),
        Shape("triangle", "red", 32, 32, 13, towards="circle", blend=0.5),
        Shape("triangle", "red", 32, 32, 13, towards="square", blend=0.4),
        Shape("star", "red", 32, 32, 13, towards="circle", blend=0.7),
        Shape("cross", "red", 32, 32, 13, towards="circle", blend=0.5),
    ],
    ids=str,
)
def test_half_made_shapes_are_not_what_they_come_from(shape, size):
    assert kinds_seen(shape, size=size) != [shape.kind]


@pytest.mark.parametrize("x", [32, 40])
def test_a_circle_with_a_stub_is_no_circle(x):
    disk, stub = Shape("circle", "red", 32, 32, 12), Shape("square", "red", x, 44, 5)
    assert kinds_seen(disk) == ["circle"]
    assert kinds_seen(disk, stub) == ["blob"]


@pytest.mark.parametrize("kind", ["square", "triangle"])
def test_convex_shapes_have_no_dents(kind):
    whole, bite = picture(Shape(kind, "red", 32, 32, 13)), picture(Shape("circle", "red", 32, 44, 7))
    bitten = bite.amax(1, keepdim=True) - bite.amin(1, keepdim=True) > 0.3
    for image, seen in ((whole, kind), (whole.where(~bitten, 0.5), "blob")):
        ((thing,),) = shapes_world.see(image)
        assert thing.kind == seen


def wavy(**waves: float) -> torch.Tensor:
    """Radii of an outline with waves given by name and amplitude, e.g. w5=0.2 for five periods."""
    turn = torch.arange(24) * (2 * math.pi / 24)
    out = torch.stack([height * (int(name[1:]) * turn).cos() for name, height in waves.items()])
    return 1 + out.sum(0, keepdim=True)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_kind_has_the_waves_of_its_tips_and_no_others(kind):
    own, i = {"square": 4, "triangle": 3, "star": 5, "cross": 4}[kind], KINDS.index(kind)
    tips, stray = module._tips(module._waves(wavy(**{"w2": 0.1, f"w{own}": 0.2, f"w{2 * own}": 0.05, "w7": 0.03})))
    assert tips[0, i].item() == pytest.approx(0.25, abs=1e-5)
    assert stray[0, i].item() == pytest.approx(7 * 0.03 / math.sqrt(2), abs=1e-5)


def test_all_waves_are_stray_around_a_circle_but_the_one_that_makes_it_long():
    tips, stray = module._tips(module._waves(wavy(w2=0.1, w3=0.02, w4=0.01)))
    assert tips[0, 0] == 0
    assert stray[0, 0].item() == pytest.approx(math.hypot(0.06, 0.04) / math.sqrt(2), abs=1e-5)


def test_a_disk_turns_evenly_and_a_corner_does_not():
    disk = torch.ones(1, 24)
    corner = disk.clone()
    corner[0, 0] = 1.2
    assert module._turns(disk).item() == pytest.approx(0, abs=1e-5)
    assert module._turns(corner).item() > 0.1


def test_a_bite_is_what_a_window_of_the_best_template_lacks():
    i = KINDS.index("square")
    mask = module._templates()[i, :1].clone()
    area = mask.sum()
    mask.view(32, 32)[14:19, 14:19] = 0
    overlap, bite = module._overlaps(mask)
    assert overlap[0, i].item() == pytest.approx(((area - 25) / area).item())
    assert bite[0, i].item() == pytest.approx(1.0)
    assert module._overlaps(module._templates()[i, :1])[1][0, i] == 0


def scores(*shapes: Shape) -> torch.Tensor:
    image = picture(*shapes, size=SIDE)
    chroma = image.amax(1) - image.amin(1)
    return module._scores(chroma.where(module._hues(image) >= 0, 0.0) / chroma.amax())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_much_speaks_for_clean_shapes_and_against_all_others(kind):
    seen = scores(Shape(kind, "red", 32, 32, 13))
    assert seen[KINDS.index(kind)] > 3
    assert (seen > 0).sum() == 1


@pytest.mark.parametrize("kind", ["circle", "square"])
def test_a_long_shape_is_beyond_the_limits_of_its_kind(kind):
    long, short = (scores(Shape(kind, "red", 32, 32, 13, stretch=s))[KINDS.index(kind)] for s in (1.5, 1.15))
    assert long == -math.inf
    assert short > 0


def test_a_star_is_told_by_its_five_tips():
    """By overlap alone this star resembles a triangle about as much."""
    assert kinds_seen(Shape("star", "red", 32, 32, 10, towards="triangle", blend=0.3)) == ["star"]


def test_regions_are_counted_one_by_one():
    touching = picture(
        Shape("square", "red", 20, 20, 10), Shape("square", "blue", 39, 20, 10), Shape("star", "red", 20, 50, 10)
    )
    (things,) = shapes_world.see(touching)
    assert Counter((t.color, t.kind) for t in things) == {
        ("red", "square"): 1,
        ("blue", "square"): 1,
        ("red", "star"): 1,
    }


@pytest.mark.parametrize("size", [64, 128, 192])
def test_places_do_not_depend_on_the_number_of_pixels(size):
    scene = Scene((Shape("star", "red", 16, 40, 12), Shape("square", "blue", 48, 20, 10)))
    (things,) = shapes_world.see(render(scene, torch.Generator().manual_seed(0), size=size))
    square, star = sorted(things, key=lambda thing: thing.kind)
    assert (square.kind, star.kind) == ("square", "star")
    assert (square.x, square.y) == (48, 20)
    assert square.area == 18**2
    assert max(abs(star.x - 16), abs(star.y - 40)) <= 1


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 128), (1, 3, 96, 96), (3, 64, 64), (1, 1, 64, 64)])
def test_other_sizes_are_refused(shape):
    for look in (shapes_world.see, lambda images: judge(images, "a red star")):
        with pytest.raises(ValueError, match="multiple of 64"):
            look(torch.zeros(shape))


def test_wrong_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match="Expected one prompt or 1"):
        judge(torch.zeros(1, 3, 64, 64), ["a red star"] * 2)


def test_wrong_requests_differ_from_their_origin():
    rng = random.Random(0)
    single = Request((("red", "star"),))
    for request in (single, Request(single.objects * 2), Request((*single.objects, ("blue", "cross")), "above")):
        assert all(wrong_request(request, rng) != request for _ in range(200))
