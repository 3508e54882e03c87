"""The features of an evaluation."""

import dataclasses

import pytest
import torch
from evaluations import results
from tiny_features import build_features

from noiseopt import shapes_world
from noiseopt.evaluation.instruments import Instruments, load_features, set_measure_names, set_measures
from noiseopt.evaluation.metrics import mean_pairwise_similarity
from noiseopt.rewards import PairwiseDiversity, TinyImage

IMAGES = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def test_similarity_of_patches_is_the_mean_of_the_similarities_of_each():
    features = build_features("dinov2_patch")
    embedded = Instruments([], [], features).embed(IMAGES)
    assert embedded is not None and embedded.shape == (3, 16 * 32)
    expected = 1 - PairwiseDiversity(features)(IMAGES)
    torch.testing.assert_close(mean_pairwise_similarity(embedded).float(), expected, rtol=1e-4, atol=1e-5)


def test_vectors_stay_as_they_are():
    features = build_features("dinov2")
    assert torch.equal(Instruments([], [], features).embed(IMAGES), features(IMAGES))


def test_an_embedded_tower_or_what_the_name_stands_for():
    device = torch.device("cpu")
    dinov2 = load_features("dinov2", True, device)
    assert dinov2.model.name_or_path == shapes_world.path("dinov2")
    assert isinstance(load_features("tiny_image", False, device), TinyImage)


def test_features_of_any_distance_measure_a_set():
    """By the definition of each distance, over the three pairs of three images."""
    patches, lpips = build_features("dinov2_patch"), build_features("lpips")
    found = Instruments([], [], None, {"lpips": lpips, "dinov2_patch": patches}).diversity(IMAGES)
    assert list(found) == ["distance lpips", "mss dinov2_patch", "vendi dinov2_patch"]
    pairs = [(lpips(IMAGES)[a] - lpips(IMAGES)[b]).square().sum() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["distance lpips"] == pytest.approx(float(sum(pairs)) / 3, rel=1e-4)
    unit = torch.nn.functional.normalize(patches(IMAGES).double(), dim=-1)
    cosines = [float((unit[a] * unit[b]).sum(-1).mean()) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["mss dinov2_patch"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert 1 < found["vendi dinov2_patch"] <= 3
    assert Instruments([], [], None, {"lpips": lpips}).diversity(IMAGES[:1]) == {}


def test_a_plan_names_what_is_measured_of_a_set():
    measures = set_measures(IMAGES, build_features("dinov2")(IMAGES), None, None)
    asked = results(1).plan
    asked = dataclasses.replace(asked, features="org/model", more_features=("tiny_image", "org/other"))
    more = ["distance tiny_image", "mss org/other", "vendi org/other"]
    assert set_measure_names(asked, judged=False) == [*measures, *more]
    assert set_measure_names(dataclasses.replace(asked, seeds=1), judged=False) == []
