"""The features of an evaluation."""

import dataclasses

import torch
from tiny_features import build_features

from noiseopt import shapes_world
from noiseopt.evaluation.instruments import Instruments, load_features
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


@dataclasses.dataclass
class Names:
    """The fields of a plan that `load_features` reads."""

    features: str | None
    features_are_embedded: bool


def test_an_embedded_tower_or_what_the_name_stands_for():
    device = torch.device("cpu")
    assert load_features(Names(None, False), device) is None
    dinov2 = load_features(Names("dinov2", True), device)
    assert dinov2.model.name_or_path == shapes_world.path("dinov2")
    assert isinstance(load_features(Names("tiny_image", False), device), TinyImage)
