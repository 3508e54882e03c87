"""The cards, as data, and the text of their README files.

What a card says about arguments, rewards and defaults is read from the bundled source, so that it cannot disagree with
the code. A new card is one more entry in `CARDS`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import Template
from typing import Any

NAMESPACE = "noiseopt"
REQUIREMENTS = ("torch>=2.6", "diffusers>=0.42", "transformers>=5", "accelerate>=1")

RENO_PAPER = "https://arxiv.org/abs/2406.04312"
RENO_BIBTEX = """\
@inproceedings{eyring2024reno,
  title     = {ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization},
  author    = {Eyring, Luca and Karthik, Shyamgopal and Roth, Karsten and Dosovitskiy, Alexey and Akata, Zeynep},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}"""
RENO_SUMMARY = """\
Optimises the **initial noise** of {model} for reward models at inference time. The weights stay as they are: the
gradient of the rewards flows through the image and the one-step model back to the noise, and the best image seen is
returned. Without `rewards` the pipeline is bit-identical to the stock `{stock}`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One Hub repository.

    Attributes:
        name: Its folder here and its name on the Hub.
        module: The pipeline's source, relative to the repository root.
        base_model: Hub id of the weights that the example loads.
        title, summary: What it is; Markdown.
        method: The class whose fields are the settings of the method.
        settings_argument: The argument of the call that takes those settings.
        paper, bibtex: Where the method comes from.
    """

    name: str
    module: str
    base_model: str
    title: str
    summary: str
    method: str
    settings_argument: str
    paper: str
    bibtex: str


def reno_card(name: str, module: str, base_model: str, model: str, stock: str) -> Card:
    """A card of a ReNO pipeline; `stock` is the diffusers class under it."""
    return Card(
        name=name,
        module=module,
        base_model=base_model,
        title=f"ReNO for {model}",
        summary=RENO_SUMMARY.format(model=model, stock=stock),
        method="ReNO",
        settings_argument="reno_kwargs",
        paper=RENO_PAPER,
        bibtex=RENO_BIBTEX,
    )


CARDS = (
    reno_card(
        "reno-turbo", "pipelines/reno_turbo.py", "stabilityai/sdxl-turbo", "SDXL-Turbo", "StableDiffusionXLPipeline"
    ),
    reno_card(
        "reno-stable-diffusion",
        "pipelines/reno_stable_diffusion.py",
        "stabilityai/sd-turbo",
        "SD-Turbo",
        "StableDiffusionPipeline",
    ),
)

README = Template("""\
---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
tags: [diffusers, custom-pipeline, text-to-image, noise-optimization]
base_model: $base_model
---

# $title

$summary

Paper: $paper

## Use

Nothing to install beside `pip install $requirements`.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "$base_model",
    custom_pipeline="$namespace/$name",
    trust_remote_code=True,
    dtype=torch.bfloat16,
).to("cuda")

output = pipe(
    "A blue scooter is parked near a curb in front of a green vintage car",
    rewards={"clipscore": 1.0},
    num_inference_steps=1,
    guidance_scale=0.0,
    generator=torch.Generator("cuda").manual_seed(0),
)
output.images[0].save("scooter.png")

result = output.noise_result
print(result.initial_scores, result.best_scores)
result.save("scooter.safetensors")  # the noise, its scores and where it came from
```

## Arguments

All arguments of the stock pipeline, and:

$arguments

Settings of the method, in `$settings_argument={"name": value}`, and their defaults:

$settings

## Rewards

Known by name. A Hub id or a local folder with a checkpoint of the same kind works as well, and so does any callable
`(images, prompts) -> (B,)` on images `(B, 3, H, W)` in [0, 1]. Higher is better. Checkpoints are downloaded when used.

$rewards

## As a package

The same class without `pipeline.py`, where `noiseopt` is installed:

```python
import torch
from $package_module import $class_name

