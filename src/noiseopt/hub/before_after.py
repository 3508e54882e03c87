"""What the picture of a card shows, as the picture itself says it."""

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
    """The facts of a picture of plain and optimised images. They are stored in the PNG, so that no text can miss it.

    Attributes:
        method: A name of `list_noise_optimizers()`.
        model: The embedded model that drew.
        steps: Evaluations of each noise.
        prompts: The prompts, from top left to bottom right.
        images: Of each prompt.
        seed: Of the first image; each of the others has the next.
        instruments: The embedded models that the method looked through: a reward, features.
        right: How many images the judge finds right, before and after.
        spread: How far the same objects are from their mean place in the images of a prompt, in pixels, before and
            after; `None` for single images.
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
        """Of the images before, and of those after."""
        return len(self.prompts) * self.images

    def save(self, picture: Image.Image, path: Path) -> None:
        """Write the picture with these facts, as small as 256 colors are."""
        information = PngInfo()
        information.add_text(KEY, json.dumps(dataclasses.asdict(self)))
        # of Pillow's ways to few colors the one with the least error for its size in files of these pictures
        colors = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        colors.save(path, optimize=True, pnginfo=information)

    @classmethod
    def read(cls, path: Path) -> BeforeAfter | None:
        """The facts of a picture; `None` where there is no such file, or one of something else."""
        if not path.is_file():
            return None
        with Image.open(path) as picture:
            facts = picture.info.get(KEY)
        return cls(**json.loads(facts)) if facts else None
