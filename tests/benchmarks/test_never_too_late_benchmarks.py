"""The benchmark of Never Too Late: its arithmetic in closed form, and a short run that is resumed."""

import json
import math

import never_too_late  # pyright: ignore[reportMissingImports]
import pytest
import torch
from never_too_late import Row, reached, rows  # pyright: ignore[reportMissingImports]
from PIL import Image

from noiseopt.pipelines.searches.group_solver import group_value

FEW = [
    Row("white", "plain"),
    Row("white", "group of 64"),
    Row("white", "pairwise patches"),
    Row("white", "group, equal time"),
    Row("pink", "plain"),
    Row("pink", "group of 64"),
    Row("pink", "pairwise patches"),
    Row("pink", "group, equal time"),
    Row("α = 0", "plain"),
]
SHORT = ["--limit", "2", "--batch-size", "1", "--steps", "2", "--images", "2"]


def test_rows_are_what_is_compared():
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) == 34
    for noise in ("white", "pink"):
        before = names[names.index(f"{noise}, group, equal time") - 1]
        assert before == f"{noise}, {never_too_late.SAME}"  # whose seconds it gets
        assert {f"{noise}, {what}" for what in never_too_late.WEIGHTS} < set(names)
    for other in ("white", "α = 0"):
        assert len(never_too_late.sweep(other)) == 14 and set(never_too_late.sweep(other)) < set(names)


def test_a_row_is_marked_where_it_optimizes_the_tower():
    assert Row("white", "plain").optimized == () == Row("white", "soft colors").optimized
    assert "DINO" in Row("white", "dpp").optimized and "DINO" in Row("pink", "group of 64").optimized
    assert Row("pink", "pairwise clip").optimized == ("clip",)
    assert Row("pink", "tiny L2").optimized == ("pixels",)


def test_objectives_pull_alike():
    pulls = {weight * never_too_late.GRADIENT_NORMS[name][2] for name, (_, _, weight) in never_too_late.WEIGHTS.items()}
    assert max(pulls) == pytest.approx(min(pulls)) == pytest.approx(1.5 * 3.24)


def test_group_selection_maximizes_what_ours_does(bench):
    """Σ u + w Σ b over K images is K times `mean u + λ·mean b`, the negative loss of the row `SAME`."""
    ours, group = bench.method(Row("white", never_too_late.SAME)), bench.method(Row("white", "group of 64"))
    generator = torch.Generator().manual_seed(0)
    u, b = (torch.rand(*size, generator=generator, dtype=torch.float64) for size in ((4,), (4, 4)))
    b = b + b.T
    upper = torch.triu_indices(4, 4, 1)
    wanted = 4 * (u.mean() + ours.diversity[0][2] * b[upper[0], upper[1]].mean())
    torch.testing.assert_close(group_value(u, b, torch.arange(4), group.weight), wanted)
    assert group.steps == 16 and ours.steps == 3


@pytest.fixture(scope="module")
def bench():
    return never_too_late.Bench("turbo", images=4, steps=3)


def test_a_distance_is_the_mean_over_pairs_of_a_set(bench):
    """Two sets of four uniform gray images: the pixel distance is the difference of gray levels."""
    levels = torch.tensor([0.1, 0.2, 0.4, 0.8, 0.5, 0.5, 0.5, 0.9])
    images = levels[:, None, None, None].expand(8, 3, 64, 64)
    first = [0.1, 0.3, 0.7, 0.2, 0.6, 0.4]
    assert bench.distances("pixels", images) == pytest.approx([sum(first) / 6, 3 * 0.4 / 6], rel=1e-3)


def test_time_to_reach_is_the_first_step_at_which_the_mean_curve_passes():
    curves = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]]).double()
    seconds = torch.tensor([[1.0, 2.0, 3.0], [1.0, 4.0, 7.0]]).double()
    target, cost = torch.tensor([1.5, 2.0]).double(), torch.tensor([10.0, 20.0]).double()
    both, first, second = reached(curves, seconds, target, cost, torch.tensor([[0, 1], [0, 0], [1, 1]]))
    assert (both.steps, both.seconds, both.ratio) == (1, 3.0, 3.0 / 15)  # mean curve 0, 2, 3 against 1.75
    assert (first.steps, first.seconds, first.ratio) == (2, 3.0, 0.3)
    assert (second.steps, second.ratio) == (1, 0.2)
    (never,) = reached(curves, seconds, target + 9, cost, torch.tensor([[0, 1]]))
    assert never.steps == never.seconds == never.ratio == math.inf


def test_differences_are_over_prompts_on_which_both_rows_have_a_number():
    found = {
        "a": {"numbers": [{"x": 2.0}, {"x": math.nan}, {"x": 4.0}]},
        "b": {"numbers": [{"x": 1.0}, {"x": 9.0}, {"x": math.nan}]},
    }
    assert never_too_late.compared(found, "a", "b", "x") == "3 (+1 [+1, +1])"


@pytest.mark.slow
def test_a_short_run_has_every_row_and_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(never_too_late, "rows", lambda: FEW)
    monkeypatch.setattr(never_too_late, "CANDIDATES", 6)
    output, plot, run = tmp_path / "found.json", tmp_path / "found.png", never_too_late.Bench.run
    drawn = []

    def stopped(self, row, prompts, first, seconds):
        drawn.append(first)
        if first == 1 and len(drawn) < 12:
            raise KeyboardInterrupt
        return run(self, row, prompts, first, seconds)

    monkeypatch.setattr(never_too_late.Bench, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        never_too_late.main([*SHORT, "--output", str(output)])
    before = json.loads(output.read_text())["rows"]
    drawn += [0] * 12
    found = never_too_late.main([*SHORT, "--output", str(output), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert drawn[-len(FEW) :] == [1] * len(FEW) and len(drawn) == 2 * len(FEW) + 13
    for row in FEW:
        numbers = found[row.name]["numbers"]
        assert len(numbers) == 2 and numbers[0] == before[row.name]["numbers"][0]
        assert f"| {row.name} |" in printed
    assert len(found["white, pairwise patches"]["curve"][0]) == 2
    assert found["white, plain"]["curve"][0][0] == pytest.approx(
        found["white, pairwise patches"]["curve"][0][0], rel=1e-3
    )
    evaluations = [found[row.name]["numbers"][0]["evaluations"] for row in FEW[:3]]
    assert evaluations[0] == 1 and evaluations[2] == 2
    assert evaluations[1] in (3, 4)  # 3 draws of 2 candidates, and the chosen set unless it is one of these
    with Image.open(plot) as picture:
        assert picture.width == 1600 and picture.height > 300


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "found.json"
    never_too_late.save(path, {"limit": 3}, {})
    assert never_too_late.load(path, {"limit": 3}) == {} == never_too_late.load(tmp_path / "none.json", {"limit": 3})
    with pytest.raises(SystemExit, match="Take another file"):
        never_too_late.load(path, {"limit": 4})
