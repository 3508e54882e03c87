"""Fixtures of several folders, and the order and number of processes of a test run."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fresh_process import FreshProcesses
from loopback_hub import LoopbackHub, running_hub

if "PYTEST_XDIST_WORKER" in os.environ:  # workers and their subprocesses share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `--dist loadfile` distributes whole files. The longest come first: one at the end would leave other workers idle.
LONG_FILES = (
    "conformance",
    "hub_cards/test_loading.py",
    "training/test_train.py",
    "evaluation/test_evaluate.py",
    "pipelines/test_interruptions.py",
    "pipelines/never_too_late",
    "pipelines/test_effect.py",
    "benchmarks",
    "hub_cards",
    "rewards/contract/test_published.py",
    "pipelines",
    "shapes_world",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist would start with the files of many tests
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run a single file or test in this process: a worker would import torch once more."""
    arguments = config.option.file_or_dir
    return 0 if len(arguments) == 1 and ".py" in arguments[0] else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep imported modules out of garbage collection, which would take a tenth of the collection's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the long files to the front and keep the order within each."""
    items.sort(key=lambda item: rank(item.path))


def rank(path: Path) -> int:
    relative = path.relative_to(Path(__file__).parent) if path.is_relative_to(Path(__file__).parent) else path
    ranks = (index for index, name in enumerate(LONG_FILES) if relative.is_relative_to(name))
    return next(ranks, len(LONG_FILES))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """Loopback Hub that runs for the whole session, as its address is read when the libraries are imported."""
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """Running `LoopbackHub` without repositories and with an empty download cache."""
    running.begin(tmp_path / "hub")
    return running


@pytest.fixture(scope="session")
def processes(running: LoopbackHub) -> FreshProcesses:
    """Fresh processes that see only the loopback Hub."""
    return FreshProcesses(running)
