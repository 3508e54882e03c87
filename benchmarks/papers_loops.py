"""Our ReNO and CNO against the loops released with the papers: time and memory per step, as ratios.

python benchmarks/papers_loops.py --model sd-turbo --method reno
python benchmarks/papers_loops.py --model sdxl-turbo --method cno --images 2 --size 256

Both sides use the same frozen model of the published size with random weights, the same rewards and noise, and
alternate in one process. Our exact rows must arrive at the same noise as the released loop, or the benchmark fails. The
time of a step is that between two evaluations: a backward pass, an update, a forward pass. The time of the run adds
setup and result, which matters for CNO with its three steps. Processor time is that of this process, for shared
machines; on CUDA it covers only the launches. Memory is the peak of a run above the loaded models: from torch's
allocator on CUDA, elsewhere the resident memory. It is measured in a warm-up round in which freed memory is returned at
once.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import real_shapes  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from real_rewards import reno_rewards  # pyright: ignore[reportMissingImports]
from torch.utils.checkpoint import checkpoint

from noiseopt import CNO, ReNO, optimize_noise
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.measure import PeakMemory, synchronize
from noiseopt.pipelines import NoiseOptimizer
from noiseopt.pipelines.sampling.first_call import first_step_only, stock_call
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import HPSv21, ImageRewardModel, ImageTransform, RewardSum

PROMPT = "a red circle left of a blue star"
PIPELINES: dict[str, Callable[..., Any]] = {"sd-turbo": real_shapes.sd_turbo, "sdxl-turbo": real_shapes.sdxl_turbo}
RESULTS = Path(__file__).parent / "results"
LOSS_OFFSETS = {"hpsv2.1": 1.0, "imagereward": 2.0, "clipscore": 100.0, "pickscore": 30.0}
COLUMNS = {
    "step": "time of a step",
    "processor": "processor time of a step",
    "run": "time of the run",
    "memory": "peak memory",
}
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
CNO_SAMPLING = {"num_inference_steps": 50, "guidance_scale": 6.0}


class Watch:
    """Records the time and loss of each evaluation, and the last noise.

    Two clocks are read: wall-clock and processor time, which is robust to other load. Our runs use it as a callback;
    the released loops call it at the same point.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.losses = device, []
        self.times: dict[str, list[float]] = {"step": [], "processor": []}

    def __call__(self, state: Any) -> None:
        self.note(state.loss.mean().item(), state.noise)

    def note(self, loss: float, noise: torch.Tensor) -> None:
        synchronize(self.device)
        self.times["step"].append(time.perf_counter())
        self.times["processor"].append(time.process_time())
        self.losses.append(loss)
        self.noise = noise.detach().float().clone()

    def seconds(self) -> dict[str, float]:
        """Return for each clock, "step" (wall) and "processor", the median time between evaluations."""
        steps = {name: itertools.pairwise(times) for name, times in self.times.items()}
        return {name: statistics.median(after - before for before, after in pairs) for name, pairs in steps.items()}


class ReleasedReNO:
    """The loop of github.com/ExplainableML/ReNO, which freezes its weights too.

    Each iteration encodes the prompt again in the pipeline and in every reward, the losses of all rewards share one
    graph with the decoder and the denoiser, and the image encoder of HPSv2 is checkpointed. (Checkpointing of the
    denoiser is requested, but has no effect in evaluation mode in the released environment.) The last iteration builds
    an unused graph.
    """

    def __init__(self, pipe: Any, rewards: RewardSum, call: dict[str, Any], noise: torch.Tensor, steps: int) -> None:
        self.pipe, self.rewards, self.call, self.noise, self.steps = pipe, rewards, call, noise, steps
        self.preprocess = ImageTransform(single_pass=True)

    def __call__(self, watch: Watch) -> None:
        latents = torch.nn.Parameter(self.noise.clone())
        optimizer = torch.optim.SGD([latents], lr=5.0, momentum=0.9, nesterov=True)
        best = math.inf
        for iteration in range(self.steps):
            optimizer.zero_grad()
            image = self.image(latents)
            loss = self.loss(image)
            if loss.item() < best:  # the best image keeps its graph alive
                best, _image, _latents = loss.item(), image, latents.detach().cpu()
            watch.note(loss.item(), latents)
            if iteration < self.steps - 1:
                (loss + chi_prior(latents).to(loss.dtype)).backward()
                torch.nn.utils.clip_grad_norm_(latents, 0.1)
                optimizer.step()

    def image(self, latents: torch.Tensor) -> torch.Tensor:
        again = torch.Generator(latents.device).manual_seed(0)
        call = {**self.call, "generator": again, "output_type": "pt", "return_dict": False}
        return stock_call(type(self.pipe))(self.pipe, PROMPT, latents=latents, **call)[0]

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        pixels, total = self.preprocess(image), image.new_zeros((), dtype=torch.float32)
        rewards: Any = self.rewards.rewards
        for name, reward in zip(self.rewards.names, rewards, strict=True):
            loss = LOSS_OFFSETS[name] - released_score(reward, pixels.to(reward.dtype)).float().sum()
            loss.item()  # it logs each loss
            total = total + self.rewards.weights[name] * loss
        return total


