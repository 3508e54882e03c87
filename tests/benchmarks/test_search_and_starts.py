"""The comparison of searches and starts at equal time: how a time is shared, and a short run."""

import pytest
import search_and_starts  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize(
    ("costs", "share", "starts", "expected"),
    [
        (
            (1.0, 1.0, 4.0, True),
            0.25,
            1,
            {"steps": 25 + 18, "search": 25, "starts": 1},
        ),  # 25·1 + 18·4 ≤ 100 < 25 + 19·4
        ((2.0, 0.5, 4.0, False), 0.25, 2, {"steps": 1 + 50 + 18, "search": 50, "starts": 2}),  # 2 + 50·0.5 + 18·4 = 99
        ((1.0, 1.0, 40.0, True), 0.5, 1, None),  # one evaluation is left, which would end where it starts
        ((9.0, 9.0, 10.0, True), 0.01, 4, {"steps": 4 + 6, "search": 4, "starts": 4}),  # as many noises as starts
    ],
)
def test_a_time_is_shared_and_never_exceeded(costs, share, starts, expected):
    found = search_and_starts.Costs(*costs)
    settings = found.settings(100.0, share, starts)
    assert settings == expected
    if settings:
        before = 0 if found.single_step else 1
        moving = settings["steps"] - settings["search"] - before
        assert before * found.plain + settings["search"] * found.preview + moving * found.gradient <= 100.0


@pytest.mark.slow
def test_a_short_run_prints_a_row_for_each_way(capsys):
    search_and_starts.main(["--model", "turbo", "--limit", "2", "--evaluations", "8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| 8 | none | 1 |") and "+0.0 [+0.0, +0.0]" in rows[0]
    assert "best-of-N" in rows[-1] and len(rows) >= 4
