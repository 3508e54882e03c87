"""The gradient of Noise Diffusion: its direction, and the rise of the score that it predicts for candidates.

python benchmarks/gradient_direction.py --limit 48

The method holds the outputs of the denoiser constant for its gradient. Here it is compared with the true gradient,
through the whole chain, and with the truth: the score of the image of each candidate. The step of the method moves the
noise by about half its length; a step of a tenth of that shows what is left where a gradient tells most.
"""

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from noise_diffusion import PROMPTS, load_scorer  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

import noiseopt
from noiseopt import optimize_noise, shapes_world
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.bootstrap import bootstrap
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.noise_math import displacement, unit
from noiseopt.pipelines.problem import CandidateNoise, NoiseProblem
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Reward

GRADIENTS = ("frozen", "full")
STEPS = {"the method's step": 1.0, "a tenth of it": 0.1}
Numbers = dict[str, list[float]]


@dataclasses.dataclass
class Direction:
    """Measures the gradients at the noises of a batch, and what they predict.

    Attributes:
        reward: The scorer, with values in [0, 1].
        candidates: N.
        found: One number per image, by name.
    """

    reward: Reward
    candidates: int
    found: Numbers = dataclasses.field(default_factory=dict)

    def __call__(self, problem: NoiseProblem) -> None:
        ascent = {name: self.gradient(problem, name) for name in GRADIENTS}
        with torch.no_grad():
            score = self.score(problem, problem.noise)
        self.keep("cosine", (unit(ascent["frozen"]) * unit(ascent["full"])).flatten(1).sum(1))
        self.keep("score", score)
        gamma, fresh = 1 - score.sqrt(), CandidateNoise(problem)
        moves = [displacement(problem.noise, fresh.draw(), gamma) for _ in range(self.candidates)]
        lengths = moves[0].flatten(1).norm(dim=1) / problem.noise.flatten(1).norm(dim=1)
        self.keep("length of the step", lengths)
        for step, factor in STEPS.items():
            with torch.no_grad():
                rises = torch.stack([self.score(problem, problem.noise + factor * v) - score for v in moves])
            for name, direction in ascent.items():
                rates = torch.stack([(direction * v).flatten(1).sum(1) for v in moves])
                self.keep(f"correlation, {name}, {step}", correlation(rates, rises))
                chosen = rates.argmax(0)
                below = (rises < rises.gather(0, chosen[None])).double().sum(0) / (self.candidates - 1)
                self.keep(f"rank of the chosen, {name}, {step}", below)

    def gradient(self, problem: NoiseProblem, gradient: Any) -> torch.Tensor:
        """Return ∇s, `(B, C, H, W)`."""
        leaf = problem.noise.clone().requires_grad_()
        score = self.reward(problem.sampler.images(leaf, gradient), problem.prompts)
        return torch.autograd.grad(score.sum(), leaf)[0]

    def score(self, problem: NoiseProblem, noise: torch.Tensor) -> torch.Tensor:
        return self.reward(problem.sampler.images(noise), problem.prompts)

    def keep(self, name: str, values: torch.Tensor) -> None:
        self.found.setdefault(name, []).extend(values.double().tolist())


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation over the first dimension; NaN where one of the two is constant."""
    a, b = (each.double() - each.double().mean(0) for each in (first, second))
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def measure(model: str, prompts: Sequence[str], candidates: int, batch: int) -> Numbers:
    """Return the numbers of a model, one per prompt."""
    with quiet_libraries():
        pipe: Any = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    direction = Direction(load_scorer(), candidates)
    for start in tqdm(range(0, len(prompts), batch), desc=model, unit="batch"):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        call = {**shapes_world.MODELS[model].call, "generator": generators}
        optimize_noise(pipe, part, Looking(direction), callbacks=[], **call)
    return direction.found


def markdown(found: dict[str, Numbers]) -> str:
    """Format a column per model; brackets hold 95% bootstrap intervals over prompts."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in next(iter(found.values())):
        cells = []
        for numbers in found.values():
            values = torch.tensor(numbers[name], dtype=torch.float64)
            estimate = bootstrap(values[~values.isnan()])
            cells.append(f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Numbers]:
    parser = argparse.ArgumentParser(description="The gradient of Noise Diffusion against the truth.")
    parser.add_argument("--model", action="append", help="an embedded model; repeatable (default: guided, turbo)")
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="held-out")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="the first N prompts")
    parser.add_argument("--candidates", type=int, default=16, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    options = parser.parse_args(arguments)
    if min(options.limit, options.batch_size) < 1 or options.candidates < 2:
        parser.error("expected at least 1 prompt, 2 candidates and batches of 1")
    prompts = list(PROMPTS[options.prompts][: options.limit])
    models = options.model or ["guided", "turbo"]
    found = {model: measure(model, prompts, options.candidates, options.batch_size) for model in models}
    print(markdown(found))
    if options.output:
        settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
        machine = {"python": platform.python_version(), "torch": torch.__version__, "noiseopt": noiseopt.__version__}
        text = json.dumps({"settings": settings, "machine": machine, "models": found}, ensure_ascii=False)
        options.output.write_text(text + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
