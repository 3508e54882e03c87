"""What the benchmarks of sets share: the arithmetic of the tables, the clock, and runs that are resumed."""

import dataclasses
import json
import math

import pytest
import sets  # pyright: ignore[reportMissingImports]
import torch
from defaults import digest_of_defaults  # pyright: ignore[reportMissingImports]
from sets import Clock, Report, Row  # pyright: ignore[reportMissingImports]

from noiseopt import BestOfN, shapes_world
from noiseopt.recipes import RECIPES
from noiseopt.shapes_world.world import SIDE

PLAIN, OURS = Row("plain"), Row("ours", lambda bench: BestOfN(rewards=bench.reward, steps=2))


def report(**columns):
    """A report of rows with one measurement, x."""
    found = {name: {str(at): {"x": value} for at, value in enumerate(values)} for name, values in columns.items()}
    return Report(found, [PLAIN, OURS], [str(at) for at in range(len(columns["plain"]))])


def test_a_cell_has_the_difference_on_the_prompts_where_both_rows_have_a_number():
    result = report(plain=[1.0, 9.0, math.nan], ours=[2.0, math.nan, 4.0])
    assert result.cell(OURS, "x") == "3 (+1 [+1, +1])"
    assert result.cell(PLAIN, "x") == "5"
    assert result.table(["x"]).splitlines()[2:] == ["| plain | 5 |", "| ours | 3 (+1 [+1, +1]) |"]


def test_a_share_is_the_ratio_of_means_not_the_mean_of_ratios():
    result = report(plain=[1.0, 4.0], ours=[1.0, 1.0])
    assert result.share(OURS, "x") == "x −60% [−75, +0]"


def test_right_images_are_counted_by_their_ground():
    """Of 2 sets of 4 images: 3 of 4 on the usual ground are right, and 1 of 4 others."""
    found = {"ours": {"0": {"right": 0.75, "usual grounds": 3, "right on them": 2}}}
    found["ours"]["1"] = {"right": 0.25, "usual grounds": 1, "right on them": 1}
    text = Report(found, [OURS], ["0", "1"]).by_ground(OURS, 4)
    assert text == "right: 75% of 4 images with the usual ground, 25% of 4 others"


def test_the_clock_leaves_out_the_time_of_the_measure_and_ends_the_run_in_time(monkeypatch):
    """Evaluations of 1 s, a measure of 10 s each, and 4.5 s: after three only the last one fits."""
    now = [0.0]
    monkeypatch.setattr(sets.time, "process_time", lambda: now[0])
    ended = []

    class State:
        best = type("Best", (), {"images": torch.zeros(2, 3, 4, 4)})
        stop = staticmethod(ended.append)

    def measure(images):
        now[0] += 10
        return 0.5

    clock = Clock(measure, limit=4.5)
    for count in (1, 2, 3):
        assert not ended
        now[0] += 1
        clock.on_step_end(State)
        assert clock.seconds[-1] == count == clock.now and clock.values == [0.5] * count
    assert ended == ["time"]


@pytest.fixture(scope="module")
def bench():
    return sets.Bench("turbo", images=2, curves=True)


def test_measurements_of_a_set_of_equal_images_and_of_unlike_ones(bench):
    prompt = "a red circle left of a blue star"
    request = shapes_world.parse(prompt)
    place = {True: ((16.0, 32.0), (48.0, 32.0)), False: ((14.0, 48.0), (50.0, 48.0))}
    scenes = []
    for middle in (True, False):
        things = zip(request.objects, place[middle], strict=True)
        scenes.append(shapes_world.Scene(tuple(shapes_world.Shape(k, c, x, y, 12.0) for (c, k), (x, y) in things)))
    one, two = shapes_world.render(scenes, torch.Generator().manual_seed(0))
    equal, unlike = (bench.measure(torch.stack(pair), prompt) for pair in ((one, one), (one, two)))
    assert equal["MSS"] == pytest.approx(1) and equal["Vendi"] == pytest.approx(1, abs=1e-3) and equal["right"] == 1
    assert equal["patches"] == pytest.approx(0, abs=1e-5) and equal["positions"] == 0
    assert unlike["MSS"] < 0.999 and unlike["Vendi"] > 1.001 and unlike["patches"] > 0.01 and unlike["right"] == 1
    moved = (math.dist((16, 32), (14, 48)) + math.dist((48, 32), (50, 48))) / 2
    assert unlike["positions"] == pytest.approx(moved / 2 * shapes_world.SIZE / SIDE, abs=0.5)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_with_more_prompts(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "Bench", lambda *arguments: bench)
    timed = Row("timed", lambda bench: BestOfN(rewards=bench.reward, steps=1000), time_of="ours")
    drawn, path = [], tmp_path / "found.json"
    original = type(bench).draw

    def counted(self, row, prompt, number, limit):
        if len(drawn) == 4:
            drawn.append("interrupted")
            raise KeyboardInterrupt
        drawn.append((row.name, number))
        return original(self, row, prompt, number, limit)

    monkeypatch.setattr(type(bench), "draw", counted)
    options = sets.parser_of("", "turbo", images=2, limit=2).parse_args(["--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        sets.run(options, [PLAIN, OURS, timed], "reno")
    before = json.loads(path.read_text())["rows"]
    result = sets.run(options, [PLAIN, OURS, timed], "reno")
    assert [each for each in drawn if each != "interrupted"] == [
        (row, number) for number in (0, 1) for row in ("plain", "ours", "timed")
    ]
    first = shapes_world.VALIDATION_PROMPTS[0]
    assert result.found["plain"][first] == before["plain"][first] and result.found["plain"][first]["evaluations"] == 1
    assert 1 <= result.found["timed"][first]["evaluations"] <= 4 and result.found["ours"][first]["evaluations"] == 2
    more = sets.parser_of("", "turbo", images=2, limit=3).parse_args(["--output", str(path)])
    sets.run(more, [PLAIN, OURS, timed], "reno")
    assert drawn[-3:] == [("plain", 2), ("ours", 2), ("timed", 2)]
    result.plot({"right": "right", "MSS": "similarity"}, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "found.json"
    sets.save(path, {"images": 3}, {})
    assert sets.load(path, {"images": 3}) == {} == sets.load(tmp_path / "none.json", {"images": 3})
    with pytest.raises(SystemExit, match="Take another file"):
        sets.load(path, {"images": 4})


def test_defaults_change_with_the_recipe_of_the_method_and_the_weights_of_the_models(monkeypatch, tmp_path):
    before = digest_of_defaults("cno", "turbo")
    assert before != digest_of_defaults("cno", "clip") and before == digest_of_defaults("cno", "turbo")
    other = dataclasses.replace(RECIPES["cno"], settings={"window_size": 4})
    monkeypatch.setitem(RECIPES, "cno", other)
    assert digest_of_defaults("cno", "turbo") != before
    (tmp_path / "model.safetensors").write_bytes(b"retrained")
    monkeypatch.undo()
    monkeypatch.setattr(shapes_world, "path", lambda name: tmp_path)
    assert digest_of_defaults("cno", "turbo") != before
