"""Templates and tables of the card texts."""

import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> Template:
    """Return a file of the folder `templates`."""
    return Template((TEMPLATES / f"{name}.md").read_text(encoding="utf-8"))


def sections(name: str) -> dict[str, Template]:
    """Return the texts of a template file by the comments `<!-- title -->` above them."""
    parts = re.split(r"^<!-- (\w+) -->\n", template(name).template, flags=re.MULTILINE)[1:]
    return {title: Template(text.removesuffix("\n")) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def described(docstring: str | None) -> dict[str, str]:
    """Return the description of each argument on one line.

    Args:
        docstring: From `inspect.cleandoc`, with a section `Args:` or `Attributes:`; `None` has no arguments.
    """
    section = re.search(r"^(?:Args|Attributes):\n((?:(?: .*)?\n)*)", (docstring or "") + "\n", flags=re.MULTILINE)
    entry = re.compile(r"^    ([\w, ]+): (.*\n(?:     +.*\n)*)", flags=re.MULTILINE)
    entries = entry.findall(section[1]) if section else []
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def code(text: str) -> str:
    return f"`{text}`"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
