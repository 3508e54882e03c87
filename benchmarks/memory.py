"""Memory and time of a gradient with respect to the noise, by gradient checkpointing policy.

python benchmarks/memory.py
python benchmarks/memory.py --model sdxl --steps 1 4 --size 512 1024
python benchmarks/memory.py --model flux

Each row is one gradient of one image through the whole pipeline, of a fixed random projection of its pixels, without a
reward. The models have the published sizes and random weights, so nothing is downloaded; the default is the
architecture of SDXL at a fifth of its width, for a CPU. Memory is the peak above the loaded models: from torch's
allocator on CUDA, elsewhere of all tensors, counted in a separate run. Times are medians after a warm-up run; on a CPU
they are processor time over all threads, which is robust to other load.

"tiny decoder" and "frozen" save memory by computing a different gradient, without checkpointing. Its distance from the
exact one is meaningless for random weights, and left out.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from real_shapes import embeddings, flux, sd_turbo, sdxl_turbo, small_sdxl, tiny_decoder

from noiseopt import optimize_noise
from noiseopt.evaluation.live_bytes import LiveBytes
from noiseopt.evaluation.looking import Looking
from noiseopt.evaluation.measure import MEBIBYTE, PeakMemory, synchronize
from noiseopt.pipelines.memory.checkpointing import POLICIES
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.pipelines.sampling.sampler import Gradient

RESULTS = Path(__file__).parent / "results"
MODELS = {"small": small_sdxl, "sd": sd_turbo, "sdxl": sdxl_turbo, "flux": flux}
SIZES = {"small": 128, "sd": 512, "sdxl": 512, "flux": 1024}
WAYS = (*POLICIES, "tiny decoder", "frozen")


@dataclasses.dataclass
class Row:
    """One way to compute one gradient.

    Attributes:
        way: A checkpointing policy, "tiny decoder" or "frozen".
        steps: Sampling steps.
        size: Height and width of the image.
        memory: The peak in MiB above the models; `None` if out of memory.
        seconds: Time of the forward and backward pass; `None` if out of memory.
        difference: ‖gradient − exact‖ / ‖exact‖, where "none" gives the exact gradient; `None` if not applicable.
    """

    way: str
    steps: int
    size: int
    memory: float | None = None
    seconds: float | None = None
    difference: float | None = None


class Setting:
    """One pipeline and its call."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        self.pipe: Any = MODELS[model](dtype, device)
        self.device, self.decoder = device, tiny_decoder(self.pipe)

    def row(self, way: str, steps: int, size: int, repeats: int) -> tuple[Row, torch.Tensor | None]:
        """Return a row without its difference, and the gradient on the CPU."""
        row, gradients = Row(way, steps, size), []

        def fill(problem: NoiseProblem) -> None:
            take = functools.partial(gradient, problem, "frozen" if way == "frozen" else "full")
            gradients.append(take().double().cpu())
            seconds = [self.seconds(take) for _ in range(repeats)]
            row.memory, row.seconds = self.memory(take), statistics.median(seconds)

        policy, decoder = way if way in POLICIES else "none", self.decoder if way == "tiny decoder" else None
        call = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": 0.0}
        call |= {"generator": torch.Generator().manual_seed(0), **embeddings(self.pipe)}
        look = Looking(fill, checkpointing=policy, decoder=decoder)
        try:
            optimize_noise(self.pipe, None, look, callbacks=[], **call)
        except torch.OutOfMemoryError:
            return Row(way, steps, size), None
        return row, gradients[0]

    def seconds(self, take: Callable[[], Any]) -> float:
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        synchronize(self.device)
        started = clock()
        take()
        synchronize(self.device)
        return clock() - started

    def memory(self, take: Callable[[], Any]) -> float | None:
        """Return the peak in MiB."""
        if self.device.type == "cuda":
            peak = PeakMemory(self.device)
            peak.start()
            take()
            return peak.peak()
        with LiveBytes() as live:
            take()
        return live.peak / MEBIBYTE


def gradient(problem: NoiseProblem, kind: Gradient) -> torch.Tensor:
    """Return the gradient of a fixed random projection of the pixels with respect to the noise `(1, C, H, W)`."""
    leaf = problem.noise.clone().requires_grad_()
    images = problem.sampler.images(leaf, kind)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images)
    return torch.autograd.grad((images * weights).sum() / math.sqrt(images.numel()), leaf)[0]


def measure(setting: Setting, steps: Sequence[int], sizes: Sequence[int], repeats: int) -> list[Row]:
    rows = []
    for size in sizes:
        for count in steps:
            exact = None
            for way in WAYS:
                row, found = setting.row(way, count, size, repeats)
                exact = found if way == "none" else exact
                if way in POLICIES[1:] and exact is not None and found is not None:
                    row.difference = float((found - exact).norm() / exact.norm())
                rows.append(row)
                print(line_of(row, rows), flush=True)
    return rows


def base_of(row: Row, rows: Sequence[Row]) -> Row:
    """Return the row of the same call without checkpointing."""
    return next(each for each in rows if (each.way, each.steps, each.size) == ("none", row.steps, row.size))


def line_of(row: Row, rows: Sequence[Row]) -> str:
    """Format a row."""
    if row.memory is None or row.seconds is None:
        return f"| {row.size} | {row.steps} | {row.way} | does not fit | – | – | – | – |"
    base, memory, seconds = base_of(row, rows), "–", "–"
    if base.memory and base.seconds:
        memory, seconds = f"{row.memory / base.memory:.2f}", f"{row.seconds / base.seconds:.2f}"
    difference = "–" if row.difference is None else f"{row.difference:.0e}"
    cells = (row.size, row.steps, row.way, f"{row.memory:.0f}", memory, f"{row.seconds:.2f}", seconds, difference)
    return "| " + " | ".join(map(str, cells)) + " |"


def table(rows: Sequence[Row]) -> str:
    """Format the table in Markdown."""
    head = "| size | steps | checkpointing | peak MiB | × none | seconds | × none | difference of gradients |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *(line_of(row, rows) for row in rows)])


def described(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the settings and the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    asked = {"model": options.model, "dtype": options.dtype, "repeats": options.repeats}
    return {**asked, "device": device.type, "machine": name, "torch": torch.__version__}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="sampling steps")
    parser.add_argument("--size", type=int, nargs="+", help="height and width of the image, in pixels")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="default: bfloat16 on CUDA, else float32"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="for memory_<model>_<device>.*")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    options.size = options.size or [SIZES[options.model]]
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and write a table and its numbers."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    setting = Setting(options.model, getattr(torch, options.dtype), device)
    rows = measure(setting, options.steps, options.size, options.repeats)
    about = described(options, device)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"memory_{options.model}_{device.type}"
    numbers = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    title = ", ".join(f"{name} {value}" for name, value in about.items())
    path.with_suffix(".md").write_text(f"{title}\n\n{table(rows)}\n")
    return rows


if __name__ == "__main__":
    main()
