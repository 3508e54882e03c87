"""The folder of an evaluation: its settings and its finished units (one prompt by one method, see `unit.py`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..pipelines.results.settings_diff import settings_diff as differences
from .plan import Contender, slug
from .unit import Unit, write_json

UNIT_FIELDS: dict[str, type] = {"prompt": str, "seeds": list, "evaluations": int}
UNIT_FIELDS |= {"rewards": dict, "set": dict, "noise": dict, "cost": dict}
REDO = "Delete the .json of that name; the same command computes it again."
REMEASURE = "Delete it; the same command measures again."


class CannotEvaluate(Exception):
    """Raised when an evaluation cannot proceed; the message gives the reason and a remedy. Finished units are kept."""


class ResultFolder:
    """`settings.json`, `calibration.json`, and `units/<model>/<method>/<prompt>.json` with noise and images."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or check that they equal those already here.

        Raises:
            CannotEvaluate: If the folder belongs to another evaluation, or is not writable.
        """
        file = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_json(file, settings)
                return
        except OSError as error:
            raise CannotEvaluate(f"Expected a folder to write to, but got {self.path}: {error}.") from None
        known = self.settings()
        given = json.loads(json.dumps(settings))
        if changed := differences(known, given):
            raise CannotEvaluate(
                f"Expected the settings that {self.path} was created with, but got others: {'; '.join(changed)}. "
                "Choose another --output, or delete that folder."
            )

    def settings(self) -> dict[str, Any]:
        """Read the settings that the folder was created with."""
        return read_object(self.path / "settings.json", "Choose another --output, or delete that folder.")

    def unit_path(self, model: str, contender: Contender, index: int) -> Path:
        return self.path / "units" / slug(model) / contender.folder / f"{index:05d}.json"

    def finished(self, model: str, contender: Contender, index: int) -> bool:
        return self.unit_path(model, contender, index).exists()

    def save(self, unit: Unit, contender: Contender) -> None:
        """Write a finished unit."""
        unit.save(self.unit_path(unit.numbers["model"], contender, unit.numbers["index"]))

    def numbers(self, model: str, contender: Contender, index: int) -> dict[str, Any]:
        """Read the values of a finished unit. Raises `CannotEvaluate` if the file is not of that unit."""
        path, asked = self.unit_path(model, contender, index), {"model": model, "method": contender.key, "index": index}
        found = read_object(path, REDO)
        wrong = [name for name, value in asked.items() if found.get(name) != value] + invalid_fields(found)
        if wrong:
            raise CannotEvaluate(
                f"Expected the unit of {model}, {contender.key} and prompt {index}, but {path} has "
                f"wrong values: {', '.join(wrong)}. {REDO}"
            )
        return found

    def features(self, model: str, contender: Contender, index: int) -> torch.Tensor:
        """Read the features of a finished unit, `(B, D)`. Raises `CannotEvaluate` if there are none."""
        path = self.unit_path(model, contender, index).with_suffix(".safetensors")
        try:
            return load_file(path)["features"]
        except (OSError, KeyError, SafetensorError) as error:
            raise CannotEvaluate(f"Expected image features in {path}, but got {error!r}. {REDO}") from None

    def calibration(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Read the results of `calibrate` by model and method."""
        file = self.path / "calibration.json"
        found = read_object(file, REMEASURE) if file.exists() else {}
        rows = [row for part in found.values() for row in (part.values() if isinstance(part, dict) else [None])]
        counts = [row.get("n") if isinstance(row, dict) else None for row in rows]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CannotEvaluate(f"Expected the N of each method in {file}, but got other values. {REMEASURE}")
        return found

    def save_calibration(self, model: str, method: str, found: Mapping[str, Any]) -> None:
        known = self.calibration()
        known.setdefault(model, {})[method] = dict(found)
        write_json(self.path / "calibration.json", known)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `CannotEvaluate` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CannotEvaluate(f"Expected a JSON object in {path}, but it cannot be read: {error}. {remedy}") from None
    if not isinstance(found, dict):
        raise CannotEvaluate(f"Expected a JSON object in {path}, but got {type(found).__name__}. {remedy}")
    return found


def invalid_fields(numbers: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields of a unit that are missing or malformed."""
    wrong = [name for name, kind in UNIT_FIELDS.items() if not isinstance(numbers.get(name), kind)]
    if wrong:
        return wrong
    count, judge = len(numbers["seeds"]), numbers.get("judge")
    wrong += [name for name in ("set", "noise", "cost") if not all(map(is_measure, numbers[name].values()))]
    if not all(isinstance(row, list) and len(row) == count and is_measure(row) for row in numbers["rewards"].values()):
        wrong.append("rewards")
    right = judge.get("right") if isinstance(judge, dict) else None
    if judge is not None and not (isinstance(right, list) and len(right) == count and is_measure(right)):
        wrong.append("judge")
    return wrong


def is_measure(value: Any) -> bool:
    """Return whether a value is a number, a boolean or None, or a flat list of these."""
    if isinstance(value, list):
        return all(not isinstance(each, list) and is_measure(each) for each in value)
    return value is None or isinstance(value, bool | int | float)
