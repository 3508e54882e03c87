"""The CNO benchmarks: the arithmetic of the tables, and a short run with all rows."""

import cno_cost  # pyright: ignore[reportMissingImports]
import cno_diversity  # pyright: ignore[reportMissingImports]
import pytest

from noiseopt.evaluation.measure import Cost


def test_differences_are_to_plain_sampling_with_sets_of_the_same_size():
    assert [cno_diversity.plain_of(name) for name in ("CNO", "CNO, B = 8", "plain", "plain, B = 8", "w = 1")] == [
        "plain",
        "plain, B = 8",
        "plain",
        "plain, B = 8",
        "plain",
    ]
    found = {"plain": {"right": [0.5, 1.0]}, "CNO": {"right": [0.25, 0.5]}}
    table = cno_diversity.summary(found)["CNO"]["right"]
    assert (table["estimate"].value, table["difference"].value) == (0.375, -0.375)
    assert (table["difference"].low, table["difference"].high) == (-0.5, -0.25)
    assert cno_diversity.cell(**table) == "0.375 (-0.38 [-0.5, -0.25])"


@pytest.mark.slow
def test_a_short_comparison_has_every_row_and_metric(capsys, tmp_path):
    tables = cno_diversity.main(["--limit", "1", "--seeds", "1", "--images", "2", "--output", str(tmp_path / "x.json")])
    assert list(tables) == ["plain", "CNO", "CNO, released code"]
    assert all(set(row) == set(cno_diversity.METRICS) for row in tables.values())
    assert tables["plain"]["norm"]["estimate"].value == 1.0 != tables["CNO"]["norm"]["estimate"].value
    assert capsys.readouterr().out.count("| plain |") == 2
    assert (tmp_path / "x.json").read_text().count('"right"') == 3


def test_every_choice_of_the_ablation_is_a_method():
    rows = cno_diversity.variants(5, ablation=True)
    assert len({row.name for row in rows}) == len(rows) == 18
    for row in rows:
        if row.method:
            row.method.check()
            assert row.method.settings()["learning_rate"] == (0.01 if "paper" in row.name else 0.057)


@pytest.mark.slow
def test_costs_are_ratios_to_plain_sampling_of_the_same_round(capsys):
    rounds = {"plain": [Cost(seconds=1.0), Cost(seconds=2.0)], "CNO": [Cost(seconds=1.5), Cost(seconds=2.2)]}
    texts = cno_cost.ratios(rounds, lambda cost: cost.seconds)
    assert texts == {"plain": "1.000 [1.000–1.000]", "CNO": "1.300 [1.000–1.600]"}
    assert cno_cost.ratios(rounds, lambda cost: cost.memory)["CNO"] == "–"
    found = cno_cost.main(["--steps", "4", "--rounds", "1", "--images", "2"])
    calls = {name: costs[0].model_calls for name, costs in found.items()}
    assert calls["CNO"] / calls["plain"] == pytest.approx(7 / 4)
    assert "| CNO | 1.750" in capsys.readouterr().out
