"""Prompts to evaluate on: the splits of the shapes world, and files in the formats of published benchmarks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import shapes_world
from ..shown_text import shown

SPLITS = {
    "train": shapes_world.TRAIN_PROMPTS,
    "validation": shapes_world.VALIDATION_PROMPTS,
    "held-out": shapes_world.HELD_OUT_PROMPTS,
}
TEXT_KEYS = ("prompt", "text", "caption")  # in any case, and in the plural
CATEGORY_KEYS = ("category", "tag")
COMPBENCH_FILE = re.compile(
    r"(color|shape|texture|3d_spatial|non_spatial|spatial|numeracy|complex)(?:_(?:train|val)(?:_[a-z]+)?)?"
)
JSON_SUFFIXES, TABLE_SUFFIXES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
OTHER_DATA = re.compile(
    r"\.(ya?ml|toml|ini|xml|html?|md|rst|tex|parquet|arrow|feather|xlsx?|ods|docx?|pdf|npy|npz|pkl|pt|gz|zip|zst|py)"
)
MARKUP = re.compile(r"<(\?xml|!doctype|html)|---$", re.IGNORECASE)  # in the first line
LINES_OF = {
    "cells between tabs": (r".*\t", "Name the column of the prompts 'prompt' in a first line."),
    "list markers": (r"([-*•]|\d+[.)]) ", "Remove the markers."),
    "keys": (r"\"?(prompt|text|caption)s?\"?\s*[:=]", "Keep only the prompts, or write JSON lines."),
    "the items of a list": (r"\".*\",$", "Remove quotation marks and commas, or write a JSON list."),
}  # in all lines (but for the last, which has no comma): no plain prompts; and the remedy
KINDS = "one prompt per line, CSV or TSV with a column 'prompt', JSON, or JSON lines"


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file or split.

    Attributes:
        text: The prompt.
        category: The category that its results are reported under, without control characters.
        metadata: Further fields of its source.
        where: The place in its file that messages name, "prompts.csv:3" or "captions.json, annotation 3".
    """

    text: str
    category: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, with the name of their split or file.

    Attributes:
        name: The split, or the name of the file without its suffix.
        prompts: The prompts that could be read.
        problems: A sentence for each entry of the file that is no prompt, with its line and the remedy.
    """

    name: str
    prompts: tuple[Prompt, ...]
    problems: tuple[str, ...] = ()


def load_prompts(source: str, format: str | None = None, limit: int | None = None) -> PromptSet:
    """Read a set of prompts.

    An entry of a file that is no prompt (a blank caption, a broken line of JSON) is left out and described in
    `problems`; the others are read.

    Args:
        source: "train", "validation" or "held-out" for a split of the shapes world, else a UTF-8 file.
        format: A key of `FORMATS`, for files only; guessed from name and content by default.
        limit: Maximum number of prompts, taken from the start; problems after them are not reported.

    Raises:
        ValueError: For an unknown source or format, a file that looks structured but has no known format, one that is
            not in its format as a whole, or no prompts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of 1 prompt or more, but got {limit}. Leave it out to read all.")
    if format is not None and format not in FORMATS:
        raise ValueError(f"Expected one of the formats {quoted(FORMATS)}, but got {format!r}.")
    if source in SPLITS and format is not None:
        raise ValueError(f"Expected no format for the split {source!r}, but got {format!r}. Formats are for files.")
    if source in SPLITS:
        prompts = [Prompt(text, shapes_world.category(text)) for text in SPLITS[source][:limit]]
        return PromptSet(source, tuple(prompts))
    found = read_file(Path(source), format, limit)
    prompts = [replace(each, category=each.category and shown(each.category)) for each in found.prompts]
    return PromptSet(shown(Path(source).stem), tuple(prompts), found.problems)


