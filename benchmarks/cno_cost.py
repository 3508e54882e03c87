"""Cost of CNO relative to plain sampling: denoiser calls, time and peak memory, as ratios within one run.

python benchmarks/cno_cost.py --steps 50 --rounds 5

Time is that of the processor, on an accelerator that of the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from noiseopt import CNO, optimize_noise, shapes_world
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.measure import Cost, measured

PROMPT = shapes_world.VALIDATION_PROMPTS[0]
METHODS = {"plain": None, "CNO": CNO(), "CNO, full gradient": CNO(gradient="full")}


def draw(pipe: Any, method: CNO | None, call: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    if method is None:
        pipe(PROMPT, generator=generator, output_type="pt", **call)
        return
    result = optimize_noise(pipe, PROMPT, method, generator=generator, callbacks=[], **call)
    pipe(PROMPT, latents=result.latents, output_type="pt", **call)


def measure(pipe: Any, call: Mapping[str, Any], rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each method in each round; the methods alternate, and a warm-up round is not counted."""
    found: dict[str, list[Cost]] = {name: [] for name in METHODS}
    for round_ in range(rounds + 1):
        for name, method in METHODS.items():
            with measured(pipe, pipe.device) as cost:
                began = time.process_time()
                draw(pipe, method, call)
                processor = time.process_time() - began
            if pipe.device.type == "cpu":
                cost.seconds = processor
            found[name] += [cost] if round_ else []
    return found


def ratios(found: dict[str, list[Cost]], of: Callable[[Cost], float | None]) -> dict[str, str]:
    """Return the median ratio to plain sampling of the same round, with quartiles; a dash if not measured."""
    texts = {}
    for name, costs in found.items():
        pairs = [(of(ours), of(plain)) for ours, plain in zip(costs, found["plain"], strict=True)]
        values = [ours / plain for ours, plain in pairs if ours is not None and plain]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * (values or [float("nan")])
        texts[name] = f"{middle:.3f} [{low:.3f}–{high:.3f}]" if values else "–"
    return texts


def main(arguments: list[str] | None = None) -> dict[str, list[Cost]]:
    parser = argparse.ArgumentParser(description="Cost of CNO relative to plain sampling.")
    parser.add_argument("--model", default="guided", help="an embedded multi-step model")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--images", type=int, default=16, help="images per call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    pipe: Any = load_pipeline(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    call = {**shapes_world.MODELS[options.model].call, "num_inference_steps": options.steps}
    found = measure(pipe, {**call, "num_images_per_prompt": options.images}, options.rounds)
    columns = {
        "denoiser calls": ratios(found, lambda cost: cost.model_calls),
        "time": ratios(found, lambda cost: cost.seconds),
        "peak memory": ratios(found, lambda cost: cost.memory),
    }
    print("| relative to plain sampling | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in METHODS:
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")
    return found


if __name__ == "__main__":
    main()
