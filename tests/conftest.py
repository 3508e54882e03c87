"""What tests of several folders share."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fresh_process import FreshProcesses
from loopback_hub import LoopbackHub, running_hub

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker and what it starts: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take a minute, or whose tests are few and long. `-n auto --dist loadfile` hands out whole files: one of
# these at the end would leave the other workers idle, so that they come first.
LONG_FILES = (
    "conformance",
    "hub_cards/test_loading.py",
    "training/test_training.py",
    "evaluation/test_evaluate.py",
    "pipelines/test_interruptions.py",
    "pipelines/test_never_too_late.py",
    "pipelines/test_effect.py",
    "benchmarks",
    "hub_cards",
    "rewards/contract/test_published.py",
    "pipelines",
    "shapes_world",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of xdist, which would begin with the files of many tests
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting imports is there to stay: looking through it for garbage would take a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; within one the order stays."""
    items.sort(key=lambda item: rank(item.path))


def rank(path: Path) -> int:
    relative = path.relative_to(Path(__file__).parent) if path.is_relative_to(Path(__file__).parent) else path
    places = (index for index, name in enumerate(LONG_FILES) if relative.is_relative_to(name))
    return next(places, len(LONG_FILES))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """One Hub for all tests: its address is known before the libraries are imported that read it."""
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """A running `LoopbackHub` without repositories, of which nothing is downloaded yet."""
    running.begin(tmp_path / "hub")
    return running


@pytest.fixture(scope="session")
def processes(running: LoopbackHub) -> FreshProcesses:
    """Runs programs in processes of their own, which see the loopback Hub only."""
    return FreshProcesses(running)
