"""The facts of a card's picture, stored in the picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PICTURE = "before_after.png"
KEY = "noiseopt"  # of the text chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """The facts of a picture of baseline and optimized images, stored in the PNG so that texts agree with it.

    Attributes:
        method: A name of `list_methods()`.
        model: The embedded model that generated the images.
        steps: The steps of the method.
        prompts: The prompts, from top left to bottom right.
        images: The number of images per prompt.
        seed: The seed of the first image; each further image has the next one.
        instruments: The embedded models that the method saw images through: a reward, features.
        right: The number of images that the judge finds right, before and after.
        spread: The mean distance of the same objects from their mean position in the images of a prompt, in pixels,
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
    spread: list[float] | None

    @property
    def count(self) -> int:
        """The number of images before, which is that after."""
        return len(self.prompts) * self.images

    def save(self, picture: Image.Image, path: Path) -> None:
        """Write the picture with these facts."""
        information = PngInfo()
        information.add_text(KEY, json.dumps(dataclasses.asdict(self)))
        # in all colors: a palette of 256 leaves contours in the smooth grounds of these pictures
        picture.save(path, optimize=True, pnginfo=information)

    @classmethod
    def read(cls, path: Path) -> BeforeAfter | None:
        """Return the facts of a picture; `None` if the file is missing or has no facts."""
        if not path.is_file():
            return None
        with Image.open(path) as picture:
            facts = picture.info.get(KEY)
        return cls(**json.loads(facts)) if facts else None
