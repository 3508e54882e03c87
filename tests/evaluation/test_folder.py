"""The folder of an evaluation: damaged or foreign files are refused by name, and one process writes at a time."""

import copy
import dataclasses
import errno
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from noiseopt import shapes_world
from noiseopt.evaluation.folder import CannotEvaluate, EvaluationFolder, locked, read_object
from noiseopt.evaluation.plan import PLAIN, Cell, MethodChoice, ModelChoice, Plan, control_of
from noiseopt.evaluation.prompt_sets import Prompt, PromptSet
from noiseopt.evaluation.table import Results, cost_markdown, markdown
from noiseopt.evaluation.unit import image_path

TURBO = ModelChoice.parse("turbo", {})
CELL = Cell(TURBO, PLAIN, 0)


def plan(**changes) -> Plan:
    settings = {"models": (TURBO,), "methods": (MethodChoice.parse("reno"),), "seeds": 2, "best_of": 2}
    settings |= {"prompts": PromptSet("one", (Prompt("a red star"),)), "rewards": (("red", 1.0),), "features": "clip"}
    return Plan(**{**settings, **changes})


GOOD = {
    "model": "turbo",
    "method": PLAIN.key,
    "index": 0,
    "prompt": "a red star",
    "category": "single",
    "seeds": [0, 1_000_003],
    "judge": {"right": [True, False], "found": ["a star", "nothing"]},
    "rewards": {"red": [0.5, 1.5]},
    "set": {"mss": 0.5, "vendi": 1.5, "coverage": 0.5, "layout spread": None},
    "noise": {
        name + z: [1.0, None, 1.0, 1.0, 1.0, 1.0, 1.0] if name == "spectrum" else 1.0
        for name in ("norm", "mean", "variance", "skewness", "excess_kurtosis", "spectrum", "spectral_slope")
        for z in ("", " z")
    },
    "noise shape": [2, 8, 8, 8],
    "evaluations": 1,
    "cost": {"seconds": 1.0, "model_calls": 3, "memory": None},
}


def write(folder: EvaluationFolder, numbers: object, cell: Cell = CELL) -> Path:
    path = folder.unit_path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers))
    save_file({"noise": torch.ones(2, 8, 8, 8), "features": torch.ones(2, 3)}, path.with_suffix(".safetensors"))
    for image in range(2):
        Image.new("RGB", (shapes_world.SIZE, shapes_world.SIZE)).save(image_path(path, image))
    folder.checked.clear()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> EvaluationFolder:
    """A folder with one unit and the settings of a plan."""
    found = EvaluationFolder(tmp_path, plan(), "cpu")
    write(found, GOOD)
    found.claim()
    return found


def test_what_is_whole_is_read(folder):
    assert folder.finished(CELL) and folder.numbers(CELL) == GOOD
    assert folder.features(CELL).shape == (2, 3)
    folder.claim()


