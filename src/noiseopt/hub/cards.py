"""The cards, as data, and the text of their README files.

What a card says about arguments, rewards and defaults is read from the bundled source, so that it cannot disagree with
the code. A new card is one more entry in `CARDS`; what the cards of a method have in common is its `Method`.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import Template
from typing import Any

from ..shapes_world.embedded import MODELS
from .before_after import PICTURE, BeforeAfter

REQUIREMENTS = ("torch>=2.6", "diffusers>=0.41", "transformers>=5.18", "accelerate>=1.1")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the cards of one method share.

    Attributes:
        name: The class whose fields are its settings.
        settings_argument: The argument of the call that takes those settings.
        paper, bibtex: Where it comes from.
        summary: What it does to a `{model}`, and what leaves the `{stock}` as it is; Markdown.
        example: What the first program of a card does with its `pipe`.
        limits: A Markdown list.
        takes_rewards: Whether the call takes rewards by name: then the bundle holds all, and the card lists them.
        registered: Its name in `list_noise_optimizers()`.
    """

    name: str
    settings_argument: str
    paper: str
    bibtex: str
    summary: str
    example: str
    limits: str
    takes_rewards: bool
    registered: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One Hub repository.

    Attributes:
        name: Its folder here and its name on the Hub.
        module: The pipeline's source, relative to the repository root.
        method: What the pipeline does.
        base_model: Hub id of the weights that the example loads.
        model: What people call that model.
        stock: The diffusers class under the pipeline.
        shown_on: The embedded model that its picture is of.
        no_kin: Why that is not of the same kind, if it is not.
    """

    name: str
    module: str
    method: Method
    base_model: str
    model: str
    stock: str
    shown_on: str
    no_kin: str = ""

    @property
    def title(self) -> str:
        return f"{self.method.name} for {self.model}"


RENO = Method(
    name="ReNO",
    settings_argument="reno_kwargs",
    paper="https://arxiv.org/abs/2406.04312",
    bibtex="""\
@inproceedings{eyring2024reno,
  title     = {ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization},
  author    = {Eyring, Luca and Karthik, Shyamgopal and Roth, Karsten and Dosovitskiy, Alexey and Akata, Zeynep},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}""",
    summary="""\
Optimises the **initial noise** of {model} for reward models at inference time. The weights stay as they are: the
gradient of the rewards flows through the image and the one-step model back to the noise, and the best image seen is
returned. Without `rewards` the pipeline is bit-identical to the stock `{stock}`.""",
    example="""\
output = pipe(
    "A blue scooter is parked near a curb in front of a green vintage car",
    rewards={"hpsv2.1": 5.0, "imagereward": 1.0},
    num_inference_steps=1,
    guidance_scale=0.0,
    generator=torch.Generator("cuda").manual_seed(0),
)
output.images[0].save("scooter.png")

result = output.noise_result
print(result.initial_scores, result.best_scores)
result.save("scooter.safetensors")  # the noise, its scores and where it came from""",
    limits="""\
* Each optimisation step costs a forward and a backward pass through denoiser, decoder and rewards. Made for models of
  1 to 4 steps: gradients through long chains explode or vanish.
* Offloading moves weights between forward and backward and is refused. `torch.inference_mode()` rules gradients out.
* A reward that is optimised stops being a fair judge: compare images by one that was not.""",
    takes_rewards=True,
    registered="reno",
)

CNO = Method(
    name="CNO",
    settings_argument="cno_kwargs",
    paper="https://arxiv.org/abs/2510.03813",
    bibtex="""\
@inproceedings{kim2026cno,
  title     = {Diverse Text-to-Image Generation via Contrastive Noise Optimization},
  author    = {Kim, Byungjun and Um, Soobin and Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}""",
    summary="""\
Draws images of one prompt that **differ**. Before {model} samples, the **initial noises** of the
prompt are moved apart: one model call at the first timestep estimates the clean latents of each (x0, Tweedie), and a
contrastive loss pushes the estimates away from each other and pulls each towards where it began. By default this costs
three more calls of the denoiser for each image and no backward pass through it; weights and sampler stay as they are.
With `optimization_steps=0` the pipeline is bit-identical to the stock `{stock}`.""",
    example="""\
output = pipe(
    "A blue scooter is parked near a curb in front of a green vintage car",
    num_images_per_prompt=5,
    generator=torch.Generator("cuda").manual_seed(0),
)
for index, image in enumerate(output.images):
    image.save(f"scooter_{index}.png")

output.noise_result.save("scooter.safetensors")  # the five noises and where they came from""",
    limits="""\
* At least 2 images of each prompt; images of different prompts or calls do not see each other. Those of a call are one
  batch, so memory grows with `num_images_per_prompt` as it does in plain sampling.
* A model that predicts x0 itself, or a schedule with zero terminal SNR, needs `stop_gradient=False`: there the first
  estimate depends on the noise through the denoiser alone. The backward pass through it then takes its memory.
* Offloading and `torch.inference_mode()` are refused.""",
    takes_rewards=False,
    registered="cno",
)

