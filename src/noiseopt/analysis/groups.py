"""Saved results, found in files and folders and sorted into groups that can be pooled."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pipelines.results.noise_result import NoiseResult
from ..shapes_world.embedded import MODELS


class CannotAnalyze(Exception):
    """What was given cannot be analysed; the message says why and what helps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Results of one method on one model with noise of one shape.

    Attributes:
        method, model: Their names; the model's is "unknown" if its results do not say.
        paths: The files.
        results: What they hold.
    """

    method: str
    model: str
    paths: tuple[Path, ...]
    results: tuple[NoiseResult, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one noise: (C, H, W)."""
        return tuple(self.results[0].noise.shape[1:])

    @property
    def title(self) -> str:
        return f"{self.method} on {self.model}, {'×'.join(map(str, self.shape))}"

    @property
    def initial(self) -> Tensor:
        """`(B, C, H, W)` of all results; one axis of channels, also where the family has another before it."""
        return pooled(result.initial_noise for result in self.results)

    @property
    def optimised(self) -> Tensor:
        return pooled(result.noise for result in self.results)


def pooled(noises: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([noise.flatten(1, -3) for noise in noises if noise is not None])


def load_groups(paths: Sequence[Path]) -> list[Group]:
    """All results in these files and folders, in the order of their first files.

    Raises:
        CannotAnalyze: For a file that is missing or is no result, a folder without any, or a result of an old version.
    """
    groups: dict[tuple, list[tuple[Path, NoiseResult]]] = {}
    for file in dict.fromkeys(file for path in paths for file in result_files(path)):
        result = load(file)
        key = (result.provenance.get("method"), model_name(result), tuple(result.noise.shape[1:]))
        groups.setdefault(key, []).append((file, result))
    return [
        Group(key[0] or "unknown", key[1], *map(tuple, zip(*members, strict=True))) for key, members in groups.items()
    ]


def result_files(path: Path) -> list[Path]:
    """A file itself; of a folder those files of it and its subfolders that are results."""
    if not path.exists():
        raise CannotAnalyze(f"Expected a result that `NoiseResult.save` wrote, but there is no {path}.")
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*.safetensors")) if is_result(file)]
    if found:
        return found
    if (path / "units").is_dir() and (path / "settings.json").is_file():
        raise CannotAnalyze(
            f"Expected results that `NoiseResult.save` wrote, but {path} is the folder of an evaluation, which keeps "
            "the noise that was found without what it began as; its own spectrum.png compares the noises. Save the "
            "results of `optimize_noise` with `result.save(path)`, or use the folder of `noiseopt demo`."
        )
    raise CannotAnalyze(f"Expected results that `NoiseResult.save` wrote (*.safetensors), but {path} holds none.")


def is_result(path: Path) -> bool:
    """Whether its header says so, be it of a newer version."""
    try:
        with safe_open(path, framework="pt") as file:
            return "noiseopt-result-" in (file.metadata() or {}).get("noiseopt", "")
    except (OSError, SafetensorError):
        return False


def load(path: Path) -> NoiseResult:
    try:
        result = NoiseResult.load(path)
    except (ValueError, OSError) as error:
        raise CannotAnalyze(f"{str(error).rstrip('.')}. Leave it out, or give the file that was saved.") from None
    if result.initial_noise is None or result.band_changes is None:
        raise CannotAnalyze(
            f"Expected a result with its initial noise, but {path} is of a version that did not keep it. Run its "
            "method again: the file names the seeds."
        )
    return result


def model_name(result: NoiseResult) -> str:
    """The name of an embedded model, wherever its weights were; of others the last part of the Hub id or path."""
    return embedded_name(result) or Path(result.provenance.get("model") or "unknown").name


def embedded_name(result: NoiseResult) -> str | None:
    """Which embedded model a result was found on, if on one: by its folder, or its name on the Hub."""
    model = Path(result.provenance.get("model") or "")
    for known in MODELS.values():
        if model.parts[-3:] == ("shapes_world", "weights", known.name) or model.as_posix().endswith(known.hub_id):
            return known.name
        if f"models--{known.hub_id.replace('/', '--')}" in model.parts:  # the Hub's cache
            return known.name
    return None
