"""Prompts to evaluate on: the splits of the shapes world, and files in the formats of published benchmarks."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import shapes_world

SPLITS = {
    "train": shapes_world.TRAIN_PROMPTS,
    "validation": shapes_world.VALIDATION_PROMPTS,
    "held-out": shapes_world.HELD_OUT_PROMPTS,
}
TEXT_KEYS = ("prompt", "text", "caption")
CATEGORY_KEYS = ("category", "tag")
COMPBENCH_FILE = re.compile(
    r"(color|shape|texture|3d_spatial|non_spatial|spatial|numeracy|complex)(?:_(?:train|val)(?:_[a-z]+)?)?"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, the category that its results are reported under, and further fields of its source."""

    text: str
    category: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, with the name of their split or file."""

    name: str
    prompts: tuple[Prompt, ...]


def load_prompts(source: str, format: str | None = None, limit: int | None = None) -> PromptSet:
    """Read a set of prompts.

    Args:
        source: "train", "validation" or "held-out" for a split of the shapes world, else a UTF-8 file.
        format: A key of `FORMATS`, for files only; guessed from name and content by default.
        limit: Maximum number of prompts, taken from the start.

    Raises:
        ValueError: For an unknown source or format, a file not in its format, or no prompts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of 1 prompt or more, but got {limit}. Leave it out to read all.")
    if format is not None and format not in FORMATS:
        raise ValueError(f"Expected one of the formats {quoted(FORMATS)}, but got {format!r}.")
    if source in SPLITS and format is not None:
        raise ValueError(f"Expected no format for the split {source!r}, but got {format!r}. Formats are for files.")
    if source in SPLITS:
        name, prompts = source, [Prompt(text, shapes_world.category(text)) for text in SPLITS[source][:limit]]
    else:
        name, prompts = Path(source).stem, read_file(Path(source), format)
    return PromptSet(name, tuple(prompts[:limit]))


