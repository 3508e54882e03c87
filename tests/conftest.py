"""What tests of several folders share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, running_hub

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker and what it starts: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running `LoopbackHub` without repositories."""
    with running_hub(tmp_path / "hub") as running:
        yield running
