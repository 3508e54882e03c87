"""Memory of the gradient of Noise Diffusion: sampling without a graph, then backward through decoder and scorer.

python benchmarks/frozen_gradient.py --steps 20
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch

from noiseopt import AutoReward, BestOfN, NoiseDiffusion, optimize_noise, shapes_world
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.measure import Cost, measured
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import Reward

PROMPT = shapes_world.VALIDATION_PROMPTS[0]


class Setting:
    """One model, scorer and call, with each way of computing a gradient."""

    def __init__(self, model: str, steps: int, images: int) -> None:
        with quiet_libraries():
            self.pipe: Any = load_pipeline(model)
            self.reward: Reward = AutoReward.from_pretrained(shapes_world.path("vqa"))
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)
        self.call = {**shapes_world.MODELS[model].call, "num_inference_steps": steps, "num_images_per_prompt": images}

    def sample(self) -> None:
        """Sample an image plainly, and score it."""
        method = BestOfN(rewards=self.reward, steps=1)
        optimize_noise(self.pipe, PROMPT, method, generator=torch.Generator().manual_seed(0), callbacks=[], **self.call)

    def tail(self) -> None:
        """Run decoder and scorer on latents, forward and backward."""
        unet, vae = self.pipe.unet.config, self.pipe.vae
        shape = (self.call["num_images_per_prompt"], unet.in_channels, unet.sample_size, unet.sample_size)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        images = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.autograd.grad(self.reward(images, PROMPT).sum(), latents)

    def round(self, gradient: Literal["full", "frozen"]) -> None:
        """Run one round of Noise Diffusion: two evaluations and the update between them."""
        method = NoiseDiffusion(rewards=self.reward, steps=2, candidates=2, gradient=gradient)
        optimize_noise(self.pipe, PROMPT, method, generator=torch.Generator().manual_seed(0), callbacks=[], **self.call)

    def ways(self) -> dict[str, Callable[[], None]]:
        return {
            "plain sampling and its score": self.sample,
            "decoder and scorer backwards, alone": self.tail,
            "a round, denoiser held constant": lambda: self.round("frozen"),
            "a round, through the denoiser": lambda: self.round("full"),
        }


def measure(setting: Setting, rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each way in each round; the ways alternate, and a warm-up round is not counted."""
    found: dict[str, list[Cost]] = {name: [] for name in setting.ways()}
    for round_ in range(rounds + 1):
        for name, way in setting.ways().items():
            with measured(setting.pipe, setting.pipe.device) as cost:
                way()
            found[name] += [cost] if round_ else []
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[Cost]]:
    parser = argparse.ArgumentParser(description="Memory of the gradient of Noise Diffusion.")
    parser.add_argument("--model", default="guided", help="an embedded multi-step model")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--images", type=int, default=16, help="images per call")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    found = measure(Setting(options.model, options.steps, options.images), options.rounds)
    print("| | peak memory above the models, MiB | of the largest |\n|---|---|---|")
    memory = {name: [cost.memory for cost in costs if cost.memory is not None] for name, costs in found.items()}
    largest = max((statistics.median(values) for values in memory.values() if values), default=None)
    for name, values in memory.items():
        if values and largest:
            print(f"| {name} | {statistics.median(values):.1f} | {statistics.median(values) / largest:.2f} |")
        else:
            print(f"| {name} | – | – |")
    return found


if __name__ == "__main__":
    main()
