"""The folder of an evaluation: its settings and its finished units (one prompt by one method, see `unit.py`)."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..pipelines.result_folder import only_writer
from ..pipelines.results.settings_diff import settings_diff as differences
from .instruments import set_measure_names
from .measure import Cost
from .noise_statistics import NoiseStatistics, frequency_rings
from .plan import GROWING, Cell, MethodChoice, ModelChoice, Plan, control_of, slug
from .unit import SIDE, Unit, image_path, write_json

MOST_JSON_BYTES = 16 * 2**20
REDO = "Delete the .json of that name; the same command computes it again."
REMEASURE = "Delete it; the same command measures again."
OTHER = "Choose another --output, or delete that folder."
SPECTRA = ("spectrum", "spectrum z")


class CannotEvaluate(Exception):
    """Raised when an evaluation cannot proceed; the message gives the reason and a remedy. Finished units are kept."""


class EvaluationFolder:
    """`settings.json`, `calibration.json`, and the units of one plan: each JSON with noise and images.

    A unit is the file `units/<model>/<method>/<prompt>-<key>.json`. The key is a hash of what the unit depends on, so a
    folder keeps the units of changed calls, prompts and N, and a plan may grow.

    Args:
        path: The folder.
        plan: The plan whose units are asked for.
        device: The type of the device that they are computed on, "cpu" or "cuda".
    """

    def __init__(self, path: Path, plan: Plan, device: str) -> None:
        self.path, self.plan = path, plan
        self.plan_settings: dict[str, Any] = json.loads(json.dumps(plan.settings(device), default=repr))
        self.checked: set[Path] = set()

    def claim(self) -> None:
        """Write the settings of the plan. Methods, models and prompts may differ from those already here.

        Raises:
            CannotEvaluate: If the folder belongs to another evaluation, or is not writable.
        """
        file = self.path / "settings.json"
        if file.exists():
            known, given = (
                {name: value for name, value in each.items() if name not in GROWING}
                for each in (self.settings(), self.plan_settings)
            )
            if changed := differences(known, given):
                raise CannotEvaluate(
                    f"Expected the settings that {self.path} was created with, but got others: {'; '.join(changed)}. "
                    f"{OTHER}"
                )
        try:
            write_json(file, self.plan_settings)
        except OSError as error:
            raise CannotEvaluate(f"Expected a folder to write to, but got {self.path}: {error}.") from None

    def settings(self) -> dict[str, Any]:
        """Read the settings of the last plan."""
        return read_object(self.path / "settings.json", OTHER)

    def unit_path(self, cell: Cell) -> Path:
        name = f"{cell.index:05d}-{self.plan.key(cell, self.plan_settings)}.json"
        return self.path / "units" / slug(cell.model.name) / cell.contender.folder / name

    def finished(self, cell: Cell) -> bool:
        """Return whether a unit is there. Raises `CannotEvaluate` if it is, but not whole."""
        if cell.contender.control and cell.best_of is None:  # not yet measured
            return False
        path = self.unit_path(cell)
        if not path.exists():
            return False
        if path not in self.checked:
            self.numbers(cell)
        return True

    def save(self, unit: Unit, cell: Cell) -> None:
        """Write a finished unit."""
        unit.save(self.unit_path(cell))

    def numbers(self, cell: Cell) -> dict[str, Any]:
        """Read the values of a finished unit.

        Raises:
            CannotEvaluate: If the file is not of that unit, has a value that no unit has, or lacks noise, features or
                an image.
        """
        path = self.unit_path(cell)
        found = read_object(path, REDO)
        if flaws := flaws_of(found, cell, self.plan):
            raise CannotEvaluate(
                f"Expected the unit of {cell}, but {path} has wrong values: {', '.join(flaws)}. {REDO}"
            )
        if path not in self.checked:
            self.check_files(path, found)
            self.checked.add(path)
        return {**found, "category": self.plan.category(cell.index)}

    def check_files(self, path: Path, numbers: Mapping[str, Any]) -> None:
        """Raise `CannotEvaluate` unless noise, features and images of a unit can be read."""
        shapes = {"noise": numbers["noise shape"]}
        if self.plan.features is not None:
            shapes["features"] = [self.plan.seeds, -1]
        for name, shape in shapes.items():
            tensor = self.tensor(path, name)
            sizes = zip(tensor.shape, shape, strict=False)
            if tensor.ndim != len(shape) or any(size != expected != -1 for size, expected in sizes):
                raise CannotEvaluate(
                    f"Expected {name} of shape {shape} in {path.with_suffix('.safetensors')}, but got "
                    f"{list(tensor.shape)}. {REDO}"
                )
        sizes = {self.image_size(image_path(path, image)) for image in range(self.plan.seeds)}
        expected = {
            "judge": (numbers["judge"] is not None) == (self.plan.of_shapes_world and sizes == {(SIDE, SIDE)}),
            "noise": all(len(numbers["noise"][name]) == rings(numbers["noise shape"]) for name in SPECTRA),
        }
        if flaws := [name for name, fits in expected.items() if not fits]:
            raise CannotEvaluate(f"Expected a whole unit, but {path} has wrong values: {', '.join(flaws)}. {REDO}")

    def image_size(self, path: Path) -> tuple[int, int]:
        """Return width and height of an image. Raises `CannotEvaluate` if it cannot be read."""
        try:
            with Image.open(path) as picture:
                picture.verify()  # the sums of its parts, without decoding
                return picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CannotEvaluate(f"Expected an image in {path}, but got {error}. {REDO}") from None

    def features(self, cell: Cell) -> torch.Tensor:
        """Read the features of a finished unit, `(B, D)`. Raises `CannotEvaluate` if there are none."""
        return self.tensor(self.unit_path(cell), "features")

    def tensor(self, path: Path, name: str) -> torch.Tensor:
        file = path.with_suffix(".safetensors")
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CannotEvaluate(f"Expected the tensor '{name}' in {file}, but got {error!r}. {REDO}") from None

    def calibration(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Read the results of `calibrate` for this plan, by model and label of the method."""
        known, found = self.measured(), {}
        for model in self.plan.models:
            for method in self.plan.methods:
                if row := known.get(self.calibration_key(model, method)):
                    found[model.name, method.label] = row
        return found

    def measured(self) -> dict[str, dict[str, Any]]:
        file = self.path / "calibration.json"
        found = read_object(file, REMEASURE) if file.exists() else {}
        counts = [row.get("n") if isinstance(row, dict) else None for row in found.values()]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CannotEvaluate(f"Expected the N of each method in {file}, but got other values. {REMEASURE}")
        return found

    def save_calibration(self, model: ModelChoice, method: MethodChoice, found: Mapping[str, Any]) -> None:
        row = {"model": model.name, "method": method.label, **found}
        write_json(self.path / "calibration.json", self.measured() | {self.calibration_key(model, method): row})

    def calibration_key(self, model: ModelChoice, method: MethodChoice) -> str:
        """Return the key of the control of a method on the first prompt, before its N is known."""
        return self.plan.key(Cell(model, control_of(method), 0), self.plan_settings)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the `only_writer` of a folder. Raises `CannotEvaluate` if that is impossible."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(folder))
        except ValueError as error:
            raise CannotEvaluate(str(error)) from None
        yield


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `CannotEvaluate` for anything else."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:  # 50 MB of lists in lists would take a minute
            raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CannotEvaluate(f"Expected a JSON object in {path}, but it cannot be read: {error}. {remedy}") from None
    if not isinstance(found, dict):
        raise CannotEvaluate(f"Expected a JSON object in {path}, but got {type(found).__name__}. {remedy}")
    return found


