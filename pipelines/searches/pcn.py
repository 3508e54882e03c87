"""pCN: a Markov chain of noises whose law is the Gaussian, tilted towards high rewards."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward_sum import RewardSum
from ..method import NoiseOptimizer
from ..noise_diffusion.candidate_choice import displacement
from ..noise_math import per_image
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Clamp, Gradient

LEAST_BETA = 1e-3


@register_noise_optimizer("pcn")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PCN(NoiseOptimizer):
    """Preconditioned Crank-Nicolson: a Metropolis chain that keeps the law of the noise whatever its dimension.

    "MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster", Cotter, Roberts, Stuart and White,
    Statistical Science 2013, https://arxiv.org/abs/1202.0709.

    From the noise z with the reward r it proposes `z' = √(1−β²)·z + β·ξ`, ξ a fresh Gaussian noise, and goes there with
    probability `min(1, exp((r' − r) / T))`. The law N(0, I)·exp(r / T) is invariant: for a flat reward, or a large T,
    that is N(0, I) itself. With T = 0 only noises that are no worse are accepted, and it climbs.

    Needs no gradient: any reward does, a black box too. The best noise that was seen is returned, proposals that were
    not accepted included. `result.reports["pcn"]` has the share of accepted moves and the last β of each image. (With a
    noise sampler other than the white one it is the law of that sampler, as far as it is Gaussian.)

    Args:
        rewards: What `RewardSum` takes.
        steps: Evaluations, the plain result included.
        beta: β, in (0, 1]: how far a proposal is; 1 is an independent noise.
        temperature: T, at least 0, in units of the weighted sum of the rewards: a loss of T is accepted with
            probability 1/e. A tenth to a half of what rewards differ by from seed to seed is a start.
        acceptance: Adapt β, from `beta` on and for each image by itself, so that this share of the moves is accepted,
            in (0, 1): after the k-th move `ln β` changes by `(a − acceptance) / √k`, a the probability that it was
            accepted with. `None` for a fixed β, with which the law is kept exactly at every step.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        decoder: A tiny autoencoder that decodes while noises are tried: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 50
    beta: float = 0.3
    temperature: float = 0.1
    acceptance: float | None = None
    reward_prompt: str | Sequence[str] | None = None
    decoder: Any = None
    reward_device: str | torch.device | None = None
    gradient: Gradient = dataclasses.field(default=None, init=False)
    clamp: Clamp = dataclasses.field(default="hard", init=False)

    def check(self) -> None:
        super().check()
        if not (isinstance(self.beta, int | float) and 0 < self.beta <= 1):
            raise ValueError(f"Expected `beta` to be in (0, 1], but got {self.beta!r}.")
        temperature = self.temperature
        if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"Expected `temperature` to be a finite number of at least 0, but got {temperature!r}.")
        if self.acceptance is not None and not 0 < self.acceptance < 1:
            raise ValueError(f"Expected `acceptance` to be in (0, 1), or None, but got {self.acceptance!r}.")

    def objective(self, pipe) -> RewardObjective:
        return RewardObjective(RewardSum(self.rewards, device=self.device_of_rewards(pipe)), self.reward_prompt)

    def start(self, problem: NoiseProblem) -> "NoiseChain":
        return NoiseChain(CandidateNoise(problem), self.beta, self.temperature, self.acceptance)

    def inspect(self, state: NoiseState, objective: Any, memory: "NoiseChain") -> None:
        assert state.loss is not None
        memory.take(state.noise, state.loss, state.active)
        moves, accepted = memory.moves.tolist(), memory.accepted.tolist()
        rates = [yes / all_moves if all_moves else None for yes, all_moves in zip(accepted, moves, strict=True)]
        state.reports["pcn"] = {"acceptance": rates, "beta": memory.beta.tolist()}

    def step(self, state: NoiseState, gradient: None, memory: "NoiseChain") -> torch.Tensor:
        return memory.propose()


class NoiseChain:
    """Where the chain of each image is.

    Attributes:
        noise: z, `(B, C, H, W)`.
        loss: −r, `(B,)`; infinite before the first noise is evaluated.
        beta: β, `(B,)`.
        moves, accepted: `(B,)`, proposals so far, and those that the chain went to.
    """

    def __init__(self, fresh: CandidateNoise, beta: float, temperature: float, acceptance: float | None) -> None:
        self.fresh, self.temperature, self.acceptance = fresh, temperature, acceptance
        self.noise, batch = fresh.like, len(fresh.like)
        self.loss = torch.full((batch,), torch.inf, device=self.noise.device)
        self.beta = torch.full((batch,), beta, dtype=self.noise.dtype, device=self.noise.device)
        self.moves = self.accepted = torch.zeros_like(self.loss, dtype=torch.long)

    def take(self, noise: torch.Tensor, loss: torch.Tensor, active: torch.Tensor) -> None:
        """Go to what was evaluated, or stay, for the images that are active; the first noise is no move."""
        first = active & self.loss.isinf()
        log_ratio = log_acceptance(self.loss - loss, self.temperature)
        goes = self.fresh.uniform().log() < log_ratio  # the logarithm is below 0
        moved, accepted = active & ~first, active & ~first & goes
        self.moves, self.accepted = self.moves + moved, self.accepted + accepted
        self.noise = torch.where(per_image(first | accepted, noise), noise, self.noise)
        self.loss = torch.where(first | accepted, loss, self.loss)
        if self.acceptance is not None:
            self.adapt(log_ratio.exp(), moved, self.acceptance)

    def adapt(self, probability: torch.Tensor, moved: torch.Tensor, target: float) -> None:
        """Let the `probability` that moves were accepted with come to `target` by β, less and less."""
        change = ((probability - target) / self.moves.clamp_min(1).sqrt()).exp()
        adapted = (self.beta * change).clamp(LEAST_BETA, 1).to(self.beta.dtype)
        self.beta = torch.where(moved, adapted, self.beta)

    def propose(self) -> torch.Tensor:
        """`√(1−β²)·z + β·ξ`, `(B, C, H, W)`."""
        return self.noise + displacement(self.noise, self.fresh.draw(), self.beta.square())


def log_acceptance(gain: torch.Tensor, temperature: float) -> torch.Tensor:
    """`ln min(1, exp(gain / T))`, in [−∞, 0]; for T = 0 the limit, which accepts a gain of 0. NaN stays NaN."""
    loss = gain.clamp(max=0)
    return loss / temperature if temperature else torch.where(loss < 0, -torch.inf, loss)
