"""The folder of an evaluation: damaged or foreign files are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from noiseopt.evaluation.folder import CannotEvaluate, ResultFolder
from noiseopt.evaluation.plan import PLAIN

GOOD = {
    "model": "turbo",
    "method": PLAIN.key,
    "index": 0,
    "prompt": "a star",
    "category": None,
    "seeds": [1, 2],
    "judge": {"right": [True, False], "found": ["a star", "a circle"]},
    "rewards": {"red": [0.5, 1.5]},
    "set": {"mss": None, "vendi": 1.5},
    "noise": {"norm": 1.0, "spectrum": [0.5, None]},
    "noise shape": [2, 8, 8, 8],
    "evaluations": 1,
    "cost": {"seconds": 1.0, "model_calls": 3, "memory": None},
}


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    """A folder with one unit and its features."""
    found = ResultFolder(tmp_path)
    path = found.unit_path("turbo", PLAIN, 0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(GOOD))
    save_file({"features": torch.ones(2, 3)}, path.with_suffix(".safetensors"))
    (tmp_path / "calibration.json").write_text(json.dumps({"turbo": {"reno": {"n": 3}}}))
    (tmp_path / "settings.json").write_text(json.dumps({"seeds": 2}))
    return found


def test_what_is_whole_is_read(folder):
    assert folder.numbers("turbo", PLAIN, 0) == GOOD
    assert folder.features("turbo", PLAIN, 0).shape == (2, 3)
    assert folder.calibration()["turbo"]["reno"]["n"] == 3
    folder.claim({"seeds": 2})


def without(name: str) -> str:
    return json.dumps({key: value for key, value in GOOD.items() if key != name})


UNITS = {
    "empty": ("", "cannot be read"),
    "half": (json.dumps(GOOD)[:100], "cannot be read"),
    "deep": ("[" * 200_000, "cannot be read"),
    "bytes": ("\udcff", "cannot be read"),
    "a list": ("[]", "but got list"),
    "no prompt": (without("prompt"), "wrong values: prompt"),
    "no rewards": (without("rewards"), "wrong values: rewards"),
    "of another model": (json.dumps({**GOOD, "model": "guided"}), "wrong values: model"),
    "of another method": (json.dumps({**GOOD, "method": "reno"}), "wrong values: method"),
    "of another prompt": (json.dumps({**GOOD, "index": 1}), "wrong values: index"),
    "seeds of text": (json.dumps({**GOOD, "seeds": "12"}), "wrong values: seeds"),
    "rewards of text": (json.dumps({**GOOD, "rewards": {"red": ["x", "y"]}}), "wrong values: rewards"),
    "a reward less": (json.dumps({**GOOD, "rewards": {"red": [1.0]}}), "wrong values: rewards"),
    "rewards that are a number": (json.dumps({**GOOD, "rewards": {"red": 1.0}}), "wrong values: rewards"),
    "a verdict less": (json.dumps({**GOOD, "judge": {"right": [True]}}), "wrong values: judge"),
    "no verdict": (json.dumps({**GOOD, "judge": {}}), "wrong values: judge"),
    "a verdict in words": (json.dumps({**GOOD, "judge": "right"}), "wrong values: judge"),
    "costs of text": (json.dumps({**GOOD, "cost": {"seconds": "fast"}}), "wrong values: cost"),
    "lists in lists": (json.dumps({**GOOD, "set": {"mss": [[1.0]]}}), "wrong values: set"),
}


@pytest.mark.parametrize("case", UNITS)
def test_a_unit_that_is_none_is_refused_by_name(case, folder):
    text, message = UNITS[case]
    path = folder.unit_path("turbo", PLAIN, 0)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CannotEvaluate, match=f"00000.json.*{message}.*Delete"):
        folder.numbers("turbo", PLAIN, 0)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"PK\x03\x04", bytes(100)])
def test_features_that_are_none_are_refused_by_name(data, folder):
    path = folder.unit_path("turbo", PLAIN, 0).with_suffix(".safetensors")
    path.write_bytes(data)
    with pytest.raises(CannotEvaluate, match="image features in .*00000.safetensors.*Delete"):
        folder.features("turbo", PLAIN, 0)
    save_file({"noise": torch.ones(2)}, path)
    with pytest.raises(CannotEvaluate, match="image features"):
        folder.features("turbo", PLAIN, 0)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"turbo": 3}', '{"turbo": {"reno": {}}}', '{"turbo": {"reno": {"n": "3"}}}']
)
def test_a_calibration_that_is_none_is_refused_by_name(text, folder):
    (folder.path / "calibration.json").write_text(text)
    with pytest.raises(CannotEvaluate, match="calibration.json.*Delete it"):
        folder.calibration()


@pytest.mark.parametrize("text", ["", "3", '{"seeds": 2'])
def test_settings_that_are_none_are_refused_by_name(text, folder):
    (folder.path / "settings.json").write_text(text)
    with pytest.raises(CannotEvaluate, match="settings.json.*Choose another"):
        folder.claim({"seeds": 2})
