"""The gradient of Noise Diffusion, which holds the outputs of the denoiser constant: its direction and its reach.

python benchmarks/gradient_direction.py --model guided --limit 8 --reach

The first table has its cosine to the full gradient, through the denoiser, by number of steps and guidance, for a smooth
score of the pixels and for the P("yes") of a vision-language model; and the share of the full gradient that lies in the
means of the channels, which a model must not depend on. The second one tells how far the gradients reach: what the
candidate that they choose gains at γ, more than a random one.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from noise_diffusion import CPU, Bench, Record, add_model_arguments  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from noiseopt import optimize_noise
from noiseopt.evaluation.bootstrap import bootstrap
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.noise_diffusion.candidate_choice import guided_gaussian
from noiseopt.pipelines.noise_math import displacement, unit
from noiseopt.pipelines.problem import CandidateNoise, NoiseProblem

GRADIENTS = ("frozen", "full")
Numbers = dict[str, list[Any]]
Scores = dict[str, Callable]


def gradients(problem: NoiseProblem, scores: Scores, gradient: Any) -> dict[str, torch.Tensor]:
    """Return ∇s, `(B, C, H, W)`, of each score; zero where the images do not depend on the noise."""
    leaf = problem.noise.clone().requires_grad_()
    images = problem.sampler.images(leaf, gradient)
    if not images.requires_grad:
        return {name: torch.zeros_like(leaf) for name in scores}
    totals = {name: score(images, problem.prompts).sum() for name, score in scores.items()}
    return {name: torch.autograd.grad(total, leaf, retain_graph=True)[0] for name, total in totals.items()}


def directions(problem: NoiseProblem, scores: Scores) -> Numbers:
    """Return for each score the cosine of the two gradients, and the share of the channel means, one per image."""
    frozen, full = (gradients(problem, scores, gradient) for gradient in GRADIENTS)
    found: Numbers = {}
    for name in scores:
        towards = unit(full[name])
        found[f"{name}: cosine"] = (unit(frozen[name]) * towards).flatten(1).sum(1).tolist()
        size = towards[0, 0].numel()
        found[f"{name}: share of the channel means"] = (size * towards.mean((2, 3)).square().sum(1)).tolist()
    return found


def reach(problem: NoiseProblem, scores: Scores, gammas: list[float], draws: int, candidates: int) -> Numbers:
    """Return the gains of random candidates, and how much more those gain that are best by a gradient.

    The random candidate and the chosen ones differ only along the gradients.

    Returns:
        For each score and γ the gains of the random ones, a list of `draws` per image, and for each gradient the mean
        difference, one per image.
    """
    ascents = {gradient: gradients(problem, scores, gradient) for gradient in GRADIENTS}
    fresh, found = CandidateNoise(problem), {}

    @torch.no_grad()
    def drawn(noise: torch.Tensor) -> dict[str, torch.Tensor]:
        images = problem.sampler.images(noise)
        return {name: score(images, problem.prompts) for name, score in scores.items()}

    start = drawn(problem.noise)
    for gamma in gammas:
        length = torch.full((len(problem.noise),), gamma)
        plain, more = ({name: [] for name in scores} for _ in range(2))
        for _ in range(draws):
            sigma, luck = fresh.draw(), fresh.uniform()
            same: Any = SimpleNamespace(draw=lambda sigma=sigma: sigma, uniform=lambda luck=luck: luck)
            after = drawn(problem.noise + displacement(problem.noise, sigma, length))
            for name in scores:
                chosen = [guided_gaussian(ascents[gradient][name], same, candidates) for gradient in GRADIENTS]
                moved = [problem.noise + displacement(problem.noise, each, length) for each in chosen]
                plain[name].append(after[name] - start[name])
                more[name].append(torch.stack([drawn(each)[name] - after[name] for each in moved]))
        for name in scores:
            found[f"{name}, γ = {gamma:g}, random"] = torch.stack(plain[name], 1).tolist()
            for gradient, gains in zip(GRADIENTS, torch.stack(more[name]).mean(0).tolist(), strict=True):
                found[f"{name}, γ = {gamma:g}, {gradient}"] = gains
    return found


def looked_at(bench: Bench, call: dict[str, Any], look: Callable[[NoiseProblem], Numbers]) -> Numbers:
    """Return what a function finds for all prompts, one value per prompt."""
    found: Numbers = {}

    def keep(problem: NoiseProblem) -> None:
        for name, values in look(problem).items():
            found.setdefault(name, []).extend(values)

    for start in range(0, len(bench.prompts), bench.batch):
        part = bench.prompts[start : start + bench.batch]
        generators = [torch.Generator(CPU).manual_seed(start + i) for i in range(len(part))]
        optimize_noise(bench.pipe, part, Looking(keep), callbacks=[], **{**bench.call, **call, "generator": generators})
    return found


def cell(values: torch.Tensor) -> str:
    estimate = bootstrap(values)
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def direction_table(parts: dict[str, Numbers], guidance: list[float], steps: list[int]) -> str:
    """Format a line per number of steps and a column per guidance scale, for each quantity, with 95% intervals."""
    blocks = []
    for quantity in next(iter(parts.values())):
        lines = [f"| {quantity}, by steps and guidance | " + " | ".join(f"{scale:g}" for scale in guidance) + " |"]
        lines.append("|---" * (len(guidance) + 1) + "|")
        for count in steps:
            cells = [cell(torch.tensor(parts[key(count, scale)][quantity])) for scale in guidance]
            lines.append(f"| {count} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def reach_table(found: Numbers, candidates: int) -> str:
    """Format the gains in standard deviations of the random ones."""
    lines = [f"| gain of the best of {candidates} by its prediction | frozen | full | random |", "|---" * 4 + "|"]
    for label in [name.removesuffix(", random") for name in found if name.endswith(", random")]:
        plain = torch.tensor(found[f"{label}, random"])
        spread = plain.std()
        cells = [cell(torch.tensor(found[f"{label}, {gradient}"]) / spread) for gradient in GRADIENTS]
        lines.append(f"| {label} | " + " | ".join([*cells, cell(plain.mean(1) / spread)]) + " |")
    return "\n".join(
        [*lines, "", "In standard deviations of the gains of random candidates; frozen and full: more than these."]
    )


def key(steps: int, guidance: float) -> str:
    return f"{steps} steps, guidance {guidance:g}"


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Numbers]]:
    parser = argparse.ArgumentParser(description="The gradient of Noise Diffusion against the full gradient.")
    add_model_arguments(parser)
    parser.set_defaults(limit=8, batch_size=8, clip="clip", rounds=0)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 12, 20], metavar="T")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 3.0, 5.0], metavar="W")
    parser.add_argument("--reach", action="store_true", help="measure gains too, in the model's own call")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.001, 0.01, 0.1, 0.3])
    parser.add_argument("--draws", type=int, default=2, metavar="N", help="random candidates per prompt")
    parser.add_argument("--candidates", type=int, default=50, metavar="N")
    options = parser.parse_args(arguments)
    if min(options.limit, options.batch_size, options.draws, *options.steps) < 1:
        parser.error("expected at least 1 prompt, 1 draw, 1 step and batches of 1")
    record, bench = Record(options), Bench(options)
    calls = {
        key(t, w): {"num_inference_steps": t, "guidance_scale": w} for w in options.guidance for t in options.steps
    }
    for name, call in tqdm(calls.items(), unit="call"):
        if name not in record.parts.get("direction", {}):
            record.keep("direction", name, looked_at(bench, call, lambda problem: directions(problem, bench.scores)))
    print(direction_table(record.parts["direction"], options.guidance, options.steps))
    if options.reach:
        given = (bench.scores, options.gamma, options.draws, options.candidates)
        if "gains" not in record.parts.get("reach", {}):
            record.keep("reach", "gains", looked_at(bench, {}, lambda problem: reach(problem, *given)))
        print("\n" + reach_table(record.parts["reach"]["gains"], options.candidates))
    return record.parts


if __name__ == "__main__":
    main()
