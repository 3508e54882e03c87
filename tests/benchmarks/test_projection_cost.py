"""The cost of the projection onto white noise: a short run on a small model."""

import projection_cost  # pyright: ignore[reportMissingImports]
import pytest


@pytest.mark.slow
def test_a_short_run_prints_both_times_and_their_ratio(capsys):
    ratio = projection_cost.main(["--model", "small", "--size", "64", "--device", "cpu", "--repeats", "1"])
    gradient, projection = capsys.readouterr().out.splitlines()
    seconds, milliseconds = float(gradient.split()[-2]), float(projection.split()[4])
    assert gradient.startswith("gradient of small at 64 px: ")
    assert projection.startswith("projection of 65,536 numbers: ")
    assert ratio == pytest.approx(milliseconds / 1000 / seconds, rel=0.05)
    assert 0 < milliseconds < 1000 * seconds
