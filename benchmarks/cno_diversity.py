"""CNO against plain sampling: diversity of the images of a prompt, and their correctness.

python benchmarks/cno_diversity.py --prompts held-out --limit 40 --seeds 3 --ablation --output cno.json

Similarity is measured in features that CNO does not use, relative to what the prompt requires: the mean features of
rendered images of the same prompt, which are right and otherwise as diverse as possible, are subtracted.
"""

import argparse
import dataclasses
import json
import platform
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import noiseopt
from noiseopt import CNO, AutoReward, optimize_noise, shapes_world
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap
from noiseopt.evaluation.metrics import mean_pairwise_similarity, vendi_score
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import ImageFeatures

PROMPTS = {"validation": shapes_world.VALIDATION_PROMPTS, "held-out": shapes_world.HELD_OUT_PROMPTS}
# The paper changes every entry by up to 0.01 per step in latents of 4 x 64 x 64, a distance of 0.01·128. In the
# embedded 8 x 8 x 8 the same distance is 0.057 per entry, and windows of the same 4 x 4 entries form a 2 x 2 grid.
EMBEDDED = {"learning_rate": 0.057, "window_size": 2}
RELEASED = {"gradient": "full", "gamma": 1.0}
ABLATION: dict[str, dict[str, Any]] = {
    "no attraction": {"attraction": False},
    "no repulsion": {"repulsion": False},
    "γ = 1": {"gamma": 1.0},
    "full gradient": {"gradient": "full"},
    "w = 1": {"window_size": 1},
    "w = 4": {"window_size": 4},
    "w = 8": {"window_size": 8},
    "w = 16": {"window_size": 16},
    "the paper's learning rate": {"learning_rate": 0.01},
}
SIZES = (2, 8, 16)  # set sizes besides `--images`
DRAWN = 64  # rendered images per prompt
METRICS = ("right", "reward", "MSS pixels", "MSS dinov2", "MSS patches", "MSS clip")
METRICS += ("Vendi pixels", "Vendi dinov2", "Vendi patches", "Vendi clip", "norm")
Numbers = dict[str, float]
Features = dict[str, torch.Tensor]
Tables = dict[str, dict[str, dict[str, Estimate]]]  # row, metric, "estimate" or "difference"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table: `method` on sets of `images`; `None` is plain sampling."""

    name: str
    images: int
    method: CNO | None


def variants(images: int, ablation: bool) -> list[Variant]:
    """Return the rows: plain sampling, CNO of the paper and of its code.

    With `ablation` there is also CNO with each choice changed, and with sets of other sizes.
    """
    rows = [Variant("plain", images, None), Variant("CNO", images, CNO(**EMBEDDED))]
    rows += [Variant("CNO, released code", images, CNO(**EMBEDDED, **RELEASED))]
    if ablation:
        rows += [Variant(name, images, CNO(**{**EMBEDDED, **changes})) for name, changes in ABLATION.items()]
        for size in SIZES:
            rows += [Variant(f"plain, B = {size}", size, None), Variant(f"CNO, B = {size}", size, CNO(**EMBEDDED))]
    return rows


