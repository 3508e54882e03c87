"""Measure the judge against labels made by looking: `python -m training.label_sheet --output DIR`.

The first call draws fresh pictures of all exported generators on training prompts into the folder `DIR/labels`:

- `sheet_1.png`, ...: 40 numbered pictures each, with their prompts. Look at these.
- `pictures.webp` and `pictures.json`: all pictures and what they are, without labels. Both together are a fixture of
  `tests/shapes_world/test_judge_generated.py` once they are labeled.
- `verdicts.json`: what the judge says. Look at it last.

A reader writes a line for each picture: its number, `right` or `wrong`, with a question mark if another reader may well
say otherwise, and a note. For example "12 wrong? one star too many". The second call, with the files of all readers,
`--labels FILE ...`, adds them to `pictures.json` and compares them with the judge.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from noiseopt.shapes_world.captions import CATEGORIES, sample_request
from noiseopt.shapes_world.judge import judge

from .drawing import FAMILIES
from .export import write_json
from .report import draw_all

ROW, SHEET = 20, (8, 5)  # pictures in a row of `pictures.webp`; in a row, and rows, of a sheet
SHOWN, CAPTION = 192, 34  # pixels in a sheet
LABEL = re.compile(r"(\d+)\s+(right|wrong)(\??)(?:\s+(.*))?")


def draw(args: argparse.Namespace) -> None:
    """Draw the pictures, in random order, and write the files."""
    rng = random.Random(args.seed)
    names = [name for name in FAMILIES if (args.output / "weights" / name).is_dir()]
    tiles, images = [], []
    for i, name in enumerate(names):
        prompts = [str(request_of(CATEGORIES[j % len(CATEGORIES)], rng)) for j in range(args.count // len(names))]
        seed = 1_000_000 * (args.seed + 1) + 10_000 * i
        images += draw_all(args.output / "weights" / name, prompts, args, seed)
        tiles += [{"prompt": p, "source": source_of(name), "seed": seed + j} for j, p in enumerate(prompts)]
    order = rng.sample(range(len(tiles)), len(tiles))
    tiles, folder = [tiles[i] for i in order], args.output / "labels"
    folder.mkdir(exist_ok=True)
    grid([images[i] for i in order]).save(folder / "pictures.webp", quality=90, method=6)
    write_json(folder / "pictures.json", {"tiles": [tile | {"right": [], "unsure": [], "notes": []} for tile in tiles]})
    stored, prompts = pictures_in(folder / "pictures.webp")[: len(tiles)], [tile["prompt"] for tile in tiles]
    verdicts = [{"right": v.correct, "found": v.found} for v in judge(stored, prompts)]
    write_json(folder / "verdicts.json", {"verdicts": verdicts})
    size = SHEET[0] * SHEET[1]
    for start in range(0, len(tiles), size):
        sheet(stored[start : start + size], prompts[start : start + size], start + 1).save(
            folder / f"sheet_{start // size + 1}.png"
        )


def request_of(category: str, rng: random.Random) -> Any:
    """Sample a training request of a category."""
    while (request := sample_request(rng)).category != category:
        pass
    return request


def source_of(name: str) -> str:
    """Return a model and how it was called in words."""
    call = FAMILIES[name].call
    steps = call["num_inference_steps"]
    return f"{name}, {steps} step{'s' * (steps > 1)}, guidance {call['guidance_scale']:g}"


def grid(images: Sequence[Tensor]) -> Image.Image:
    """Arrange images (3, H, H) in [0, 1] in rows of `ROW`; a last row that is not full ends in black."""
    padded = torch.stack([*images, *[torch.zeros_like(images[0])] * (-len(images) % ROW)])
    rows = padded.unflatten(0, (-1, ROW)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((rows * 255).round().byte().numpy())


def pictures_in(path: Path) -> Tensor:
    """Return the images in a file that `grid` arranged, (N, 3, H, H) in [0, 1]."""
    rows = torch.from_numpy(np.array(Image.open(path))).float() / 255
    size = rows.shape[1] // ROW
    return rows.unflatten(0, (-1, size)).unflatten(2, (ROW, size)).permute(0, 2, 4, 1, 3).flatten(0, 1)


def sheet(images: Tensor, prompts: Sequence[str], first: int) -> Image.Image:
    """Show images with numbers that count up from `first`, and their prompts."""
    across, down = SHEET
    page = Image.new("RGB", (across * (SHOWN + 4), down * (SHOWN + CAPTION)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % across * (SHOWN + 4), i // across * (SHOWN + CAPTION)
        tile = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        page.paste(tile.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y + SHOWN), "\n".join(textwrap.wrap(f"{first + i}: {prompt}", 29)), "black", font, spacing=2)
    return page


def labels_in(path: Path, count: int) -> list[dict[str, Any]]:
    """Read the labels of one reader, in order."""
    found = {}
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        match = LABEL.fullmatch(line)
        if not match:
            raise ValueError(f"Expected a line such as '12 wrong? a note' in {path}, but got {line!r}.")
        number, word, doubt, note = match.groups()
        found[int(number)] = {"right": word == "right", "unsure": bool(doubt), "notes": note or ""}
    if sorted(found) != list(range(1, count + 1)):
        missing = sorted(set(range(1, count + 1)) ^ set(found))
        raise ValueError(f"Expected one label for each of {count} pictures in {path}, but not so for {missing}.")
    return [found[number] for number in range(1, count + 1)]


def compare(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Add the labels of readers to `pictures.json`, and return how often the judge agrees with them."""
    data = json.loads((folder / "pictures.json").read_text())
    tiles = data["tiles"]
    readers = [labels_in(path, len(tiles)) for path in files]
    for tile, *labels in zip(tiles, *readers, strict=True):
        tile |= {key: [label[key] for label in labels] for key in ("right", "unsure", "notes")}
    write_json(folder / "pictures.json", data)
    judged = [verdict["right"] for verdict in json.loads((folder / "verdicts.json").read_text())["verdicts"]]
    sure = [i for i, tile in enumerate(tiles) if not any(tile["unsure"]) and len(set(tile["right"])) == 1]
    against = [i for i in sure if tiles[i]["right"][0] != judged[i]]
    return {
        "pictures": len(tiles),
        "agreement with each reader": [
            sum(tile["right"][i] == right for tile, right in zip(tiles, judged, strict=True)) for i in range(len(files))
        ],
        "all sure of the same": len(sure),
        "agreement there": len(sure) - len(against),
        "against": [i + 1 for i in against],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Draw pictures, or compare labels with the judge."""
    parser = argparse.ArgumentParser(description="Measure the judge against labels made by looking.")
    parser.add_argument("--output", type=Path, required=True, help="folder with `weights`")
    parser.add_argument("--count", type=int, default=200, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="fresh pictures need another one")
    parser.add_argument("--labels", type=Path, nargs="+", metavar="FILE", help="labels, a file for each reader")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.dtype = torch.float32
    if args.labels:
        print(json.dumps(compare(args.output / "labels", args.labels), indent=1))
    else:
        draw(args)


if __name__ == "__main__":
    main()
