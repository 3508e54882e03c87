"""The benchmark of Never Too Late: its rows, the weights of its objectives, and the time to reach another method."""

import math

import never_too_late  # pyright: ignore[reportMissingImports]
import pytest
import sets  # pyright: ignore[reportMissingImports]
import torch
from never_too_late import reached, rows  # pyright: ignore[reportMissingImports]
from PIL import Image

from noiseopt import optimize_noise, shapes_world
from noiseopt.demo import seeded
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.searches.group_solver import group_value

BUDGET = never_too_late.Budget(search=2, steps=2)


@pytest.mark.parametrize(("table", "count"), [("methods", 12), ("objectives", 11), ("pink", 39)])
def test_rows_are_compared_with_rows_and_get_the_time_of_rows_before_them(table, count):
    names = [row.name for row in rows(table, BUDGET)]
    assert len(set(names)) == len(names) == count
    for at, row in enumerate(rows(table, BUDGET)):
        assert row.against in names and (row.time_of is None or row.time_of in names[:at])
        assert table == "objectives" or never_too_late.of_white(row) in names


def test_the_sweep_has_each_exponent_for_each_method():
    swept = [row for row in rows("pink", BUDGET) if isinstance(row.noise, dict) and row.noise.get("standardize", True)]
    exponents = [row.noise["alpha"] for row in swept]
    assert exponents[::3] == exponents[1::3] == exponents[2::3] == pytest.approx([0.05 * step for step in range(11)])


@pytest.fixture(scope="module")
def bench():
    return sets.Bench("turbo", images=4)


@pytest.fixture
def equal_pulls(monkeypatch):
    """A λ of 150 for every objective, without measuring."""
    monkeypatch.setattr(never_too_late, "weight", lambda bench, objective: 150.0)


def test_group_selection_maximizes_what_ours_does(bench, equal_pulls):
    """Σ u + w Σ b over K images is K times `mean u + λ·mean b`, the negative loss of the objective `MAIN`."""
    ours, group = never_too_late.ours(never_too_late.ALONE)(bench), never_too_late.group(64)(bench)
    generator = torch.Generator().manual_seed(0)
    u, b = (torch.rand(*size, generator=generator, dtype=torch.float64) for size in ((4,), (4, 4)))
    b = b + b.T
    upper = torch.triu_indices(4, 4, 1)
    wanted = 4 * (u.mean() + ours.diversity[0][2] * b[upper[0], upper[1]].mean())
    torch.testing.assert_close(group_value(u, b, torch.arange(4), group.weight), wanted)
    assert group.steps == 16 and group.features is ours.diversity[0][1]


def test_further_guards_stand_beside_that_of_the_search(bench, equal_pulls):
    floor, both = ({"clipscore": never_too_late.FLOOR}, {"clipscore": never_too_late.FLOOR, **never_too_late.GUARD})
    assert never_too_late.ours(BUDGET)(bench).guard == floor
    assert never_too_late.ours(BUDGET, guard=never_too_late.GUARD)(bench).guard == both
    assert never_too_late.ours(never_too_late.ALONE)(bench).guard is None


@pytest.mark.slow
def test_a_weight_makes_the_gradient_of_diversity_a_multiple_of_the_reward_s(bench, monkeypatch):
    monkeypatch.setattr(never_too_late, "BALANCED", 1)
    norms = {}

    def look(problem):
        leaf = problem.noise.clone().requires_grad_()
        units = torch.nn.functional.normalize(bench.features["clip"](problem.sampler.images(leaf, "full")), dim=1)
        distance = 1 - ((units @ units.T).sum() - 4) / 12
        norms["distance"] = float(torch.autograd.grad(distance, leaf)[0].norm())
        reward = bench.reward(problem.sampler.images(leaf, "full"), problem.prompts).mean()
        norms["reward"] = float(torch.autograd.grad(reward, leaf)[0].norm())

    call = {**bench.call, "num_images_per_prompt": 4, "generator": seeded(0, 4)}
    optimize_noise(bench.pipe, shapes_world.VALIDATION_PROMPTS[0], Looking(look), callbacks=[], **call)
    wanted = never_too_late.PULL * norms["reward"] / norms["distance"]
    assert never_too_late.weight.__wrapped__(bench, "pairwise") == pytest.approx(wanted, rel=1e-3)


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


@pytest.mark.slow
def test_a_short_run_has_every_row_and_figure(capsys, tmp_path, equal_pulls, monkeypatch):
    monkeypatch.setattr(never_too_late, "CANDIDATES", 6)
    monkeypatch.setattr(never_too_late, "FLOOR", {"threshold": -100.0})
    monkeypatch.setattr(never_too_late, "ALPHAS", (0.0, 0.2))
    swept = {name: never_too_late.SWEPT[name] for name in ("white", "α = 0", "α = 0.2")}
    monkeypatch.setattr(never_too_late, "SWEPT", swept)
    prompt = shapes_world.VALIDATION_PROMPTS[0]
    for table in ("methods", "pink"):
        plot = tmp_path / f"{table}.png"
        short = f"--limit 1 --images 2 --search 2 --steps 2 --plot {plot} --table {table}".split()
        found = never_too_late.main(short).found
        printed = capsys.readouterr().out
        assert [row.name for row in rows(table, BUDGET)] == list(found)
        assert all(f"| {name} |".replace("-", "−") in printed for name in found)
        assert found["white, plain"][prompt]["evaluations"] == 1 and found["white, ours"][prompt]["evaluations"] == 4
        with Image.open(plot) as picture:
            assert picture.width == 1600 and picture.height > 300
        if table == "methods":
            curve = found["white, ours"][prompt]["curve"]
            assert len(curve) == 4 and curve[0] == pytest.approx(found["white, plain"][prompt]["patches"], rel=1e-3)
            # 3 draws of 2 candidates, and the chosen set unless it is one of these
            assert found[never_too_late.many_of("white")][prompt]["evaluations"] in (3, 4)
            assert "white: step" in printed
