"""Callbacks that stop a run early."""

import math
import re
import time

import torch

from .noise_callback import NoiseCallback
from .noise_state import NoiseState

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_in(text: str) -> float:
    """Return the seconds in a text such as "20s", "1.5min", "500ms" or "2h".

    Raises:
        ValueError: For anything else, and for no time at all.
    """
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*({'|'.join(SECONDS)})", text.strip())
    seconds = float(match[1]) * SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"Expected a time above 0 such as '20s', '1.5min', '500ms' or '2h', but got {text!r}.")
    return seconds


class EarlyStopping(NoiseCallback):
    """Stop a sample when its best loss has not decreased by more than `min_delta` for `patience` steps.

    Each sample of a batch is stopped independently, so its result does not depend on the rest of the batch. In a run
    that begins with a search, the steps of each start are counted anew and compared with each other, those of the
    search not at all; a sample that is stopped leaves out its other starts.

    Args:
        patience: Steps without progress, at least 1.
        min_delta: The smallest decrease of the loss that counts as progress, at least 0.

    Raises:
        ValueError: For arguments outside their ranges.
    """

    continues = ("reference", "waited", "stage")

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"Expected patience >= 1 and min_delta >= 0, but got {patience} and {min_delta}.")
        self.patience, self.min_delta = patience, min_delta

    def on_run_start(self, state: NoiseState) -> None:
        self.reference = torch.full((len(state.noise),), torch.inf, device=state.noise.device)
        self.waited = torch.zeros(len(state.noise), dtype=torch.long, device=state.noise.device)
        self.stage = state.stage

    def on_step_end(self, state: NoiseState) -> None:
        if state.stage != self.stage:
            self.on_run_start(state)
        if state.stage == "search":
            return
        loss = state.loss if state.stage else state.best.loss
        progress = loss < self.reference - self.min_delta
        self.reference = torch.where(progress, loss, self.reference)
        self.waited = torch.where(progress, 0, self.waited + 1)
        state.stop("patience", self.waited >= self.patience)


class LossThreshold(NoiseCallback):
    """Stop a sample when its best loss is at most `threshold`; each sample of a batch is stopped independently.

    Args:
        threshold: The loss to reach. With a single reward of weight 1 it is the negated target score.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def on_step_end(self, state: NoiseState) -> None:
        state.stop("threshold", state.best.loss <= self.threshold)


class TimeBudget(NoiseCallback):
    """Stop before the first step that would end after the time budget, if it took as long as the last one.

    Args:
        seconds: Seconds since the start of the optimization, above 0.
        closing: Evaluations after the last step, for each of which the time of the first step is kept.

    Raises:
        ValueError: If `seconds` is not above 0.
    """

    def __init__(self, seconds: float, closing: int = 0) -> None:
        if seconds <= 0:
            raise ValueError(f"Expected a time budget of more than 0 seconds, but got {seconds}.")
        self.seconds, self.closing = seconds, closing
        self.last: float | None = None
        self.first = 0.0

    def on_run_start(self, state: NoiseState) -> None:
        self.last = time.perf_counter() if state.step < 0 else None  # a resumed run draws images before its first step
        self.first = 0.0

    def on_step_end(self, state: NoiseState) -> None:
        if state.noise.is_cuda:
            torch.cuda.synchronize(state.noise.device)
        now = time.perf_counter()
        took, self.last = 0.0 if self.last is None else now - self.last, now
        self.first = self.first or took
        if state.elapsed + took + self.closing * self.first > self.seconds:
            state.stop("time budget")
