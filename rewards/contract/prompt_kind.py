"""The kind of a prompt, told by its words."""

import re
from typing import Literal

PromptKind = Literal[
    "color", "shape", "texture", "2d_spatial", "3d_spatial", "numeracy", "non_spatial", "complex", "general"
]

# Words that say what a prompt asks for; "_" is a space.
KIND_WORDS: dict[PromptKind, str] = {
    "color": "red orange yellow green blue purple pink brown black white gray grey golden silver beige cyan magenta "
    "turquoise violet maroon teal colored colorful",
    "shape": "round circular oval square rectangular triangular pentagonal hexagonal octagonal oblong cubic cubical "
    "spherical cylindrical conical pyramidal teardrop diamond curved flat pointed big small tall short long tiny large "
    "huge little",
    "texture": "wooden metallic metal rubber leather glass plastic fabric fluffy woolen cotton silk velvet stone "
    "ceramic furry smooth rough soft",
    "2d_spatial": "left_of right_of left_side right_side top_of bottom_of side_of next_to close_to near beside above "
    "below under underneath beneath",
    "3d_spatial": "behind in_front_of hidden_by in_the_background in_the_foreground",
    "numeracy": "two three four five six seven eight nine ten eleven twelve dozen",
}
NUMBER = r"\d+"
ACTION = r"(?:is|are|was|were) (?:\w+ly )?\w+ing"


def kind_pattern(words: str, *expressions: str) -> re.Pattern[str]:
    """Return a pattern of any of the words, in which "_" is a space, and of other expressions."""
    escaped = [re.escape(word).replace("_", r"\s+") for word in words.split()]
    return re.compile(rf"\b(?:{'|'.join([*escaped, *expressions])})\b", re.IGNORECASE)


KIND_PATTERNS: dict[PromptKind, re.Pattern[str]] = {
    **{kind: kind_pattern(words, *[NUMBER] * (kind == "numeracy")) for kind, words in KIND_WORDS.items()},
    "non_spatial": kind_pattern("", ACTION),
}


def prompt_kind(prompt: str) -> PromptKind:
    """Return the kind of an English prompt: a category of T2I-CompBench++, or "general".

    A prompt is of the kind of its words (`KIND_WORDS`, numbers, and actions as in "is holding"), "complex" if these are
    of several kinds, and "general" if it has none. The categories are those of https://arxiv.org/abs/2307.06350, where
    sizes are shapes and actions are "non_spatial"; the words are chosen here.

    Raises:
        TypeError: For anything but a text.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"Expected one prompt as a text, but got {prompt!r}. Ask about one prompt at a time.")
    found: list[PromptKind] = [kind for kind, pattern in KIND_PATTERNS.items() if pattern.search(prompt)]
    return "complex" if len(found) > 1 else found[0] if found else "general"
