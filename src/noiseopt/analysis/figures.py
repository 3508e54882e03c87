"""The figures of an analysis, drawn without pyplot: no windows, no global state."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..evaluation.figures import COLORS, GROUND, quiet_axes
from ..evaluation.noise_statistics import gaussian_limits
from ..pipelines.results.frequency_bands import BANDS
from ..plots import MARGIN, MUTED, Page
from ..plots import WIDTH as PAGE
from .analysis import Analysis

BAND_COLORS = ("#cf222e", "#bf8700", "#0969da")  # from long to short wavelengths, as in light
HEIGHT = 2.6  # of a panel, in inches


def draw_analyses(analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """Write `coherence.png`, `bands.png` and `spectrum.png`, and return their paths."""
    drawings = {"coherence.png": draw_coherence, "bands.png": draw_bands, "spectrum.png": draw_spectrum}
    for name, draw in drawings.items():
        draw(analyses, folder / name)
    return [folder / name for name in drawings]


def draw_panels(
    analyses: Sequence[Analysis],
    path: Path,
    title: str,
    legend: Sequence[Line2D],
    draw: Callable[[Axes, Analysis], None],
) -> None:
    """Draw a panel per group, two in a row, below a shared title and legend."""
    head, foot = 0.35, 0.55
    width = 6.4 if len(analyses) == 1 else PAGE
    own_scales = " Each panel has its own scale." * (len(analyses) > 1)
    lines = textwrap.wrap(title + own_scales, int(13 * width))
    above = 0.5 + 0.18 * len(lines)
    page = Page(above + -(-len(analyses) // 2) * (head + HEIGHT + foot), width)
    for number, words in enumerate(lines):
        page.text(MARGIN, 0.12 + 0.18 * number, words, size=9, color=MUTED)
    draw_legend(page, legend, above - 0.36)
    places = page.panels(len(analyses), above, head + HEIGHT + foot, gap=0.8)
    for analysis, (left, top, across) in zip(analyses, places, strict=True):
        page.text(left, top + head - 0.27, panel_title(analysis), size=10, weight="bold")
        axes = page.axes(left, top + head, across, HEIGHT)
        draw(axes, analysis)
        quiet_axes(axes)
    page.save(path)


def draw_legend(page: Page, handles: Sequence[Line2D], top: float) -> None:
    axes = page.axes(0, top, page.width, 0.3)
    axes.set_axis_off()
    axes.legend(handles=handles, loc="center left", ncols=len(handles), fontsize=8, frameon=False, borderaxespad=0.6)


def panel_title(analysis: Analysis) -> str:
    return f"{analysis.group.title}, {len(analysis.change)} noises"


def line(label: str, color: str, style: Literal["-", "--"] = "-") -> Line2D:
    return Line2D([], [], color=color, linestyle=style, linewidth=1.8, label=label)


def draw_coherence(analyses: Sequence[Analysis], path: Path) -> None:
    """Plot the coherence of initial and optimized noise.

    For comparison, the dashed line is the coherence after adding white noise of the same norm.
    """

    def draw(axes: Axes, analysis: Analysis) -> None:
        found = analysis.coherence
        axes.axhline(analysis.white, color=MUTED, linewidth=1.4, linestyle="--")
        axes.plot(found.frequencies, found.values, "o-", color=COLORS[0], linewidth=1.8, markersize=3.5)
        low = min(float(found.values.min()), analysis.white)
        axes.set(xlim=(0, 0.5), ylim=(max(0.0, low - 0.08 * (1 - low) - 0.002), 1 + 0.03 * (1 - low) + 0.001))
        label_axes(axes, "coherence")

    title = (
        "Coherence of initial and optimized noise by spatial frequency. 1: equal up to a factor; 0: unrelated. "
        "A curve that rises from left to right is an edit of coarse structure."
    )
    handles = (line("optimized", COLORS[0]), line("after adding white noise of the same norm", MUTED, "--"))
    draw_panels(analyses, path, title, handles, draw)


def draw_bands(analyses: Sequence[Analysis], path: Path) -> None:
    """Plot the change of each third of the frequencies over the steps."""

    def draw(axes: Axes, analysis: Analysis) -> None:
        for values, ink in zip(analysis.band_changes.T, BAND_COLORS, strict=True):
            marker = "o-" if len(values) < 20 else "-"
            axes.plot(values, marker, color=ink, linewidth=1.8, markersize=3.5)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimization step", size=8, color=MUTED)
        axes.set_ylabel("change of a frequency (root mean square)", size=8, color=MUTED)

    title = (
        "Distance of the noise from the initial one after each step, by third of the spatial frequencies. "
        "In units of white noise: 1 is as large as the noise itself. A white edit has three equal curves."
    )
    draw_panels(analyses, path, title, [line(*pair) for pair in zip(BANDS, BAND_COLORS, strict=True)], draw)


def draw_spectrum(analyses: Sequence[Analysis], path: Path) -> None:
    """Plot the mean power of initial and optimized noise by frequency, and the range of Gaussian noise."""

    def draw(axes: Axes, analysis: Analysis) -> None:
        limits = gaussian_limits(tuple(analysis.group.initial.shape))
        spread = 2 * torch.tensor(limits.standard_error.spectrum)
        side = min(analysis.group.shape[-2:])
        frequencies = torch.arange(len(spread)) / side
        axes.fill_between(frequencies, 1 - spread, 1 + spread, color=GROUND, alpha=0.5, linewidth=0)
        before, after = analysis.statistics
        axes.plot(frequencies, before.spectrum, color=MUTED, linewidth=1.4)
        axes.plot(frequencies, after.spectrum, color=COLORS[0], linewidth=1.8)
        axes.set_xlim(left=0)
        label_axes(axes, "mean power")

    title = (
        "Power of the noise by spatial frequency. White noise has power 1, within the gray band 95% of the time. "
        "Frequency 0 is the means of the channels."
    )
    handles = (line("initial", MUTED), line("optimized", COLORS[0]))
    draw_panels(analyses, path, title, handles, draw)


def label_axes(axes: Axes, quantity: str) -> None:
    axes.set_xlabel("spatial frequency, cycles per entry of the noise (0.5: Nyquist)", size=8, color=MUTED)
    axes.set_ylabel(quantity, size=8, color=MUTED)
