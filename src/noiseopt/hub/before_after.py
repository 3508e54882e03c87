"""The facts of a card's picture, stored in the picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from PIL import Image

PICTURE = "before_after.jpg"
QUALITY = 80  # of a JPEG: under 150 kB for four sets before and after


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """The facts of a picture of baseline and optimized images, stored in its file so that texts agree with it.

    Attributes:
        method: A name of `list_methods()`.
        model: The embedded model that generated the images.
        steps: The steps of the method.
        prompts: The prompts, from top left to bottom right.
        images: The number of images per prompt.
        seed: The seed of the first image; each further image has the next one.
        instruments: The embedded models that the method saw images through: a reward, features.
        right: The number of images that the judge finds right, before and after.
        measure: The name of what else shows the effect: "reward", "P(yes)" or "diversity".
        values: Its mean over the images or sets, before and after.
        ruler: The embedded model whose features the diversity is measured in; `None` for single images.
        layout: The root mean square distance of an object from its mean position in the images of a prompt, in pixels,
            before and after; `None` for single images.
    """

    method: str
    model: str
    steps: int
    prompts: list[str]
    images: int
    seed: int
    instruments: list[str]
    right: list[int]
    measure: str
    values: list[float]
    ruler: str | None
    layout: list[float] | None

    @property
    def count(self) -> int:
        """The number of images before, which is that after."""
        return len(self.prompts) * self.images

    def save(self, picture: Image.Image, path: Path) -> None:
        """Write the picture with these facts, in all its colors."""
        facts = json.dumps(dataclasses.asdict(self))
        picture.save(path, quality=QUALITY, subsampling=0, optimize=True, progressive=True, comment=facts)

    @classmethod
    def read(cls, path: Path) -> BeforeAfter | None:
        """Return the facts of a picture; `None` if the file is missing or has none of this form."""
        if not path.is_file():
            return None
        with Image.open(path) as picture:
            facts = picture.info.get("comment")
        try:
            return cls(**json.loads(facts)) if facts else None
        except (TypeError, ValueError):
            return None
