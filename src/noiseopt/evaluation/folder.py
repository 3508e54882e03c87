"""The folder of an evaluation: what it was asked for, what is finished, and what is still to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pipelines.agreement import differences as differences
from .plan import Contender, slug
from .unit import Unit, write_json


class CannotEvaluate(Exception):
    """What was asked for cannot be done here; the message says why and what helps. Nothing finished is lost."""


class ResultFolder:
    """`settings.json`, `calibration.json`, and `units/<model>/<method>/<prompt>.json` with noise and images beside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or see that they are those of what is already here.

        Raises:
            CannotEvaluate: If another command wrote here, or nothing can be written.
        """
        file = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                return write_json(file, settings)
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CannotEvaluate(f"Expected a folder to write to, but got {self.path}: {error}.") from None
        given = json.loads(json.dumps(settings))
        if changed := differences(known, given):
            raise CannotEvaluate(
                f"Expected the settings that {self.path} was begun with, but got others: {'; '.join(changed)}. "
                "Choose another --output, or delete that folder."
            )

    def unit_path(self, model: str, contender: Contender, index: int) -> Path:
        return self.path / "units" / slug(model) / contender.folder / f"{index:05d}.json"

    def finished(self, model: str, contender: Contender, index: int) -> bool:
        return self.unit_path(model, contender, index).exists()

    def save(self, unit: Unit, contender: Contender) -> None:
        """Keep a finished unit for good."""
        unit.save(self.unit_path(unit.numbers["model"], contender, unit.numbers["index"]))

    def numbers(self, model: str, contender: Contender, index: int) -> dict[str, Any]:
        """The plain values of a finished unit."""
        return json.loads(self.unit_path(model, contender, index).read_text(encoding="utf-8"))

    def calibration(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By model and method, what `calibrate` found."""
        file = self.path / "calibration.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def keep_calibration(self, model: str, method: str, found: Mapping[str, Any]) -> None:
        known = self.calibration()
        known.setdefault(model, {})[method] = dict(found)
        write_json(self.path / "calibration.json", known)
