"""Rewards as a score in [0, 1], on which the step size of Noise Diffusion depends."""

import math
from typing import Any

import torch

from ..objective import RewardObjective
from ..sampling.sample import Sample

SCORE_SLACK = 1e-3  # rounding error of a probability


class UnitScore(RewardObjective):
    """Minus the total of rewards, which lies in [0, 1] or is mapped there by `score_range`.

    Args:
        rewards: A `RewardSum`, or anything that it takes.
        score_range: The totals (low, high) that become the scores 0 and 1; `None` for totals in [0, 1].

    Raises:
        ValueError: For rewards whose published range exceeds [0, 1]; at the first evaluation, for a total outside.
    """

    def __init__(self, rewards: Any, score_range: tuple[float, float] | None = None) -> None:
        super().__init__(rewards)
        self.score_range = score_range
        if score_range is None:
            self.check_ranges()
        else:
            check_score_range(score_range)

    def check_ranges(self) -> None:
        """Raise `ValueError` if the published ranges allow a total outside [0, 1]."""
        low = high = 0.0
        for reward, weight in zip(self.rewards.rewards, self.rewards.weights.values(), strict=True):
            span: Any = reward.range
            if span is None and weight and hasattr(reward, "function"):
                return  # a callable without a range: its values are checked
            if weight:
                ends = span or (-math.inf, math.inf)
                low, high = low + weight * ends[0], high + weight * ends[1]
        if low < 0 or high > 1:
            raise ValueError(self.advice(f"{list(self.rewards.weights)} have a total from {low:g} to {high:g}"))

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, scores = super().evaluate(sample)
        self.check_total(-loss.detach())
        return loss, scores

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        super().try_out(prompt, height, width, gradient)
        if all(hasattr(reward, "function") for reward in self.rewards.rewards):
            image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                self.check_total(self.rewards(image, prompt).total)

    def check_total(self, total: torch.Tensor) -> None:
        if self.score_range is None and not ((total >= -SCORE_SLACK) & (total <= 1 + SCORE_SLACK)).all():
            raise ValueError(self.advice(f"{list(self.rewards.weights)} gave {[round(x, 4) for x in total.tolist()]}"))

    @staticmethod
    def advice(found: str) -> str:
        return (
            f"Expected a score in [0, 1], since the step is γ = 1 − √score, but {found}. Pass the totals of bad and "
            "good images as `score_range=(low, high)`, or map the reward yourself, as with `torch.sigmoid`."
        )

    @staticmethod
    def score_of(total: torch.Tensor, score_range: tuple[float, float] | None) -> torch.Tensor:
        """Map totals `(B,)` to scores in [0, 1], linearly in `score_range` and clamped."""
        low, high = score_range or (0.0, 1.0)
        return ((total - low) / (high - low)).clamp(0, 1)


def check_score_range(score_range: Any) -> None:
    """Raise `ValueError` unless a range is (low, high), two finite numbers with low < high."""
    ends = score_range if isinstance(score_range, list | tuple) else ()
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)]
    if len(ends) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError(
            f"Expected `score_range` as (low, high) with low < high, but got {score_range!r}. Pass the totals of bad "
            "and good images."
        )
