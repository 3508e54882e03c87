"""The benchmark of what is right per second: its arithmetic in closed form, and a short run that is resumed."""

import json
import math

import per_second  # pyright: ignore[reportMissingImports]
import pytest
import torch
from per_second import (  # pyright: ignore[reportMissingImports]
    BEFORE,
    BEST_OF_N,
    NO_VIEWS,
    NOW,
    PLAIN,
    RELEASED,
    ROWS,
    UNSEARCHED,
    Curve,
    Follower,
    Results,
    Row,
    statements,
)
from PIL import Image

from noiseopt import shapes_world
from noiseopt.callbacks import NoiseState

ONE_STEP = [label for label, row in ROWS.items() if not row.chain]
SHORT = ["--limit", "3", "--seeds", "2", "--batch-size", "3", "--steps", "2"]


def curve(seconds: list[float], *problems: list[tuple[float, float]]) -> Curve:
    """Return a curve of `(reward, right)` by problem and outcome."""
    pairs = torch.tensor(problems).transpose(0, 1)
    return Curve(torch.tensor(seconds), *pairs.unbind(2))


def results(**found: list[Curve]) -> Results:
    """Return results of two prompts, the second of which is never right, and two evaluations."""
    wrong = [curve([1.0, 2.0], [(0.0, 0.0), (0.0, 0.0)], [(0.0, 0.0), (0.0, 0.0)])]
    labels = {
        "before": BEFORE,
        "released": RELEASED,
        "now": NOW,
        "views": NO_VIEWS,
        "unsearched": UNSEARCHED,
        "best_of_n": BEST_OF_N,
    }
    curves = {label: found.get(name, wrong) for name, label in labels.items()}
    return Results({label: [each.packed() for each in batches] for label, batches in curves.items()}, 2, steps=2)


def test_a_curve_is_the_same_after_it_was_packed():
    made = curve([0.5, 1.0, 1.5], [(1.0, 0.0), (1.0, 0.0), (2.0, 1.0)], [(3.0, 1.0), (3.0, 0.0), (3.0, 0.0)])
    packed = json.loads(json.dumps(made.packed()))
    assert packed["problems"] == [[[0, 1.0, 0], [2, 2.0, 1]], [[0, 3.0, 1], [1, 3.0, 0]]]
    for name in ("seconds", "rewards", "right"):
        assert torch.equal(getattr(Curve.unpacked(packed), name), getattr(made, name))


def test_an_outcome_counts_once_it_is_there():
    made = curve([1.0, 2.0, 3.0], [(0.0, 0.0)] * 3)
    assert [made.at(seconds) for seconds in (0.1, 1.0, 1.99, 2.0, 9.0)] == [0, 0, 0, 1, 2]


def test_a_prompt_counts_once_and_a_slow_batch_is_compared_with_itself():
    """Two batches of two prompts each, the second twice as slow; half of the time is 1 s in the first, 2 s there."""
    before = [curve([2.0, 2.0], *[[(0.0, 0.0)] * 2] * 2), curve([4.0, 4.0], *[[(0.0, 0.0)] * 2] * 2)]
    now = [
        curve([1.0, 2.0], [(1.0, 1.0), (5.0, 1.0)], [(2.0, 0.0), (5.0, 0.0)]),
        curve([2.0, 4.0], [(3.0, 0.0), (5.0, 1.0)], [(4.0, 0.0), (5.0, 0.0)]),
    ]
    found = results(before=before, now=now, released=before, best_of_n=before)
    half = found.before / 2
    assert found.values(NOW, "rewards", half).tolist() == [2.0, 3.0]  # (1 + 3) / 2, (2 + 4) / 2
    assert found.values(NOW, "right", half).tolist() == [0.5, 0.0]
    assert found.values(NOW, "right", found.before).tolist() == [1.0, 0.0]
    assert found.begins(NOW) == 0.5 and found.evaluations(NOW, half) == 1.0


