"""Contract of every registered feature map, and the checkpoints that names load."""

import copy
from pathlib import Path

import pytest
import torch
from fresh_process import FreshProcesses
from loopback_hub import LoopbackHub
from tiny_features import PUBLISHED_FEATURES, TINY_FEATURES, build_features

from noiseopt.rewards import Features, PairwiseDistance, list_features
from noiseopt.rewards.features.features import FEATURES

SIZES = [(40, 56), (57, 33), (64, 64)]


@pytest.fixture(params=list_features())
def features(request: pytest.FixtureRequest) -> Features:
    return build_features(request.param)


def random_images(height: int, width: int, count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Away from 0 and 1, so that no clamp takes part in a finite difference."""
    noise = torch.rand(count, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return 0.3 + 0.4 * noise


def probe(found: torch.Tensor) -> torch.Tensor:
    """A number that depends on every feature: the plain sum of normalized ones has no gradient."""
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(2))
    return (found * weights).sum()


def test_every_entry_has_a_tiny_model_and_states_its_facts(features: Features):
    entry = FEATURES.find(features.name)
    assert type(features) is entry
    has_weights = bool(entry.default_checkpoint or entry.package or entry.weights_file)
    assert (entry.weights_file is None) == (entry.published_at is None)
    assert has_weights == (features.name in TINY_FEATURES)
    assert bool(entry.license) == has_weights
    assert entry.default_checkpoint is None or (
        entry.parameter_count and entry.default_checkpoint in PUBLISHED_FEATURES
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_float32_and_tell_images_apart(features: Features, size: tuple[int, int]):
    images = random_images(*size)
    found = features(images)
    assert found.ndim in (2, 3) and len(found) == 2 and found.dtype == torch.float32
    assert found.isfinite().all()
    assert PairwiseDistance(features)(images)[0, 1] > 1e-3
    assert features(images.bfloat16()).dtype == torch.float32


def test_is_frozen_deterministic_and_stays_in_evaluation_mode(features: Features):
    images = random_images(40, 56)
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not any(module.training for module in features.train().modules())
    assert torch.equal(features(images), features(images))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_is_finite_and_not_zero_for_each_image(features: Features, size: tuple[int, int]):
    images = random_images(*size).requires_grad_()
    (gradient,) = torch.autograd.grad(probe(features(images)), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_gradient_agrees_with_finite_differences_in_float64(features: Features):
    """Along the gradient itself, where the difference is largest."""
    exact, images = features.double(), random_images(40, 33, dtype=torch.float64).requires_grad_()
    assert exact(images).dtype == torch.float64
    (gradient,) = torch.autograd.grad(probe(exact(images)), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (probe(exact(images + step * direction)) for step in (1e-4, -1e-4))
    assert ((ahead - behind) / 2e-4).item() == pytest.approx(gradient.norm().item(), rel=0.01)


def test_gradient_is_finite_on_flat_images(features: Features):
    """Black, white and gray: where activations vanish, a norm has no derivative."""
    images = torch.tensor([0.0, 1.0, 0.5])[:, None, None, None].expand(3, 3, 40, 40).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(probe(features(images)), images)
    assert gradient.isfinite().all()


def test_features_depend_on_their_own_image_alone(features: Features):
    images = random_images(40, 56, count=3)
    together = features(images)
    alone = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_stay_close_to_float32(features: Features):
    images = random_images(40, 56)
    exact, half = features(images), copy.deepcopy(features).bfloat16()(images)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.2 * (exact[0] - exact[1]).norm()


def test_refuses_images_that_are_not_in_0_to_1(features: Features):
    for bad in (random_images(40, 56) * 4 - 2, torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=f"the features of {features.name}"):
            features(bad)


def test_distances_are_those_of_a_set_of_images(features: Features):
    """Zero to itself, symmetric, not negative, of N x M pairs; the same from cached, detached features."""
    images, distance = random_images(40, 56, count=3), PairwiseDistance(features)
    found = distance(images)
    assert found.shape == (3, 3) and found.dtype == torch.float32
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.zeros(3), atol=2e-6, rtol=0)
    assert (found > -2e-6).all()
    known = features(images[1:]).detach()
    torch.testing.assert_close(distance(images[:1], images[1:]), found[:1, 1:], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(distance.between(features(images[:1]), known), found[:1, 1:], rtol=1e-4, atol=2e-6)


def test_the_gradient_of_a_distance_agrees_with_finite_differences(features: Features):
    distance = PairwiseDistance(features.double())
    images = random_images(40, 33, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(images)[0, 1], images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (distance(images + step * direction)[0, 1] for step in (1e-4, -1e-4))
    assert ((ahead - behind) / 2e-4).item() == pytest.approx(gradient.norm().item(), rel=0.01)


PROGRAM = """
import sys, torch
from noiseopt.rewards import AutoFeatures
images = torch.load(sys.argv[1])
torch.save({name: AutoFeatures.from_pretrained(name)(images) for name in sys.argv[3:]}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_names_and_hub_ids_load_what_is_published(hub: LoopbackHub, processes: FreshProcesses, tmp_path: Path):
    for publish in PUBLISHED_FEATURES.values():
        publish(hub.root)
    names = [name for name, entry in FEATURES.entries.items() if entry.package is entry.weights_file is None]
    images = random_images(48, 40)
    torch.save(images, tmp_path / "images.pt")
    run = processes.run(PROGRAM, "images.pt", "found.pt", *names, *PUBLISHED_FEATURES, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    by_id = {"facebook/dinov2-base": "dinov2", "openai/clip-vit-large-patch14": "clip"}
    for name, values in found.items():
        torch.testing.assert_close(values, build_features(by_id.get(name, name))(images), rtol=1e-4, atol=1e-4)
