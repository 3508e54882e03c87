"""Distances, norms, coherence and spectra of a group of results, and a table of them."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.noise_statistics import NoiseStatistics, noise_statistics, slope_error
from ..evaluation.table import escaped
from ..pipelines.results.frequency_bands import BANDS, band_energies, frequency_bands
from ..pipelines.results.noise_result import NoiseResult
from ..shown_text import LONGEST_LINE, shown
from .coherence import Coherence, coherence, most_rings, white_coherence
from .distances import l2_table
from .groups import Group


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The analysis of one group of results.

    Attributes:
        group: The results.
        rings: Number of frequency rings of the coherence; `None` for as many as the size allows, at most 16.
        latents: `(B, C, H, W)` each, the images of the initial and the optimized noises as latents, if sampled.
    """

    group: Group
    rings: int | None = None
    latents: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def change(self) -> Tensor:
        """Return the optimized minus the initial noise, `(B, C, H, W)` in float64."""
        return self.group.optimized.double() - self.group.initial.double()

    @property
    def unchanged(self) -> int:
        """Number of noises that were returned unchanged because no step improved on the baseline."""
        return int((self.change.flatten(1).norm(dim=1) == 0).sum())

    @functools.cached_property
    def distances(self) -> dict[str, float]:
        """See `l2_table`."""
        return l2_table(self.group.initial, self.group.optimized, *(self.latents or ()))

    @property
    def relative_change(self) -> float:
        """`ρ = ‖change‖ / ‖initial noise‖` over all noises."""
        return float(self.change.norm() / self.group.initial.double().norm())

    @property
    def cosine(self) -> float:
        """The mean cosine of initial and optimized noise."""
        initial, optimized = (noise.double().flatten(1) for noise in (self.group.initial, self.group.optimized))
        return float(torch.cosine_similarity(initial, optimized).mean())

    @functools.cached_property
    def coherence(self) -> Coherence:
        """See `coherence`. Raises `ValueError` for too little data."""
        initial = self.group.initial
        return coherence(initial, self.group.optimized, self.rings or most_rings(initial.shape))

    @property
    def white(self) -> float:
        """The coherence after a white edit of the same norm."""
        return white_coherence(self.relative_change)

    @functools.cached_property
    def statistics(self) -> tuple[NoiseStatistics, NoiseStatistics]:
        """The statistics of the initial and the optimized noise."""
        return noise_statistics(self.group.initial), noise_statistics(self.group.optimized)

    @property
    def slope_error(self) -> float:
        """The standard error of the spectral slope of white noise of this size."""
        return slope_error(self.group.initial.shape)

    @functools.cached_property
    def band_shares(self) -> Tensor:
        """`(3,)`: the share of each third of the frequencies in the squared change."""
        energies = band_energies(self.change).sum(0)
        return energies / energies.sum()

    @property
    def mean_share(self) -> float:
        """The share of the squared change at frequency 0, the means of the channels."""
        size = self.change[0, 0].numel()
        return float(size * self.change.mean((-2, -1)).square().sum() / self.change.square().sum())

    @property
    def white_shares(self) -> Tensor:
        """`(3,)`: the band shares of a white edit, proportional to the number of entries."""
        return band_entries(self.group) / band_entries(self.group).sum()

    @functools.cached_property
    def band_changes(self) -> Tensor:
        """`(steps, 3)`: root mean square change of a Fourier coefficient, by step and third of the frequencies.

        In units of white noise, whose coefficients are 1, over all noises that were still running. A white edit has
        three equal values. Figure 6 of "It's Never Too Late" shows this comparison.
        """
        steps = [changes_of(result) for result in self.group.results]
        longest = max(len(each) for each in steps)
        padded = [torch.nn.functional.pad(each, (0, 0, 0, 0, 0, longest - len(each)), value=math.nan) for each in steps]
        channels = math.prod(self.group.shape[:-2])
        return (torch.cat(padded, dim=1).nanmean(1) / band_entries(self.group) / channels).sqrt()

    def numbers(self) -> dict[str, Any]:
        """Return everything as plain values."""
        initial, optimized = self.statistics
        found = self.coherence
        return {
            "method": self.group.method,
            "model": self.group.model,
            "shape": list(self.group.shape),
            "files": [shown(path, LONGEST_LINE) for path in self.group.paths],
            "noises": len(self.change),
            "unchanged": self.unchanged,
            "l2": self.distances,
            "relative change": self.relative_change,
            "cosine": self.cosine,
            "coherence": {
                "frequencies": found.frequencies.tolist(),
                "values": found.values.tolist(),
                "entries": found.entries.tolist(),
                "white edit": self.white,
            },
            "initial": dataclasses.asdict(initial),
            "optimized": dataclasses.asdict(optimized),
            "spectral slope error": self.slope_error,
            "band shares": self.band_shares.tolist(),
            "mean share": self.mean_share,
            "band shares of a white edit": self.white_shares.tolist(),
            "band changes": self.band_changes.tolist(),
        }

    def column(self) -> dict[str, str]:
        """Return the group's column of the table, from row to text."""
        initial, optimized = self.statistics
        values = self.coherence.values.tolist()
        count = len(self.change)
        rows = {"noises": str(count) + f", {self.unchanged} of them unchanged" * (self.unchanged > 0)}
        rows |= {f"L2: {row}": f"{distance:.4g}" for row, distance in self.distances.items()}
        rows["change / norm of the initial noise"] = f"{self.relative_change:.3g}"
        rows["cosine of initial and optimized noise"] = f"{self.cosine:.3f}"
        rows["norm / √d"] = f"{initial.norm:.3f} → {optimized.norm:.3f}"
        rows["spectral slope without frequency 0 (white noise: 0)"] = (
            f"{initial.spectral_slope:+.3f} → {optimized.spectral_slope:+.3f} (± {self.slope_error:.3f})"
        )
        rows["coherence, lowest … highest frequencies"] = f"{values[0]:.3f} … {values[-1]:.3f}"
        rows["coherence after a white edit of this size"] = f"{self.white:.3f}"
        means, of_white = self.mean_share, 1 / self.change[0, 0].numel()
        rows["share of the squared change: means of the channels (white edit)"] = f"{means:.1%} ({of_white:.1%})"
        for band, share, white in zip(BANDS, self.band_shares.tolist(), self.white_shares.tolist(), strict=True):
            rows[f"share of the squared change: {band} of frequencies (white edit)"] = f"{share:.1%} ({white:.1%})"
        return rows


def band_entries(group: Group) -> Tensor:
    """Return the number of entries of a channel's spectrum in each third of the frequencies, `(3,)`."""
    return frequency_bands(*group.shape[-2:]).sum((-2, -1)).double()


def changes_of(result: NoiseResult) -> Tensor:
    """Return the recorded changes, then those of a returned noise that was updated once more, `(steps, B, 3)`."""
    assert result.band_changes is not None and result.initial_noise is not None
    recorded = result.band_changes.double()
    returned = band_energies(result.noise.double() - result.initial_noise.double())
    at_best = recorded[result.best_step, torch.arange(len(result.noise))]
    same = at_best.isnan() | torch.isclose(returned, at_best, rtol=1e-3, atol=1e-6)
    moved_on = returned.where(~recorded[-1].isnan(), torch.nan)
    return recorded if same.all() else torch.cat([recorded, moved_on[None]])


def markdown(analyses: Sequence[Analysis]) -> str:
    """Format a table with a column per group; rows that a group lacks show a dash."""
    columns = [analysis.column() for analysis in analyses]
    names = list(dict.fromkeys(row for column in columns for row in column))
    lines = [["", *(escaped(analysis.group.title) for analysis in analyses)], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column.get(row, "–") for column in columns)] for row in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
