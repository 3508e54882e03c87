"""Evaluations that are killed end as those that are not."""

import json

import pytest
import reliability_evaluate  # pyright: ignore[reportMissingImports]


@pytest.mark.slow
def test_killed_evaluations_end_as_if_they_were_not(capsys):
    counts = reliability_evaluate.main(["--count", "3", "--limit", "1"])
    assert counts["killed"] == 3 == counts["while measuring"] + counts["while reporting"]
    assert counts["units"] == 4 and "differences: 0" in capsys.readouterr().out


def test_what_differs_is_found(tmp_path):
    def write(folder, seconds, red):
        unit = folder / "units" / "turbo" / "plain" / "00000-ab.json"
        unit.parent.mkdir(parents=True)
        unit.write_text(json.dumps({"rewards": [red], "cost": {"seconds": seconds, "model_calls": 2}}))
        for name in ("table.md", "table.csv"):
            (folder / name).write_text("the same")
        return reliability_evaluate.end_of(folder)

    first = write(tmp_path / "a", 1.0, 0.5)
    assert first == write(tmp_path / "b", 2.0, 0.5) and first != write(tmp_path / "c", 1.0, 0.6)
    assert len(reliability_evaluate.finished(tmp_path / "a")) == 1