def test_statements_say_what_the_curves_do():
    before = [curve([5.0, 10.0], [(0.0, 0.0), (3.0, 1.0)], [(0.0, 0.0), (3.0, 0.0)])]
    released = [curve([2.0, 4.0], [(0.0, 0.0), (4.0, 0.0)], [(0.0, 0.0), (4.0, 0.0)])]
    now = [curve([1.0, 2.0, 8.0], [(1.0, 0.0), (4.0, 1.0), (5.0, 1.0)], [(1.0, 0.0), (4.0, 0.0), (5.0, 1.0)])]
    found = statements(results(before=before, released=released, now=now, views=now))
    soon, above, control, *unsearched, reward = found
    assert len(unsearched) == 3 and not any(each.holds for each in unsearched)  # it is never right
    assert soon.holds and soon.figures == "+0.0 [+0.0, +0.0] points; as many after 0.20 [0.10, 0.20] of the seconds"
    assert above.holds and above.figures == "+50.0 [+0.0, +100.0] points"
    assert control.holds and control.figures.startswith(
        "+100.0 [+100.0, +100.0] points; at 1/5 of the seconds of both +50"
    )
    assert reward.holds and reward.figures == (
        "+0.00 [+0.00, +0.00]; as much after 0.50 [0.50, 0.50] of the seconds; with the view -4.00 [-4.00, -4.00]"
    )


def test_statements_that_do_not_hold_say_so():
    ahead = [curve([1.0, 2.0], [(1.0, 0.0), (9.0, 1.0)], [(1.0, 0.0), (9.0, 1.0)])]
    found = statements(results(before=ahead, released=ahead, best_of_n=ahead))
    assert not any(statement.holds for statement in found)
    assert "as many after never [never, never]" in found[0].figures and "**does not hold**" in str(found[0])
    narrow = [curve([1.0, 2.0], [(0.0, 0.0), (0.0, 1.0)], [(0.0, 0.0), (0.0, 0.0)])]
    *_, unsearched, _ = statements(results(unsearched=narrow))
    assert not unsearched.holds  # 50 points more, with an interval that has 0


def test_images_that_are_not_there_yet_are_no_evidence():
    late = [curve([1.9, 2.0], [(9.0, 1.0), (9.0, 1.0)], [(9.0, 1.0), (9.0, 1.0)])]
    soon, above, control, *_, reward = statements(results(now=late, views=late))
    assert not soon.holds and soon.figures == "no image yet; as many after 0.95 [0.95, 0.95] of the seconds"
    assert above.holds and control.holds and control.figures.endswith("at 1/5 of the seconds of both no image yet")
    assert not reward.holds and reward.figures.startswith("no image yet; as much after 0.95")


def test_judging_takes_no_time_and_only_new_images_are_judged():
    """Each evaluation takes 1 s, and each judgment 10 s of the clock. The third image is not better than the second."""
    clock, judged = [0.0], []

    def right(images, prompts):
        clock[0] += 10.0
        judged.append(list(prompts))
        return torch.ones(len(images))

    follower = Follower(lambda: clock[0], "clip", horizon=3.0, least=2, judge=right)
    state = NoiseState(None, ["a", "b"], 9, torch.zeros(2, 4, 8, 8))
    state.best.__dict__["images"] = torch.zeros(2, 3, 64, 64)
    for step, best in enumerate([[0, 0], [0, 1], [0, 1]]):
        clock[0] += 1.0
        state.step, state.best.__dict__["step"] = step, torch.tensor(best)
        state.scores = {"other": torch.full((2,), 9.0), "clip": torch.tensor([step, 5.0 - step])}
        follower.on_step_end(state)
        assert state.stopped == (None if step < 2 else "time")
    assert follower.seconds == [1.0, 2.0, 3.0] and judged == [["a", "b"], ["b"]]
    made = follower.curve()
    assert made.seconds.tolist() == [0.5, 1.0, 1.5] and made.rewards.tolist() == [[0.0, 5.0], [0.0, 4.0], [0.0, 4.0]]


def test_rows_alternate_in_both_orders(monkeypatch):
    called = []

    class Bench:
        steps, call = 1, {"num_inference_steps": 1}

        def run(self, row, problems, horizon):
            called.append((next(label for label, each in ROWS.items() if each is row), problems, horizon))
            return curve([2.0], [(0.0, 0.0)])

    found = {}
    for _ in per_second.compare(Bench(), ["0", "1"], found):
        pass
    timed = [(label, batch) for label, batch, horizon in called if horizon > 0]
    assert timed == [(label, "0") for label in ONE_STEP] + [(label, "1") for label in reversed(ONE_STEP)]
    assert {horizon for *_, horizon in called} == {0.0, 2.0 * per_second.AHEAD}


def test_labels_keep_their_order_and_a_gap():
    found = per_second.apart({"a": 1.0, "b": 1.5, "c": 9.0}, gap=1.0)
    assert found == {"a": 0.75, "b": 1.75, "c": 9.0}


@pytest.fixture(scope="module")
def bench():
    return per_second.Bench("turbo", steps=2, device="cpu")


