"""Fixtures of the tests of the cards."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback_hub import WRITER, LoopbackHub


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return Path(__file__).parents[2]


@pytest.fixture
def api(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """A writer's access to the loopback Hub, which knows large files but not Xet's chunks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=WRITER)
