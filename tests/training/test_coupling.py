"""The coupling of noises and images: it sets the numbers and keeps the noise Gaussian."""

import torch

from training.coupling import basis, couple


def chances(noise: torch.Tensor) -> torch.Tensor:
    """Read the numbers determined by noises (B, 8, 8, 8): (B, LAYOUT + LOOKS), uniform on [0, 1] if Gaussian."""
    return torch.special.ndtr(noise.flatten(1) @ basis().flatten(1).T)


def test_basis_is_orthonormal():
    patterns = basis().flatten(1)
    torch.testing.assert_close(patterns @ patterns.T, torch.eye(len(patterns)))


def test_coupled_noise_decides_what_it_was_coupled_to_and_stays_gaussian():
    generator = torch.Generator().manual_seed(0)
    noise, chance = torch.randn(4000, 8, 8, 8, generator=generator), torch.rand(4000, len(basis()), generator=generator)
    coupled = couple(noise, chance)
    torch.testing.assert_close(chances(coupled), chance, atol=2e-4, rtol=0)
    flat = coupled.flatten(1)
    assert abs(flat.var(0).mean() - 1) < 0.01
    assert (flat @ basis().flatten(1).T).var(0).sub(1).abs().max() < 0.1
