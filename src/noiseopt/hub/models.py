"""The cards of the trained models of the shapes world, as text, from what lies beside their weights.

A model has a card once its training and its measurements are recorded in `training.json` and `metrics.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ..shapes_world.embedded import MODELS, NAMESPACE, WEIGHTS
from .cards import REQUIREMENTS, code, table

RECORDS = ("training.json", "metrics.json")


DRAW = """\
import torch
from diffusers import DiffusionPipeline

name, prompt = "$hub_id", "a red circle left of a blue star"
pipe = DiffusionPipeline.from_pretrained(name$load, dtype=torch.float32)
image = pipe(prompt, $call).images[0]
image.save("shapes.png")"""
COMPARE = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

name = "$hub_id"
model, tokenizer = CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
pixels = AutoImageProcessor.from_pretrained(name)(Image.open("shapes.png"), return_tensors="pt")
texts = tokenizer(["a red circle left of a blue star", "two green squares"], padding=True, return_tensors="pt")
print(model(**pixels, input_ids=texts.input_ids).logits_per_image)"""
EMBED = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name = "$hub_id"
pixels = AutoImageProcessor.from_pretrained(name)(Image.open("shapes.png"), return_tensors="pt")
print(AutoModel.from_pretrained(name)(**pixels).pooler_output.shape)"""
ASK = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "$hub_id"
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
question = 'does this figure show "a red circle left of a blue star" ? please answer yes or no .'
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open("shapes.png"), text=text, return_tensors="pt")
answer = model(**inputs).logits[0, -1].softmax(-1)
print("yes:", answer[processor.tokenizer.convert_tokens_to_ids("yes")].item())"""
OPTIMIZE = """\
from diffusers import DiffusionPipeline
from noiseopt import ReNO, optimize_noise, shapes_world

pipe = DiffusionPipeline.from_pretrained(shapes_world.path("$model")$load)
method = ReNO(rewards=shapes_world.path("clip"), steps=10)
prompt = "a red circle left of a blue star"
result = optimize_noise(pipe, prompt, method, $call)"""
REWARD = """\
from noiseopt import AutoReward, shapes_world

reward = AutoReward.from_pretrained(shapes_world.path("$model"))"""
FEATURES = """\
from noiseopt import shapes_world
from noiseopt.rewards import ImageFeatures

features = ImageFeatures.from_pretrained(shapes_world.path("$model"))"""

DRAWS = """\
* It draws only what the shapes world has: one to three shapes of five kinds, in six colors. It knows no other words.
* Pictures are 64×64 pixels. Many are wrong, as many as the table says: it is made to be improved.
* Use the arguments above. With other steps or other guidance it was not measured."""
READS = """\
* It knows pictures and captions of the shapes world only, 64×64 pixels. Of anything else its numbers mean nothing."""
JUDGES = (
    READS
    + """
* What is optimised stops being a fair judge: there are pictures that please it and are wrong. Compare methods by the
  judge of the shapes world, which reads the pixels and is no model."""
)


@dataclass(frozen=True)
class Kind:
    """What the cards of similar models share.

    Attributes:
        library: What loads them.
        task: The Hub's name of what they do.
        use: A program that loads them from the Hub.
        package: A program that loads them by `noiseopt`.
        limits: A Markdown list.
    """

    library: str
    task: str
    use: str
    package: str
    limits: str


PIPELINE = Kind("diffusers", "text-to-image", DRAW, OPTIMIZE, DRAWS)
READERS = {
    "clip": Kind("transformers", "zero-shot-image-classification", COMPARE, REWARD, JUDGES),
    "dinov2": Kind("transformers", "image-feature-extraction", EMBED, FEATURES, READS),
    "vqa": Kind("transformers", "image-text-to-text", ASK, REWARD, JUDGES),
}
STAGES = {
    "vae": "autoencoder, on windows of pictures",
    "decoder": "its decoder, on whole pictures and noisier latents",
    "base": "U-Net of the SD kind, mostly from pure noise",
    "unet": "the same, further",
    "student": "the same, as a one-step student",
    "guided": "the same, for several steps with guidance, at last with some careless captions",
    "sdxl": "U-Net of the SDXL kind, begun with the one before, for several steps, at last with some careless captions",
    "sdxl-turbo": "U-Net of the SDXL kind, begun with the one before, for one step",
    "sd3": "flow-matching transformer of the SD3 kind, at last with some careless captions",
    "clip": "dual encoder, on drawn pictures and captions",
    "hardened": "the same, on pictures that were optimised to please it",
    "refined": "the same, on pictures that the generators drew",
    "dinov2": "image tower, on what is where in drawn pictures",
    "vqa": "vision-language model, on questions about drawn and generated pictures",
}
PICTURES = {
    "learning_curve.png": "Losses of each stage against its samples",
    "reliability.png": 'Share of right pictures against the probability of "yes"',
}

