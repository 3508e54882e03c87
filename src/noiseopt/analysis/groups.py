"""Saved results, found in files and folders and grouped for pooling."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.results.atomic_write import PART_NAME
from ..pipelines.results.noise_result import NoiseResult
from ..pipelines.results.result_file import is_result_file
from ..shapes_world.embedded import MODELS
from ..shown_text import shown

LONGEST_NAME = 60  # characters of a model's name in a table or a figure


class CannotAnalyze(Exception):
    """Raised for input that cannot be analyzed; the message gives the reason and a remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Results of one method on one model with noise of one shape.

    Attributes:
        method, model: Their names on one line, without control characters; the model is "unknown" if its results do not
            name it.
        paths: The files.
        results: Their contents.
    """

    method: str
    model: str
    paths: tuple[Path, ...]
    results: tuple[NoiseResult, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one noise, (C, H, W)."""
        return tuple(self.results[0].noise.shape[1:])

    @property
    def title(self) -> str:
        return f"{self.method} on {self.model}, {'×'.join(map(str, self.shape))}"

    @property
    def initial(self) -> Tensor:
        """Initial noises of all results, `(B, C, H, W)`; other leading axes are merged into the channels."""
        return pooled(result.initial_noise for result in self.results)

    @property
    def optimized(self) -> Tensor:
        return pooled(result.noise for result in self.results)


def pooled(noises: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([noise.flatten(1, -3) for noise in noises if noise is not None])


def load_groups(paths: Sequence[Path]) -> list[Group]:
    """Load all results in these files and folders, grouped, in the order of their first files.

    Raises:
        CannotAnalyze: For a file that is missing or no result, a folder without any, or a result of an old version.
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
    """Return the file itself, or all results in a folder and its subfolders."""
    if not path.exists():
        raise CannotAnalyze(f"Expected a result that `NoiseResult.save` wrote, but {path} does not exist.")
    if not path.is_dir():
        return [path]
    files = (file for file in sorted(path.rglob("*.safetensors")) if not PART_NAME.fullmatch(file.name))
    found = [file for file in files if is_result_file(file)]
    if found:
        return found
    if (path / "units").is_dir() and (path / "settings.json").is_file():
        raise CannotAnalyze(
            f"Expected results that `NoiseResult.save` wrote, but {path} is the folder of an evaluation, which does "
            "not store initial noises; its spectrum.png compares the noises. Save the results of `optimize_noise` with "
            "`result.save(path)`, or use the folder of `noiseopt demo`."
        )
    raise CannotAnalyze(f"Expected results that `NoiseResult.save` wrote (*.safetensors), but {path} holds none.")


def load(path: Path) -> NoiseResult:
    try:
        result = NoiseResult.load(path)
    except (ValueError, OSError) as error:
        raise CannotAnalyze(f"{str(error).rstrip('.')}. Leave it out, or pass the saved file.") from None
    if result.initial_noise is None or result.band_changes is None:
        raise CannotAnalyze(
            f"Expected a result with its initial noise, but {path} is from a version that did not store it. Run the "
            "method again: the file contains the seeds."
        )
    return result


def model_name(result: NoiseResult) -> str:
    """Return the name of an embedded model, or the last component of a Hub id or path."""
    return embedded_name(result) or shown(Path(result.provenance.get("model") or "unknown").name, LONGEST_NAME)


def embedded_name(result: NoiseResult) -> str | None:
    """Return the name of the embedded model that produced a result, by its folder or Hub id, or `None`."""
    model = Path(result.provenance.get("model") or "")
    for known in MODELS.values():
        if model.parts[-3:] == ("shapes_world", "weights", known.name) or model.as_posix() == known.hub_id:
            return known.name
        if f"models--{known.hub_id.replace('/', '--')}" in model.parts:  # the Hub's cache
            return known.name
    return None
