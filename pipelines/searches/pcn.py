"""pCN: a Markov chain of noises whose distribution is the Gaussian, tilted towards high rewards."""

import dataclasses
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import RewardOptimizer
from ..noise_math import displacement, per_image
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_method

LEAST_BETA = 1e-3


@register_method("pcn")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PCN(RewardOptimizer):
    """Preconditioned Crank-Nicolson: a Metropolis chain that keeps the distribution of the noise in any dimension.

    "MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster", Cotter, Roberts, Stuart and White,
    Statistical Science 2013, https://arxiv.org/abs/1202.0709.

    From the noise z with reward r it proposes `z' = √(1−β²)·z + β·ξ`, ξ fresh Gaussian noise, and accepts with
    probability `min(1, exp((r' − r) / T))`. The distribution N(0, I)·exp(r / T) is invariant: for a flat reward, or a
    large T, N(0, I) itself. With T = 0 only noises that are no worse are accepted, and the chain climbs.

    Needs no gradient, so any reward works, also a black box. The best noise is returned, rejected proposals included.
    `result.reports["pcn"]` has the acceptance rate and the last β of each image. (Another noise sampler than white
    replaces N(0, I) by its distribution, as far as that is Gaussian.)

    Args:
        steps: Evaluations, the baseline included.
        beta: β, the distance of a proposal; 1 is an independent noise.
        temperature: T, in units of the weighted sum of rewards: a loss of T is accepted with probability 1/e. Start
            with a tenth to a half of the spread of rewards over seeds.
        acceptance: Adapt β of each image, starting from `beta`, towards this acceptance rate: after the k-th proposal
            `ln β` changes by `(a − acceptance) / √k`, where a is the probability that it was accepted. `None` keeps β
            fixed, which keeps the distribution exactly.
    """

    beta: float = checked(0.3, "(0, 1]")
    temperature: float = checked(0.1, "[0, inf)")
    acceptance: float | None = checked(None, "(0, 1)")

    def start(self, problem: NoiseProblem) -> "PCNState":
        return PCNState(CandidateNoise(problem), self.beta, self.temperature, self.acceptance)

    def inspect(self, run: NoiseState, objective: Any, state: "PCNState") -> None:
        state.update(run.noise, run.loss, run.active)
        proposals, accepted = state.proposals.tolist(), state.accepted.tolist()
        rates = [yes / count if count else None for yes, count in zip(accepted, proposals, strict=True)]
        run.reports["pcn"] = {"acceptance": rates, "beta": state.beta.tolist()}

    def step(self, run: NoiseState, gradient: None, state: "PCNState") -> torch.Tensor:
        return state.propose()


class PCNState:
    """The current noise of the chain of each image.

    Attributes:
        noise: z, `(B, C, H, W)`.
        loss: −r, `(B,)`; infinite before the first noise is evaluated.
        beta: β, `(B,)`.
        proposals, accepted: `(B,)`, the proposals so far, and those that were accepted.
    """

    def __init__(self, fresh: CandidateNoise, beta: float, temperature: float, acceptance: float | None) -> None:
        self.fresh, self.temperature, self.acceptance = fresh, temperature, acceptance
        self.noise, batch = fresh.like, len(fresh.like)
        self.loss = torch.full((batch,), torch.inf, device=self.noise.device)
        self.beta = torch.full((batch,), beta, dtype=self.noise.dtype, device=self.noise.device)
        self.proposals = self.accepted = torch.zeros_like(self.loss, dtype=torch.long)

    def update(self, noise: torch.Tensor, loss: torch.Tensor, active: torch.Tensor) -> None:
        """Accept or reject the evaluated noise for the active images; the first noise is no proposal."""
        first = active & self.loss.isinf()
        log_ratio = log_acceptance(self.loss - loss, self.temperature)
        goes = self.fresh.uniform().log() < log_ratio  # the logarithm is below 0
        moved, accepted = active & ~first, active & ~first & goes
        self.proposals, self.accepted = self.proposals + moved, self.accepted + accepted
        self.noise = torch.where(per_image(first | accepted, noise), noise, self.noise)
        self.loss = torch.where(first | accepted, loss, self.loss)
        if self.acceptance is not None:
            self.adapt(log_ratio.exp(), moved, self.acceptance)

    def adapt(self, probability: torch.Tensor, moved: torch.Tensor, target: float) -> None:
        """Adapt β with decreasing steps, so that the acceptance `probability` approaches `target`."""
        change = ((probability - target) / self.proposals.clamp_min(1).sqrt()).exp()
        adapted = (self.beta * change).clamp(LEAST_BETA, 1).to(self.beta.dtype)
        self.beta = torch.where(moved, adapted, self.beta)

    def propose(self) -> torch.Tensor:
        """Return the proposal `√(1−β²)·z + β·ξ`, `(B, C, H, W)`."""
        return self.noise + displacement(self.noise, self.fresh.draw(), self.beta.square())


def log_acceptance(gain: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return `ln min(1, exp(gain / T))` in [−∞, 0]; for T = 0 the limit, which accepts a gain of 0. NaN stays NaN."""
    loss = gain.clamp(max=0)
    return loss / temperature if temperature else torch.where(loss < 0, -torch.inf, loss)
