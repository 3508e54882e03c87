"""The figures of the demo, drawn without pyplot: no windows, no global state."""

import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .story import ENDS, Story, decimal, plural

INK, MUTED, RIGHT, WRONG, CURVE = "#1f2328", "#6e7781", "#1a7f37", "#cf222e", "#0969da"
DPI = 200  # twice the full width of a README
WIDTH, MARGIN, COLUMNS, GUTTER = 10.0, 0.15, 4, 0.25  # inches
CELL = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GUTTER) / COLUMNS


class Page:
    """A white figure whose elements are placed in inches from the top left corner."""

    def __init__(self, height: float, width: float = WIDTH) -> None:
        self.height, self.width = height, width
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, text: str, size: float = 10, color: str = INK, **style) -> None:
        x, y = left / self.width, 1 - top / self.height
        self.figure.text(x, y, text, size=size, color=color, **{"va": "top", **style})

    def title(self, left: float, bottom: float, prompt: str) -> None:
        """Draw a prompt over as many lines as needed, ending at `bottom`."""
        for line, words in enumerate(reversed(wrapped(prompt))):
            self.text(left, bottom - 0.16 * line, words, va="baseline")

    def image(self, left: float, top: float, side: float, image: torch.Tensor, correct: bool) -> None:
        """Draw an image `(3, H, W)` in [0, 1], smoothly enlarged, in a frame colored by the judge's verdict."""
        axes = self.axes(left, top, side, side)
        axes.imshow(enlarged(image, round(side * DPI)), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=RIGHT if correct else WRONG, linewidth=2)

    def caption(self, left: float, top: float, side: float, text: str, correct: bool) -> None:
        """Draw a line below an image: a mark for the judge's verdict, and a text."""
        mark = "✓" if correct else "✗"
        color = RIGHT if correct else WRONG
        self.text(left + side / 2, top + side + 0.06, f"{mark} {text}", size=9, color=color, ha="center")

    def panels(self, count: int, top: float, height: float, gap: float) -> list[tuple[float, float, float]]:
        """Return left, top and width of panels, two in a row that is `height` high; a single one fills its row.

        `gap` is the room for the labels left of each panel.
        """
        places = []
        for number in range(count):
            row, column = divmod(number, 2)
            alone = number == count - 1 and column == 0
            across = self.width if alone else self.width / 2
            places.append((column * across + gap, top + row * height, across - gap - MARGIN))
        return places

    def save(self, path: Path | BinaryIO) -> None:
        """Write the figure. Text is drawn as it is: a dollar sign in a prompt starts no formula."""
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)
        self.figure.savefig(path)


def enlarged(image: torch.Tensor, side: int) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def cell(sample: int, top: float, height: float) -> tuple[float, float]:
    """Return the left and top of a sample's cell in a grid of `COLUMNS`."""
    row, column = divmod(sample, COLUMNS)
    return MARGIN + column * (CELL + GUTTER), top + row * height


