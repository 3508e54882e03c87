"""`hub_cards/` is a folder of scripts, not a package: its modules reach the tests as fixtures."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HUB_CARDS = ROOT / "hub_cards"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


def script(name: str) -> ModuleType:
    """Import `hub_cards/<name>.py` the way `python hub_cards/build.py` does: its folder first on the path."""
    sys.path.insert(0, str(HUB_CARDS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HUB_CARDS))


@pytest.fixture(scope="session")
def bundling() -> ModuleType:
    return script("bundle")
