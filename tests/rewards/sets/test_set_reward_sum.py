"""The forms of `diversity=`, the weighted sum, shared features, references, and its gradient in two passes."""

import json
from pathlib import Path

import pytest
import torch
from tiny_features import build_features, publish_dinov2
from torch import Tensor, nn

from noiseopt.rewards import (
    DPP,
    AutoFeatures,
    ColorHistogramFeatures,
    NonDifferentiableReward,
    PairwiseDiversity,
    SetRewardSum,
    TinyImage,
    Vendi,
    join_features,
    list_features,
    list_set_rewards,
)


class CountedFeatures(TinyImage):
    """Counts its forward passes and the images in them."""

    name = "counted"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def encode(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return super().encode(images).square()


def random_images(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.1 + 0.8 * torch.rand(count, 3, 40, 33, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that need no download where a set reward names none."""
    for reward in (DPP, Vendi, PairwiseDiversity):
        monkeypatch.setattr(reward, "default_features", "tiny_image")


@pytest.mark.parametrize(
    ("diversity", "weights", "features"),
    [
        ("dpp", {"dpp": 1.0}, ["tiny_image"]),
        ({"dpp": 150.0}, {"dpp": 150.0}, ["tiny_image"]),
        ({"dpp": ("color_histogram", 150)}, {"dpp": 150.0}, ["color_histogram"]),
        ({"dpp": ["color_histogram", 150]}, {"dpp": 150.0}, ["color_histogram"]),
        ({"dpp": 2.0, "vendi_2": 0.0}, {"dpp": 2.0, "vendi_2": 0.0}, ["tiny_image", "tiny_image"]),
        (["dpp", ["vendi", 3.0]], {"dpp": 1.0, "vendi": 3.0}, ["tiny_image", "tiny_image"]),
        (
            [("dpp", 150.0), ("dpp", "color_histogram", 50.0)],
            {"dpp": 150.0, "dpp_2": 50.0},
            ["tiny_image", "color_histogram"],
        ),
        ({Vendi(TinyImage(), 0.5): 3.0}, {"vendi_0.5": 3.0}, ["tiny_image"]),
        ({"dpp": (ColorHistogramFeatures(), 2.0)}, {"dpp": 2.0}, ["color_histogram"]),
        (DPP(ColorHistogramFeatures()), {"dpp": 1.0}, ["color_histogram"]),
        (SetRewardSum({"pairwise": ("tiny_image", 3.0)}), {"pairwise": 3.0}, ["tiny_image"]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("tiny_default")
def test_accepts_every_form(diversity, weights: dict[str, float], features: list[str]):
    total = SetRewardSum(diversity)
    assert total.weights == weights and total.names == list(weights)
    assert [total.features_of[name] for name in total.names] == features
    output = total(random_images(3))
    expected = sum(weight * output.components[name] for name, weight in weights.items())
    torch.testing.assert_close(output.total, expected)
    described = json.loads(json.dumps(total.describe()))
    assert described == {n: {"features": f, "weight": w} for (n, w), f in zip(weights.items(), features, strict=True)}


@pytest.mark.usefixtures("tiny_default")
def test_plain_values_of_a_description_build_it_again():
    total = SetRewardSum({"dpp": ("color_histogram", 150.0), "vendi": 2.0})
    again = SetRewardSum({name: (each["features"], each["weight"]) for name, each in total.describe().items()})
    assert again.describe() == total.describe()
    assert torch.equal(again(random_images(3)).total, total(random_images(3)).total)


@pytest.mark.parametrize("features", list_features())
@pytest.mark.parametrize("name", list_set_rewards())
def test_every_set_reward_on_every_features(name: str, features: str):
    total = SetRewardSum({name: (build_features(features), 2.0)})
    images = random_images(3).requires_grad_()
    (gradient,) = torch.autograd.grad(total(images).total, images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_a_folder_and_its_precision(tmp_path: Path):
    publish_dinov2(tmp_path)
    folder = tmp_path / "facebook/dinov2-base"
    total = SetRewardSum({"dpp": (folder, 1.0), "vendi": (str(folder), 1.0)}, dtype=torch.bfloat16)
    (features,) = total.feature_maps
    assert features.dtype == torch.bfloat16 and total(random_images(2)).total.dtype == torch.float32


def test_components_are_unweighted_and_detached_and_only_weights_have_a_gradient():
    features, images = TinyImage(), random_images(3).requires_grad_()
    output = SetRewardSum([(DPP(features), 150.0), (Vendi(features), 0.0)])(images)
    torch.testing.assert_close(output.components["dpp"], DPP(features)(images).detach())
    torch.testing.assert_close(output.components["vendi"], Vendi(features)(images).detach())
    assert not any(value.requires_grad for value in output.components.values())
    (found,) = torch.autograd.grad(output.total, images)
    (expected,) = torch.autograd.grad(150 * DPP(features)(images), images)
    torch.testing.assert_close(found, expected)


def test_set_rewards_on_the_same_features_share_one_pass(monkeypatch: pytest.MonkeyPatch):
    features = CountedFeatures()
    total = SetRewardSum({"dpp": (features, 1.0), "vendi": (features, 2.0), "pairwise": ("tiny_image", 1.0)})
    total(random_images(4))
    assert features.batches == [4] and total.feature_names == ["counted", "tiny_image"]
    loaded, load = [], AutoFeatures.from_pretrained
    monkeypatch.setattr(AutoFeatures, "from_pretrained", lambda name, **kw: loaded.append(name) or load(name, **kw))
    total = SetRewardSum([("dpp", "tiny_image", 1.0), ("vendi", "tiny_image", 1.0), ("dpp", "color_histogram", 1.0)])
    assert loaded == ["tiny_image", "color_histogram"] and len(total.feature_maps) == 2


def two_features(dtype: torch.dtype = torch.float32) -> SetRewardSum:
    """Several set rewards on three features, one of them without a weight."""
    patches = build_features("dinov2_patch")
    diversity = [
        (DPP(patches), 150.0),
        (Vendi(patches), 3.0),
        (PairwiseDiversity(TinyImage()), 60.0),
        (DPP(build_features("clip")), 0.0),
    ]
    return SetRewardSum(diversity).to(dtype)


@pytest.mark.parametrize("known_count", [0, 3])
def test_two_passes_give_the_gradient_of_one(known_count: int):
    """The images are functions of noise, and those of the second pass are drawn anew one at a time."""
    total, noise = two_features(), torch.randn(4, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    decode = nn.Upsample(scale_factor=2, mode="bilinear")
    known = total.known_features(random_images(known_count, seed=5)) if known_count else None
    noise.requires_grad_()
    joint = total((decode(noise)).sigmoid(), known)
    (expected,) = torch.autograd.grad(joint.total, noise)

    parts = [total.known_features(decode(each[None]).sigmoid()) for each in noise.detach()]
    output, gradient = total.gradient(join_features(parts), known)
    torch.testing.assert_close(output.total, joint.total.detach())
    assert gradient.keys() == {"dinov2_patch", "tiny_image"} and output.components.keys() == joint.components.keys()
    for index in range(4):
        rows = {name: each[index : index + 1] for name, each in gradient.items()}
        image = decode(noise[index : index + 1]).sigmoid()
        (found,) = torch.autograd.grad(total.linearized(image, rows), noise)
        assert (found[index] - expected[index]).norm() < 1e-5 * expected[index].norm()
        assert not found[:index].any() and not found[index + 1 :].any()


def test_gradient_with_respect_to_features_is_asked_for_under_no_grad():
    total = two_features()
    features = total.known_features(random_images(3))
    with torch.no_grad():
        output, gradient = total.gradient(features)
    leaves = {name: each.clone().requires_grad_() for name, each in features.items()}
    expected = torch.autograd.grad(total.of_features(leaves).total, [leaves[name] for name in gradient])
    for found, each in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(found, each)
    assert not output.total.requires_grad and not any(each.requires_grad for each in features.values())


def test_gradient_of_the_sum_in_float64():
    total = SetRewardSum([(DPP(TinyImage()), 2.0), (Vendi(ColorHistogramFeatures()), 0.5)])
    images = random_images(2, dtype=torch.float64)[..., :3, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total(x).total, images)


def test_references_are_encoded_once_and_get_no_gradient():
    """A set that grows one image at a time: its value is that of the union, of k + 1 images."""
    features = CountedFeatures()
    total, images = SetRewardSum({"dpp": (features, 1.0), "vendi": (features, 1.0)}), random_images(4)
    known = total.known_features(images[:2], chunk_size=1)
    assert features.batches == [1, 1] and not known["counted"].requires_grad
    known = join_features([known, total.known_features(images[2:3])])
    features.batches.clear()
    new = images[3:].requires_grad_()
    for _ in range(3):
        assert torch.autograd.grad(total(new, known).total, new)[0].any()
    assert features.batches == [1, 1, 1]
    torch.testing.assert_close(total(new, known).total, total(images).total)
    torch.testing.assert_close(total(new, images[:3]).total, total(images).total)
    everyone = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(total(everyone[3:], everyone[:3]).total, everyone)
    assert gradient[3].any() and not gradient[:3].any()


def test_without_weights_it_reports_and_has_no_gradient():
    total = SetRewardSum({"dpp": ("tiny_image", 0.0)})
    output, gradient = total.gradient(total.known_features(random_images(3)))
    assert output.total == 0 and 0 < output.components["dpp"] <= 1 and gradient == {}
    assert total.linearized(random_images(1), gradient) == 0


def test_one_image_alone_is_refused():
    total = SetRewardSum({"dpp": ("tiny_image", 1.0)})
    with pytest.raises(ValueError, match="Expected at least 2 images for the set reward 'dpp', references included"):
        total(random_images(1))
    assert total(random_images(1), random_images(1, seed=2)).total > 0


def test_features_of_another_sum_are_refused():
    total = SetRewardSum({"dpp": ("tiny_image", 1.0)})
    features = total.known_features(random_images(2))
    for given in ((features, {"clip": features["tiny_image"]}), ({"clip": features["tiny_image"]}, None)):
        with pytest.raises(ValueError, match=r"Expected features of \['tiny_image'\].*\['clip'\].*missing"):
            total.of_features(*given)


def test_features_without_a_gradient_are_named():
    class Cut(TinyImage):
        differentiable = False

    total = SetRewardSum([(DPP(Cut()), 1.0), (Vendi(Cut()), 0.0)])
    with pytest.raises(NonDifferentiableReward, match=r"the features of \['dpp'\] are not differentiable.*weight 0"):
        total.check_differentiable()
    SetRewardSum([(DPP(TinyImage()), 1.0), (Vendi(Cut()), 0.0)]).check_differentiable()


@pytest.mark.parametrize(
    ("diversity", "error", "message"),
    [
        ({"dpq": 1.0}, ValueError, r"Expected a set reward out of \[.*Did you mean 'dpp'"),
        ({"dpp": ("tiny_imag", 1.0)}, ValueError, r"Expected a feature map out of \[.*Did you mean 'tiny_image'"),
        ({"dpp": (1.0, "tiny_image")}, TypeError, r"Expected features for the set reward 'dpp' .*but got 1\.0\. Write"),
        ({"dpp": -1.0}, ValueError, r"finite weight of at least 0 for the set reward 'dpp', but got -1\.0"),
        ({"dpp": float("nan")}, ValueError, "but got nan"),
        ({"dpp": "tiny_image"}, ValueError, r"but got 'tiny_image'.*other features"),
        (
            {"dpp": ("tiny_image", 1.0, 2.0)},
            ValueError,
            r"a set reward, optional features.*Write `\{'dpp': 150\.0\}`",
        ),
        ([("dpp",)], ValueError, "Expected a set reward, optional features"),
        (("dpp", 150.0), TypeError, r"Expected a set reward by name .*but got 150\.0\. Weighted ones"),
        (DPP, TypeError, "Expected a set reward by name or as an instance"),
        (TinyImage(), TypeError, "Expected a set reward by name or as an instance"),
        ([(DPP(TinyImage()), "clip", 1.0)], ValueError, "Expected no features for the set reward 'dpp'.*Omit them"),
        ({}, ValueError, r"at least one set reward, but got none\. Pass for example `diversity=\{'dpp': 150\.0\}`"),
    ],
)
def test_what_is_no_diversity_is_refused_before_anything_is_loaded(diversity, error, message, monkeypatch):
    monkeypatch.setattr(AutoFeatures, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        SetRewardSum(diversity)
