"""Where in the spectrum a change of noise lies."""

import functools

import torch

BANDS = ("lowest third", "middle third", "highest third")


def band_energies(change: torch.Tensor) -> torch.Tensor:
    """`change` (B, ..., H, W) to how much of its squared norm lies in each third of the frequencies, `(B, 3)`.

    With the orthonormal FFT of each channel the three add up to `‖change‖²` (Parseval). See `frequency_bands`.
    """
    power = torch.fft.fft2(change, norm="ortho").abs().square().flatten(1, -3).sum(1)
    return (power[:, None] * frequency_bands(*change.shape[-2:]).to(power)).sum((-2, -1))


@functools.cache
def frequency_bands(height: int, width: int) -> torch.Tensor:
    """Which third each entry of `fft2` belongs to, `(3, H, W)` zeros and ones: lowest, middle, highest.

    The thirds are of the radial frequency √(u² + v²) in cycles per entry, from 0 to the largest that the grid has, in
    its corner. "It's Never Too Late", https://arxiv.org/abs/2601.00090, figure 6, speaks of thirds of the spectrum and
    does not say where it ends. The lowest third of the radius holds only about 17% of the entries of large grids, the
    middle 52% and the highest 30%: white noise has its energy in these shares.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot(rows[:, None], columns)
    third = (3 * radius / radius.max().clamp_min(1e-12)).long().clamp(max=2)
    return torch.stack([third == band for band in range(3)])
