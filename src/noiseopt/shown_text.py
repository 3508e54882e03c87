"""Text of files and prompts, made safe to print."""

from typing import Any

LONGEST_SHOWN, LONGEST_LINE = 200, 4096  # characters


def shown(value: Any, longest: int = LONGEST_SHOWN) -> str:
    """Return a text on one line, with what a terminal would act on written as an escape, cut to a length.

    Files and prompts may come from anyone. Control characters, line breaks and marks that reverse the direction of
    writing are not printed as they are.
    """
    text = str(value)
    escaped = "".join(each if each.isprintable() else escape(each) for each in text[: longest + 1])
    return escaped if len(escaped) <= longest else escaped[:longest] + "…"


def shown_lines(value: Any) -> str:
    """Return a text of several lines as `shown` does, with the lines as they are."""
    return "\n".join(shown(line, LONGEST_LINE) for line in str(value).splitlines())


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