def released_score(reward: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Score images as the release does, encoding the text each time."""
    if isinstance(reward, ImageRewardModel):
        reward.tokens.batches.clear()
        return given_pixels(reward).score(pixels, [PROMPT])
    tower, is_hps = reward.model.vision_model, isinstance(reward, HPSv21)
    with checkpointed(tower.encoder.layers) if is_hps else contextlib.nullcontext():
        features = reward.model.visual_projection(tower(pixel_values=pixels).pooler_output)
    text = padded_text(reward) if is_hps else reward.encode_text(PROMPT)
    cosine = (F.normalize(features.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)
    return cosine if is_hps else reward.logit_scale * cosine


def given_pixels(reward: ImageRewardModel) -> ImageRewardModel:
    """Return the reward for preprocessed pixels; weights are shared."""
    twin = copy.copy(reward)
    twin.image_transform = lambda pixels: pixels
    return twin


def padded_text(reward: HPSv21) -> torch.Tensor:
    """Return the text features over all 77 positions, as in open_clip."""
    tokens = reward.tokenizer(PROMPT, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    ids = tokens["input_ids"].to(reward.device)  # pyright: ignore[reportAttributeAccessIssue]
    return reward.model.text_projection(reward.model.text_model(input_ids=ids).pooler_output)


@contextlib.contextmanager
def checkpointed(layers: Any) -> Iterator[None]:
    """Checkpoint the layers inside the context, as open_clip does."""
    try:
        for layer in layers:
            vars(layer)["forward"] = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def chi_prior(latents: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(latents).float()
    return 0.01 * (0.5 * norm**2 - (latents[0].numel() - 1) * norm.log())


class ReleasedCNO:
    """The loop released with CNO: the gradient of its loss through the guided denoiser, for all images.

    One call of the denoiser gives the reference; each iteration then calls it with a graph, and Adam updates the noise.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], noise: torch.Tensor, steps: int) -> None:
        self.pipe, self.call, self.noise, self.steps = pipe, call, noise, steps

    def __call__(self, watch: Watch) -> None:
        with torch.no_grad():
            reference = self.directions(self.noise)
        latents = self.noise.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=0.01)
        for _ in range(self.steps):
            loss = contrastive_loss(self.directions(latents), reference)
            watch.note(loss.item(), latents)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def directions(self, latents: torch.Tensor) -> torch.Tensor:
        twin = copy.copy(self.pipe)
        twin.scheduler = copy.deepcopy(self.pipe.scheduler)
        call = {**self.call, "num_images_per_prompt": len(latents), "output_type": "latent", "return_dict": False}
        with first_step_only(twin):
            x0 = stock_call(type(twin))(twin, PROMPT, latents=latents.to(twin.unet.dtype), **call)[0]
        return F.normalize(F.adaptive_avg_pool2d(x0.float(), 16).flatten(2), dim=1)


def contrastive_loss(found: torch.Tensor, reference: torch.Tensor, tau: float = 0.1) -> torch.Tensor:
    """Return the cross-entropy in every cell, with the image's reference as the positive in its own position; γ = 1."""
    batch, _, cells = found.shape
    others = torch.einsum("icp,jcp->pij", found, found)
    own = torch.eye(batch, dtype=torch.bool, device=found.device)
    logits = torch.where(own, (found * reference).sum(1).T[:, :, None], others) / tau
    return F.cross_entropy(logits.reshape(-1, batch), torch.arange(batch, device=found.device).repeat(cells))


