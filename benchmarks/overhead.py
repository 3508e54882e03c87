"""Overhead of ReNO's loop over a bare loop of `loss.backward()` on the same model.

python benchmarks/overhead.py --batch-size 8
"""

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from noiseopt import ReNO, optimize_noise, shapes_world
from noiseopt.demo import ONE_STEP, load_pipeline, seeded
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import CLIPScore


class BareLoop:
    """The same evaluations as ReNO's without best, history, checks or callbacks.

    As in ReNO the weights are frozen, prompts are encoded once, and the last evaluation needs no gradient.
    """

    call = staticmethod(inspect.unwrap(StableDiffusionPipeline.__call__))

    def __init__(self, pipe, reward: CLIPScore, prompts: list[str], steps: int) -> None:
        self.pipe, self.reward, self.prompts, self.steps = pipe, reward, prompts, steps

    def __call__(self) -> None:
        with torch.no_grad():
            embeddings, _ = self.pipe.encode_prompt(self.prompts, "cpu", 1, False)
            texts = torch.stack([self.reward.encode_text(prompt) for prompt in self.prompts])
            shape = (len(self.prompts), self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
            noise = torch.cat([torch.randn(1, *shape[1:], generator=stream) for stream in seeded(0, shape[0])])
        noise = noise.requires_grad_()
        optimizer = torch.optim.SGD([noise], lr=5.0, momentum=0.9, nesterov=True)
        for _ in range(self.steps - 1):
            optimizer.zero_grad()
            self.loss(noise, embeddings, texts).backward()
            torch.nn.utils.clip_grad_norm_([noise], 0.1)
            optimizer.step()
        with torch.no_grad():
            self.loss(noise, embeddings, texts)

    def loss(self, noise: torch.Tensor, embeddings: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        drawn = self.call(self.pipe, prompt_embeds=embeddings, latents=noise, output_type="pt", **ONE_STEP)
        scores = self.reward.logit_scale * (self.reward.encode_image(drawn.images) * texts).sum(-1)
        norm = noise.flatten(1).norm(dim=1)
        prior = 0.01 * (norm.square() / 2 - (noise[0].numel() - 1) * norm.log())
        return (prior - scores).sum()


class OurLoop(BareLoop):
    """ReNO through `optimize_noise`, including hook, prompt encoding and result."""

    def __call__(self) -> None:
        method = ReNO(rewards=self.reward, steps=self.steps, search=0, views=0)  # the same work as the bare loop
        generator = seeded(0, len(self.prompts))
        optimize_noise(self.pipe, self.prompts, method, generator=generator, **ONE_STEP)


def cost(work: Callable[[], None]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds that `work` takes; the latter are robust to other load."""
    wall, process = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - process


def paired_costs(
    ours: Callable[[], None], bare: Callable[[], None], repetitions: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the costs (ours, bare) of each repetition; the two alternate in order."""
    pairs = []
    for repetition in range(repetitions):
        if repetition % 2 == 0:
            pairs.append((cost(ours), cost(bare)))
        else:
            theirs = cost(bare)
            pairs.append((cost(ours), theirs))
    return pairs


def report(label: str, ours: Sequence[float], bare: Sequence[float], steps: int) -> str:
    """Format a row of the table: milliseconds per step, and the median of the ratios with their quartiles."""
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    mine, theirs = (1000 * statistics.median(times) / steps for times in (ours, bare))
    return f"| {label} | {theirs:.2f} | {mine:.2f} | {middle:.3f} | {low:.3f} – {high:.3f} |"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in one call")
    parser.add_argument("--steps", type=int, default=50, help="evaluations in one run")
    parser.add_argument("--repetitions", type=int, default=15, help="runs of each loop, at least 2")
    return parser.parse_args(argv)


def loops(batch_size: int, steps: int) -> tuple[OurLoop, BareLoop]:
    """Build both loops on the same frozen model."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    with quiet_libraries():
        reward = CLIPScore.from_pretrained(shapes_world.path("clip"))
    prompts = list(shapes_world.VALIDATION_PROMPTS[:batch_size])
    return OurLoop(pipe, reward, prompts, steps), BareLoop(pipe, reward, prompts, steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    arguments = parse_arguments(argv)
    ours, bare = loops(arguments.batch_size, arguments.steps)
    paired_costs(ours, bare, 1)  # warm-up
    pairs = paired_costs(ours, bare, arguments.repetitions)
    print(f"{arguments.steps} steps of {arguments.batch_size} prompts, {arguments.repetitions} repetitions\n")
    print("| seconds of | bare loop, ms a step | ReNO, ms a step | ratio, median | quartiles |\n|---|---|---|---|---|")
    for index, label in enumerate(("the clock", "the processor")):
        columns = ([side[index] for side in sides] for sides in zip(*pairs, strict=True))
        print(report(label, *columns, steps=arguments.steps))


if __name__ == "__main__":
    main()
