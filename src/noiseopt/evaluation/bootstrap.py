"""Confidence intervals over prompts: the percentile bootstrap, https://doi.org/10.1214/aos/1176344552."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; NaN without data."""

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
    """Estimate a mean over prompts with a percentile bootstrap interval.

    Args:
        values: `(P,)`, one number per prompt: the mean over its seeds, or their sum if `weights` are given.
        weights: `(P,)`, the number of cases in each sum: the estimate is then `values.sum() / weights.sum()`. Resamples
            without any case are ignored.
        resamples: Number of resamples of `P` prompts with replacement.
        level: Confidence level in (0, 1).
        seed: Seed of the resampling. Equal `P` gives equal resamples, so estimates are comparable.
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
    """Estimate the mean difference `ours - theirs` of two methods on the same prompts, both `(P,)`.

    Prompts are resampled in pairs, so the difficulty of a prompt cancels.

    Raises:
        ValueError: For different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"Expected values of the same prompts, but got shapes {tuple(ours.shape)} and {tuple(theirs.shape)}."
        )
    return bootstrap(ours - theirs, **settings)