NOISE_DIFFUSION = Method(
    name="NoiseDiffusion",
    settings_argument="noise_diffusion_kwargs",
    paper="https://arxiv.org/abs/2411.16503",
    bibtex="""\
@inproceedings{miao2025noisediffusion,
  title     = {Noise Diffusion for Enhancing Semantic Faithfulness in Text-to-Image Synthesis},
  author    = {Miao, Boming and others},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025}
}""",
    summary="""\
Chooses the **initial noise** of {model} by a vision-language model. Each round draws the image, asks whether it shows
the prompt, and mixes into the noise the fresh Gaussian noise that leads up the probability of "yes": far where the
answer is no, hardly at all where it is yes. The noise stays Gaussian, the sampler stays as it is, and no gradient
passes the denoiser. Without `rewards` the pipeline is bit-identical to the stock `{stock}`.""",
    example="""\
output = pipe(
    "a frog on a red bench",
    rewards="vqascore",
    optimization_steps=10,
    noise_diffusion_kwargs={"threshold": 0.95},
    generator=torch.Generator("cuda").manual_seed(0),
)
output.images[0].save("frog.png")

result = output.noise_result
print(result.initial_scores, result.best_scores)
result.save("frog.safetensors")  # the noise, its scores and where it came from""",
    limits="""\
* Each round samples the whole image, then passes decoder and scorer backwards: ten rounds cost ten images and more.
* The score is the opinion of one model. Best-of-N by the same scorer is the control, a scorer of another family the
  judge.
* Offloading and `torch.inference_mode()` are refused.""",
    takes_rewards=True,
    registered="noise_diffusion",
)

NEVER_TOO_LATE = Method(
    name="NeverTooLate",
    settings_argument="never_too_late_kwargs",
    paper="https://arxiv.org/abs/2601.00090",
    bibtex="""\
@inproceedings{harrington2026nevertoolate,
  title     = {It's Never Too Late: Noise Optimization for Collapse Recovery in Trained Diffusion Models},
  author    = {Harrington, Anne and Koepke, A. Sophia and Karthik, Shyamgopal and Darrell, Trevor and Efros, Alexei A.},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2026}
}""",
    summary="""\
Draws a **set** of images of one prompt that differ, where {model} alone draws nearly the same image again and again.
The **initial noises** of the set are optimised together: the gradient of how much the images differ, and of rewards
that keep each of them good, flows through the images and the model back to the noises. What counts as different is a
set reward (`dpp`, `dpp_patch`, `pairwise`, `vendi`, `vendi_2`) on features of your choice (`dinov2`, `dinov2_patch`,
`clip`, `dreamsim`, `lpips`, `color_histogram`, `tiny_image`, or the Hub id of a vision model). A guard takes an image
back where its quality falls. Without `diversity` the pipeline is bit-identical to the stock `{stock}`.""",
    example="""\
output = pipe(
    "A dog in a park",
    diversity={"dpp": 150.0},
    rewards={"hpsv2.1": 3.0},
    guard={"sharpness": {"keep": 0.8}},
    noise_sampler="pink",
    num_images_per_prompt=4,
    num_inference_steps=1,
    guidance_scale=0.0,
    generator=torch.Generator("cuda").manual_seed(0),
)
for index, image in enumerate(output.images):
    image.save(f"dog_{index}.png")

result = output.noise_result
print(result.initial_scores, result.best_scores, result.reports)
result.save("dogs.safetensors")  # the four noises, their scores and where they came from""",
    limits="""\
* At least 2 images of each prompt, or `references`; images of different prompts do not see each other.
* Each optimisation step costs a forward and a backward pass through denoiser, decoder, features and rewards. Made for
  models of 1 to 4 steps: gradients through long chains explode or vanish.
* Diversity in the features that are optimised rises in any case: measure it in others, and watch a quality that is not
  optimised. Blur and plain backgrounds are answered by the guards "sharpness" and "complexity".
* LPIPS and DreamSim come from packages of their own: `pip install lpips`, `pip install dreamsim`.
* Offloading and `torch.inference_mode()` are refused.""",
    takes_rewards=True,
    registered="never_too_late",
)