def read_file(path: Path, format: str | None) -> list[Prompt]:
    """Read all prompts of a file."""
    if not path.is_file():
        raise ValueError(
            f"Expected one of the splits {quoted(SPLITS)} or a file of prompts, but got {str(path)!r}, which does "
            "not exist."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 text in {path}, but got another encoding. Convert it to UTF-8.") from error
    prompts = list(FORMATS[format or sniff(text, path)](text, path))
    if not prompts:
        raise ValueError(f"Expected prompts in {path}, but got none. Write one per line.")
    return prompts


def sniff(text: str, path: Path) -> str:
    """Return the format of a prompt file, judged by its name and its first line."""
    if path.suffix == ".txt":
        return "t2i-compbench" if COMPBENCH_FILE.fullmatch(path.stem) else "text"
    lines = text.lstrip().split("\n", 1)
    if lines[0].split("\t")[0] == "Prompt":
        return "partiprompts"
    return sniff_json(text, lines[0]) if lines[0][:1] in ("{", "[") else "text"


def sniff_json(text: str, first_line: str) -> str:
    """Guess the JSON format from the whole text if it is one document, else from the first line."""
    document = parsed(text)
    if isinstance(document, list) or (isinstance(document, Mapping) and not set(TEXT_KEYS) & set(document)):
        return "coco" if "annotations" in document else "noise-diffusion"
    item = parsed(first_line) if document is None else document
    keys = set(item) if isinstance(item, Mapping) else set()
    return "geneval" if {"tag", "include"} <= keys or "vqa_list" in keys else "jsonl"


def parsed(text: str) -> Any:
    """Parse JSON, or return None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_text(text: str, path: Path) -> Iterator[Prompt]:
    """Read one prompt per line, skipping blank lines."""
    return (Prompt(line) for _, line in numbered(text))


def read_compbench(text: str, path: Path) -> Iterator[Prompt]:
    """Read T2I-CompBench, https://arxiv.org/abs/2307.06350.

    `color_val.txt` has a prompt of category "color" on each line. For other file names the category is the whole name.
    """
    match = COMPBENCH_FILE.fullmatch(path.stem)
    category = match[1] if match else path.stem
    return (Prompt(line, category) for _, line in numbered(text))


def read_jsonl(text: str, path: Path) -> Iterator[Prompt]:
    """Read one object per line with a `prompt`, `text` or `caption`, and optionally a `category` or `tag`."""
    return (prompt_of(item, where) for where, item in json_lines(text, path))


def read_geneval(text: str, path: Path) -> Iterator[Prompt]:
    """Read GenEval, https://arxiv.org/abs/2310.11513, or GenEval 2, https://arxiv.org/abs/2512.16853.

    `evaluation_metadata.jsonl` of the first has `tag`, `include` and `prompt`; the category is the tag.
    `geneval2_data.jsonl` has `prompt`, `atom_count`, `vqa_list` and `skills`; the category is "3 atoms" and so on.
    """
    for where, item in json_lines(text, path):
        if "tag" not in item and "atom_count" not in item:
            raise ValueError(f"Expected a `tag` or an `atom_count` in {where}, but got the keys {quoted(item)}.")
        yield prompt_of(item, where, None if "tag" in item else f"{item['atom_count']} atoms")


def read_partiprompts(text: str, path: Path) -> Iterator[Prompt]:
    """Read PartiPrompts, https://arxiv.org/abs/2206.10789: tab-separated Prompt, Category, Challenge and Note."""
    # prompts contain unescaped quotation marks
    rows = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "Prompt" not in (rows.fieldnames or ()):
        raise ValueError(f"Expected a column 'Prompt' in {path}, but got {quoted(rows.fieldnames or ())}.")
    for row in rows:
        item = {name.lower(): value for name, value in row.items() if name and value}
        yield prompt_of(item, f"{path}:{rows.line_num}")


def read_noise_diffusion(text: str, path: Path) -> Iterator[Prompt]:
    """Read Noise Diffusion, https://arxiv.org/abs/2411.16503: objects with `prompt` and the `indices` of its nouns.

    `simple_cases.json` maps categories to lists of objects; `complex_cases.json` is one list. The indices count CLIP
    tokens and become metadata.
    """
    document = json_document(text, path)
    groups = document if isinstance(document, Mapping) else {None: document}
    for category, items in groups.items():
        for number, item in enumerate(required(items, list, f"{path}, {category}" if category else str(path)), 1):
            yield prompt_of(item, f"{path}, item {number}" + (f" of {category!r}" if category else ""), category)


def read_coco(text: str, path: Path) -> Iterator[Prompt]:
    """Read the first caption of each image from `captions_*.json` of COCO, https://arxiv.org/abs/1504.00325."""
    document = required(json_document(text, path), Mapping, str(path))
    if "annotations" not in document:
        raise ValueError(f"Expected `annotations` in {path}, but got the keys {quoted(document)}.")
    seen = set()
    for number, item in enumerate(required(document["annotations"], list, f"{path}, annotations"), 1):
        prompt = prompt_of(item, f"{path}, annotation {number}")
        image = prompt.metadata.get("image_id", number)
        if image not in seen:
            seen.add(image)
            yield prompt


FORMATS: dict[str, Callable[[str, Path], Iterator[Prompt]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "geneval": read_geneval,
    "t2i-compbench": read_compbench,
    "partiprompts": read_partiprompts,
    "noise-diffusion": read_noise_diffusion,
    "coco": read_coco,
}


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yield the stripped, nonblank lines with their numbers from 1."""
    # not `splitlines`, which splits at characters that JSON strings may contain
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return ((number, line) for number, line in lines if line)


def json_lines(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the position, as "file:line", and the object of each line of JSON."""
    for number, line in numbered(text):
        where = f"{path}:{number}"
        yield where, required(json_document(line, path, number), Mapping, where)


def json_document(text: str, path: Path, first_line: int = 1) -> Any:
    """Parse JSON; errors name the line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{first_line + error.lineno - 1}"
        raise ValueError(f"Expected JSON in {where}, but got {shortened(error.doc)}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"Expected JSON in {path}, but it cannot be read: {error}.") from error


def required(value: Any, kind: type, where: str) -> Any:
    """Return `value` if it is of the required kind, a mapping or a list. Raises `ValueError` otherwise."""
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise ValueError(f"Expected {name} in {where}, but got {shortened(repr(value))}.")
    return value


def prompt_of(item: Any, where: str, category: str | None = None) -> Prompt:
    """Convert an object to a prompt."""
    rest = dict(required(item, Mapping, where))
    text = next((rest.pop(key) for key in TEXT_KEYS if key in rest), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"Expected a text under {quoted(TEXT_KEYS)} in {where}, but got the keys {quoted(item)}.")
    if category is None:
        category = next((str(rest.pop(key)) for key in CATEGORY_KEYS if rest.get(key) is not None), None)
    return Prompt(text.strip(), category, rest)


def quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
