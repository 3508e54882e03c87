"""The soft histogram against its formula, `torch.histc` and finite differences."""

import pytest
import torch

from noiseopt.rewards import ColorHistogramFeatures, PairwiseDistance, SoftColorHistogram, histogram_distance


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def triangles(images: torch.Tensor, bins: int) -> torch.Tensor:
    """The formula as it stands: one triangle per bin and pixel."""
    distance = (images.flatten(2)[..., None] * (bins - 1) - torch.arange(bins)).abs()
    return (1 - distance).clamp_min(0).mean(2).flatten(1)


@pytest.mark.parametrize("bins", [2, 5, 32])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48)], ids=str)
def test_equals_the_formula(bins: int, size: tuple[int, int]):
    images = random_images(2, 3, *size, dtype=torch.float64)
    features = SoftColorHistogram(bins)(images)
    assert features.shape == (2, 3 * bins)
    torch.testing.assert_close(features, triangles(images, bins))
    torch.testing.assert_close(features.unflatten(1, (3, bins)).sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_equals_the_hard_histogram_where_pixels_sit_on_the_centers():
    """Those of `torch.histc` over half a bin more on either side."""
    levels = torch.randint(0, 32, (1, 3, 20, 20), generator=torch.Generator().manual_seed(2))
    images = levels / 31
    features = SoftColorHistogram()(images)
    for channel in range(3):
        hard = torch.histc(images[0, channel], bins=32, min=-0.5 / 31, max=1 + 0.5 / 31) / 400
        torch.testing.assert_close(features[0, 32 * channel : 32 * channel + 32], hard, rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences():
    """Away from the corners of the triangles, where there is no derivative."""
    positions = torch.randint(0, 7, (2, 3, 3, 4), generator=torch.Generator().manual_seed(3)) + 0.2
    images = ((positions + 0.6 * random_images(2, 3, 3, 4)) / 7).double().requires_grad_()
    assert torch.autograd.gradcheck(SoftColorHistogram(8), (images,), eps=1e-5)


def test_no_pixel_is_without_a_gradient():
    """Black, white and overshooting ones included; each moves mass between two bins."""
    images = random_images(1, 3, 6, 6)
    for row, value in enumerate((0, 1, -0.03, 1.03)):
        images[0, :, row] = value
    images.requires_grad_()
    (gradient,) = torch.autograd.grad((SoftColorHistogram()(images) * torch.arange(96)).sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 31 / 36))


def test_does_not_know_where_a_pixel_is_nor_how_many_there_are():
    images = random_images(1, 3, 8, 8)
    shuffled = images.flatten(2)[..., torch.randperm(64)].unflatten(2, (8, 8))
    histogram = SoftColorHistogram()
    torch.testing.assert_close(histogram(shuffled), histogram(images))
    torch.testing.assert_close(histogram(images.repeat(1, 1, 2, 3)), histogram(images))


def test_half_precision_becomes_float32_and_overshoot_is_clamped():
    histogram = SoftColorHistogram()
    assert histogram(random_images(1, 3, 4, 4).bfloat16()).dtype == torch.float32
    over = torch.tensor([-0.04, 1.04]).expand(1, 3, 2, 2)
    torch.testing.assert_close(histogram(over), histogram(over.clamp(0, 1)))


def test_distance_spans_0_to_1():
    black, white = SoftColorHistogram()(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
    assert histogram_distance(black, black) == 0
    assert histogram_distance(black, white).item() == pytest.approx(1)
    features = SoftColorHistogram()(random_images(4, 3, 5, 5))
    distances = histogram_distance(features[:, None], features[None])
    assert distances.shape == (4, 4)
    torch.testing.assert_close(distances, torch.cdist(features, features) / 6**0.5, rtol=1e-4, atol=1e-4)
    assert distances.max() < 1


def test_descending_the_distance_brings_palettes_together():
    images = random_images(2, 3, 8, 8)
    images[1] = images[1] / 2
    histogram, target = SoftColorHistogram(), SoftColorHistogram()(images[:1])[0]
    moving = images[1:].clone().requires_grad_()
    before = histogram_distance(histogram(moving)[0], target)
    (gradient,) = torch.autograd.grad(before, moving)
    after = histogram_distance(histogram(moving.detach() - 0.5 * gradient)[0], target)
    assert after < before


def test_refuses_a_single_bin():
    with pytest.raises(ValueError, match="Expected at least 2 bins, but got 1"):
        SoftColorHistogram(1)


def test_as_features_their_distance_is_that_of_histograms():
    first, second = torch.rand(2, 3, 3, 12, 10, generator=torch.Generator().manual_seed(9))
    features = ColorHistogramFeatures()
    found = PairwiseDistance(features)(first, second)
    histogram = SoftColorHistogram()
    expected = histogram_distance(histogram(first)[:, None], histogram(second)[None])
    torch.testing.assert_close(found, expected)
