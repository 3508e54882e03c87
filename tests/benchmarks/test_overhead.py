"""The overhead benchmark: both loops do the same work; arithmetic of the table."""

import pytest
from overhead import loops, main, report  # pyright: ignore[reportMissingImports]


def test_report_has_milliseconds_and_the_median_ratio():
    row = report("the clock", ours=[1.1, 2.4, 1.3], bare=[1.0, 2.0, 1.0], steps=10)
    assert row == "| the clock | 100.00 | 130.00 | 1.200 | 1.150 – 1.250 |"


@pytest.mark.parametrize("which", [0, 1])
def test_both_loops_call_the_denoiser_as_often(which):
    loop, calls = loops(batch_size=2, steps=3)[which], []
    loop.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    loop()
    assert len(calls) == 3


def test_short_run_prints_a_table(capsys):
    main(["--batch-size", "1", "--steps", "2", "--repetitions", "2"])
    assert capsys.readouterr().out.count("|\n") == 4