def flaws_of(numbers: Mapping[str, Any], cell: Cell, plan: Plan) -> list[str]:
    """Return the names of the values of a unit that are missing, malformed, or of another unit."""
    judged, statistics = numbers.get("judge") is not None, [field.name for field in dataclasses.fields(NoiseStatistics)]
    moments = {*statistics, *(f"{name} z" for name in statistics)}.difference(SPECTRA)
    expected: dict[str, Callable[[Any], bool]] = {
        "model": lambda value: value == cell.model.name,
        "method": lambda value: value == cell.contender.key,
        "index": lambda value: value == cell.index,
        "prompt": lambda value: value == plan.prompts.prompts[cell.index].text,
        "seeds": lambda value: value == [plan.seed(cell.index, image) for image in range(plan.seeds)],
        "judge": lambda value: not judged or is_judgment(value, plan.seeds),
        "rewards": lambda value: is_object(value, plan.reward_names, lambda each: is_list(each, is_number, plan.seeds)),
        "set": lambda value: is_object(value, set_measure_names(plan, judged)),
        "noise": lambda value: (
            is_object(value, moments, ignored=SPECTRA) and all(is_list(value.get(name), is_number) for name in SPECTRA)
        ),
        "noise shape": lambda value: is_list(value, is_count) and len(value) > 2 and value[0] == plan.seeds,
        "evaluations": is_count,
        "cost": lambda value: (
            is_object(value, [field.name for field in dataclasses.fields(Cost)])
            and None not in (value["seconds"], value["model_calls"])
        ),
    }
    return [name for name, fits in expected.items() if name not in numbers or not fits(numbers[name])]


def rings(shape: Sequence[int]) -> int:
    """Return the length of the spectrum of a noise."""
    return len(frequency_rings(*shape[-2:])[1])


def is_judgment(value: Any, count: int) -> bool:
    return (
        is_object(value, ["right", "found"], lambda each: isinstance(each, list))
        and is_list(value["right"], lambda each: isinstance(each, bool), count)
        and is_list(value["found"], lambda each: isinstance(each, str), count)
    )


def is_object(
    value: Any, names: Collection[str], fits: Callable[[Any], bool] | None = None, ignored: Collection[str] = ()
) -> bool:
    """Return whether a value is an object of these names whose values fit; by default, are numbers."""
    if not isinstance(value, dict):
        return False
    found = {name: each for name, each in value.items() if name not in ignored}
    return found.keys() == set(names) and all(map(fits or is_number, found.values()))


def is_list(value: Any, fits: Callable[[Any], bool], count: int | None = None) -> bool:
    return isinstance(value, list) and count in (None, len(value)) and all(map(fits, value))


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, or `None`, which stands for NaN."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
