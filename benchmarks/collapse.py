"""How alike the seeds of the embedded models are, against pictures of the same prompts.

python benchmarks/collapse.py --limit 24 --output collapse.json

Similarity is the mean cosine of held-out DINOv2 features of the images of a set (MSS); places are those of the
requested objects, in pixels of 128. Pictures are drawn as those that the models were trained on, or all with the usual
layout or ground too, or with other captions. The guided model runs at several strengths of guidance, from equal noises.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from noiseopt import shapes_world
from noiseopt.demo import load_pipeline, seeded
from noiseopt.evaluation.bootstrap import bootstrap
from noiseopt.evaluation.metrics import mean_pairwise_similarity
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import ImageFeatures
from noiseopt.shapes_world.captions import Request, parse
from noiseopt.shapes_world.world import LOOKS, lay_out, render, usual, usual_looks
from training.naturalness import new_pictures, spread

SET = 6  # images of a prompt
SCALES = (1.0, 3.0, 5.0, 8.0, 12.0)  # of guidance; 1 is without
STUDENTS = ("turbo", "sdxl-turbo", "sd3")


def usual_pictures(request: Request, chance: random.Random, other_ground: bool = False) -> Tensor:
    """Draw a set of a request in its usual layout, `(SET, 3, 128, 128)`, on the usual ground or on any."""
    scenes = [
        lay_out(request.objects, usual(request.objects, request.relation, chance), request.relation) for _ in range(SET)
    ]
    looks = [[chance.random() for _ in range(LOOKS)] if other_ground else usual_looks(chance) for _ in range(SET)]
    return render(scenes, torch.Generator().manual_seed(chance.getrandbits(32)), torch.tensor(looks))


def drawn(prompts: Sequence[str]) -> dict[str, Callable[[int], Tensor]]:
    """Return sets of pictures by name, each a function of the number of a prompt."""
    requests = [parse(prompt) for prompt in prompts]
    return {
        "training pictures of the prompt": lambda number: new_pictures([requests[number]] * SET, seed=96 + number)[0],
        "of these, usual layout, any ground": lambda number: usual_pictures(
            requests[number], random.Random(number), True
        ),
        "of these, usual layout and ground": lambda number: usual_pictures(requests[number], random.Random(number)),
        "training pictures of six prompts": lambda number: new_pictures(
            [requests[(number + i) % len(requests)] for i in range(SET)], seed=196 + number
        )[0],
    }


def generated(prompts: Sequence[str]) -> dict[str, Callable[[int], Tensor]]:
    """Return sets of images of the embedded models by name, each a function of the number of a prompt."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        f"guided, guidance {scale:g}": ("guided", {"guidance_scale": scale}) for scale in SCALES
    }
    runs |= {name: (name, {}) for name in STUDENTS}
    pipes: dict[str, Any] = {}

    def images(name: str, changes: dict[str, Any], number: int) -> Tensor:
        if name not in pipes:
            pipes[name] = load_pipeline(name)
            pipes[name].set_progress_bar_config(disable=True)
        call = {**shapes_world.MODELS[name].call, **changes, "num_images_per_prompt": SET, "output_type": "pt"}
        return pipes[name](prompts[number], generator=seeded(1000 * number, SET), **call).images

    return {key: lambda number, run=run: images(*run, number) for key, run in runs.items()}


def measured(images: Tensor, prompt: str, features: ImageFeatures) -> dict[str, float]:
    with torch.no_grad():
        similarity = float(mean_pairwise_similarity(features(images)))
    right = [verdict.correct for verdict in shapes_world.judge(images, prompt)]
    return {"MSS": similarity, "places": spread(images, 1), "right": sum(right) / len(right)}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description="How alike seeds are.")
    parser.add_argument("--limit", type=int, default=24, metavar="N", help="the first N validation prompts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    options = parser.parse_args(arguments)
    prompts, found = shapes_world.VALIDATION_PROMPTS[: options.limit], {}
    with quiet_libraries():
        features: Any = ImageFeatures.from_pretrained(shapes_world.path("dinov2"))
    print("| sets of six | MSS | places, pixels | right |\n|---|---|---|---|")
    for name, draw in (drawn(prompts) | generated(prompts)).items():
        found[name] = [
            measured(draw(i), prompts[i], features) for i in tqdm(range(len(prompts)), desc=name, leave=False)
        ]
        mss, places, right = (torch.tensor([each[key] for each in found[name]]) for key in ("MSS", "places", "right"))
        interval = bootstrap(mss)
        cells = (
            f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]",
            f"{places.nanmean():.0f}",
            f"{right.mean():.0%}",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
