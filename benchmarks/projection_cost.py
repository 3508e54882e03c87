"""Time of `WhiteNoiseProjection` of a noise of FLUX's size, relative to a gradient of SD-Turbo.

python benchmarks/projection_cost.py --size 256

The gradient is that of one image with respect to its noise through the model of published size with random weights,
without a reward: a lower bound of a step. ReNO projects twice per step, gradient and noise. On a CPU times are of the
processor, over all threads.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence

import torch
from memory import MODELS, Setting, gradient
from real_shapes import embeddings

from noiseopt import optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.pipelines.white_noise import WhiteNoiseProjection

FLUX_NOISE = (1, 16, 64, 64)  # 65,536 numbers, at 512 px


def gradient_seconds(setting: Setting, size: int, repeats: int) -> float:
    """Return the median time of a gradient of one image of `size`² pixels, after a first one."""
    seconds: list[float] = []

    def fill(problem: NoiseProblem) -> None:
        take = functools.partial(gradient, problem, "full")
        seconds.extend(setting.seconds(take) for _ in range(1 + repeats))

    call = {"height": size, "width": size, "num_inference_steps": 1, "guidance_scale": 0.0}
    call |= {"generator": torch.Generator().manual_seed(0), **embeddings(setting.pipe)}
    optimize_noise(setting.pipe, None, Looking(fill, checkpointing="none"), callbacks=[], **call)
    return statistics.median(seconds[1:])


def projection_seconds(setting: Setting, repeats: int) -> float:
    """Return the median time of a projection, after a first one."""
    noise = torch.randn(FLUX_NOISE, generator=torch.Generator().manual_seed(0)).to(setting.device)
    seconds = [setting.seconds(functools.partial(WhiteNoiseProjection(), noise)) for _ in range(1 + repeats)]
    return statistics.median(seconds[1:])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="sd", help="sd is SD-Turbo")
    parser.add_argument("--size", type=int, default=512, help="height and width of the image, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed gradients")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> float:
    """Measure, print, and return the ratio of a projection to a gradient."""
    options = parse_arguments(arguments)
    setting = Setting(options.model, torch.float32, torch.device(options.device))
    whole, part = gradient_seconds(setting, options.size, options.repeats), projection_seconds(setting, 100)
    print(f"gradient of {options.model} at {options.size} px: {whole:.3f} s")
    print(f"projection of {torch.Size(FLUX_NOISE).numel():,} numbers: {1000 * part:.3f} ms, {100 * part / whole:.4f}%")
    return part / whole


if __name__ == "__main__":
    main()
