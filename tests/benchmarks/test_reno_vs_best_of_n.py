"""The comparison of ReNO with best-of-N: its arithmetic on artificial rows, and a short run."""

import json

import pytest
import torch
from reno_vs_best_of_n import METHODS, Run, Table, main, markdown  # pyright: ignore[reportMissingImports]

from noiseopt import shapes_world


def outcome(correct: bool) -> dict:
    return {"correct": correct, "reward": 1.0, "norm": 1.0, "evaluations": 5, "seconds": 0.5}


def row(index: int, category: str, **correct: bool) -> dict:
    return {"index": index, "category": category} | {name: outcome(correct.get(name, False)) for name in METHODS}


ROWS = [
    row(0, "binding", reno=True),
    row(0, "binding", plain=True, reno=True),
    row(1, "position", best_of_n=True),
    row(1, "position", plain=True, best_of_n=True),
]


def test_table_counts_what_is_right_repaired_and_kept():
    estimates = Table(ROWS).estimates("reno")
    values = {name: estimate.value for name, estimate in estimates.items()}
    expected = {"right": 0.5, "right, binding (n = 1)": 1.0, "right, position (n = 1)": 0.0, "failures repaired": 0.5}
    assert expected.items() <= values.items()
    assert values["right ones kept"] == 0.5


def test_table_pairs_methods_by_prompt():
    table = Table(ROWS)
    assert table.difference("reno", "best_of_n").value == 0.0
    assert table.difference("reno", "plain").value == 0.0
    assert (table.difference("reno", "plain").low, table.difference("reno", "plain").high) == (-0.5, 0.5)


def test_markdown_has_a_row_for_each_number_and_a_column_for_each_method():
    lines = markdown(Table(ROWS).summary()).splitlines()
    assert lines[0].count("|") == len(METHODS) + 2
    assert any(line.startswith("| ReNO − plain | +0.0% [-50.0, +50.0]") for line in lines)


def test_equal_time_counts_the_evaluations_that_begin_in_time():
    run = Run(torch.zeros(4, 1, 3, 64, 64), torch.zeros(4, 1), torch.ones(4, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert [run.evaluations_within(seconds) for seconds in (0.5, 1.0, 2.5, 9.0)] == [1, 1, 3, 4]


@pytest.mark.slow
def test_short_run_writes_all_numbers(tmp_path, capsys):
    path = tmp_path / "results" / "reno.json"
    main(["--limit", "3", "--batch-size", "2", "--steps", "3", "--output", str(path)])
    results = json.loads(path.read_text())
    assert [row["prompt"] for row in results["rows"]] == list(shapes_world.VALIDATION_PROMPTS[:3])
    for each in results["rows"]:
        assert each["plain"]["evaluations"] == 1 and each["reno"]["evaluations"] == 3
        assert each["plain"]["reward"] <= min(each[name]["reward"] for name in METHODS) + 1e-4
        assert each["best_of_n"]["norm"] == pytest.approx(1.0, abs=0.2)
    assert "| ReNO − best-of-N, equal time |" in capsys.readouterr().out
