"""Memory of the gradient of a set objective for B images: jointly, and in chunks.

python benchmarks/set_memory.py
python benchmarks/set_memory.py --size 512 --device cuda

Each cell is one step of a set of B images (DPP of the embedded DINOv2 features, with one more given image, so that a
set of one has a value) on the embedded SDXL model with a few steps: images, value, and its gradient with respect to the
noise. Memory is the peak above the loaded models: from torch's allocator on CUDA, elsewhere the resident memory, in a
separate process that has computed the gradient of one image before, so that one-time allocations do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from noiseopt import optimize_noise, shapes_world
from noiseopt.demo import load_pipeline, seeded
from noiseopt.evaluation.looking import Looking
from noiseopt.evaluation.measure import measured
from noiseopt.pipelines.loop import chunk_size_of
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.pipelines.sampling.sample import Sample
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import DPP, AutoFeatures, SetRewardSum

MODES: dict[str, Any] = {"joint": None, "one": 1, "auto": "auto"}
PROMPT = shapes_world.VALIDATION_PROMPTS[0]


class SetStep:
    """One step of a set of `batch` images of `size`² pixels, drawn in a number of steps, on a device."""

    def __init__(self, model: str, size: int, steps: int, device: torch.device) -> None:
        with quiet_libraries():
            self.pipe: Any = load_pipeline(model).to(device)
            features = AutoFeatures.from_pretrained(shapes_world.path("dinov2"), dtype=torch.float32, device=device)
        self.total, self.device = SetRewardSum([(DPP(features), 1.0)]), device
        steps = min(steps, shapes_world.MODELS[model].call["num_inference_steps"])
        self.call = {**shapes_world.MODELS[model].call, "height": size, "width": size, "num_inference_steps": steps}
        given = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.given = self.total.known_features(given.to(device))

    def look(self, batch: int, then: Callable[[NoiseProblem], Any]) -> None:
        """Call a function with the problem of a set."""
        call = {**self.call, "num_images_per_prompt": batch, "generator": seeded(0, batch)}
        optimize_noise(self.pipe, PROMPT, Looking(then, checkpointing="none"), callbacks=[], **call)

    def gradient(self, problem: NoiseProblem, chunk_size: int | None) -> torch.Tensor:
        """Return the gradient of the set's value with respect to the noise, `(B, C, H, W)`."""
        leaf = problem.noise.clone().requires_grad_()
        seeds = list(range(len(leaf)))
        sample = Sample(problem.sampler, leaf, problem.prompts, problem.groups, seeds, "full", chunk_size=chunk_size)
        value = self.total(sample.images, self.given, chunk_size=chunk_size).total
        return torch.autograd.grad(value, leaf)[0]

    def measure(self, problem: NoiseProblem, mode: str) -> dict[str, Any]:
        """Return the seconds, MiB and gradient of one step."""
        chunk_size = chunk_size_of(Looking(id, chunk_size=MODES[mode]), problem)
        with measured(self.pipe, self.device) as cost:
            gradient = self.gradient(problem, chunk_size)
        return {"seconds": cost.seconds, "memory": cost.memory, "chunk_size": chunk_size, "gradient": gradient.cpu()}


def measure(mode: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds, MiB and gradient of one step, in this process."""
    step, found = SetStep(options.model, options.size, options.steps, torch.device(options.device)), {}
    step.look(1, lambda first: step.gradient(first, None))
    step.look(batch, lambda problem: found.update(step.measure(problem, mode)))
    return found


def measure_apart(mode: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.pt"
        names = ("model", "size", "steps", "device")
        arguments = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
        one = ["--one", mode, str(batch), str(path)]
        # return freed blocks to the system at once, so that they do not count
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([sys.executable, __file__, *arguments, *one], check=True, env=environment)
        return torch.load(path)


def cells(found: dict[str, Any], single: dict[str, Any]) -> str:
    """Format three cells of a table: seconds, MiB, and MiB relative to a set of one in the same mode."""
    if found["memory"] is None or not single["memory"]:
        return f"{found['seconds']:.2f} | – | –"
    return f"{found['seconds']:.2f} | {found['memory']:.0f} | {found['memory'] / single['memory']:.2f}"


def difference(found: torch.Tensor, joint: torch.Tensor) -> float:
    """Return ‖found − joint‖ / ‖joint‖."""
    return float((found - joint).double().norm() / joint.double().norm())


def report(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the table in Markdown, and the largest difference of the gradients."""
    head = "| B | mode | images at once | seconds | peak MiB | × B = 1 |"
    lines = [head, "|---|---|---|---|---|---|"]
    batches = list(next(iter(results.values())))
    for batch in batches:
        for mode, found in results.items():
            at_once = found[batch]["chunk_size"] or batch
            lines.append(f"| {batch} | {mode} | {at_once} | {cells(found[batch], found[batches[0]])} |")
    pairs = [(results[mode][batch], results["joint"][batch]) for mode in results for batch in batches]
    largest = max(difference(found["gradient"], joint["gradient"]) for found, joint in pairs)
    return "\n".join([*lines, "", f"Largest relative difference to the joint gradient: {largest:.1e}"])


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", help="an embedded pipeline")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--steps", type=int, default=6, help="sampling steps, at most those of the model's own call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="set sizes; others are compared with the first"
    )
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        mode, batch, path = options.one
        torch.save(measure(mode, int(batch), options), path)
        return {}
    results = {mode: {batch: measure_apart(mode, batch, options) for batch in options.batches} for mode in MODES}
    print(report(results))
    if options.output:
        numbers = {mode: {b: {**cell, "gradient": None} for b, cell in row.items()} for mode, row in results.items()}
        options.output.write_text(json.dumps(numbers, indent=2))
    return results


if __name__ == "__main__":
    main()