pipe = $class_name.from_pretrained("$base_model", dtype=torch.bfloat16).to("cuda")
```

The package also optimises the noise of pipelines of other families, and offers the classes behind these arguments. A
class loaded from the Hub is another object than the package's: give it plain Python values only.

## Limits

* Each optimisation step costs a forward and a backward pass through denoiser, decoder and rewards. Made for models of
  1 to 4 steps: gradients through long chains explode or vanish.
* Offloading moves weights between forward and backward and is refused. `torch.inference_mode()` rules gradients out.
* A reward that is optimised stops being a fair judge: compare images by one that was not.
* `save_pretrained` keeps the weights and not this code: load again with `custom_pipeline=`. diffusers asks the Hub for
  the code at each load, so offline use needs a local copy of this folder as `custom_pipeline="./$name"`.
* This repository holds code only. Model and reward checkpoints keep their own licences.

## Citation

```bibtex
$bibtex
```

Generated from `$module` by `python hub_cards/build.py`.
""")


def readme(card: Card, namespace: str, source: str) -> str:
    """The README of a card; `source` is its bundled pipeline."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    pipeline = pipeline_class(classes)
    return README.substitute(
        vars(card),
        namespace=namespace,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        package_module="noiseopt." + card.module.removesuffix(".py").replace("/", "."),
        class_name=pipeline.name,
        arguments=table(("Argument", "Default", "Meaning"), call_arguments(pipeline, classes)),
        settings=table(("Setting", "Default", "Meaning"), settings(classes[card.method])),
        rewards=table(("Name", "Checkpoint", "Licence of the checkpoint"), rewards(tree, classes)),
    )


def pipeline_class(classes: dict[str, ast.ClassDef]) -> ast.ClassDef:
    """The only class with a base called `…Pipeline`."""
    found = [node for node in classes.values() if any(ast.unparse(base).endswith("Pipeline") for base in node.bases)]
    if len(found) != 1:
        raise ValueError(f"Expected exactly one pipeline class in a bundle, but got {[node.name for node in found]}.")
    return found[0]


def call_arguments(pipeline: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str, str]]:
    """Name, default and description of the keyword-only arguments of `__call__`, wherever it is inherited from."""
    call = inherited(pipeline, "__call__", classes)
    text = described(ast.get_docstring(call) or "")
    for argument, default in zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True):
        yield code(argument.arg), code(ast.unparse(default)) if default else "required", text.get(argument.arg, "")


def inherited(node: ast.ClassDef, method: str, classes: dict[str, ast.ClassDef]) -> ast.FunctionDef:
    """The definition of a method, from a class or the nearest of its bases that are in the bundle."""
    own = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == method]
    bases = [classes[base] for base in map(ast.unparse, node.bases) if base in classes]
    return own[0] if own else inherited(bases[0], method, classes)


def settings(method: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, default and description of the fields of a method that have one."""
    text = described(ast.get_docstring(method) or "")
    for item in method.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
            yield code(item.target.id), code(ast.unparse(item.value)), text.get(item.target.id, "")


def rewards(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str, str]]:
    """Name, default checkpoint and its licence of everything registered as a reward."""
    for node in tree.body:
        for name in registered_names(node):
            checkpoint, license = (
                inherited_value(node, attribute, classes) if isinstance(node, ast.ClassDef) else None
                for attribute in ("default_checkpoint", "license")
            )
            yield code(name), code(checkpoint) if checkpoint else "none needed", license or ""


def registered_names(node: ast.stmt) -> Iterator[str]:
    """The first argument of each `@register_reward(...)` on a class or function."""
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register_reward":
            yield ast.literal_eval(decorator.args[0])


def inherited_value(node: ast.ClassDef, name: str, classes: dict[str, ast.ClassDef]) -> Any:
    """The literal value of a class attribute, from a class or the nearest of its bases that are in the bundle."""
    for item in node.body:
        if isinstance(item, (ast.Assign, ast.AnnAssign)) and item.value:
            target = item.targets[0] if isinstance(item, ast.Assign) else item.target
            if ast.unparse(target) == name:
                return ast.literal_eval(item.value)
    bases = [classes[base] for base in map(ast.unparse, node.bases) if base in classes]
    return inherited_value(bases[0], name, classes) if bases else None


def described(docstring: str) -> dict[str, str]:
    """Argument -> its description on one line, from the `Args:` section of a docstring."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n)*)", docstring + "\n", flags=re.MULTILINE)
    entry = re.compile(r"^    ([\w, ]+): (.*\n(?:     +.*\n)*)", flags=re.MULTILINE)
    entries = entry.findall(section[1]) if section else []
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def code(text: str) -> str:
    return f"`{text}`"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