class Instruments:
    """The measurements of a set of images."""

    def __init__(self) -> None:
        self.reward = AutoReward.from_pretrained(shapes_world.path("clip"))
        self.features: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "pixels": lambda images: images.flatten(1),
            "dinov2": ImageFeatures.from_pretrained(shapes_world.path("dinov2")),
            "patches": ImageFeatures.from_pretrained(shapes_world.path("dinov2"), kind="patch"),
            "clip": ImageFeatures.from_pretrained(shapes_world.path("clip")),
        }

    @torch.no_grad()
    def embed(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """Return the features of the images, `(B, D)`."""
        return self.features[name](images).flatten(1)

    def demanded(self, prompt: str) -> Features:
        """Return the mean of each feature over rendered images of a prompt, `(D,)`."""
        rng, request = random.Random(0), shapes_world.parse(prompt)
        scenes = [shapes_world.sample_scene(rng, request) for _ in range(DRAWN)]
        drawn = shapes_world.render(scenes, torch.Generator().manual_seed(0))
        return {name: self.embed(name, drawn).mean(0) for name in self.features}

    def measure(self, images: torch.Tensor, prompt: str, demanded: Features) -> Numbers:
        verdicts = shapes_world.judge(images, prompt)
        with torch.no_grad():
            scores = self.reward(images, prompt)
        numbers = {"right": sum(v.correct for v in verdicts) / len(verdicts), "reward": float(scores.mean())}
        for name, mean in demanded.items():
            relative = F.normalize(self.embed(name, images) - mean, dim=1)
            numbers[f"MSS {name}"] = float(mean_pairwise_similarity(relative))
            numbers[f"Vendi {name}"] = float(vendi_score(relative))
        return numbers


def draw(pipe, variant: Variant, prompt: str, generators: list[torch.Generator], call: Mapping[str, Any]):
    """Return the images of one set `(B, 3, 64, 64)`, and ‖noise‖ relative to the initial noise."""
    call = {**call, "num_images_per_prompt": variant.images}
    if variant.method is None:
        return pipe(prompt, generator=generators, output_type="pt", **call).images, 1.0
    result = optimize_noise(pipe, prompt, variant.method, generator=generators, **call)
    images = pipe(prompt, latents=result.latents, generator=result.generator(), output_type="pt", **call).images
    length = result.noise.flatten(1).norm(dim=1) / result.noise[0].numel() ** 0.5
    return images, float((length / result.norms[0]).mean())


def compare(pipe, rows: Iterable[Variant], prompts: list[str], seeds: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return by variant and metric one number per prompt, the mean over its sets."""
    instruments, rows = Instruments(), list(rows)
    found = {row.name: {metric: [0.0] * len(prompts) for metric in METRICS} for row in rows}
    for index, prompt in enumerate(tqdm(prompts, unit="prompt")):
        demanded = instruments.demanded(prompt)
        for seed in range(seeds):
            for row in rows:
                starts = [1_000_003 * (100 * seed + image) + index for image in range(row.images)]
                generators = [torch.Generator().manual_seed(start) for start in starts]
                images, norm = draw(pipe, row, prompt, generators, call)
                for metric, value in {**instruments.measure(images, prompt, demanded), "norm": norm}.items():
                    found[row.name][metric][index] += value / seeds
    return found


def plain_of(name: str) -> str:
    """Return the row of plain sampling with the same set size."""
    size = name.partition(", B = ")[2]
    return f"plain, B = {size}" if size else "plain"


def summary(found: dict[str, Any]) -> Tables:
    """Return estimates of every row and metric, and the differences from plain sampling on the same prompts."""
    tables: Tables = {}
    for name, metrics in found.items():
        tables[name] = {}
        for metric, values in metrics.items():
            ours, theirs = torch.tensor(values), torch.tensor(found[plain_of(name)][metric])
            tables[name][metric] = {"estimate": bootstrap(ours), "difference": paired_bootstrap(ours, theirs)}
    return tables


def markdown(tables: Tables, metrics: Iterable[str]) -> str:
    """Format each estimate, and its difference from plain sampling with the 95% interval."""
    metrics = list(metrics)
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, row in tables.items():
        lines.append(f"| {name} | " + " | ".join(cell(**row[metric]) for metric in metrics) + " |")
    return "\n".join(lines).replace("-", "−").replace("|−−−", "|---")


def cell(estimate: Estimate, difference: Estimate) -> str:
    text = f"{estimate.value:.3g}"
    if difference.low == difference.high == 0:
        return text
    return f"{text} ({difference.value:+.2g} [{difference.low:+.2g}, {difference.high:+.2g}])"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CNO against plain sampling on an embedded model.")
    parser.add_argument("--model", default="guided", help="an embedded multi-step model")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="validation")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="the first N prompts")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="sets per prompt")
    parser.add_argument("--images", type=int, default=5, metavar="B", help="images per set")
    parser.add_argument("--ablation", action="store_true", help="also change each choice of CNO")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    options = parser.parse_args(arguments)
    if min(options.limit, options.seeds) < 1 or options.images < 2:
        parser.error("expected at least 1 prompt, 1 seed and 2 images")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    with quiet_libraries():
        pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(PROMPTS[options.prompts][: options.limit])
    call = shapes_world.MODELS[options.model].call
    found = compare(pipe, variants(options.images, options.ablation), prompts, options.seeds, call)
    tables = summary(found)
    print(markdown(tables, METRICS[:6]), markdown(tables, METRICS[6:]), sep="\n\n")
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        machine = {"python": platform.python_version(), "torch": torch.__version__, "noiseopt": noiseopt.__version__}
        text = json.dumps({"settings": settings, "machine": machine, "prompts": found}, indent=1, ensure_ascii=False)
        options.output.write_text(text + "\n", encoding="utf-8")
    return tables


if __name__ == "__main__":
    main()