README = Template("""\
---
library_name: $library
pipeline_tag: $task
license: apache-2.0
tags: [$tags]
---

# $name: $title

A tiny model of the shapes world of `noiseopt`: pictures of colored shapes, and prompts such as "a red circle left of a
blue star". It was trained from scratch, for tests, demos and benchmarks of **noise optimisation** that need no GPU, and
is of no other use.

## Use

With `pip install $requirements`:

```python
$use
```

With `noiseopt`, which finds the same folder by name in its package, in a checkout of its repository or here:

```python
$package
```

## Architecture

$architecture

Stock classes. The weights are stored in half precision and meant to run in float32.

## Training

All models of the family are trained by one command, on a CPU or a GPU, from pictures that the renderer of the shapes
world draws; there is no other data.

```bash
python -m training.train --output DIR
```

What these weights went through:

$stages

$record

## What it measures

$measures

```bash
python -m training.train --output DIR --stages report
```

## Limits

$limits
* Another run gives other weights of the same kind: the arithmetic depends on the machine.

## The family

$family

Generated from the records beside the weights by `noiseopt hub build`.
""")


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
        """Its folder here and its name on the Hub."""
        return MODELS[self.model].hub_id.partition("/")[2]

    @property
    def title(self) -> str:
        return MODELS[self.model].title

    @property
    def folder(self) -> Path:
        return self.weights / self.model

    def files(self, namespace: str = NAMESPACE) -> dict[str, str]:
        """The generated files: name -> text."""
        return {"README.md": readme(self, namespace)}

    def uploads(self) -> dict[str, Path]:
        """What else belongs into the repository: name -> file."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


def recorded(weights: Path = WEIGHTS) -> list[ModelCard]:
    """The cards of the models whose weights and records are there."""
    return [ModelCard(name, weights) for name in MODELS if all((weights / name / file).is_file() for file in RECORDS)]


def readme(card: ModelCard, namespace: str) -> str:
    """The README of a model."""
    kind = READERS.get(card.model, PIPELINE)
    model = MODELS[card.model]
    load = "".join(f", {argument}" for argument in arguments(model.load))
    names = {"hub_id": f"{namespace}/{card.name}", "model": model.name, "load": load}
    names["call"] = ", ".join(arguments(model.call))
    training, metrics = (json.loads((card.folder / name).read_text(encoding="utf-8")) for name in RECORDS)
    return README.substitute(
        library=kind.library,
        task=kind.task,
        tags=", ".join([kind.library, "shapes-world", "noise-optimization"]),
        name=card.name,
        title=card.title,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        use=Template(kind.use).substitute(names),
        package=Template(kind.package).substitute(names),
        architecture=architecture(card.folder),
        stages=stages(training["stages"]),
        record=paragraphs(machine(training), picture(card.folder, "learning_curve.png")),
        measures=paragraphs(*measures(metrics), picture(card.folder, "reliability.png")),
        limits=kind.limits,
        family=family(namespace, card.model),
    )


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as source."""
    return [f"{name}={value!r}" for name, value in values.items()]


def architecture(folder: Path) -> str:
    """A table of the parts with weights, their classes and parameters; their own `config.json` has the rest."""
    rows = [(code(name), code(kind), f"{count:,}") for name, kind, count in parts(folder)]
    if not (folder / "model_index.json").is_file():
        return table(("Class", "Parameters"), [row[1:] for row in rows])
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    total = sum(count for _, _, count in parts(folder))
    return table(("Part", "Class", "Parameters"), [*rows, ("all", code(pipeline), f"{total:,}")])


def parts(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Folder, class and number of parameters of each part of a model that has weights."""
    for path in sorted(folder.rglob("*.safetensors")):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or config["architectures"][0]
        yield path.parent.relative_to(folder).as_posix(), name, parameters(path)


def parameters(path: Path) -> int:
    """The number of floating-point entries in a safetensors file, from its header.

    https://huggingface.co/docs/safetensors/index#format: eight bytes with the length of a JSON object, and the object.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(math.prod(entry["shape"]) for entry in header.values() if "F" in entry["dtype"])


def stages(records: list[dict[str, Any]]) -> str:
    """A table of the stages that the weights went through, in their order."""
    head = ("Stage", "What is trained", "Parameters", "Samples", "Batch", "Minutes")
    rows = [
        (
            code(record["stage"]),
            STAGES.get(record["stage"], ""),
            f"{record['parameters']:,}",
            f"{record['samples']:,}",
            f"{record['batch']}",
            "not kept" if record["seconds"] is None else f"{record['seconds'] / 60:.1f}",
        )
        for record in records
    ]
    known = "" if all(record["seconds"] is not None for record in records) else "at least "
    total = ("all", "", "", f"{sum(r['samples'] for r in records):,}", "", f"{known}{minutes(records):.1f}")
    return table(head, [*rows, total] if len(rows) > 1 else rows)


def minutes(records: list[dict[str, Any]]) -> float:
    return sum(record["seconds"] or 0 for record in records) / 60


def machine(training: Mapping[str, Any]) -> str:
    """Data, seed and machine in a sentence."""
    count = training["threads"]
    where = f"`{training['device']}`" + f" with {count} thread{'s' * (count != 1)}" * (training["device"] == "cpu")
    return (
        f"Data: {training['pictures']:,} drawn pictures. Seed {training['seed']}, device {where}, torch "
        f"{training['torch']}. `training.json` has the losses on the way."
    )


def measures(metrics: Mapping[str, Any]) -> Iterator[str]:
    """A table of all numbers, and one for each list of records."""
    yield table(("Measure", "Value"), [(name, shown(value)) for name, value in numbers(metrics)])
    for name, rows in metrics.items():
        if isinstance(rows, list) and rows:
            cells = [tuple(shown(value) for value in row.values()) for row in rows]
            yield f"{name.capitalize()}:\n\n{table(tuple(rows[0]), cells)}"


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries that are no lists, those of nested records under both names."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}: ")
        elif not isinstance(value, list):
            yield prefix + name, value


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def picture(folder: Path, name: str) -> str:
    """A picture in the repository, if there is one."""
    return f"![{PICTURES[name]}]({name})" if (folder / name).is_file() else ""


def paragraphs(*texts: str) -> str:
    return "\n\n".join(part for part in texts if part)


def family(namespace: str, itself: str) -> str:
    """A list of the other models."""
    others = [model for name, model in MODELS.items() if name != itself]
    return "\n".join(f"* `{namespace}/shapes-{model.name}`: {model.title}" for model in others)
