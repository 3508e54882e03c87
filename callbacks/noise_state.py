"""What a callback sees of a noise optimisation, once per optimisation step."""

import dataclasses
import time
from typing import Any

import torch


@dataclasses.dataclass(eq=False)
class NoiseState:
    """A running optimisation of `B` independent noises.

    Attributes:
        pipeline: The pipeline whose noise is optimised.
        prompts: The `B` prompts that rewards are asked about.
        steps: How many evaluations the method plans.
        noise: `(B, C, H, W)`, unit variance, the noise that was evaluated in this step.
        step: Index of this evaluation, from 0: step 0 is the plain result.
        images: `(B, 3, H, W)` in [0, 1], what the noise draws; `None` if the objective did not ask for images.
        loss: `(B,)`, lower is better, without the regularizer.
        scores: Name to `(B,)`, the raw rewards of this step, higher is better.
        best_loss: `(B,)`, the lowest loss so far.
        best_step: `(B,)`, the step of the lowest loss.
        best_noise: `(B, C, H, W)`, the noise of the lowest loss.
        best_images: `(B, 3, H, W)` or `None`, the images of the lowest loss.
        active: `(B,)` bool. A sample that is not active keeps its best and is not recorded any more.
        reports: What callbacks have to say in the result, by name: plain values.
        stopped: Why the run ended before its last step, or `None`.
    """

    pipeline: Any
    prompts: list[str]
    steps: int
    noise: torch.Tensor
    step: int = -1
    images: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    best_loss: torch.Tensor | None = None
    best_step: torch.Tensor | None = None
    best_noise: torch.Tensor | None = None
    best_images: torch.Tensor | None = None
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    active: torch.Tensor = dataclasses.field(init=False)
    stopped: str | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.active = torch.ones(len(self.noise), dtype=torch.bool, device=self.noise.device)

    @property
    def elapsed(self) -> float:
        """Seconds since the optimisation began."""
        return time.perf_counter() - self.started

    def stop(self, reason: str = "callback", samples: torch.Tensor | None = None) -> None:
        """End the run after this step, or only for the samples where the `(B,)` bool mask `samples` is true."""
        self.active = self.active & ~samples if samples is not None else torch.zeros_like(self.active)
        if not self.active.any():
            self.stopped = reason