class OurLoop:
    """A method through `optimize_noise`, with the prompt and the rewards' text encoded once per run."""

    def __init__(self, pipe: Any, method: NoiseOptimizer, call: dict[str, Any], noise: torch.Tensor) -> None:
        self.pipe, self.method, self.call, self.noise = pipe, method, call, noise

    def __call__(self, watch: Watch) -> None:
        for reward in getattr(getattr(self.method, "rewards", None), "rewards", ()):
            reward.prompt_features.clear()
        call = {"num_images_per_prompt": len(self.noise), "latents": self.noise.to(self.pipe.unet.dtype), **self.call}
        optimize_noise(self.pipe, PROMPT, self.method, callbacks=watch, **call)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        loop: Runs the loop once.
        exact: Whether it must arrive where the released loop does.
        offset: Added to its losses to match those of the released loop.
    """

    loop: Callable[[Watch], None]
    exact: bool = False
    offset: float = 0.0


def reno_rows(pipe: Any, rewards: RewardSum, size: int, steps: int) -> dict[str, Row]:
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": size, "width": size}
    offset = sum(weight * LOSS_OFFSETS[name] for name, weight in rewards.weights.items())
    noise = drawn_noise(pipe, 1, size)
    rate = 5.0 * 64 / noise.shape[-1]  # in units of the side of the noise: the released loop takes 5 at any
    method = functools.partial(ReNO, rewards=rewards, mode="parity", steps=steps, learning_rate=rate)
    rows = {
        "released loop": Row(ReleasedReNO(pipe, rewards, call, noise, steps)),
        'ReNO(mode="parity")': Row(OurLoop(pipe, method(), call, noise), True, offset),
        'and checkpointing="blocks"': Row(OurLoop(pipe, method(checkpointing="blocks"), call, noise), True, offset),
    }
    if isinstance(pipe.vae, AutoencoderKL):  # the embedded model's decoder is already tiny
        rows["and a tiny decoder"] = Row(OurLoop(pipe, method(decoder=real_shapes.tiny_decoder(pipe)), call, noise))
    return rows


def cno_rows(pipe: Any, images: int, size: int, steps: int) -> dict[str, Row]:
    pipe = copy.copy(pipe)
    pipe.scheduler = DDIMScheduler(
        **real_shapes.NOISE_LEVELS, steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    call = {**CNO_SAMPLING, "height": size, "width": size}
    noise = drawn_noise(pipe, images, size)
    released = CNO(steps=steps, gradient="full", gamma=1.0)
    return {
        "released loop": Row(ReleasedCNO(pipe, call, noise, steps)),
        'CNO(gradient="full", gamma=1.0)': Row(OurLoop(pipe, released, call, noise), True),
        "CNO()": Row(OurLoop(pipe, CNO(steps=steps), call, noise)),
    }


def drawn_noise(pipe: Any, images: int, size: int) -> torch.Tensor:
    """Return noise `(B, C, H, W)` in float32 with values that the pipeline's dtype represents exactly."""
    side = size // pipe.vae_scale_factor
    noise = torch.randn(images, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    return noise.to(pipe.unet.device, pipe.unet.dtype).float()


def measure(rows: dict[str, Row], rounds: int, device: torch.device) -> dict[str, dict[str, list[Any]]]:
    """Return the measurements of each row: its peak MiB, and by round the seconds of a step and a run, and its `Watch`.

    In a round the rows run one after the other, so that other load on the machine affects all of them.
    """
    found: dict[str, dict[str, list[Any]]] = {name: {"memory": []} for name in rows}
    for name, row in reversed(rows.items()):  # in reverse, so that lazy imports do not count for exact rows
        memory = PeakMemory(device)
        with memory_goes_back():
            memory.start()
            row.loop(Watch(device))
            found[name]["memory"].append(memory.peak())
        print(f"{name}, {found[name]['memory']} MiB", file=sys.stderr)
    for round_ in range(rounds):
        for name, row in list(rows.items())[:: -1 if round_ % 2 else 1]:
            watch, started = Watch(device), time.perf_counter()
            row.loop(watch)
            synchronize(device)
            numbers = {**watch.seconds(), "run": time.perf_counter() - started}
            for key, value in {**numbers, "watches": watch}.items():
                found[name].setdefault(key, []).append(value)
            print(f"round {round_}: {name}, {numbers}", file=sys.stderr)
    return found


@contextlib.contextmanager
def memory_goes_back() -> Iterator[None]:
    """Return freed blocks to the system inside the context, if the C library supports it.

    Otherwise it caches most of them, and freed memory would count. Caching is faster, so it is restored afterwards,
    with the thresholds that glibc adapts to in a process with blocks of this size.
    """
    mallopt(MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, 2**25)
        mallopt(TRIM_THRESHOLD, 2**26)


def mallopt(parameter: int, value: int) -> None:
    """Call mallopt(3) of glibc. Does nothing with another C library."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def deviation(ours: Watch, released: Watch, start: torch.Tensor, offset: float) -> tuple[float, float]:
    """Return the largest difference of the losses, and that of the final noises.

    The latter is relative to the total change of the noise in the released loop.
    """
    losses = max(abs(a + offset - b) for a, b in zip(ours.losses, released.losses, strict=True))
    moved = (released.noise - start).norm()
    return losses, float((ours.noise - released.noise).norm() / moved)


def ratio(ours: Sequence[float | None], released: Sequence[float | None]) -> str:
    """Return the median ratio within a round, with minimum and maximum; a dash if not measured."""
    values = [mine / theirs for mine, theirs in zip(ours, released, strict=True) if mine is not None and theirs]
    return f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]" if values else "–"


def compared(rows: dict[str, Row], found: dict[str, dict[str, list[Any]]], noise: torch.Tensor) -> dict[str, Any]:
    """Return the numbers of each row, and the deviation of exact ones from the released loop."""
    released = found["released loop"]
    table = {}
    for name, row in rows.items():
        ours = found[name]
        table[name] = {key: ours[key] for key in COLUMNS}
        table[name] |= {f"{key} ratio": ratio(ours[key], released[key]) for key in COLUMNS}
        if row.exact:
            pairs = zip(ours["watches"], released["watches"], strict=True)
            table[name]["deviation"] = max(deviation(*pair, noise, row.offset) for pair in pairs)
    return table


def check_exact(table: dict[str, Any], tolerance: float) -> None:
    """Raise `SystemExit` for an exact row that deviates from the released loop."""
    for name, row in table.items():
        losses, noise = row.get("deviation", (0.0, 0.0))
        if not (losses <= tolerance and noise <= tolerance):
            raise SystemExit(
                f"Expected {name} to follow the released loop, but its losses differ by {losses:.1e} and its noise by "
                f"{noise:.1e} of its total change: more than {tolerance}."
            )


def report(title: str, table: dict[str, Any]) -> str:
    """Format the table in Markdown."""
    lines = [f"{title}\n", "| | seconds a step | peak MiB | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for name, row in table.items():
        memory = [value for value in row["memory"] if value is not None]
        peak = f"{statistics.median(memory):.0f}" if memory else "–"
        ratios = " | ".join(row[f"{key} ratio"] for key in COLUMNS)
        lines.append(f"| {name} | {statistics.median(row['step']):.3f} | {peak} | {ratios} |")
    far = [row["deviation"] for row in table.values() if "deviation" in row]
    losses, noise = (max(values) for values in zip(*far, strict=True))
    lines.append(f"\nExact rows: losses differ by at most {losses:.1e}, the noise by {noise:.1e} of its total change.")
    return "\n".join(lines)


def load(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a frozen stock pipeline with its text encoders."""
    if model == "tiny":
        pipe: Any = load_pipeline("turbo").to(device, dtype)
    else:
        pipe = PIPELINES[model](dtype, device, text_encoders=True)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", *PIPELINES), default="tiny")
    parser.add_argument("--method", choices=("reno", "cno"), default="reno")
    parser.add_argument("--size", type=int, help="height and width of the images (default: the model's)")
    parser.add_argument("--steps", type=int, help="evaluations per run (default: 4 for ReNO, 3 for CNO)")
    names = tuple(LOSS_OFFSETS)
    parser.add_argument(
        "--rewards", nargs="+", choices=names, default=names, help="rewards of ReNO (default: all four)"
    )
    parser.add_argument("--images", type=int, default=5, help="images per set, for CNO")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tolerance", type=float, help="for losses and noise (default: 0.01, or 1 in half precision)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the table and its numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(fastest if options.device == "auto" else options.device)
    dtype, tiny = getattr(torch, options.dtype), options.model == "tiny"
    with quiet_libraries():
        pipe = load(options.model, dtype, device)
        rewards = reno_rewards(tiny, dtype, device, options.rewards) if options.method == "reno" else None
    size = options.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    if rewards is not None:
        rows = reno_rows(pipe, rewards, size, options.steps or 4)
    else:
        rows = cno_rows(pipe, options.images, size, options.steps or 3)
    found = measure(rows, options.rounds, device)
    images = 1 if rewards is not None else options.images
    table = compared(rows, found, drawn_noise(pipe, images, size))
    title = f"{options.method}, {options.model}, {images} × {size} px, {options.dtype}, {device.type}"
    print(report(title, table))
    name = f"papers_loops_{options.method}_{options.model}_{device.type}"
    (options.output / f"{name}.md").write_text(report(title, table) + "\n")
    (options.output / f"{name}.json").write_text(json.dumps(table, indent=2) + "\n")
    check_exact(table, options.tolerance or (0.01 if dtype == torch.float32 else 1.0))
    return table


if __name__ == "__main__":
    main()
