"""The CNO benchmarks: the arithmetic of the tables, and a short run with all rows."""

import cno_cost  # pyright: ignore[reportMissingImports]
import cno_diversity  # pyright: ignore[reportMissingImports]
import pytest
import sets  # pyright: ignore[reportMissingImports]

from noiseopt import CNO, shapes_world
from noiseopt.evaluation.measure import Cost


@pytest.mark.slow
def test_a_short_comparison_has_every_row_and_metric(capsys, tmp_path):
    found = cno_diversity.main(["--limit", "1", "--images", "2", "--output", str(tmp_path / "x.json")])
    prompt = shapes_world.VALIDATION_PROMPTS[0]
    assert list(found.found) == ["plain", "CNO", "CNO, released code"]
    metrics = {*sets.DIVERSITY, *sets.QUALITY, *sets.COST, "usual grounds", "right on them"}
    assert all(set(row[prompt]) == metrics for row in found.found.values())
    norms = [row[prompt]["norm"] for row in found.found.values()]
    assert norms[0] != norms[1] == pytest.approx(norms[0], abs=0.03)
    assert [row[prompt]["evaluations"] for row in found.found.values()] == [1, 3, 3]
    assert capsys.readouterr().out.count("| plain |") == 2


@pytest.mark.parametrize("ours", [{}, {"learning_rate": 0.05, "window_size": 8}])
def test_every_choice_of_the_ablation_is_another_method(ours, monkeypatch):
    monkeypatch.setattr(cno_diversity, "OURS", ours)
    rows = {row.name: row for row in cno_diversity.rows(ablation=True)}
    methods = {name: row.make(None) for name, row in rows.items() if row.make and not row.images}
    assert len({str(method.settings()) for method in methods.values()}) == len(methods)
    assert methods["CNO"] == CNO(**ours)
    assert ours == {} or (methods["the paper's settings"] == CNO() and "w = 16" in methods and "w = 8" not in methods)
    assert all(row.against in rows for row in rows.values())
    assert {row.images for name, row in rows.items() if "B = 8" in name} == {8}


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