def places(value: object, *before) -> list[tuple]:
    """Return the keys that lead to each value in nested objects and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inside for place in [(*before, key), *places(each, *before, key)]]


def replaced(place: tuple, value: object, numbers: dict = GOOD) -> dict:
    """Return the unit with another value at a place, or without it if the value is an ellipsis."""
    found = copy.deepcopy(numbers)
    *way, last = place
    inside = found
    for key in way:
        inside = inside[key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return found


OTHERS = (..., "x", [], {}, [[1.0]], True, None, 7, float("inf"))
UNCOUNTED = {("category",), ("judge", "found", 0), ("judge", "found", 1)}
MEASURED = ("rewards", "set", "noise", "cost")  # numbers, or `None` for NaN


def fits(place: tuple, value: object) -> bool:
    """Return whether a unit with another value at a place is one that a run could have written."""
    known = GOOD
    for key in place:
        known = known[key]
    if place in UNCOUNTED:
        return place == ("category",) or isinstance(value, str)
    if place[0] in MEASURED and (known is None or isinstance(known, float | int)):
        return value == 7 or (value is None and place[-1] not in ("seconds", "model_calls"))
    return (isinstance(known, bool) and value is True) or (place == ("evaluations",) and value == 7)


@pytest.mark.parametrize("place", places(GOOD), ids=str)
def test_a_unit_is_checked_whole(place, folder):
    """Accepted units make a table."""
    for value in OTHERS:
        path = write(folder, replaced(place, value))
        if not fits(place, value):
            part = (
                "judge|set" if place == ("judge",) else place[0].split()[0]
            )  # without a judge, sets have fewer measures
            with pytest.raises(CannotEvaluate, match=rf"(?=.*{path.stem})(?=.*({part})).*Delete"):
                folder.finished(CELL)
            continue
        numbers = folder.numbers(CELL)
        one = dataclasses.replace(folder.plan, methods=(MethodChoice.parse("best_of_n"),))
        results = Results(one, [numbers, {**numbers, "method": "best_of_n"}], {})
        assert markdown(results) and cost_markdown(results)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (json.dumps(GOOD).encode()[:100], "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "but got list"),
    ],
)
def test_a_file_that_is_no_unit_is_refused_by_name(data, message, folder):
    path = write(folder, GOOD)
    path.write_bytes(data)
    with pytest.raises(CannotEvaluate, match=f"{path.name}.*{message}.*Delete"):
        folder.finished(CELL)


@pytest.mark.parametrize("data", [None, "cut", b"", b"\x80\x04K\x01.", b"PK\x03\x04", bytes(100)])
@pytest.mark.parametrize(
    ("name", "message"), [(".safetensors", "the tensor 'noise' in .*"), ("-1.png", "an image in .*")]
)
def test_a_unit_without_its_noise_features_or_images_is_refused_by_name(name, message, data, folder):
    path = write(folder, GOOD)
    file = path.with_name(path.stem + name)
    if data is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if data == "cut" else data)
    with pytest.raises(CannotEvaluate, match=f"{message}{file.name}.*Delete"):
        folder.finished(CELL)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"noise": torch.ones(2, 8, 8, 8)}, "features"),
        ({"noise": torch.ones(1, 8, 8, 8), "features": torch.ones(2, 3)}, r"noise of shape \[2, 8, 8, 8\]"),
        ({"noise": torch.ones(2, 8, 8, 8), "features": torch.ones(3, 3)}, r"features of shape \[2, -1\]"),
    ],
)
def test_tensors_of_other_shapes_are_refused(tensors, message, folder):
    save_file(tensors, write(folder, GOOD).with_suffix(".safetensors"))
    with pytest.raises(CannotEvaluate, match=f"{message}.*Delete"):
        folder.finished(CELL)


def test_a_unit_has_its_own_place_for_all_that_it_depends_on(tmp_path):
    reno = MethodChoice.parse("reno")

    def place(cell: Cell = CELL, device: str = "cpu", **changes) -> Path:
        return EvaluationFolder(tmp_path, plan(**changes), device).unit_path(cell)

    control = Cell(TURBO, control_of(reno), 0, 2)
    others = [
        place(Cell(ModelChoice.parse("turbo", {"num_inference_steps": 2}), PLAIN, 0)),
        place(Cell(ModelChoice.parse("guided", {}), PLAIN, 0)),
        place(control),
        place(dataclasses.replace(control, best_of=3)),
        place(device="cuda"),
        place(prompts=PromptSet("one", (Prompt("a blue star"),))),
        *(place(**change) for change in ({"seeds": 3}, {"rewards": (("blue", 1.0),)}, {"watched": ("blue",)})),
        *(place(**change) for change in ({"features": None}, {"dtype": "float16"}, {"threads": 2})),
    ]
    assert len({place(), *others}) == 1 + len(others)
    grown = PromptSet("two", (Prompt("a red star", "of another category"), Prompt("a blue star")))
    more = {
        "prompts": grown,
        "methods": (MethodChoice.parse("cno"), reno),
        "models": (ModelChoice.parse("sd3", {}), TURBO),
    }
    assert place(**more) == place() and place(control, **more) == place(control)


def test_a_plan_may_grow_but_not_change_what_every_unit_depends_on(folder, tmp_path):
    EvaluationFolder(tmp_path, plan(methods=(MethodChoice.parse("cno"),), best_of=3), "cpu").claim()
    with pytest.raises(CannotEvaluate, match="seeds was 2 and is 3. Choose another --output"):
        EvaluationFolder(tmp_path, plan(seeds=3), "cpu").claim()
    with pytest.raises(CannotEvaluate, match="device was 'cpu' and is 'cuda'"):
        EvaluationFolder(tmp_path, plan(), "cuda").claim()
    assert folder.settings()["methods"] == {"cno": {"name": "cno"}}


def test_the_measured_n_is_that_of_the_call_and_the_method(tmp_path):
    reno, other = MethodChoice.parse("reno"), MethodChoice.parse("reno:steps=3")
    folder = EvaluationFolder(tmp_path, plan(methods=(reno, other)), "cpu")
    folder.save_calibration(TURBO, reno, {"n": 3})
    folder.save_calibration(TURBO, other, {"n": 4})
    assert {key: row["n"] for key, row in folder.calibration().items()} == {
        ("turbo", "reno"): 3,
        ("turbo", "reno:steps=3"): 4,
    }
    longer = ModelChoice.parse("turbo", {"num_inference_steps": 2})
    assert EvaluationFolder(tmp_path, plan(models=(longer,)), "cpu").calibration() == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"ab": 3}', '{"ab": {}}', '{"ab": {"n": "3"}}', '{"ab": {"n": 0}}'])
def test_a_calibration_that_is_none_is_refused_by_name(text, folder):
    (folder.path / "calibration.json").write_text(text)
    with pytest.raises(CannotEvaluate, match="calibration.json.*Delete it"):
        folder.calibration()


@pytest.mark.parametrize("text", ["", "3", '{"seeds": 2'])
def test_settings_that_are_none_are_refused_by_name(text, folder):
    (folder.path / "settings.json").write_text(text)
    with pytest.raises(CannotEvaluate, match="settings.json.*Choose another"):
        folder.claim()


def test_one_evaluation_writes_at_a_time(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    busy = "another process is writing to .*new. Wait until it has ended, or choose"
    for _ in range(2):
        with locked(folder), pytest.raises(CannotEvaluate, match=busy):
            locked(folder).__enter__()

    def without_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", without_locks)
    with locked(folder):
        pass
    assert not list(folder.iterdir())


def test_a_json_file_of_many_lists_is_refused_at_once(tmp_path):
    (tmp_path / "settings.json").write_text('{"a": [' + "[]," * 6_000_000 + "[]]}")
    start = time.perf_counter()
    with pytest.raises(CannotEvaluate, match="settings.json.*more than 16,777,216 bytes"):
        read_object(tmp_path / "settings.json", "Delete it.")
    assert time.perf_counter() - start < 1
