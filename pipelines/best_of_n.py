"""Best-of-N: the control that every optimiser has to beat."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..callbacks.noise_state import NoiseState
from ..rewards.reward_sum import RewardSum
from .methods import register_noise_optimizer
from .noise_optimizer import NoiseOptimizer
from .noise_problem import CandidateNoise, NoiseProblem
from .objectives import RewardObjective
from .sampling import Clamp, Gradient


@register_noise_optimizer("best_of_n")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(NoiseOptimizer):
    """Draw `steps` independent noises, the given one first, and return the one with the highest reward.

    Needs no gradient: any reward does, a black box too. With a `TimeBudget` callback and a large `steps` it is the
    control at equal wall-clock.

    Args:
        rewards: What `RewardSum` takes.
        steps: N, the number of noises.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        preview: Score the x0 estimate of one model call instead of the whole chain.
    """

    rewards: Any
    steps: int = 50
    reward_prompt: str | Sequence[str] | None = None
    preview: bool = False
    gradient: Gradient = dataclasses.field(default=None, init=False)
    clamp: Clamp = dataclasses.field(default="hard", init=False)

    def objective(self, pipe) -> RewardObjective:
        return RewardObjective(RewardSum(self.rewards, device=pipe._execution_device), self.reward_prompt)

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, state: NoiseState, gradient: None, memory: CandidateNoise) -> torch.Tensor:
        return memory.draw()
