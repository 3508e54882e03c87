"""The cards of the trained models of the shapes world, as text, from the records beside their weights.

A model has a card once its training and its measurements are recorded in `training.json` and `metrics.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shapes_world.embedded import MODELS, NAMESPACE, WEIGHTS
from .cards import REQUIREMENTS
from .markdown import code, sections, table, template

RECORDS = ("training.json", "metrics.json")
PROGRAMS = sections("model_programs")


@dataclass(frozen=True)
class Kind:
    """The common part of the cards of similar models.

    Attributes:
        library: The library that loads them.
        task: The Hub's name of their task.
        use: The title in `PROGRAMS` of the program that loads them from the Hub.
        package: The title of the program that loads them with `noiseopt`.
        limits: The titles of Markdown lists.
    """

    library: str
    task: str
    use: str
    package: str
    limits: tuple[str, ...]


PIPELINE = Kind("diffusers", "text-to-image", "generate", "optimize", ("generators",))
READERS = {
    "clip": Kind("transformers", "zero-shot-image-classification", "compare", "reward", ("readers", "judges")),
    "dinov2": Kind("transformers", "image-feature-extraction", "embed", "features", ("readers",)),
    "vqa": Kind("transformers", "image-text-to-text", "ask", "reward", ("readers", "judges")),
}
STAGES = {
    "vae": "autoencoder, on windows of pictures",
    "decoder": "its decoder, on whole pictures and noisier latents",
    "base": "U-Net of the SD kind, on true captions",
    "guided": "the same, with careless captions of common pictures",
    "turbo": "one-step student of the guided model, on its ways from noise to picture",
    "sdxl": "U-Net of the SDXL kind from the guided model's weights, with careless captions",
    "sdxl-turbo": "one-step student of the SDXL kind from the other student's weights, on the same ways",
    "sd3": "flow-matching transformer of the SD3 kind, with careless captions of common pictures",
    "eyes": "image encoder of the readers, on the objects in rendered pictures",
    "clip": "dual encoder, on rendered pictures and captions",
    "refined": "the same, on pictures of the generators and on pictures optimized to please it",
    "dinov2": "image tower, on copies and on the objects in rendered pictures",
    "vqa": "vision-language model, on questions about rendered and generated pictures",
}
PICTURES = {
    "learning_curve.png": "Losses of each stage against its samples",
    "reliability.png": 'Share of right pictures against the probability of "yes"',
}


@dataclass(frozen=True)
class ModelCard:
    """The Hub repository of a trained model.

    Attributes:
        model: A key of `MODELS`.
        weights: The folder of all weights.
    """

    model: str
    weights: Path = WEIGHTS

    @property
    def name(self) -> str:
        """The folder here and the name on the Hub."""
        return MODELS[self.model].hub_id.partition("/")[2]

    @property
    def title(self) -> str:
        return MODELS[self.model].title

    @property
    def folder(self) -> Path:
        return self.weights / self.model

    def files(self, namespace: str = NAMESPACE) -> dict[str, str]:
        """Return the generated files: name to text."""
        return {"README.md": readme(self, namespace)}

    def uploads(self) -> dict[str, Path]:
        """Return the other files of the repository: name to path."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


def recorded(weights: Path = WEIGHTS) -> list[ModelCard]:
    """Return the cards of the models whose weights and records exist."""
    return [ModelCard(name, weights) for name in MODELS if all((weights / name / file).is_file() for file in RECORDS)]


