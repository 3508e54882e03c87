"""Every pipeline class of the installed diffusers does what `docs/pipelines.md` says."""

import re

import diffusers
import pytest
from conformance.all_pipelines import DOCUMENT, HEADINGS, Outcome, all_classes, by_rule, outcome_of, row
from conformance.builders import RECIPES, can_build

DOCUMENTED = DOCUMENT.read_text(encoding="utf-8")
SAME_VERSION = f"diffusers {diffusers.__version__};" in DOCUMENTED
OTHERS = "others"


def group_of(name: str) -> str:
    """Return the recipe of a class that is built, as the name of its test."""
    built = can_build(all_classes()[name]) and by_rule(name) is None
    return next(pattern for pattern in RECIPES if re.match(pattern, name)) if built else OTHERS


def documented(name: str, outcome: Outcome) -> bool:
    heading = f"\n## {HEADINGS[outcome.kind][0]}\n"
    section = DOCUMENTED.partition(heading)[2].partition("\n## ")[0]
    return row(name, outcome) in section


@pytest.mark.slow
@pytest.mark.parametrize("group", [*RECIPES, OTHERS])
def test_classes_do_what_the_document_says(group):
    names = [name for name in all_classes() if group_of(name) == group]
    outcomes = {name: outcome_of(name) for name in names}
    unknown = [name for name in names if f"`{name}`" not in DOCUMENTED]
    assert not unknown, "new in diffusers: python tests/conformance/all_pipelines.py --write"
    if SAME_VERSION:
        assert not {name: each for name, each in outcomes.items() if not documented(name, each)}


@pytest.mark.slow
def test_the_document_names_each_class_once():
    names = re.findall(r"^\| `(\w+)` \|", DOCUMENTED, re.MULTILINE)
    assert len(names) == len(set(names))
    if SAME_VERSION:
        assert set(names) == set(all_classes())
