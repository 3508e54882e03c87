"""Zero-order search: the best of the neighbours of a noise, and of theirs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward_sum import RewardSum
from ..method import NoiseOptimizer
from ..noise_diffusion.candidate_choice import unit
from ..noise_math import per_image, per_sample_norm
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Clamp, Gradient


@register_noise_optimizer("zero_order_search")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroOrderSearch(NoiseOptimizer):
    """Looks around a noise, the pivot, goes to the best of its neighbours, and looks around that.

    "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", Ma et al., CVPR 2025,
    https://arxiv.org/abs/2501.09732.

    The neighbours of a pivot p are `‖p‖·(λ·p/‖p‖ + √(1−λ²)·w)` with w of length 1, uniform among the directions at a
    right angle to p: each has exactly the norm of p and the cosine λ to it. A round looks at N of them. The best one is
    the next pivot if it is better than the present one, which is not drawn again; if not, the search begins anew from a
    fresh noise, as in the code of tt-scale-flux, or goes on around the same pivot.

    Needs no gradient: any reward does, a black box too. The best noise of all rounds is returned.
    `result.reports["zero_order_search"]` has the finished rounds of each image, and how many of them found nothing
    better.

    Args:
        rewards: What `RewardSum` takes.
        steps: Evaluations, the plain result included. A round takes N of them, and one more after a fresh start.
        neighbors: N, at least 1.
        cosine: λ, in [0, 1): the higher, the closer the neighbours.
        restart: Begin anew from a fresh noise after a round that found nothing better; `False` to look at other
            neighbours of the same pivot.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        decoder: A tiny autoencoder that decodes while noises are tried: see `NoiseOptimizer`.
        reward_device: Where rewards that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any
    steps: int = 50
    neighbors: int = 4
    cosine: float = 0.95
    restart: bool = True
    reward_prompt: str | Sequence[str] | None = None
    decoder: Any = None
    reward_device: str | torch.device | None = None
    gradient: Gradient = dataclasses.field(default=None, init=False)
    clamp: Clamp = dataclasses.field(default="hard", init=False)

    def check(self) -> None:
        super().check()
        if not isinstance(self.neighbors, int) or isinstance(self.neighbors, bool) or self.neighbors < 1:
            raise ValueError(f"Expected `neighbors` to be an integer of 1 or more, but got {self.neighbors!r}.")
        if not (isinstance(self.cosine, int | float) and 0 <= self.cosine < 1):
            raise ValueError(
                f"Expected `cosine` to be in [0, 1), but got {self.cosine!r}. At 1 a neighbour is the noise itself."
            )

    def objective(self, pipe) -> RewardObjective:
        return RewardObjective(RewardSum(self.rewards, device=self.device_of_rewards(pipe)), self.reward_prompt)

    def start(self, problem: NoiseProblem) -> "Neighborhood":
        return Neighborhood(CandidateNoise(problem), self.neighbors, self.cosine, self.restart)

    def inspect(self, state: NoiseState, objective: Any, memory: "Neighborhood") -> None:
        assert state.loss is not None
        memory.take(state.noise, state.loss, state.active)
        state.reports["zero_order_search"] = {
            "rounds": memory.rounds.tolist(),
            "rounds_without_progress": memory.stuck.tolist(),
        }

    def step(self, state: NoiseState, gradient: None, memory: "Neighborhood") -> torch.Tensor:
        return memory.propose()


class Neighborhood:
    """Around which noise each image searches, and what it has found there. Images are in rounds of their own.

    Attributes:
        pivot, best: `(B, C, H, W)`: the noise that is searched around, and the best one of the round, itself included.
        pivot_loss, best_loss: `(B,)`, their losses.
        looked: `(B,)`, how many neighbours have been evaluated in this round; −1 where the pivot has not been.
        rounds, stuck: `(B,)`, finished rounds, and those of them without a better neighbour.
    """

    def __init__(self, fresh: CandidateNoise, neighbors: int, cosine: float, restart: bool) -> None:
        self.fresh, self.neighbors, self.cosine, self.restart = fresh, neighbors, cosine, restart
        self.pivot = self.best = fresh.like
        self.pivot_loss = torch.full((len(fresh.like),), torch.inf, device=fresh.like.device)
        self.best_loss = self.pivot_loss
        self.looked = torch.full_like(self.pivot_loss, -1, dtype=torch.long)
        self.rounds = self.stuck = torch.zeros_like(self.looked)

    def take(self, noise: torch.Tensor, loss: torch.Tensor, active: torch.Tensor) -> None:
        """What was evaluated, of the images that are active: a pivot, or a neighbour."""
        first = active & (self.looked < 0)
        self.pivot = torch.where(per_image(first, noise), noise, self.pivot)
        self.pivot_loss = torch.where(first, loss, self.pivot_loss)
        better = first | (active & (loss < self.best_loss))
        self.best = torch.where(per_image(better, noise), noise, self.best)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.looked = self.looked + active.long()
        self.end_rounds()

    def end_rounds(self) -> None:
        """Choose the next pivot of the images that have looked at all neighbours."""
        over = self.looked == self.neighbors
        stuck = over & ~(self.best_loss < self.pivot_loss)
        self.rounds, self.stuck = self.rounds + over, self.stuck + stuck
        self.pivot = torch.where(per_image(over, self.best), self.best, self.pivot)
        self.pivot_loss = torch.where(over, self.best_loss, self.pivot_loss)
        self.looked = torch.where(over, torch.where(stuck & self.restart, -1, 0), self.looked)

    def propose(self) -> torch.Tensor:
        """The next noise of each image, `(B, C, H, W)`: a neighbour of its pivot, or a fresh one to begin anew from."""
        draw = self.fresh.draw()
        return torch.where(per_image(self.looked < 0, draw), draw, neighbor(self.pivot, draw, self.cosine))


def neighbor(pivot: torch.Tensor, direction: torch.Tensor, cosine: float) -> torch.Tensor:
    """`‖p‖·(λ·p/‖p‖ + √(1−λ²)·w)`, w the part of `direction` at a right angle to the pivot, scaled to length 1.

    Args:
        pivot: p, `(B, ...)`.
        direction: `(B, ...)`, Gaussian for a w that is uniform.
        cosine: λ, in [0, 1): the cosine of the result to p, each image by itself.
    """
    along = unit(pivot)
    across = unit(direction - per_image((direction * along).flatten(1).sum(1), direction) * along)
    return per_image(per_sample_norm(pivot), pivot) * (cosine * along + math.sqrt(1 - cosine**2) * across)
