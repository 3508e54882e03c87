"""The memory benchmark: the arithmetic of the table, and a short run with less memory and one gradient in every row."""

import json

import memory  # pyright: ignore[reportMissingImports]
import pytest
from memory import Row  # pyright: ignore[reportMissingImports]


def test_the_table_is_in_multiples_of_keeping_everything():
    rows = [Row("none", 4, 512, 100.0, 2.0), Row("steps", 4, 512, 25.0, 3.0, 1.26e-7), Row("frozen", 4, 512)]
    lines = memory.table(rows).splitlines()
    assert lines[2] == "| 512 | 4 | none | 100 | 1.00 | 2.00 | 1.00 | – |"
    assert lines[3] == "| 512 | 4 | steps | 25 | 0.25 | 3.00 | 1.50 | 1e-07 |"
    assert lines[4] == "| 512 | 4 | frozen | does not fit | – | – | – | – |"


def test_rows_have_no_multiple_of_what_did_not_fit():
    rows = [Row("none", 1, 512), Row("blocks", 1, 512, 30.0, 1.0)]
    assert memory.table(rows).splitlines()[3] == "| 512 | 1 | blocks | 30 | – | 1.00 | – | – |"


@pytest.mark.slow
def test_a_short_run(tmp_path, capsys):
    arguments = ["--steps", "1", "--size", "32", "--repeats", "1", "--dtype", "float32", "--output", str(tmp_path)]
    rows = {row.way: row for row in memory.main([*arguments, "--device", "cpu"])}
    assert list(rows) == ["none", "blocks", "steps", "tiny decoder", "frozen"]
    assert rows["steps"].memory < rows["blocks"].memory < 0.7 * rows["none"].memory
    assert max(rows["frozen"].memory, rows["tiny decoder"].memory) < rows["none"].memory
    assert rows["none"].difference is None and rows["frozen"].difference is None
    assert max(rows["blocks"].difference, rows["steps"].difference) < 1e-5
    assert all(row.seconds > 0 for row in rows.values())
    written = json.loads((tmp_path / "memory_small_cpu.json").read_text())
    assert len(written["rows"]) == 5 and written["dtype"] == "float32"
    assert (tmp_path / "memory_small_cpu.md").read_text().count("| 32 | 1 |") == 5
    assert capsys.readouterr().out.count("| 32 | 1 |") == 5
