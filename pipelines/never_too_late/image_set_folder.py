"""The folder of a set of images: a JSON file, and a PNG and a noise file for each image."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ...shown_text import shown
from ..results.atomic_write import atomic_write
from ..results.noise_result import NoiseResult

IMAGE_SET_FORMAT = "noiseopt-image-set-1"
IMAGE_SET_FILE = "image_set.json"
MOST_RECORD_BYTES = 16 * 2**20  # those of some 100,000 images
IMAGE_SET_RECORD = {"prompt": str, "settings": dict, "seeds": list, "values": list}


class ImageSetFolder:
    """`image_set.json`, and `image_000.png` and `image_000.safetensors` for each image in it.

    The JSON file is written last, and an image counts only if it is listed there: the folder always holds a whole set.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def begun(self) -> bool:
        return (self.path / IMAGE_SET_FILE).exists()

    def file(self, index: int, suffix: str) -> Path:
        return self.path / f"image_{index:03d}{suffix}"

    def check_free(self) -> None:
        """Raise `ValueError` for a folder that already has images of a set."""
        if self.begun or self.file(0, ".png").exists() or self.file(0, ".safetensors").exists():
            raise ValueError(
                f"Expected a folder without images of another set, but {self.path} has some. Choose another one."
            )

    def write_record(self, record: dict[str, Any]) -> None:
        """Write the JSON file from the entries named in `IMAGE_SET_RECORD`."""
        text = json.dumps({"format": IMAGE_SET_FORMAT, **record}, indent=1, ensure_ascii=False) + "\n"
        atomic_write(self.path / IMAGE_SET_FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def write_image(self, index: int, picture: Image.Image, result: NoiseResult) -> None:
        atomic_write(self.file(index, ".png"), picture.save)
        result.save(self.file(index, ".safetensors"))

    def read_record(self) -> dict[str, Any]:
        """Read the JSON file. Raises `ValueError` for anything that `write_record` did not write."""
        file = self.path / IMAGE_SET_FILE
        try:
            if file.stat().st_size > MOST_RECORD_BYTES:
                raise ValueError(f"it has more than {MOST_RECORD_BYTES:,} bytes")
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.refusal(file, shown(error)) from None
        if not isinstance(record, dict) or record.pop("format", None) != IMAGE_SET_FORMAT:
            raise self.refusal(file, f"it has no format {IMAGE_SET_FORMAT!r}")
        if unknown := sorted(record.keys() - IMAGE_SET_RECORD.keys()):
            raise self.refusal(file, f"it has unknown entries {shown(unknown[:3])}")
        if wrong := [name for name, kind in IMAGE_SET_RECORD.items() if not isinstance(record.get(name), kind)]:
            raise self.refusal(file, f"{wrong} are missing or of another type")
        seeds, values = record["seeds"], record["values"]
        if len(seeds) != len(values) or not all(type(seed) is int for seed in seeds):
            raise self.refusal(file, "it has not one seed and one row of values for each image")
        if not all(isinstance(row, dict) and is_row(row) for row in values):
            raise self.refusal(file, "its values are not rows of numbers")
        return {name: record[name] for name in IMAGE_SET_RECORD}

    def read_picture(self, index: int) -> Image.Image:
        """Read the PNG of an image. Raises `ValueError` for one that is missing, broken or not RGB."""
        file = self.file(index, ".png")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self.refusal(file, shown(error)) from None
        if image.mode != "RGB":
            raise self.refusal(file, f"its mode is {image.mode}, not RGB")
        return image.convert("RGB")

    def read_result(self, index: int, seed: int) -> NoiseResult:
        """Read the noise of an image. Raises `ValueError` for one that is missing, broken or of another seed."""
        file = self.file(index, ".safetensors")
        try:
            result = NoiseResult.load(file)
        except (OSError, ValueError) as error:
            raise self.refusal(file, str(error).rstrip(".")) from None
        if result.provenance.get("seeds") != [seed] or len(result.noise) != 1:
            raise self.refusal(file, f"it is not the noise of the one image with the seed {seed}")
        return result

    def refusal(self, file: Path, reason: str) -> ValueError:
        return ValueError(
            f"Expected a folder that `ImageSet.save` or `grow_set` wrote, but {file} cannot be used: {reason}. Take "
            "another folder, or grow the set again."
        )


def is_row(row: dict[str, Any]) -> bool:
    """Return whether all values of a row are numbers or `None`."""
    return all(value is None or type(value) in (int, float) for value in row.values())