def read_file(path: Path, format: str | None, limit: int | None) -> PromptSet:
    """Read the first prompts of a file."""
    if not path.is_file():
        what = "is a folder. Pass a file in it" if path.is_dir() else "does not exist"
        raise ValueError(
            f"Expected one of the splits {quoted(SPLITS)} or a file of prompts, but got {str(path)!r}, which {what}."
        )
    if format is None and OTHER_DATA.fullmatch(path.suffix.lower()):
        raise ValueError(f"Expected {KINDS}, but got {path}. Export it to one of these.")
    # bytes that are not UTF-8 become lone surrogates, so that the entries without them are read
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    bad = sum(map(has_bad_bytes, lines := text.split("\n")))
    if bad and ("\0" in text or 2 * bad > sum(map(bool, map(str.strip, lines)))):
        raise ValueError(f"Expected UTF-8 text in {path}, but got another encoding. Convert it to UTF-8.")
    entries = list(FORMATS[format or sniff(text, path)](text, path))
    if bad:
        entries = [readable(entry) for entry in entries]
    places = [place for place, entry in enumerate(entries, 1) if isinstance(entry, Prompt)]
    entries = entries[: places[limit - 1]] if limit is not None and len(places) >= limit else entries
    prompts = tuple(entry for entry in entries if isinstance(entry, Prompt))
    problems = tuple(str(entry) for entry in entries if not isinstance(entry, Prompt))
    if not prompts and problems:
        raise ValueError(problems[0] + f" None of {len(problems)} entries is a prompt." * (len(problems) > 1))
    if not prompts:
        raise ValueError(f"Expected prompts in {path}, but got none. Write one per line.")
    return PromptSet(path.stem, prompts, problems)


def has_bad_bytes(text: str) -> bool:
    """Return whether a text has bytes that are not UTF-8, as decoded by `surrogateescape`."""
    return re.search("[\udc80-\udcff]", text) is not None


