"""Coherence against closed forms, and against a band-pass filter followed by a cosine."""

import math

import pytest
import torch

from noiseopt.analysis.coherence import coherence, most_rings, ring_of_each_frequency, white_coherence


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edit(kind: torch.Tensor, norm: float) -> torch.Tensor:
    """Scale each sample to a norm."""
    return kind * norm / kind.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def test_white_edit_is_flat():
    """The standard error of a squared correlation C near 1 over n entries is 2·(1 − C)·√(C/n)."""
    noise = normal(0, 8, 4, 64, 64)
    found = coherence(noise, noise + edit(normal(1, 8, 4, 64, 64), 27.0))
    expected = white_coherence(27 / 128)
    assert expected == pytest.approx(0.957, abs=5e-4)
    errors = 2 * (1 - expected) * (expected / found.entries).sqrt()
    assert ((found.values - expected).abs() < 4.5 * errors).all()


def test_block_edit_is_in_the_low_frequencies():
    """Constant on 4×4 blocks, norm 27, d = 16384: `1 / (1 + ρ²·S)` with S the power of a block."""
    noise, blocks = normal(0, 8, 4, 64, 64), normal(1, 8, 4, 16, 16)
    constant = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = coherence(noise, noise + edit(constant, 27.0))
    f = torch.fft.fftfreq(64, dtype=torch.float64)
    kernel = (torch.cos(2 * math.pi * f * 0.5) * torch.cos(2 * math.pi * f)).square() * 4  # |(1 + w + w² + w³)/2|²
    power, ring = kernel[:, None] * kernel, ring_of_each_frequency(noise.shape, 16)
    assert power.mean() == pytest.approx(1)
    expected = torch.stack([1 / (1 + (27 / 128) ** 2 * power[ring == index].mean()) for index in range(16)])
    errors = 2 * (1 - expected) * (expected / found.entries.clamp(max=blocks.numel())).sqrt()
    assert ((found.values - expected).abs() < 4.5 * errors).all()
    assert (expected[:5] > 0.55).all() and (expected[:5] < 0.8).all() and (expected[8:] > 0.979).all()


def test_is_the_squared_cosine_of_band_passed_noises():
    x, y = normal(0, 2, 3, 16, 16), normal(0, 2, 3, 16, 16) + normal(1, 2, 3, 16, 16)
    found = coherence(x, y, rings=4)
    rows, columns = (torch.fft.fftfreq(16).abs() for _ in range(2))
    radius = (rows[:, None].square() + columns.square()).sqrt()
    for ring, value in enumerate(found.values):
        low, high = ring / 8, (ring + 1) / 8
        inside = (radius >= low) & ((radius < high) | ((ring == 3) & (radius <= high)))
        a, b = (torch.fft.ifft2(torch.fft.fft2(noise) * inside).real.flatten() for noise in (x, y))
        torch.testing.assert_close(value, torch.cosine_similarity(a, b, dim=0).square())
        assert found.entries[ring] == inside.sum() * 6
    torch.testing.assert_close(found.frequencies, torch.tensor([0.0625, 0.1875, 0.3125, 0.4375]).double())


def test_equal_noises_and_multiples_score_one():
    noise = normal(0, 1, 4, 32, 32)
    torch.testing.assert_close(coherence(noise, -0.3 * noise, rings=8).values, torch.ones(8).double())


def test_independent_noises_score_one_over_the_entries():
    """The squared correlation of n pairs of normals has mean 1/n and a standard deviation of about √2/n."""
    found = [coherence(normal(2 * i, 1, 4, 32, 32), normal(2 * i + 1, 1, 4, 32, 32), 8) for i in range(200)]
    scaled = torch.stack([each.values * each.entries for each in found])
    assert ((scaled.mean(0) - 1).abs() < 5 * 2**0.5 / 200**0.5).all()
    assert found[0].values[3:].max() < 0.03


def test_a_ring_of_one_entry_is_refused():
    noise = normal(0, 1, 1, 16, 16)
    with pytest.raises(ValueError, match="8 rings of 1 × 1 channels of 16×16 have one with 1. Pool more samples"):
        coherence(noise, noise, rings=8)
    with pytest.raises(ValueError, match="fewer rings"):
        coherence(normal(0, 50, 4, 8, 8), normal(1, 50, 4, 8, 8), rings=40)  # rings without any frequency
    assert coherence(normal(0, 8, 1, 16, 16), normal(0, 8, 1, 16, 16), rings=8).entries[0] == 8


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        coherence(normal(0, 1, 4, 16, 16), normal(0, 1, 4, 8, 8))
    with pytest.raises(ValueError, match="Unpack"):
        coherence(normal(0, 1, 64, 64), normal(0, 1, 64, 64))


@pytest.mark.parametrize(
    ("shape", "rings"),
    [((1, 4, 64, 64), 16), ((2, 8, 8, 8), 4), ((4, 4, 128, 20), 10), ((1, 2, 8, 8), 3), ((1, 1, 1, 9), 1)],
)
def test_as_many_rings_as_have_enough_entries(shape, rings):
    assert most_rings(torch.Size(shape)) == rings
    if rings > 1:
        assert coherence(normal(0, *shape), normal(1, *shape), rings).entries.min() >= 8
