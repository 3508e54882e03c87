"""What tests of several folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, running_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running `LoopbackHub` without repositories."""
    with running_hub(tmp_path / "hub") as running:
        yield running
