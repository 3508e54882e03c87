"""The page of a generation: images before and after, in one HTML file without scripts."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any
from urllib.parse import quote

STYLE = """\
:root { color-scheme: light dark }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
section { border-top: 1px solid #8886; padding: 1rem 0 }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
.set { display: flex; flex-wrap: wrap; gap: 1rem }
.pair { display: flex; gap: .3rem }
figure { margin: 0; width: 16rem }
img { display: block; width: 100%; border-radius: 4px }
figcaption { font-size: .8rem; opacity: .75 }
.error { color: #cf222e }
"""


def page(records: Iterable[Mapping[str, Any]], title: str) -> str:
    """Return the page. All texts are escaped: prompts and names may come from anywhere.

    Args:
        records: One for each prompt, as in `results.jsonl`; the prompt is `None` where none could be read.
        title: The heading.
    """
    sections = "\n".join(section(record) for record in records)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>Left of each pair: the image of the initial noise. Right: of the optimized noise.</p>\n{sections}\n"
        "</body>\n</html>\n"
    )


def section(record: Mapping[str, Any]) -> str:
    """Return the part of one prompt."""
    prompt = "No prompt" if record["prompt"] is None else str(record["prompt"])
    heading = f"<section>\n<h2>{escape(prompt)}</h2>\n"
    if "error" in record:
        return f'{heading}<p class="error">{escape(str(record["error"]))}</p>\n</section>'
    pairs = "\n".join(pair(record, image) for image in range(len(record["images"])))
    return f'{heading}<div class="set">\n{pairs}\n</div>\n</section>'


def pair(record: Mapping[str, Any], image: int) -> str:
    """Return one image before and after, with its rewards and its seed."""
    figures = []
    for files, rewards, word in (("before", "rewards before", "before"), ("images", "rewards", "after")):
        scores = [
            f"{name} {values[image]:.4g}" for name, values in record[rewards].items() if values[image] is not None
        ]
        caption = ", ".join([f"{word}, seed {record['seeds'][image]}", *scores])
        figures.append(
            f'<figure><img src="{escape(quote(record[files][image]))}" loading="lazy" alt="{word}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="pair">{"".join(figures)}</div>'
