"""State of a running noise optimization, passed to callbacks after each step."""

import dataclasses
import time
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Best:
    """The best evaluation so far of each of `B` noises.

    Attributes:
        loss: `(B,)`, the lowest loss; infinite before the first evaluation. Ties go to the earliest.
        step: `(B,)`, the step of the lowest loss.
        noise: `(B, C, H, W)`, the noise of the lowest loss.
        images: `(B, 3, H, W)` in [0, 1], its images; of videos `(B, F, 3, H, W)`, the frames
            that rewards see; `None` if the objective asked for none.
        evaluations: The number of evaluations so far.
    """

    loss: torch.Tensor
    step: torch.Tensor
    noise: torch.Tensor
    images: torch.Tensor | None = None
    evaluations: int = 0


@dataclasses.dataclass(eq=False)
class NoiseState:
    """A running optimization of `B` independent noises.

    Attributes:
        pipeline: The pipeline whose noise is optimized. Callbacks may draw with it, as with one that is not in use.
        prompts: The `B` prompts of the rewards.
        steps: The number of evaluations that the method plans; with a time budget those that fit at the present rate.
        noise: `(B, C, H, W)`, unit variance, the noise that was evaluated in this step.
        step: Index of this evaluation, from 0. Step 0 is the baseline.
        images: `(B, 3, H, W)` in [0, 1], the images of the noise; of videos `(B, F, 3, H, W)`; `None`
            if the objective asked for none.
        loss: `(B,)`, lower is better, without the regularizer. NaN where a sample is not active.
        scores: Name to `(B,)`, the raw rewards of this step, higher is better.
        best: The best so far.
        active: `(B,)` bool. A sample that is not active keeps its best and is no longer recorded.
        reports: Plain values that methods and callbacks add to the result, by name.
        stopped: The reason why the run ended before its last step, or `None`.
        stage: "search", "start 1", "start 2", ... in a run that begins with a search, see `GradientOptimizer`; empty in
            others.
    """

    pipeline: Any
    prompts: list[str]
    steps: int
    noise: torch.Tensor
    step: int = -1
    images: torch.Tensor | None = None
    loss: torch.Tensor = dataclasses.field(init=False)
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    best: Best = dataclasses.field(init=False)
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    active: torch.Tensor = dataclasses.field(init=False)
    stopped: str | None = None
    stage: str = ""
    started: float = dataclasses.field(default_factory=lambda: time.perf_counter())

    def __post_init__(self) -> None:
        batch = len(self.noise)
        self.active = torch.ones(batch, dtype=torch.bool, device=self.noise.device)
        self.loss = torch.full((batch,), torch.inf, device=self.noise.device)
        self.best = Best(loss=self.loss, step=torch.zeros_like(self.active, dtype=torch.long), noise=self.noise)

    @property
    def elapsed(self) -> float:
        """Seconds since the optimization began."""
        return time.perf_counter() - self.started

    def stop(self, reason: str = "callback", samples: torch.Tensor | None = None) -> None:
        """End the run after this step, or only the samples for which the `(B,)` bool mask `samples` is true."""
        self.active = self.active & ~samples if samples is not None else torch.zeros_like(self.active)
        if not self.active.any():
            self.stopped = reason
