"""Best-of-N: the control that every optimizer has to beat."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import RewardOptimizer
from ..objective import Objective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_method
from .previews import PreviewedRewards


@register_method("best_of_n")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(RewardOptimizer):
    """Draws `steps` independent noises, the given one first, and returns the one with the highest reward.

    Needs no gradient, so any reward works, also a black box. With `budget="20s"` it is the control at equal wall-clock
    time.

    `preview=True` scores all but the given noise by the x0 estimate of one model call, and samples those with the
    highest rewards fully: `keep` for each image, the given one included. Preview steps have rewards, and NaN for a
    loss. A run that is stopped during the previews samples the best one fully. If the pipeline makes a single step,
    its images cost no more than previews, and all are sampled fully.

    Args:
        steps: N, the number of noises.
        preview: Score the noises by one model call, and sample only a few fully.
        keep: With `preview`, the number of noises sampled fully for each image, the given one included.
    """

    preview: bool = False
    keep: int = checked(4, "[2, inf)")

    @property
    def closing(self) -> int:
        return self.keep - 1 if self.preview else 0

    def objective(self, pipe) -> Objective:
        rewards: Any = super().objective(pipe)
        return PreviewedRewards(rewards, self.keep - 1) if self.preview else rewards

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, run: NoiseState, gradient: None, state: CandidateNoise) -> torch.Tensor:
        return state.draw()

    def finish(self, run: NoiseState, objective: Any, state: CandidateNoise) -> Iterable[torch.Tensor]:
        """Sample the best previews fully."""
        return objective.kept(run, self.keep - 1) if self.preview else ()
