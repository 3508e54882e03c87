"""Callbacks that stop a run early."""

import torch

from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class EarlyStopping(NoiseCallback):
    """Stop a sample when its best loss has not decreased by more than `min_delta` for `patience` steps.

    Each sample of a batch is stopped independently, so its result does not depend on the rest of the batch.

    Args:
        patience: Steps without progress, at least 1.
        min_delta: The smallest decrease of the loss that counts as progress, at least 0.

    Raises:
        ValueError: For arguments outside their ranges.
    """

    continues = ("reference", "waited")

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"Expected patience >= 1 and min_delta >= 0, but got {patience} and {min_delta}.")
        self.patience, self.min_delta = patience, min_delta

    def on_run_start(self, state: NoiseState) -> None:
        self.reference = torch.full((len(state.noise),), torch.inf, device=state.noise.device)
        self.waited = torch.zeros(len(state.noise), dtype=torch.long, device=state.noise.device)

    def on_step_end(self, state: NoiseState) -> None:
        progress = state.best.loss < self.reference - self.min_delta
        self.reference = torch.where(progress, state.best.loss, self.reference)
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
    """Stop after the step in which the time budget is used up.

    Args:
        seconds: Seconds since the start of the optimization, above 0.

    Raises:
        ValueError: If `seconds` is not above 0.
    """

    def __init__(self, seconds: float) -> None:
        if seconds <= 0:
            raise ValueError(f"Expected a time budget of more than 0 seconds, but got {seconds}.")
        self.seconds = seconds

    def on_step_end(self, state: NoiseState) -> None:
        if state.noise.is_cuda:
            torch.cuda.synchronize(state.noise.device)
        if state.elapsed >= self.seconds:
            state.stop("time budget")
