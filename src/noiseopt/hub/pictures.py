"""The pictures of the cards: the effect of each method on the images of an embedded model, as in the demo."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from .. import plots
from ..demo import optimize_and_judge
from ..story import ENDS, Choice, Story
from .before_after import BeforeAfter
from .build import picture_path
from .cards import Card

SEED = 0
DPI = 100  # half of the demo's; a page of the Hub shows no more


def draw_pictures(cards: Sequence[Card]) -> Iterator[Path]:
    """Write the picture of each card and yield its path. Cards of one method and model share a run."""
    runs: dict[tuple[str, str], list[Card]] = {}
    for card in cards:
        runs.setdefault((card.room, card.shown_on), []).append(card)
    for (method, model), sharing in runs.items():
        story = tell(Choice.of(method, model))
        for card in sharing:
            path = picture_path(card)
            path.parent.mkdir(exist_ok=True)
            facts(story).save(picture(story), path)
            yield path


def tell(choice: Choice) -> Story:
    """Return the story of the demo: its prompts and seeds are chosen by their order."""
    return optimize_and_judge(choice, choice.prompts, SEED)


def facts(story: Story) -> BeforeAfter:
    """Return the facts of a story's picture."""
    choice = story.choice
    return BeforeAfter(
        method=choice.method,
        model=choice.model.name,
        steps=story.steps,
        prompts=list(story.prompts[:: choice.count]),
        images=choice.count,
        seed=SEED,
        instruments=choice.instruments,
        right=list(story.all_right),
        measure=choice.measure,
        values=[round(story.mean(story.value, end), story.digits) for end in ENDS],
        ruler=choice.ruler,
        layout=None if choice.single else [round(story.mean(story.layout, end), 1) for end in ENDS],
    )


def picture(story: Story) -> Image.Image:
    """Return the figure of the demo at the size of a page."""
    buffer = io.BytesIO()
    plots.draw_before_after(story, buffer)
    with Image.open(buffer) as figure:
        return figure.convert("RGB").reduce(plots.DPI // DPI)
