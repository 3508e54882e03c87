"""Set metrics against explicit formulas, closed forms, published packages, and rendered scenes."""

import itertools
import math
import random

import pytest
import torch

from noiseopt.evaluation.metrics import (
    coverage,
    ground_spread,
    layout_spread,
    mean_pairwise_similarity,
    size_spread,
    vendi_score,
)
from noiseopt.shapes_world import Scene, Shape, render
from noiseopt.shapes_world.world import SIDE

ORDERS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 5.0, math.inf)


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def equally_similar(count: int, similarity: float) -> torch.Tensor:
    """Unit vectors with the same cosine for every pair."""
    kernel = (1 - similarity) * torch.eye(count, dtype=torch.float64) + similarity
    return torch.linalg.cholesky(kernel)


def test_similarity_is_the_mean_over_pairs():
    features = random_features(6, 4)
    pairs = [cosine(a, b) for a, b in itertools.combinations(features.tolist(), 2)]
    assert float(mean_pairwise_similarity(features)) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("metric", [mean_pairwise_similarity, vendi_score])
def test_sets_in_a_batch_are_independent(metric):
    features = random_features(2, 3, 5, 8)
    expected = torch.stack([torch.stack([metric(each) for each in row]) for row in features])
    torch.testing.assert_close(metric(features), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_score_is_the_formula_on_numpy_eigenvalues(q):
    features = random_features(7, 20)
    directions = (features / features.norm(dim=1, keepdim=True)).numpy()
    shares = torch.linalg.eigvals(torch.from_numpy(directions @ directions.T / 7)).real.tolist()
    expected = {
        0.0: lambda: 7,
        1.0: lambda: math.exp(-sum(p * math.log(p) for p in shares)),
        math.inf: lambda: 1 / max(shares),
    }.get(q, lambda: sum(p**q for p in shares) ** (1 / (1 - q)))()
    assert float(vendi_score(features, q)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("q", ORDERS)
def test_equally_similar_images_have_a_closed_form(q, similarity):
    """One eigenvalue (1 + (N - 1) s) / N, and N - 1 of (1 - s) / N."""
    count = 5
    shares = [(1 + (count - 1) * similarity) / count] + [(1 - similarity) / count] * (count - 1)
    if q == 1:
        expected = math.exp(-sum(p * math.log(p) for p in shares))
    else:
        expected = 1 / max(shares) if q == math.inf else sum(p**q for p in shares) ** (1 / (1 - q))
    features = equally_similar(count, similarity)
    assert float(vendi_score(features, q)) == pytest.approx(expected)
    assert float(mean_pairwise_similarity(features)) == pytest.approx(similarity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", ORDERS)
def test_copies_do_not_count(q, dtype):
    """Three orthogonal directions, each twice, once scaled: 3 effective images of 6, for any order."""
    rotation = torch.linalg.qr(random_features(8, 8)).Q[:3].to(dtype)
    assert float(vendi_score(torch.cat((rotation, 0.1 * rotation)), q)) == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("q", ORDERS)
def test_a_single_image_counts_once(q):
    assert float(vendi_score(random_features(1, 4), q)) == pytest.approx(1)


@pytest.mark.parametrize("q", [order for order in ORDERS if order > 0])
def test_gradient_of_the_vendi_score_matches_finite_differences(q):
    features = random_features(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vendi_score(x, q), features)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_gradient_is_finite_for_equal_images(q):
    features = random_features(1, 6).repeat(4, 1).requires_grad_()
    vendi_score(features, q).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_gradient_of_the_similarity_matches_finite_differences():
    assert torch.autograd.gradcheck(mean_pairwise_similarity, random_features(4, 6).requires_grad_())


def naive_balls(features: torch.Tensor, references: torch.Tensor, k: int) -> list[list[bool]]:
    """For each reference, the features inside its ball."""
    found = []
    for i, reference in enumerate(references.tolist()):
        others = [each for j, each in enumerate(references.tolist()) if j != i]
        radius = sorted(math.dist(reference, other) for other in others)[k - 1]
        found.append([math.dist(reference, feature) < radius for feature in features.tolist()])
    return found


@pytest.mark.parametrize("k", [1, 3, 5, 29])
def test_coverage_is_its_definition(k):
    references, features = random_features(30, 3), random_features(20, 3, seed=1) + 0.5
    balls = naive_balls(features, references, k)
    assert float(coverage(features, references, k)) == pytest.approx(sum(map(any, balls)) / 30)


def test_coverage_of_points_on_a_line():
    """The nearest others of the references 0, 1, 3, 6 are at distance 1, 1, 2 and 3; balls are open."""
    references = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    assert float(coverage(torch.tensor([[0.5]]), references, k=1)) == 0.5
    assert float(coverage(torch.tensor([[3.0]]), references, k=1)) == 0.25
    assert float(coverage(references, references, k=1)) == 1.0


def test_equals_the_vendi_score_package():
    vendi = pytest.importorskip("vendi_score.vendi")
    for seed, (count, width) in enumerate([(4, 9), (12, 40), (30, 12)]):
        features = random_features(count, width, seed=seed)
        assert float(vendi_score(features)) == pytest.approx(vendi.score_X(features.numpy()), rel=1e-10)
        if count <= width:
            # on a kernel without zero eigenvalues, whose positive rounding errors the package would count
            directions = torch.nn.functional.normalize(features, dim=1)
            kernel = (directions @ directions.T).numpy()
            for q in ORDERS:
                theirs = vendi.score_K(kernel, q="inf" if q == math.inf else q)
                assert float(vendi_score(features, q)) == pytest.approx(theirs, rel=1e-9)


def test_equals_the_prdc_package(capsys):
    prdc = pytest.importorskip("prdc")
    for seed, k in enumerate([1, 2, 5]):
        references, features = random_features(40, 6, seed=seed), 0.8 * random_features(25, 6, seed=seed + 10) + 0.3
        theirs = prdc.compute_prdc(references.numpy(), features.numpy(), nearest_k=k)
        assert float(coverage(features, references, k)) == pytest.approx(theirs["coverage"], abs=1e-12)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"at least 2 images, but got \(1, 4\)"):
        mean_pairwise_similarity(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\(..., N, D\), but got \(4,\)"):
        vendi_score(torch.zeros(4))
    with pytest.raises(ValueError, match="order of 0 or more"):
        vendi_score(torch.zeros(2, 4), q=-1)
    with pytest.raises(ValueError, match="k from 1 to 4, .* but got 5"):
        coverage(torch.zeros(3, 2), torch.zeros(5, 2), k=5)
    with pytest.raises(ValueError, match="same model"):
        coverage(torch.zeros(3, 2), torch.zeros(5, 3))


def pictures(*scenes: list[Shape]) -> torch.Tensor:
    """Pictures whose units of length are pixels."""
    return render([Scene(tuple(shapes)) for shapes in scenes], torch.Generator().manual_seed(0), size=SIDE)


def rms_distance(places: list[tuple[float, float]]) -> float:
    x, y = (sum(axis) / len(places) for axis in zip(*places, strict=True))
    return math.sqrt(sum((a - x) ** 2 + (b - y) ** 2 for a, b in places) / len(places))


def test_layout_spread_is_the_distance_from_the_mean_place():
    rng = random.Random(0)
    red = [(rng.uniform(13, 22), rng.uniform(13, 51)) for _ in range(6)]
    blue = [(rng.uniform(42, 51), rng.uniform(13, 51)) for _ in range(6)]
    images = pictures(
        *[
            [Shape("circle", "red", *here, 11), Shape("square", "blue", *there, 11)]
            for here, there in zip(red, blue, strict=True)
        ]
    )
    expected = (rms_distance(red) + rms_distance(blue)) / 2
    assert layout_spread(images, "a red circle left of a blue square") == pytest.approx(expected, abs=0.3)
    assert layout_spread(images, "a red star") == pytest.approx(rms_distance(red), abs=0.3)


def test_layout_spread_does_not_see_which_of_two_alike_is_which():
    """Two red circles swap positions and move by 3 pixels vertically: only the moves count."""
    left, right = (16, 29), (47, 35)
    first = [Shape("circle", "red", *left, 10), Shape("circle", "red", *right, 11)]
    second = [Shape("circle", "red", 16, 35, 11), Shape("circle", "red", 47, 29, 10)]
    assert layout_spread(pictures(first, second), "two red circles") == pytest.approx(3, abs=0.3)


def test_layout_spread_of_what_is_found():
    """The blue square is in one image only, so it has no spread."""
    both = [Shape("circle", "red", 16, 20, 10), Shape("square", "blue", 47, 32, 10)]
    images = pictures(both, [Shape("circle", "red", 16, 40, 10)])
    assert layout_spread(images, "a red circle and a blue square") == pytest.approx(10, abs=0.3)
    assert math.isnan(layout_spread(images, "a green circle"))
    assert math.isnan(layout_spread(images[:1], "a red circle"))
    assert layout_spread(images[:1].repeat(3, 1, 1, 1), "a red circle") == 0


@pytest.mark.parametrize("spread", [layout_spread, size_spread])
def test_spreads_are_in_pixels_of_the_image(spread):
    """Of the same pictures, drawn with twice as many."""
    images = pictures([Shape("circle", "red", 16, 20, 9)], [Shape("circle", "red", 16, 40, 12)])
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert spread(large, "a red circle") == pytest.approx(2 * spread(images, "a red circle")) != 0


def test_layout_spread_refuses_other_worlds():
    with pytest.raises(ValueError, match=r"\(B, 3, H, H\) with H a multiple of 64"):
        layout_spread(torch.zeros(2, 3, 32, 32), "a red circle")
    with pytest.raises(ValueError, match="prompt of the shapes world"):
        layout_spread(torch.zeros(2, 3, 64, 64), "a photo of a cat")


def test_size_spread_is_the_deviation_of_radii():
    """A disk of radius r has the area πr²; the square of half-width r has 4r², a radius of 2r/√π."""
    red, blue = (9, 11, 13), (10, 10, 13)
    images = pictures(
        *[
            [Shape("circle", "red", 16, 32, r), Shape("circle", "blue", 46, 32, b)]
            for r, b in zip(red, blue, strict=True)
        ]
    )
    expected = [float(torch.tensor(radii, dtype=torch.float64).std(correction=0)) for radii in (red, blue)]
    assert size_spread(images, "a red circle left of a blue circle") == pytest.approx(sum(expected) / 2, abs=0.15)
    assert size_spread(images, "a red star") == pytest.approx(expected[0], abs=0.15)


def test_size_spread_compares_the_largest_with_the_largest():
    """Two red circles swap their sizes: no difference. One in a single image does not count."""
    first = [Shape("circle", "red", 16, 32, 9), Shape("circle", "red", 47, 32, 13)]
    second = [Shape("circle", "red", 16, 32, 13), Shape("circle", "red", 47, 32, 9)]
    assert size_spread(pictures(first, second), "two red circles") == pytest.approx(0, abs=0.05)
    assert size_spread(pictures(first, second[1:]), "two red circles") == pytest.approx(2, abs=0.15)
    assert math.isnan(size_spread(pictures(first, second), "a green circle"))


def test_ground_spread_is_the_distance_of_mean_grays_and_ignores_shapes():
    """Grounds of gray g and g + 0.2: each is 0.1 from the mean in three channels."""
    images = torch.full((2, 3, 64, 64), 0.3)
    images[1] += 0.2
    images[0, 0, 10:30, 10:30] = 1.0
    assert ground_spread(images) == pytest.approx(0.1 * math.sqrt(3), rel=1e-6)
    saturated = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 64, 64)
    assert ground_spread(torch.cat([images, saturated])) == pytest.approx(0.1 * math.sqrt(3), rel=1e-6)
    assert math.isnan(ground_spread(torch.cat([images[:1], saturated])))


@pytest.mark.parametrize("spread", [lambda images: size_spread(images, "a red circle"), ground_spread])
def test_other_spreads_refuse_other_worlds(spread):
    with pytest.raises(ValueError, match=r"\(B, 3, H, H\) with H a multiple of 64"):
        spread(torch.zeros(2, 3, 32, 32))
