"""Run by `test_several_cards.py` in a fresh process: load card after card on embedded models, then the first again.

Arguments: a JSON list with the folder, room, class name, weights and call of each card. Prints one JSON object.
"""

import json
import sys
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

REQUESTS: dict[str, dict[str, Any]] = {
    "reno": {"rewards": {"red": 1.0}, "steps": 2},
    "cno": {"steps": 2, "num_images_per_prompt": 2},
    "noise_diffusion": {"rewards": "brightness", "steps": 2},
    "never_too_late": {"diversity": {"dpp": ("color_histogram", 150.0)}, "steps": 2, "num_images_per_prompt": 2},
}


def load(card: dict[str, Any]) -> Any:
    pipe = DiffusionPipeline.from_pretrained(card["weights"], custom_pipeline=card["folder"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, card: dict[str, Any]) -> Any:
    """Return the output of one seed."""
    arguments = {**card["call"], "generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    return pipe("a red circle left of a blue star", **{**arguments, **REQUESTS[card["room"]]})


def main(cards: list[dict[str, Any]]) -> dict[str, bool]:
    """Return what is true of the cards in one process."""
    logging.set_verbosity_error()
    pipes = [load(card) for card in cards]
    outputs = list(map(generate, pipes, cards))
    first = load(cards[0])
    again = [output.images for output in map(generate, pipes, cards)]
    return {
        "each is its own class": [type(pipe).__name__ for pipe in pipes] == [card["class"] for card in cards],
        "each optimizes": all(len(output.noise_result.losses) == 2 for output in outputs),
        "the first loads again": type(first).__name__ == cards[0]["class"]
        and torch.allclose(generate(first, cards[0]).images, outputs[0].images, atol=1e-4),
        "those loaded before still work": all(map(torch.equal, again, [output.images for output in outputs])),
        "the package was not needed": "noiseopt" not in sys.modules,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
