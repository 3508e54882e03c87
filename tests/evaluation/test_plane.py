"""The plane quality × diversity: the front against its definition, the axes, and labels that can be read."""

import itertools
import json
import math
import random

import pytest
from evaluations import results, set_of

from noiseopt.evaluation.evaluate import pareto_fronts
from noiseopt.evaluation.label_places import box, label_places, overlap
from noiseopt.evaluation.plane import front_notes, pareto_front, plane_of
from noiseopt.evaluation.table import markdown


def dominated(point, points) -> bool:
    """By definition, for points without NaN."""
    return any(x >= point[0] and y >= point[1] and (x, y) != point for x, y in points)


@pytest.mark.parametrize("seed", range(50))
def test_the_front_is_what_no_other_point_dominates(seed):
    """Few different values, so that many are equal in one or both."""
    chance = random.Random(seed)
    points = [(chance.randrange(5) / 4, float(chance.randrange(5))) for _ in range(chance.randrange(1, 12))]
    assert pareto_front(points) == [not dominated(point, points) for point in points]


def test_a_front_is_never_empty_and_unknown_points_are_not_on_it():
    nan = math.nan
    assert pareto_front([]) == [] and pareto_front([(nan, 1.0)]) == [False]
    assert pareto_front([(nan, 9.0), (0.0, 1.0), (9.0, nan), (-1.0, 2.0)]) == [False, True, False, True]
    assert pareto_front([(1.0, 1.0)] * 3) == [True] * 3 and pareto_front([(-math.inf, -math.inf)]) == [True]


def test_quality_is_what_the_judge_finds_right_and_diversity_one_minus_similarity():
    """Plain images are the most diverse and all wrong; the method's are right but for one, and the least diverse."""
    found = set_of(results(6), mss=lambda gain, index: 0.2 + 0.4 * gain + 0.01 * index)
    plane = plane_of(found, "turbo")
    assert plane is not None and (plane.diversity, plane.quality.name) == ("1 − MSS (features)", "right")
    plain, control, reno = plane.spots
    assert [spot.contender.key for spot in plane.spots] == ["plain", "best-of-N for reno", "reno"]
    mean = 1 - (0.2 + 0.01 * 2.5)
    assert plain.diversity.value == pytest.approx(mean) and plain.quality.value == 0
    assert reno.diversity.value == pytest.approx(mean - 0.4) and reno.quality.value == pytest.approx(5 / 6)
    assert plain.diversity.low < mean < plain.diversity.high and plain.diversity.high < 1 - 0.2
    assert [spot.on_front for spot in plane.spots] == [True, True, False]  # the control is right as often
    assert control.diversity.value == pytest.approx(mean - 0.2)


def test_without_a_judge_the_first_reward_is_quality_and_without_an_embedding_a_distance_diversity():
    found = set_of(results(6), mss=None, judge=False, distance=lambda gain, index: 0.5 + gain)
    plane = plane_of(found, "turbo")
    assert plane is not None and (plane.diversity, plane.quality.title) == ("distance (tiny_image)", "red*")
    assert [spot.diversity.value for spot in plane.spots] == pytest.approx([0.5, 1.0, 1.5])
    assert [spot.on_front for spot in plane.spots] == [False, False, True]
    assert front_notes(found) == ["On the Pareto front of red* and distance (tiny_image), on turbo: reno."]


def test_the_tables_name_the_front_of_each_model():
    found = set_of(results(4, names=("turbo", "sdxl")), mss=lambda gain, index: 0.5)
    for model in ("turbo", "sdxl"):
        sentence = f"On the Pareto front of right, % and 1 − MSS (features), on {model}: best-of-7 for reno, reno."
        assert markdown(found).count(sentence) == 1
    assert pareto_fronts(found) == {name: ["best-of-N for reno", "reno"] for name in ("turbo", "sdxl")}
    json.dumps(pareto_fronts(found))
    plain = plane_of(found, "turbo").spots[0]
    assert math.isnan(plain.diversity.low)  # of 4 prompts


def test_there_is_no_plane_without_features():
    assert plane_of(results(5), "turbo") is None and front_notes(results(5)) == [] and pareto_fronts(results(5)) == {}


@pytest.mark.parametrize("seed", range(20))
def test_labels_cover_no_point_and_no_other_label(seed):
    chance = random.Random(seed)
    points = [(chance.uniform(50, 950), chance.uniform(50, 450)) for _ in range(12)]
    points += points[:3]  # three pairs on the same spot
    sizes = [(chance.uniform(12, 60), 14.0) for _ in points]
    places = label_places(points, sizes, (0, 0, 1000, 500), gap=12)
    labels = [box(place, size) for place, size in zip(places, sizes, strict=True)]
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(labels, 2))
    assert all(overlap(label, box(point, (24, 24))) == 0 for label in labels for point in points)
    assert all(left >= 0 and low >= 0 and right <= 1000 and high <= 500 for left, low, right, high in labels)
    near = [math.dist(place, point) for place, point in zip(places, points, strict=True)]
    assert max(near) < 3.5 * 12 * math.sqrt(2) + 40


def test_a_label_at_the_edge_is_inside():
    ((x, y),) = label_places([(95, 95)], [(20, 10)], (0, 0, 100, 100), gap=5)
    assert x + 10 <= 100 and y + 5 <= 100 and (x, y) != (95, 95)
