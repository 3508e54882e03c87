"""How much of a noise survives an edit, by spatial frequency."""

import dataclasses

import torch
from torch import Tensor

NYQUIST = 0.5  # cycles per entry of the noise
FEWEST = 8  # entries of a ring, over channels and samples: unrelated noises then score 1/8


@dataclasses.dataclass(frozen=True, eq=False)
class Coherence:
    """Magnitude-squared coherence of two noises, ring by ring.

    Attributes:
        frequencies: `(R,)`, the middle of each ring of radial frequencies, in cycles per entry: 0.5 is Nyquist.
        values: `(R,)` in [0, 1]: 0 for unrelated noises, 1 for noises that are equal up to one factor.
        entries: `(R,)`, what was pooled in each ring. Unrelated Gaussian noises score `1 / entries` on average.
    """

    frequencies: Tensor
    values: Tensor
    entries: Tensor


def coherence(initial: Tensor, optimised: Tensor, rings: int = 16) -> Coherence:
    """`C(f) = |⟨S_xy⟩|² / (⟨S_xx⟩·⟨S_yy⟩)`, where ⟨·⟩ pools a ring of frequencies over all channels and samples.

    The measure of the analysis of ReNO, https://arxiv.org/abs/2406.04312, that its authors' group presented; they do
    not say how they estimate it. Each channel is transformed by a 2-D FFT. By Parseval, C of a ring is the squared
    cosine between the two noises with all other frequencies removed. The corners beyond Nyquist are left out.

    Args:
        initial, optimised: `(B, ..., H, W)`, of one shape; several results concatenated along B.
        rings: How many rings of equal width from 0 to Nyquist.

    Raises:
        ValueError: For different shapes, and where a ring has too few entries: a single one is coherent with anything.
    """
    check_pair(initial, optimised)
    if not (isinstance(rings, int) and rings >= 1):
        raise ValueError(f"Expected `rings` to be an integer of 1 or more, but got {rings!r}.")
    entries = ring_entries(initial.shape, rings)
    check_entries(entries, initial.shape)
    ring = ring_of_each_frequency(initial.shape, rings)
    x, y = (torch.fft.fft2(noise.detach().double().cpu()).flatten(0, -3) for noise in (initial, optimised))
    products = ((x.conj() * y).real, x.abs().square(), y.abs().square())
    s_xy, s_xx, s_yy = (torch.zeros(rings + 1).double().index_add_(0, ring.flatten(), p.sum(0).flatten())[:rings]
                        for p in products)  # fmt: skip
    middles = (torch.arange(rings, dtype=torch.float64) + 0.5) * NYQUIST / rings
    return Coherence(middles, s_xy.square() / (s_xx * s_yy), entries)


def white_coherence(relative_norm: float) -> float:
    """`1 / (1 + ρ²)`: the coherence, at every frequency, after adding white noise of ρ times the norm."""
    return 1 / (1 + relative_norm**2)


def most_rings(shape: torch.Size) -> int:
    """As many rings as noise of this shape has enough entries for, each an index unit wide or more; at most 16."""
    widest = max(1, min(16, min(shape[-2:]) // 2))
    return next((rings for rings in range(widest, 1, -1) if ring_entries(shape, rings).min() >= FEWEST), 1)


def ring_entries(shape: torch.Size, rings: int) -> Tensor:
    """How many entries each ring has over all channels and samples, `(R,)`."""
    ring = ring_of_each_frequency(shape, rings)
    return torch.bincount(ring.flatten(), minlength=rings + 1)[:rings] * shape[:-2].numel()


def ring_of_each_frequency(shape: torch.Size, rings: int) -> Tensor:
    """The ring of each entry of `fft2`, `(H, W)`; `rings` for what lies beyond Nyquist."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in shape[-2:])
    radius = torch.hypot(rows[:, None], columns)
    ring = (radius * rings / NYQUIST).long().clamp(max=rings - 1)
    return ring.where(radius <= NYQUIST, rings)


def check_pair(initial: Tensor, optimised: Tensor) -> None:
    """Raise unless these are noises of one spatial shape."""
    if initial.shape != optimised.shape or initial.ndim < 4:
        raise ValueError(
            "Expected initial and optimised noise of one shape (B, C, H, W), but got "
            f"{tuple(initial.shape)} and {tuple(optimised.shape)}. Unpack packed latents first."
        )


def check_entries(entries: Tensor, shape: torch.Size) -> None:
    if entries.min() < FEWEST:
        samples, channels = shape[0], shape[1:-2].numel()
        raise ValueError(
            f"Expected at least {FEWEST} entries in each ring of frequencies, since one alone is coherent with "
            f"anything, but {len(entries)} rings of {samples} × {channels} channels of {shape[-2]}×{shape[-1]} have "
            f"one with {int(entries.min())}. Pool more samples, or ask for fewer rings."
        )