def readme(card: ModelCard, namespace: str) -> str:
    """Return the README of a model."""
    kind = READERS.get(card.model, PIPELINE)
    model = MODELS[card.model]
    names = {"hub_id": f"{namespace}/{card.name}", "model": model.name}
    names["call"] = ", ".join(arguments(model.call))
    training, metrics = (json.loads((card.folder / name).read_text(encoding="utf-8")) for name in RECORDS)
    return template("model").substitute(
        library=kind.library,
        task=kind.task,
        tags=", ".join([kind.library, "shapes-world", "noise-optimization"]),
        name=card.name,
        title=card.title,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        use=PROGRAMS[kind.use].substitute(names),
        package=PROGRAMS[kind.package].substitute(names),
        architecture=architecture(card.folder),
        stages=stages(training["stages"]),
        record=paragraphs(machine(training), picture(card.folder, "learning_curve.png")),
        measures=paragraphs(*measures(metrics), picture(card.folder, "reliability.png")),
        limits="\n".join(PROGRAMS[title].template for title in kind.limits),
        family=family(namespace, card.model),
    )


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Return keyword arguments as source."""
    return [f"{name}={value!r}" for name, value in values.items()]


def architecture(folder: Path) -> str:
    """Return a table of the submodules with weights, their classes and parameters; each `config.json` has the rest."""
    rows = [(code(name), code(kind), f"{count:,}") for name, kind, count in parts(folder)]
    if not (folder / "model_index.json").is_file():
        return table(("Class", "Parameters"), [row[1:] for row in rows])
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    total = sum(count for _, _, count in parts(folder))
    return table(("Submodule", "Class", "Parameters"), [*rows, ("all", code(pipeline), f"{total:,}")])


def parts(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield folder, class and number of parameters of each submodule of a model that has weights."""
    for path in sorted(folder.rglob("*.safetensors")):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or config["architectures"][0]
        yield path.parent.relative_to(folder).as_posix(), name, parameters(path)


def parameters(path: Path) -> int:
    """Return the number of floating-point entries in a safetensors file, from its header.

    https://huggingface.co/docs/safetensors/index#format: eight bytes with the length of a JSON object, and the object.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(math.prod(entry["shape"]) for entry in header.values() if "F" in entry["dtype"])


def stages(records: list[dict[str, Any]]) -> str:
    """Return a table of the training stages, in order."""
    head = ("Stage", "Model", "Parameters", "Samples", "Batch", "Minutes")
    rows = [
        (
            code(record["stage"]),
            STAGES.get(record["stage"], ""),
            f"{record['parameters']:,}",
            f"{record['samples']:,}",
            f"{record['batch']}",
            "not recorded" if record["seconds"] is None else f"{record['seconds'] / 60:.1f}",
        )
        for record in records
    ]
    known = "" if all(record["seconds"] is not None for record in records) else "at least "
    total = ("all", "", "", f"{sum(r['samples'] for r in records):,}", "", f"{known}{minutes(records):.1f}")
    return table(head, [*rows, total] if len(rows) > 1 else rows)


def minutes(records: list[dict[str, Any]]) -> float:
    return sum(record["seconds"] or 0 for record in records) / 60


def machine(training: Mapping[str, Any]) -> str:
    """Return data, seed and machine in a sentence."""
    count = training["threads"]
    where = f"`{training['device']}`" + f" with {count} thread{'s' * (count != 1)}" * (training["device"] == "cpu")
    return (
        f"Data: {training['pictures']:,} rendered pictures. Seed {training['seed']}, device {where}, torch "
        f"{training['torch']}. `training.json` has the losses during training."
    )


def measures(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the single numbers in `metrics`, then one for each list of records in it."""
    yield table(("Measure", "Value"), [(name, shown(value)) for name, value in numbers(metrics)])
    for name, rows in metrics.items():
        if isinstance(rows, list) and rows:
            cells = [tuple(shown(value) for value in row.values()) for row in rows]
            yield f"{name.capitalize()}:\n\n{table(tuple(rows[0]), cells)}"


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of the entries other than lists; an entry of a nested record is named "record: entry"."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}: ")
        elif not isinstance(value, list):
            yield prefix + name, value


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def picture(folder: Path, name: str) -> str:
    """Return the Markdown of a picture in the repository, if it exists."""
    return f"![{PICTURES[name]}]({name})" if (folder / name).is_file() else ""


def paragraphs(*texts: str) -> str:
    return "\n\n".join(part for part in texts if part)


def family(namespace: str, itself: str) -> str:
    """Return a list of the other models."""
    others = [model for name, model in MODELS.items() if name != itself]
    return "\n".join(f"* `{namespace}/shapes-{model.name}`: {model.title}" for model in others)