NO_FLUX = "There is no embedded model of the FLUX kind: this is the nearest, which learned by flow matching too."
CARDS = (
    Card(
        name="reno-turbo",
        module="pipelines/reno/turbo.py",
        method=RENO,
        base_model="stabilityai/sdxl-turbo",
        model="SDXL-Turbo",
        stock="StableDiffusionXLPipeline",
        shown_on="sdxl-turbo",
    ),
    Card(
        name="reno-stable-diffusion",
        module="pipelines/reno/stable_diffusion.py",
        method=RENO,
        base_model="stabilityai/sd-turbo",
        model="SD-Turbo",
        stock="StableDiffusionPipeline",
        shown_on="turbo",
    ),
    Card(
        name="cno-stable-diffusion",
        module="pipelines/cno/stable_diffusion.py",
        method=CNO,
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        model="Stable Diffusion 1.5",
        stock="StableDiffusionPipeline",
        shown_on="guided",
    ),
    Card(
        name="cno-stable-diffusion-xl",
        module="pipelines/cno/stable_diffusion_xl.py",
        method=CNO,
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        model="SDXL",
        stock="StableDiffusionXLPipeline",
        shown_on="sdxl",
    ),
    Card(
        name="cno-stable-diffusion-3",
        module="pipelines/cno/stable_diffusion_3.py",
        method=CNO,
        base_model="stabilityai/stable-diffusion-3.5-medium",
        model="Stable Diffusion 3.5",
        stock="StableDiffusion3Pipeline",
        shown_on="sd3",
    ),
    Card(
        name="cno-flux",
        module="pipelines/cno/flux.py",
        method=CNO,
        base_model="black-forest-labs/FLUX.1-dev",
        model="FLUX.1",
        stock="FluxPipeline",
        shown_on="sd3",
        no_kin=NO_FLUX,
    ),
    Card(
        name="noise-diffusion-stable-diffusion",
        module="pipelines/noise_diffusion/stable_diffusion.py",
        method=NOISE_DIFFUSION,
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        model="Stable Diffusion 1.5",
        stock="StableDiffusionPipeline",
        shown_on="guided",
    ),
    Card(
        name="noise-diffusion-stable-diffusion-xl",
        module="pipelines/noise_diffusion/stable_diffusion_xl.py",
        method=NOISE_DIFFUSION,
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        model="SDXL",
        stock="StableDiffusionXLPipeline",
        shown_on="sdxl",
    ),
    Card(
        name="noise-diffusion-stable-diffusion-3",
        module="pipelines/noise_diffusion/stable_diffusion_3.py",
        method=NOISE_DIFFUSION,
        base_model="stabilityai/stable-diffusion-3.5-medium",
        model="Stable Diffusion 3.5",
        stock="StableDiffusion3Pipeline",
        shown_on="sd3",
    ),
    Card(
        name="noise-diffusion-flux",
        module="pipelines/noise_diffusion/flux.py",
        method=NOISE_DIFFUSION,
        base_model="black-forest-labs/FLUX.1-dev",
        model="FLUX.1",
        stock="FluxPipeline",
        shown_on="sd3",
        no_kin=NO_FLUX,
    ),
    Card(
        name="never-too-late-turbo",
        module="pipelines/never_too_late/turbo.py",
        method=NEVER_TOO_LATE,
        base_model="stabilityai/sdxl-turbo",
        model="SDXL-Turbo",
        stock="StableDiffusionXLPipeline",
        shown_on="sdxl-turbo",
    ),
    Card(
        name="never-too-late-stable-diffusion",
        module="pipelines/never_too_late/stable_diffusion.py",
        method=NEVER_TOO_LATE,
        base_model="stabilityai/sd-turbo",
        model="SD-Turbo",
        stock="StableDiffusionPipeline",
        shown_on="turbo",
    ),
    Card(
        name="never-too-late-flux",
        module="pipelines/never_too_late/flux.py",
        method=NEVER_TOO_LATE,
        base_model="black-forest-labs/FLUX.1-schnell",
        model="FLUX.1-schnell",
        stock="FluxPipeline",
        shown_on="sd3",
        no_kin=NO_FLUX,
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

$example
```

$shown## Arguments

All arguments of the stock pipeline, and:

$arguments

Settings of the method, in `$settings_argument={"name": value}`, and their defaults:

$settings
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

$limits
* `save_pretrained` keeps the weights and not this code: load again with `custom_pipeline=`. diffusers asks the Hub for
  the code at each load, so offline use needs a local copy of this folder as `custom_pipeline="./$name"`.
* This repository holds code only. $checkpoints keep their own licences.

## Citation

```bibtex
$bibtex
```

Generated from `$module` by `noiseopt hub build`.
""")

SHOWN = Template("""\
## Before and after

![Images of the shapes world, plain and optimised]($picture)

$origin

$finding

```bash
noiseopt hub pictures $name
```

""")

REWARDS = Template("""
## Rewards

Known by name. A Hub id or a local folder with a checkpoint of the same kind works as well, and so does any callable
`(images, prompts) -> (B,)` on images `(B, 3, H, W)` in [0, 1]. Higher is better. Checkpoints are downloaded when used.

$table
""")


def readme(card: Card, namespace: str, source: str, shown: BeforeAfter | None) -> str:
    """The README of a card; `source` is its bundled pipeline, `shown` what its picture shows, if there is one."""
    tree, method = ast.parse(source), card.method
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    pipeline = pipeline_class(classes)
    return README.substitute(
        vars(method) | vars(card),
        title=card.title,
        summary=method.summary.format(model=card.model, stock=card.stock),
        namespace=namespace,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        package_module="noiseopt." + card.module.removesuffix(".py").replace("/", "."),
        class_name=pipeline.name,
        arguments=table(("Argument", "Default", "Meaning"), call_arguments(pipeline, classes)),
        settings=table(("Setting", "Default", "Meaning"), settings(classes[method.name])),
        shown=shown_section(card, shown) if shown else "",
        rewards=rewards_section(tree, classes) if method.takes_rewards else "",
        checkpoints="Model and reward checkpoints" if method.takes_rewards else "Model checkpoints",
    )


def shown_section(card: Card, shown: BeforeAfter) -> str:
    """What a card says about its picture."""
    paragraphs = {"origin": origin(card, shown), "finding": finding(card.method, shown)}
    filled = {name: textwrap.fill(text, 119, break_on_hyphens=False) for name, text in paragraphs.items()}
    return SHOWN.substitute(filled, picture=PICTURE, name=card.name)


def origin(card: Card, shown: BeforeAfter) -> str:
    """What drew a picture, and what that is not."""
    model = MODELS[shown.model]
    sentences = [
        f"{card.model} is too large for pictures that anyone can draw again.",
        f"These are by the embedded model [`{model.hub_id}`](https://huggingface.co/{model.hub_id}), a {model.title}.",
        card.no_kin,
        f"The pictures show what the method does, and say nothing about how much it does for {card.model}.",
        "In a checkout of the repository the command below draws them.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def finding(method: Method, shown: BeforeAfter) -> str:
    """What is left and right of an arrow, and what the judge says of it."""
    plain, gives = "an image as the model draws it", "seed gives"
    if shown.images > 1:
        plain, gives = f"{shown.images} images of a prompt as the model draws them", "seeds give"
    through = " and ".join(code(f"shapes-{name}") for name in shown.instruments)
    before, after = shown.right
    sentences = [
        f"Left of an arrow: {plain}. Right of it: what the same {gives} after {shown.steps} steps of {method.name}",
        f", which sees images through {through}. " if through else ". ",
        "✓ and ✗ are the verdicts of a judge that reads the pixels; it is no model, and nothing optimises it. ",
        f"{before} of {shown.count} images are right before, {after} of {shown.count} after. {effect(shown)} ",
        "The prompts are the first of the validation split, and the seeds count from ",
        f"{shown.seed}: nothing was chosen by its outcome.",
    ]
    return "".join(sentences)


def effect(shown: BeforeAfter) -> str:
    """What else a picture says: the numbers under single images, or how far the layouts of a set differ."""
    if shown.spread is None:
        return "The numbers are the reward."
    before, after = (f"{pixels:.1f}" for pixels in shown.spread)
    return (
        f"In the images of a prompt the same objects are {before} pixels from their mean place before, {after} after."
    )


def rewards_section(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> str:
    """What a card says about the rewards in its bundle."""
    rows = rewards(tree, classes)
    return REWARDS.substitute(table=table(("Name", "Checkpoint", "Licence of the checkpoint"), rows))


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
    """Name, default and description of the fields of a method that have a default; a `ClassVar` is none."""
    text = described(ast.get_docstring(method) or "")
    for item in method.body:
        if not isinstance(item, ast.AnnAssign) or "ClassVar" in ast.unparse(item.annotation):
            continue
        if isinstance(item.target, ast.Name) and item.value:
            yield code(item.target.id), code(ast.unparse(item.value)), text.get(item.target.id, "")


def rewards(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str, str]]:
    """Name, default checkpoint and its licence of everything registered as a reward."""
    for node in tree.body:
        for name in registered_names(node):
            checkpoint, published_at, license = (
                inherited_value(node, attribute, classes) if isinstance(node, ast.ClassDef) else None
                for attribute in ("default_checkpoint", "published_at", "license")
            )
            source = f"a folder with the file from {published_at}" if published_at else "none needed"
            yield code(name), code(checkpoint) if checkpoint else source, license or ""


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
