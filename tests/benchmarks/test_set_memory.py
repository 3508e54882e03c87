"""The memory of a set objective: the arithmetic of the table, and a short run with every cell and one gradient."""

import sys

import pytest
import set_memory  # pyright: ignore[reportMissingImports]
import torch


def cell(memory, chunk_size, gradient):
    return {"seconds": 1.0, "memory": memory, "chunk_size": chunk_size, "gradient": torch.tensor(gradient)}


def test_memory_is_a_multiple_of_the_smallest_set_of_the_mode():
    results = {
        "joint": {1: cell(100.0, None, [3.0]), 4: cell(400.0, None, [3.0, 4.0])},
        "one": {1: cell(90.0, None, [3.0]), 4: cell(99.0, 1, [3.0, 4.5])},
    }
    table = set_memory.report(results)
    assert "| 4 | joint | 4 | 1.00 | 400 | 4.00 |" in table
    assert "| 4 | one | 1 | 1.00 | 99 | 1.10 |" in table
    assert table.endswith("1.0e-01")


@pytest.mark.slow
def test_a_short_run_has_every_mode_and_the_same_gradient(capsys, monkeypatch):
    """In one process; the benchmark measures each cell in its own."""

    def run(command, check, env):
        assert command[:2] == [sys.executable, set_memory.__file__] and check and "MALLOC_MMAP_THRESHOLD_" in env
        set_memory.main(command[2:])

    monkeypatch.setattr(set_memory.subprocess, "run", run)
    results = set_memory.main(["--model", "sdxl-turbo", "--size", "32", "--batches", "2"])
    joint = results["joint"][2]["gradient"]
    assert list(results) == ["joint", "one", "auto"] and joint.shape[0] == 2 and joint.any()
    assert results["one"][2]["chunk_size"] == 1 and results["auto"][2]["chunk_size"] is None
    assert all(set_memory.difference(row[2]["gradient"], joint) < 1e-4 for row in results.values())
    assert capsys.readouterr().out.count("| auto |") == 1
