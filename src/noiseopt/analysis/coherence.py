"""Coherence of two noises by spatial frequency: how much of a noise survives an edit."""

import dataclasses

import torch
from torch import Tensor

NYQUIST = 0.5  # cycles per entry of the noise
FEWEST = 8  # entries per ring, over channels and samples: unrelated noises then score 1/8


@dataclasses.dataclass(frozen=True, eq=False)
class Coherence:
    """Magnitude-squared coherence of two noises by ring of frequencies.

    Attributes:
        frequencies: `(R,)`, the center of each ring in cycles per entry; 0.5 is Nyquist.
        values: `(R,)` in [0, 1]: 0 for unrelated noises, 1 for noises equal up to a factor.
        entries: `(R,)`, the number of coefficients pooled in each ring. Unrelated Gaussian noises average `1 /
            entries`.
    """

    frequencies: Tensor
    values: Tensor
    entries: Tensor


def coherence(initial: Tensor, optimized: Tensor, rings: int = 16) -> Coherence:
    """`C(f) = |⟨S_xy⟩|² / (⟨S_xx⟩·⟨S_yy⟩)`, where ⟨·⟩ pools a ring of frequencies over all channels and samples.

    The analysis of ReNO (https://arxiv.org/abs/2406.04312) presented by its authors' group uses this measure without
    giving an estimator. Each channel is transformed by a 2-D FFT. By Parseval's theorem, C of a ring is the squared
    cosine of the two noises filtered to that ring. Frequencies beyond Nyquist (the corners) are ignored.

    Args:
        initial, optimized: `(B, ..., H, W)`, of equal shape; concatenate several results along B.
        rings: Number of rings of equal width from 0 to Nyquist.

    Raises:
        ValueError: For different shapes, or a ring with too few entries (a single one has coherence 1 with anything).
    """
    check_pair(initial, optimized)
    if not (isinstance(rings, int) and rings >= 1):
        raise ValueError(f"Expected `rings` to be an integer of 1 or more, but got {rings!r}.")
    entries = ring_entries(initial.shape, rings)
    check_entries(entries, initial.shape)
    ring = ring_of_each_frequency(initial.shape, rings)
    x, y = (torch.fft.fft2(noise.detach().double().cpu()).flatten(0, -3) for noise in (initial, optimized))
    products = ((x.conj() * y).real, x.abs().square(), y.abs().square())
    s_xy, s_xx, s_yy = (torch.zeros(rings + 1).double().index_add_(0, ring.flatten(), p.sum(0).flatten())[:rings]
                        for p in products)  # fmt: skip
    middles = (torch.arange(rings, dtype=torch.float64) + 0.5) * NYQUIST / rings
    return Coherence(middles, s_xy.square() / (s_xx * s_yy), entries)


def white_coherence(relative_norm: float) -> float:
    """Return `1 / (1 + ρ²)`, the coherence at every frequency after adding white noise of ρ times the norm."""
    return 1 / (1 + relative_norm**2)


def most_rings(shape: torch.Size) -> int:
    """Return the largest number of rings with enough entries each, at least one index unit wide; at most 16."""
    widest = max(1, min(16, min(shape[-2:]) // 2))
    return next((rings for rings in range(widest, 1, -1) if ring_entries(shape, rings).min() >= FEWEST), 1)


def ring_entries(shape: torch.Size, rings: int) -> Tensor:
    """Return the number of entries of each ring over all channels and samples, `(R,)`."""
    ring = ring_of_each_frequency(shape, rings)
    return torch.bincount(ring.flatten(), minlength=rings + 1)[:rings] * shape[:-2].numel()


def ring_of_each_frequency(shape: torch.Size, rings: int) -> Tensor:
    """Return the ring of each entry of `fft2`, `(H, W)`, which is `rings` beyond the Nyquist frequency."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in shape[-2:])
    radius = torch.hypot(rows[:, None], columns)
    ring = (radius * rings / NYQUIST).long().clamp(max=rings - 1)
    return ring.where(radius <= NYQUIST, rings)


def check_pair(initial: Tensor, optimized: Tensor) -> None:
    """Raise `ValueError` unless the noises have one spatial shape."""
    if initial.shape != optimized.shape or initial.ndim < 4:
        raise ValueError(
            "Expected initial and optimized noise of one shape (B, C, H, W), but got "
            f"{tuple(initial.shape)} and {tuple(optimized.shape)}. Unpack packed latents first."
        )


def check_entries(entries: Tensor, shape: torch.Size) -> None:
    if entries.min() < FEWEST:
        samples, channels = shape[0], shape[1:-2].numel()
        raise ValueError(
            f"Expected at least {FEWEST} entries in each ring of frequencies, but {len(entries)} rings of "
            f"{samples} × {channels} channels of {shape[-2]}×{shape[-1]} have one with {int(entries.min())}. Pool more "
            "samples, or use fewer rings."
        )