def readable(entry: Prompt | ValueError) -> Prompt | ValueError:
    """Return an entry, or the error that it has bytes that are not UTF-8."""
    if isinstance(entry, ValueError):
        return ValueError(re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", str(entry)))
    texts = [text for text in (entry.text, entry.category, *entry.metadata.values()) if isinstance(text, str)]
    if not any(map(has_bad_bytes, texts)):
        return entry
    return ValueError(f"Expected UTF-8 text in {entry.where}, but got other bytes. Convert the line to UTF-8.")


def sniff(text: str, path: Path) -> str:
    """Return the format of a prompt file, judged by its name and its content.

    Raises:
        ValueError: For a file that looks structured in a way that is not known.
    """
    suffix, first_line = path.suffix.lower(), text.lstrip().split("\n", 1)[0].rstrip()
    if suffix in TABLE_SUFFIXES or delimiter_of(first_line):
        return "partiprompts" if first_line.startswith("Prompt\tCategory\tChallenge") else "table"
    if suffix in JSON_SUFFIXES or first_line in ("{", "[") or isinstance(parsed(first_line), (list, Mapping)):
        return sniff_json(text, first_line, path)
    if suffix == ".txt" and COMPBENCH_FILE.fullmatch(path.stem):
        return "t2i-compbench"
    refuse_structured(text, first_line, path)
    return "text"


def sniff_json(text: str, first_line: str, path: Path) -> str:
    """Guess the JSON format from the whole text if it is one document, else from the first line."""
    document = parsed(text)
    if isinstance(document, Mapping) and "annotations" in document:
        return "coco"
    item = parsed(first_line) if document is None else document
    keys = set(item) if isinstance(item, Mapping) else set()
    if {"tag", "include"} <= keys or "vqa_list" in keys:
        return "geneval"
    if document is None:
        return "json" if item is None and path.suffix.lower() not in (".jsonl", ".ndjson") else "jsonl"
    key = text_key(document) if isinstance(document, Mapping) else None
    return "jsonl" if key is not None and isinstance(document[key], str) else "json"


def parsed(text: str) -> Any:
    """Parse JSON, or return None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def refuse_structured(text: str, first_line: str, path: Path) -> None:
    """Raise `ValueError` for text that looks like something else than one prompt per line."""
    if "\0" in text or MARKUP.match(first_line):
        raise ValueError(
            f"Expected {KINDS}, but {path} starts with {shortened(repr(first_line))}. Export it to one of these."
        )
    lines = [line for _, line in numbered(text)]
    for kind, (pattern, remedy) in LINES_OF.items():
        if lines and all(re.match(pattern, line, re.IGNORECASE) for line in lines[:-1] or lines):
            raise ValueError(
                f"Expected one prompt per line in {path}, but got {kind}: {shortened(repr(lines[0]))}. {remedy}"
            )


Entries = Iterator[Prompt | ValueError]  # the error of an entry that is no prompt


def attempt(make: Callable[..., Prompt], *arguments: Any) -> Prompt | ValueError:
    """Return a prompt, or the error of its entry, so that the entries after it are read too."""
    try:
        return make(*arguments)
    except ValueError as error:
        return error


def read_text(text: str, path: Path) -> Entries:
    """Read one prompt per line, skipping blank lines."""
    return (Prompt(line, where=f"{path}:{number}") for number, line in numbered(text))


def read_compbench(text: str, path: Path) -> Entries:
    """Read T2I-CompBench, https://arxiv.org/abs/2307.06350.

    `color_val.txt` has a prompt of category "color" on each line. For other file names the category is the whole name.
    """
    match = COMPBENCH_FILE.fullmatch(path.stem)
    category = match[1] if match else path.stem
    return (Prompt(line, category, where=f"{path}:{number}") for number, line in numbered(text))


def read_jsonl(text: str, path: Path) -> Entries:
    """Read one object per line with a `prompt`, `text` or `caption`, and optionally a `category` or `tag`."""
    for number, line in numbered(text):
        yield attempt(json_prompt, line, path, number)


def json_prompt(line: str, path: Path, number: int) -> Prompt:
    return prompt_of(json_document(line, path, number), f"{path}:{number}")


def read_geneval(text: str, path: Path) -> Entries:
    """Read GenEval, https://arxiv.org/abs/2310.11513, or GenEval 2, https://arxiv.org/abs/2512.16853.

    `evaluation_metadata.jsonl` of the first has `tag`, `include` and `prompt`; the category is the tag.
    `geneval2_data.jsonl` has `prompt`, `atom_count`, `vqa_list` and `skills`; the category is "3 atoms" and so on.
    """
    for number, line in numbered(text):
        yield attempt(geneval_prompt, line, path, number)


def geneval_prompt(line: str, path: Path, number: int) -> Prompt:
    where = f"{path}:{number}"
    item = required(json_document(line, path, number), Mapping, where)
    if "tag" not in item and "atom_count" not in item:
        raise ValueError(f"Expected a `tag` or an `atom_count` in {where}, but got the keys {quoted(item)}.")
    return prompt_of(item, where, None if "tag" in item else f"{item['atom_count']} atoms")


def read_partiprompts(text: str, path: Path) -> Entries:
    """Read PartiPrompts, https://arxiv.org/abs/2206.10789: tab-separated Prompt, Category, Challenge and Note."""
    head = text.split("\n", 1)[0].rstrip().split("\t")
    if "Prompt" not in head:
        raise ValueError(f"Expected a column 'Prompt' in {path}, but got {quoted(head)}.")
    # prompts contain unescaped quotation marks
    return table_prompts(text, path, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_table(text: str, path: Path) -> Entries:
    """Read CSV or TSV whose first line names a column `prompt`, `text` or `caption`, in any case.

    Cells are separated by commas, semicolons or tabs. A column `category` or `tag` is the category, the others are
    metadata.
    """
    first_line = text.lstrip().split("\n", 1)[0].rstrip()
    delimiter = delimiter_of(first_line, strict=False)
    if delimiter is None:
        raise ValueError(
            f"Expected a column out of {quoted(TEXT_KEYS)} in the first line of {path}, but got "
            f"{shortened(repr(first_line))}. Name the column of the prompts 'prompt'."
        )
    if delimiter != "\t" or is_quoted(text, delimiter):
        return table_prompts(text, path, delimiter=delimiter, strict=True)
    return table_prompts(text, path, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def delimiter_of(first_line: str, strict: bool = True) -> str | None:
    """Return what separates the names of columns, one of which is that of the prompts, or `None` if it is no such line.

    `strict` also expects several columns whose names are words, to tell the first line of a table from a prompt.
    """
    for delimiter in ("\t", ",", ";"):
        names = [name.strip('"') for name in first_line.split(delimiter)]
        words = (
            len(names) > 1 and len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]*", name) for name in names)
        )
        if any(is_text_key(name) for name in names) and (words or not strict):
            return delimiter
    return None


def is_quoted(text: str, delimiter: str) -> bool:
    """Return whether the quotation marks of a table enclose cells; in many TSV files they belong to the prompts."""
    try:
        return bool(list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)))
    except csv.Error:
        return False


def table_prompts(text: str, path: Path, **dialect: Any) -> Entries:
    rows, names, line = csv.reader(io.StringIO(text, newline=""), **dialect), None, 0
    try:
        for cells in rows:
            where, line = f"{path}:{line + 1}", rows.line_num  # a cell can have several lines
            if names is None and any(cells):
                names = [name.strip().lower() for name in cells]
            elif names is not None and any(cell.strip() for cell in cells):
                yield attempt(row_prompt, names, cells, where)
    except csv.Error as error:
        where = f"{path}:{line + 1}"
        raise ValueError(f"Expected quotation marks around whole cells in {where}, but got: {error}.") from None


def row_prompt(names: list[str], cells: list[str], where: str) -> Prompt:
    if len(cells) > len(names):
        raise ValueError(
            f"Expected {len(names)} cells in {where}, but got {len(cells)}. Put cells that contain the separator in "
            "quotation marks."
        )
    return prompt_of({name: cell for name, cell in zip(names, cells, strict=False) if name and cell}, where)


