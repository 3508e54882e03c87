"""Spectrum of a change of the noise."""

import functools

import torch

BANDS = ("lowest third", "middle third", "highest third")


def band_energies(change: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of `change` (B, ..., H, W) in each third of the frequencies, `(B, 3)`.

    By Parseval's theorem, with the orthonormal FFT of each channel, the three add up to `‖change‖²`. See
    `frequency_bands`.
    """
    power = torch.fft.fft2(change, norm="ortho").abs().square().flatten(1, -3).sum(1)
    bands = frequency_bands(*change.shape[-2:]).to(change.device)
    return torch.where(bands, power[:, None], 0.0).sum((-2, -1))


@functools.cache
def frequency_bands(height: int, width: int) -> torch.Tensor:
    """Return the masks of the lowest, middle and highest third of the frequencies of `fft2`, `(3, H, W)` bool.

    The thirds are of the radial frequency √(u² + v²) in cycles per entry, from 0 to the largest of the grid, in its
    corner. Figure 6 of "It's Never Too Late", https://arxiv.org/abs/2601.00090, plots thirds of the spectrum without
    saying where it ends. On large grids the thirds hold about 17%, 52% and 30% of the entries, and so of the energy of
    white noise.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot(rows[:, None], columns)
    third = (3 * radius / radius.max().clamp_min(1e-12)).long().clamp(max=2)
    return torch.stack([third == band for band in range(3)])
