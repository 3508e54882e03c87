"""Confidence intervals over prompts: the percentile bootstrap, https://doi.org/10.1214/aos/1176344552."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with the interval that a share `level` of the resamples falls into; NaN where there is no data."""

    value: float
    low: float
    high: float


def bootstrap(
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The mean of a quantity over prompts, with what drawing other prompts might have given.

    Args:
        values: `(P,)`, one number for each prompt: the mean over its seeds, or their sum if `weights` are given.
        weights: `(P,)`, how many cases each sum is over: the estimate is then `values.sum() / weights.sum()`. Resamples
            without any case are left out.
        resamples: Draws of `P` prompts with replacement.
        level: Of the interval, in (0, 1).
        seed: Of the draws: the same for the same `P`, so that estimates are comparable.
    """
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    values = values.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    chosen = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values[chosen].sum(1) / weights[chosen].sum(1)
    tail = (1 - level) / 2
    low, high = means.nanquantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Estimate(float(values.sum() / weights.sum()), low, high)


def paired_bootstrap(ours: torch.Tensor, theirs: torch.Tensor, **settings) -> Estimate:
    """The mean difference `ours − theirs` of two methods on the same prompts, both `(P,)`.

    Prompts are drawn in pairs: what makes a prompt hard for both methods cancels.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"Expected the same prompts twice, but got {tuple(ours.shape)} and {tuple(theirs.shape)}.")
    return bootstrap(ours - theirs, **settings)
