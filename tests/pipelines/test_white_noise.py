"""The projection on white noise: on its set, nearest, idempotent, for any size."""

import itertools
import math

import numpy as np
import pytest
import torch

from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines import WhiteNoiseProjection

project = WhiteNoiseProjection()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks_of(sample: torch.Tensor) -> list[np.ndarray]:
    """The sizes of the coefficients of one sample `(C, H, W)` by numpy, in blocks of 16, the last of 16 to 31."""
    channels, height, width = sample.shape
    spectrum = np.fft.fft2(sample.double().numpy()) / math.sqrt(height * width)
    real, found, seen = [], [], set()
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        partner = (c, -y % height, -x % width)
        far = min(y / height, 1 - y / height) ** 2 + min(x / width, 1 - x / width) ** 2
        if partner == (c, y, x):
            real.append((far, spectrum[c, y, x].real))
        elif partner not in seen:
            seen.add((c, y, x))
            found.append((far, abs(spectrum[c, y, x])))
    real.sort(key=lambda each: round(each[0], 6))
    pairs = [(a[0], math.hypot(a[1], b[1]) / math.sqrt(2)) for a, b in zip(real[::2], real[1::2], strict=False)]
    sizes = [size for _, size in sorted(pairs + found, key=lambda each: round(each[0], 6))]
    starts = list(range(0, max(len(sizes) - 15, 1), 16))
    return [np.array(sizes[start:end]) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


SIZES = [
    (4, 8, 8),
    (1, 1, 4),
    (1, 1, 5),
    (1, 5, 7),
    (1, 3, 11),
    (3, 10, 10),
    (8, 8, 8),
    (1, 7, 73),
    (3, 1, 40),
    (4, 33, 20),
]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_it_is_on_the_set(shape):
    sample = project(5 * drawn(2, *shape).square())[1]
    for block in blocks_of(sample):
        assert block.sum() == pytest.approx(len(block) * math.sqrt(math.pi) / 2, rel=1e-4)
        assert np.square(block).sum() == pytest.approx(len(block), rel=1e-4)
    assert sample.square().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_projecting_again_changes_nothing(shape):
    projected = project(drawn(3, *shape).square())
    torch.testing.assert_close(project(projected), projected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sample",
    [
        torch.ones(1, 4, 8, 8),
        torch.nn.functional.one_hot(torch.tensor(5), 256).float().view(1, 4, 8, 8),
        torch.arange(256.0).view(1, 4, 8, 8),
        torch.ones(1, 1, 5, 7),
        (torch.arange(256) % 2 * 2.0 - 1).view(1, 4, 8, 8),
    ],
    ids=["constant", "one entry", "ramp", "constant of odd size", "alternating"],
)
def test_equal_coefficients_have_a_projection_too(sample):
    projected = project(sample)
    for block in blocks_of(projected[0]):
        assert np.square(block).sum() == pytest.approx(len(block), rel=2e-3)
        assert block.sum() == pytest.approx(len(block) * math.sqrt(math.pi) / 2, rel=2e-3)
    torch.testing.assert_close(project(projected), projected, atol=2e-3, rtol=0)


def test_no_point_of_the_set_is_nearer():
    """Every point near the projection is at least as far, and so is that of other samples."""
    sample = drawn(1, 4, 8, 8).abs()
    distance = (project(sample) - sample).norm()
    others = [project(project(sample) + 0.1 * drawn(1, 4, 8, 8, seed=seed)) for seed in range(1, 50)]
    others += [project(drawn(1, 4, 8, 8, seed=seed)) for seed in range(50, 60)]
    assert all((other - sample).norm() >= distance - 1e-5 for other in others)


@pytest.mark.parametrize(("shape", "cosine"), [((8, 8, 8), 0.98), ((4, 64, 64), 0.988)], ids=["512", "16,384"])
def test_a_gaussian_draw_hardly_changes(shape, cosine):
    samples = drawn(64, *shape)
    cosines = torch.cosine_similarity(project(samples).flatten(1), samples.flatten(1))
    assert cosines.mean() >= cosine and cosines.min() >= cosine - 0.008


def test_it_turns_pink_noise_white():
    """The noise statistics of the projection are those of Gaussian noise, for a sample far from it."""
    pink = drawn(1, 4, 64, 64).cumsum(-1).cumsum(-2)
    before, after = (
        gaussian_limits((1, 4, 64, 64)).z_scores(noise_statistics(noise)) for noise in (pink, project(pink))
    )
    assert abs(before.spectral_slope) > 20
    assert abs(after.spectral_slope) < 3
    assert abs(after.norm) < 3


def test_each_sample_is_projected_by_itself():
    noise = drawn(3, 4, 8, 8)
    torch.testing.assert_close(project(noise)[1:2], project(noise[1:2]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    gradient = drawn(2, 4, 8, 8)
    torch.testing.assert_close(project(scale * gradient), project(gradient), atol=1e-4, rtol=1e-4)


def test_zeros_stay_zero_and_half_precision_is_projected_in_float32():
    noise = drawn(2, 4, 8, 8, dtype=torch.bfloat16)
    assert project(noise).dtype == torch.float32
    assert not project(torch.zeros(2, 4, 8, 8)).any()
    assert project(drawn(1, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    noise = drawn(2, 4, 8, 8).square()
    expected, usual = project(noise), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = project(noise)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(found, expected)


def test_a_sample_has_two_dimensions():
    with pytest.raises(ValueError, match=r"Expected samples of shape \(B, ..., H, W\), but got \(2, 64\)"):
        project(drawn(2, 64))
