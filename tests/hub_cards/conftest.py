"""`hub_cards/` is a folder of scripts, not a package: its modules reach the tests as fixtures."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """Import `<folder>/<name>.py` as a program in that folder would: with the folder first on the path."""
    path = ROOT / name
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.name)
    finally:
        sys.path.remove(str(path.parent))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def bundling() -> ModuleType:
    """`hub_cards/bundle.py`."""
    return script("hub_cards/bundle")


@pytest.fixture(scope="session")
def cards() -> ModuleType:
    """`hub_cards/cards.py`."""
    return script("hub_cards/cards")


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """`hub_cards/build.py`."""
    return script("hub_cards/build")
