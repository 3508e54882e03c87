"""Best-of-N: the control that every optimiser has to beat."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward_sum import RewardSum
from ..method import NoiseOptimizer
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Clamp, Gradient
from .previews import PreviewedRewards


@register_noise_optimizer("best_of_n")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(NoiseOptimizer):
    """Draw `steps` independent noises, the given one first, and return the one with the highest reward.

    Needs no gradient: any reward does, a black box too. With a `TimeBudget` callback and a large `steps` it is the
    control at equal wall-clock.

    `preview=True` looks at all but the given noise as the x0 estimate of one model call, and draws those of the highest
    rewards wholly: `keep` for each image, the given one included. Steps that only look have rewards, and NaN for a
    loss. A run that is stopped among the previews draws the best one wholly. Where the pipeline makes a single step,
    its images take no longer than previews, and all are drawn.

    Args:
        rewards: What `RewardSum` takes.
        steps: N, the number of noises.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        preview: Look at the noises by one model call, and draw few wholly.
        keep: With `preview`, how many noises are drawn wholly for each image, the given one included; 2 or more.
        decoder: A tiny autoencoder that decodes while noises are tried: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 50
    reward_prompt: str | Sequence[str] | None = None
    preview: bool = False
    keep: int = 4
    decoder: Any = None
    reward_device: str | torch.device | None = None
    gradient: Gradient = dataclasses.field(default=None, init=False)
    clamp: Clamp = dataclasses.field(default="hard", init=False)

    @property
    def final_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is kept of previews."""
        return self.keep - 1 if self.preview else 0

    def check(self) -> None:
        super().check()
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 2:
            raise ValueError(f"Expected `keep` to be an integer of 2 or more, but got {self.keep!r}.")

    def objective(self, pipe) -> RewardObjective | PreviewedRewards:
        rewards = RewardObjective(RewardSum(self.rewards, device=self.device_of_rewards(pipe)), self.reward_prompt)
        return PreviewedRewards(rewards, self.keep - 1) if self.preview else rewards

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, state: NoiseState, gradient: None, memory: CandidateNoise) -> torch.Tensor:
        return memory.draw()

    def finish(self, state: NoiseState, objective: Any, memory: CandidateNoise) -> Iterable[torch.Tensor]:
        """What is kept of previews."""
        return objective.kept(state, self.keep - 1) if self.preview else ()
