"""Damaged and forged result files, a few hundred of them; the benchmark makes thousands."""

import pytest
import reliability_files  # pyright: ignore[reportMissingImports]
import torch
from reliability_files import CHANGES, check_files  # pyright: ignore[reportMissingImports]

from noiseopt import NoiseResult


def test_each_file_is_a_valid_result_or_refused_by_one_clear_error(tmp_path):
    report = check_files(420, first=0, folder=tmp_path)
    assert report.faults == []
    assert report.loaded.total() > 20 and report.refused.total() > 200
    assert report.loaded.keys() | report.refused.keys() == CHANGES.keys()


@pytest.mark.parametrize("fault", ["another error", "a long message", "an escape", "a result that is none"])
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    def load(path):
        if "damaged" not in path.name:
            return real(path)
        if fault == "a result that is none":
            found = real(tmp_path / "valid1.safetensors")
            found.noise = found.noise * torch.nan
            return found
        message = {"a long message": "x" * 5000, "an escape": "\x1b[2J"}.get(fault, "")
        raise (KeyError if fault == "another error" else ValueError)(f"Expected a file that {message}")

    real = NoiseResult.load
    monkeypatch.setattr(reliability_files.NoiseResult, "load", load)
    assert len(check_files(3, first=0, folder=tmp_path).faults) >= 3


def test_the_command_prints_counts(capsys):
    with pytest.raises(SystemExit) as end:
        reliability_files.main(["--count", "5"])
    assert end.value.code == 0 and "faults: 0" in capsys.readouterr().out