def read_json(text: str, path: Path) -> Entries:
    """Read one JSON document of prompts, each a text or an object as in JSON lines.

    A list of them (HPSv2); lists by category, as in Noise Diffusion, https://arxiv.org/abs/2411.16503, whose `indices`
    of nouns become metadata; or one by id (HPDv4, MJHQ-30K), which becomes metadata.
    """
    document = json_document(text, path)
    if isinstance(document, Mapping):  # {"prompts": [...]} with other facts beside it
        lists = (value for key, value in document.items() if is_text_key(key) and isinstance(value, list))
        document = next(lists, document)
    groups = required({None: document} if isinstance(document, list) else document, Mapping, str(path))
    by_id = all(isinstance(value, str | Mapping) for value in groups.values())
    for key, value in groups.items():
        where = str(path) if key is None else f"{path}, {shortened(repr(key))}"
        if by_id:
            yield attempt(prompt_of, value, where, None, {"id": key})
            continue
        for number, item in enumerate(required(value, list, where), 1):
            yield attempt(prompt_of, item, f"{where}, item {number}", key)


def read_coco(text: str, path: Path) -> Entries:
    """Read the first caption of each image from `captions_*.json` of COCO, https://arxiv.org/abs/1504.00325."""
    document = required(json_document(text, path), Mapping, str(path))
    if "annotations" not in document:
        raise ValueError(f"Expected `annotations` in {path}, but got the keys {quoted(document)}.")
    seen = set()
    for number, item in enumerate(required(document["annotations"], list, f"{path}, annotations"), 1):
        prompt = attempt(prompt_of, item, f"{path}, annotation {number}")
        image = str(prompt.metadata.get("image_id", number)) if isinstance(prompt, Prompt) else None
        if image is None or image not in seen:
            seen.add(image)
            yield prompt


FORMATS: dict[str, Callable[[str, Path], Entries]] = {
    "text": read_text,
    "table": read_table,
    "json": read_json,
    "jsonl": read_jsonl,
    "geneval": read_geneval,
    "t2i-compbench": read_compbench,
    "partiprompts": read_partiprompts,
    "noise-diffusion": read_json,
    "coco": read_coco,
}


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yield the stripped, nonblank lines with their numbers from 1."""
    # not `splitlines`, which splits at characters that JSON strings may contain
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return ((number, line) for number, line in lines if line)


def json_document(text: str, path: Path, first_line: int = 1) -> Any:
    """Parse JSON; errors name the line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{first_line + error.lineno - 1}"
        raise ValueError(f"Expected JSON in {where}, but got {shortened(repr(error.doc))}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"Expected JSON in {path}:{first_line}, but it cannot be read: {error}.") from error


def required(value: Any, kind: type, where: str) -> Any:
    """Return `value` if it is of the required kind, a mapping or a list. Raises `ValueError` otherwise."""
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise ValueError(f"Expected {name} in {where}, but got {shortened(repr(value))}.")
    return value


def prompt_of(item: Any, where: str, category: str | None = None, metadata: Mapping[str, Any] | None = None) -> Prompt:
    """Convert a text or an object to a prompt. Raises `ValueError` if there is no text."""
    rest = {"prompt": item} if isinstance(item, str) else dict(required(item, Mapping, where))
    key = text_key(rest)
    text = None if key is None else rest.pop(key)
    if not isinstance(text, str):
        got = f"the keys {quoted(item)}" if key is None else f"{shortened(repr(text))} under {key!r}"
        raise ValueError(f"Expected a text under {quoted(TEXT_KEYS)} in {where}, but got {got}.")
    if not text.strip():
        raise ValueError(f"Expected a prompt in {where}, but it is blank. Write one, or remove the entry.")
    if category is None:
        category = next((str(rest.pop(key)) for key in CATEGORY_KEYS if rest.get(key) is not None), None)
    return Prompt(text.strip(), category, {**(metadata or {}), **rest}, where)


def is_text_key(key: str) -> bool:
    return singular(key) in TEXT_KEYS


def singular(key: str) -> str:
    return key.strip().lower().removesuffix("s")


def text_key(item: Mapping[str, Any]) -> str | None:
    """Return the key of the text of an object, or `None`."""
    return min(filter(is_text_key, item), key=lambda key: TEXT_KEYS.index(singular(key)), default=None)


def quoted(names: Iterable[str]) -> str:
    return shortened(", ".join(map(repr, names)) or "none", 200)


def shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