@pytest.mark.parametrize("label", [label for label in ONE_STEP if label == PLAIN or ROWS[label].followed])
def test_each_row_starts_from_the_plain_image(bench, label):
    problems = [per_second.Problem(shapes_world.VALIDATION_PROMPTS[0], 0, 0)]
    plain, made = bench.run(ROWS[PLAIN], problems, 0.0), bench.run(ROWS[label], problems, 0.0)
    assert len(made.seconds) == (bench.steps if ROWS[label].followed else 1)
    assert (made.seconds.diff() > 0).all() and made.seconds[0] > 0
    torch.testing.assert_close(made.rewards[0], plain.rewards[0])


def test_a_dark_ground_counts_for_reward_and_judge(bench):
    images = torch.full((3, 3, 128, 128), 0.5)
    images[1, :, :, :8] = images[1, :, :, -8:] = 0.25
    images[2, :, :, :8] = 0.0
    assert per_second.border(images).tolist() == pytest.approx([0.5, 0.25, 0.25])
    reward = per_second.DarkGround(lambda images, prompts: torch.ones(len(images)))
    assert reward(images, [""] * 3).tolist() == pytest.approx([-5.0, 0.0, 0.0], abs=1e-5)
    problems = [per_second.Problem(shapes_world.VALIDATION_PROMPTS[4], 4, 0)]
    dark = per_second.Bench("turbo", steps=2, device="cpu", dark=True).run(ROWS[PLAIN], problems, 0.0)
    plain = bench.run(ROWS[PLAIN], problems, 0.0)
    assert dark.rewards < plain.rewards - 1  # its ground is light
    assert dark.right <= plain.right


def test_runs_with_a_number_of_evaluations_give_a_point_each(bench):
    row = Row("black", ("best_of_n:steps=9", "best_of_n:steps=1"))
    problems = [per_second.Problem(prompt, i, 0) for i, prompt in enumerate(shapes_world.VALIDATION_PROMPTS[:2])]
    made, followed = bench.run(row, problems, 0.0), bench.run(ROWS[BEST_OF_N], problems, 0.0)
    assert made.seconds.shape == (2,) and made.rewards.shape == (2, 2)
    torch.testing.assert_close(made.rewards[0], followed.rewards[0])
    assert (made.rewards[1] >= followed.rewards[1] - 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("label", [PLAIN, "RewardGuidance"])
def test_rows_of_chains_run_on_a_model_with_several_steps(label):
    bench = per_second.Bench("guided", steps=2, device="cpu")
    assert label in per_second.rows_of(bench.call)
    made = bench.run(ROWS[label], [per_second.Problem(shapes_world.VALIDATION_PROMPTS[0], 0, 0)], 0.0)
    assert made.seconds.shape == (max(1, len(ROWS[label].methods)),) and made.rewards.isfinite().all()


@pytest.mark.slow
def test_a_short_run_has_every_row_and_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch):
    output, plot, run = tmp_path / "found" / "all.json", tmp_path / "all.png", per_second.Bench.run
    count = []

    def stopped(self, row, problems, horizon):
        count.append(problems)
        if (
            len(count) == 2 * len(ONE_STEP) + 1
        ):  # without the warm-up of starts, and with that of the horizon: in the second batch
            raise KeyboardInterrupt
        return run(self, row, problems, horizon)

    monkeypatch.setitem(ROWS, "ReNO, 4 starts", Row("black", ("reno:search=2,starts=2,steps=5",)))
    monkeypatch.setitem(ROWS, NOW, Row("black", ("reno:steps=2", "reno:steps=4")))
    monkeypatch.setattr(per_second.Bench, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        per_second.main([*SHORT, "--model", "turbo", "--output", str(output)])
    before = json.loads(output.read_text())
    found = per_second.main([*SHORT, "--model", "turbo", "--output", str(output), "--plot", str(plot)])
    after = json.loads(output.read_text())
    assert before["prompts"] == list(shapes_world.VALIDATION_PROMPTS[:3])
    for label in ONE_STEP:
        assert len(after["rows"][label]) == 2 and before["rows"][label] == after["rows"][label][:1]
        assert found.values(label, "rewards", found.before).shape == (3,)
        assert (
            found.values(label, "rewards", found.before) >= found.values(PLAIN, "rewards", found.before) - 1e-3
        ).all()
    printed = capsys.readouterr().out
    assert printed.count("hold") == 7 and all(f"| {label} |" in printed for label in ONE_STEP)
    assert "RewardGuidance" not in printed
    assert not math.isnan(float(found.before.sum()))
    with Image.open(plot) as picture:
        assert picture.width == 1600
