"""Callbacks that record scores and images."""

from pathlib import Path

import torch
from PIL import Image

from ..frames import as_strips
from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class History(NoiseCallback):
    """Record one row per step and sample: `step, sample, prompt, seconds, loss, norm` and each reward.

    Attributes:
        rows: Plain values, ready for `csv.DictWriter` or `pandas.DataFrame`. `norm` is ‖noise‖ / √d, about 1 for
            Gaussian noise.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int | str]] = []

    def on_run_start(self, state: NoiseState) -> None:
        self.rows = []

    def on_step_end(self, state: NoiseState) -> None:
        norm = state.noise.flatten(1).norm(dim=1) / state.noise[0].numel() ** 0.5
        columns = {"loss": state.loss, "norm": norm, **state.scores}
        for sample, prompt in enumerate(state.prompts):
            values = {name: column[sample].item() for name, column in columns.items()}
            seconds = round(state.elapsed, 4)
            self.rows.append({"step": state.step, "sample": sample, "prompt": prompt, "seconds": seconds, **values})


class StepImages(NoiseCallback):
    """Store the images of every `every`-th step in memory and, given a `folder`, as PNG files; videos as strips.

    Args:
        every: The interval in steps, at least 1.
        folder: The folder of the PNG files; it is created if needed.

    Attributes:
        images: Step -> `(B, 3, H, W)` in [0, 1], or `(B, F, 3, H, W)` of videos, float32 on the CPU.

    Raises:
        ValueError: If `every` is below 1.
    """

    def __init__(self, every: int = 1, folder: str | Path | None = None) -> None:
        if every < 1:
            raise ValueError(f"Expected `every` to be at least 1, but got {every}.")
        self.every, self.folder = every, Path(folder) if folder is not None else None
        self.images: dict[int, torch.Tensor] = {}

    def on_run_start(self, state: NoiseState) -> None:
        self.images = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_step_end(self, state: NoiseState) -> None:
        if state.step % self.every or state.images is None:
            return
        self.images[state.step] = state.images.float().cpu()
        if self.folder is not None:
            for sample, image in enumerate(as_strips(self.images[state.step])):
                pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(self.folder / f"step_{state.step:03d}_sample_{sample}.png")