def rows(story: Story) -> int:
    return -(-len(story.prompts) // COLUMNS)


def wrapped(prompt: str, width: int = 26) -> list[str]:
    """Wrap a prompt to as few lines as possible, balanced in length."""
    lines = len(textwrap.wrap(prompt, width))
    narrower = (textwrap.wrap(prompt, w) for w in range(1, width + 1))
    return next(wrap for wrap in narrower if len(wrap) <= lines)


def draw_before_after(story: Story, path: Path | BinaryIO) -> None:
    """Draw the baselines and the returned images: as pairs, or as sets for methods that optimize a set."""
    draw = draw_pairs if story.choice.count == 1 else draw_sets
    draw(story, path)


def draw_pairs(story: Story, path: Path | BinaryIO) -> None:
    """Draw the baseline and the returned image of each prompt side by side."""
    title, arrow = 0.42, 0.28
    side = (CELL - arrow) / 2
    height = title + side + 0.42
    columns = min(COLUMNS, len(story.prompts))
    width = max(5.6, 2 * MARGIN + columns * (CELL + GUTTER) - GUTTER)
    page, head = headed(story, f"Below: the judge's verdict and {story.choice.measure}.", rows(story) * height, width)
    for sample, prompt in enumerate(story.prompts):
        left, top = cell(sample, head, height)
        page.title(left, top + title - 0.1, prompt)
        for offset, step in zip((0, side + arrow), story.ends(sample), strict=True):
            correct = story.verdicts[step][sample].correct
            page.image(left + offset, top + title, side, story.images[step, sample], correct)
            value = decimal(float(story.values[step, sample]), story.digits)
            page.caption(left + offset, top + title, side, value, correct)
        page.text(left + CELL / 2, top + title + side / 2, "→", size=13, color=MUTED, ha="center", va="center")
    page.save(path)


def headed(story: Story, below: str, height: float, width: float = WIDTH) -> tuple[Page, float]:
    """Return a page that starts with the outcome and an explanation, and the top of the `height` inches below it."""
    choice = story.choice
    method = (
        f"{plural(story.steps, choice.recipe.unit)} of {choice.name} on {choice.model.name}, the {choice.model.title}"
    )
    words = f"Left of an arrow: plain seeds. Right: the same after {method}. {below}"
    explanation = textwrap.wrap(words, int(13 * width))
    head = 0.5 + 0.18 * len(explanation)
    page = Page(head + height, width)
    page.text(MARGIN, 0.1, story.headline, size=13, weight="bold")
    for line, words in enumerate(explanation):
        page.text(MARGIN, 0.38 + 0.18 * line, words, color=MUTED)
    return page, head


def draw_sets(story: Story, path: Path | BinaryIO) -> None:
    """Draw the baseline set of each prompt beside the returned one."""
    count, title, gap, arrow = story.choice.count, 0.36, 0.06, 0.36
    side = (WIDTH - 2 * MARGIN - arrow - 2 * (count - 1) * gap) / (2 * count)
    half, height = count * side + (count - 1) * gap, title + side + 0.34
    below = f"Below: the judge's verdict. Diversity: 1 − the mean cosine of features ({story.choice.ruler})."
    page, top = headed(story, below, len(story.sets) * height)
    for row, samples in enumerate(story.sets):
        page.text(MARGIN, top + title - 0.1, story.prompts[samples.start], va="baseline")
        for end in ENDS:
            left = MARGIN + end * (half + arrow)
            differ = f"diversity {decimal(story.value(row, end), story.digits)}"
            page.text(left + half, top + title - 0.1, differ, color=MUTED, ha="right", va="baseline")
            for place, sample in enumerate(samples):
                step = story.ends(sample)[end]
                correct = story.verdicts[step][sample].correct
                spot = (left + place * (side + gap), top + title, side)
                page.image(*spot, story.images[step, sample], correct)
                page.caption(*spot, "", correct)
        middle = (MARGIN + half + arrow / 2, top + title + side / 2)
        page.text(*middle, "→", size=13, color=MUTED, ha="center", va="center")
        top += height
    page.save(path)


def draw_trajectory(story: Story, path: Path) -> None:
    """Plot the outcome over the steps, for all and for each prompt, and film strips of up to two images."""
    height, frame, strip, overview = 1.75, 0.98, 1.75, 1.8
    shown = film_prompts(story)
    head = 0.75 + overview
    strips_top = head + -(-len(story.sets) // COLUMNS) * height + 0.1
    page = Page(strips_top + len(shown) * strip)
    page.text(MARGIN, 0.1, story.headline, size=13, weight="bold")
    choice = story.choice
    curves = ": best so far (bold) and each. Green: the image is right" if choice.single else ""
    words = f"{choice.measure} over the {choice.recipe.unit}s of {choice.name} on {choice.model.name}{curves}."
    page.text(MARGIN, 0.38, words[0].upper() + words[1:], color=MUTED)
    draw_overview(page.axes(MARGIN + 0.45, 0.8, WIDTH - 2 * MARGIN - 0.9, overview - 0.55), story)
    for row, samples in enumerate(story.sets):
        left, top = cell(row, head, height)
        draw_curve(page.axes(left + 0.35, top + 0.42, CELL - 0.35, height - 0.8), story, row)
        page.title(left, top + 0.32, story.prompts[samples.start])
    for row, sample in enumerate(shown):
        draw_strip(page, strips_top + row * strip, frame, story, sample)
    page.save(path)


def draw_overview(axes: Axes, story: Story) -> None:
    """Plot the mean of all prompts, and on the other side the number of right images, over the steps."""
    right = axes.twinx()
    axes.plot(story.so_far.nanmean(1), color=CURVE, linewidth=1.8)
    right.step(range(len(story.images)), story.right_so_far, color=RIGHT, linewidth=1.8, where="mid")
    right.set_ylim(-0.03 * len(story.prompts), 1.03 * len(story.prompts))
    right.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.set_ylabel(story.choice.measure, color=CURVE, fontsize=9)
    right.set_ylabel(f"right of {len(story.prompts)}", color=RIGHT, fontsize=9)
    for each in (axes, right):
        style(each, len(story.images))
    right.spines["right"].set(visible=True, color=MUTED)


def style(axes: Axes, steps: int) -> None:
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def draw_curve(axes: Axes, story: Story, row: int) -> None:
    values, sample = story.values[:, row], story.sets[row].start
    for step, verdicts in enumerate(story.verdicts if story.choice.single else []):
        if verdicts[sample].correct:
            axes.axvspan(step - 0.5, step + 0.5, color=RIGHT, alpha=0.16, linewidth=0, antialiased=False)
    if story.so_far is not story.values:
        axes.plot(values, color=CURVE, linewidth=0.8, alpha=0.5)
    axes.plot(story.so_far[:, row], color=CURVE, linewidth=1.8)
    axes.plot(story.best(sample), values[story.best(sample)], "o", color=CURVE, markersize=4)
    known = story.values[story.values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    margin = 0.05 * (high - low) + 10**-story.digits / 10
    axes.set_ylim(low - margin, high + margin)
    style(axes, len(values))


def film_prompts(story: Story, count: int = 2) -> list[int]:
    """Choose samples for the film strips.

    Of single images first those that become right, then those that stay wrong; of sets those that change most.
    """
    change = (story.end_images(1) - story.end_images(0)).square().mean((1, 2, 3)).tolist()

    def order(sample: int) -> tuple[bool, bool] | float:
        before, after = (story.verdicts[step][sample].correct for step in story.ends(sample))
        return (before, not after) if story.choice.single else -change[sample]

    return sorted(range(len(story.prompts)), key=order)[:count]


def film_steps(landmarks: Collection[int], steps: int, count: int) -> list[int]:
    """Choose `count` steps: the landmarks, then repeatedly the step farthest from those chosen.

    Distances are between square roots, because most changes happen early.
    """
    chosen = set(landmarks)
    while len(chosen) < min(count, steps):
        chosen.add(max(range(steps), key=lambda step: min(abs(step**0.5 - other**0.5) for other in chosen)))
    return sorted(chosen)


def draw_strip(page: Page, top: float, side: float, story: Story, sample: int, count: int = 9) -> None:
    first, best = story.first_right(sample), story.best(sample)
    landmarks = {0, best} | ({first} if first is not None else set())
    page.text(MARGIN, top, story.prompts[sample], size=10)
    gap = (WIDTH - 2 * MARGIN - count * side) / (count - 1)
    for column, step in enumerate(film_steps(landmarks, len(story.values), count)):
        left, correct = MARGIN + column * (side + gap), story.verdicts[step][sample].correct
        page.image(left, top + 0.24, side, story.images[step, sample], correct)
        page.caption(left, top + 0.24, side, f"{story.choice.recipe.unit} {step}", correct)
        note = " and ".join(name for name, at in (("first right", first), ("returned", best)) if at == step)
        page.text(left + side / 2, top + 0.24 + side + 0.22, note, size=8, color=MUTED, ha="center")
