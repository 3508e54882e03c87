"""Zero-order search: the best of the neighbors of a noise, and of theirs."""

import dataclasses
import math
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import RewardOptimizer
from ..noise_math import per_image, per_sample_norm, unit
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_method


@register_method("zero_order_search")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroOrderSearch(RewardOptimizer):
    """Searches around a noise, the pivot, moves to the best of its neighbors, and repeats.

    "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", Ma et al., CVPR 2025,
    https://arxiv.org/abs/2501.09732.

    The neighbors of a pivot p are `‖p‖·(λ·p/‖p‖ + √(1−λ²)·w)`, where w has length 1 and is uniform among the directions
    orthogonal to p: each has the norm of p and the cosine λ to it. A round evaluates N of them. The best is the next
    pivot if it is better than the present one, which is not sampled again; if not, the search restarts from a fresh
    noise, as in the code of tt-scale-flux, or goes on around the same pivot.

    Needs no gradient, so any reward works, also a black box. The best noise of all rounds is returned.
    `result.reports["zero_order_search"]` has the finished rounds of each image, and the number without progress.

    Args:
        steps: Evaluations, the baseline included. A round takes N, and one more after a restart.
        neighbors: N.
        cosine: λ: the higher, the closer the neighbors.
        restart: Restart from a fresh noise after a round without progress; `False` evaluates other neighbors of the
            same pivot.
    """

    neighbors: int = checked(4, "[1, inf)")
    cosine: float = checked(0.95, "[0, 1)")
    restart: bool = True

    def start(self, problem: NoiseProblem) -> "ZeroOrderState":
        return ZeroOrderState(CandidateNoise(problem), self.neighbors, self.cosine, self.restart)

    def inspect(self, run: NoiseState, objective: Any, state: "ZeroOrderState") -> None:
        state.update(run.noise, run.loss, run.active)
        run.reports["zero_order_search"] = {
            "rounds": state.rounds.tolist(),
            "rounds_without_progress": state.stuck.tolist(),
        }

    def step(self, run: NoiseState, gradient: None, state: "ZeroOrderState") -> torch.Tensor:
        return state.propose()


class ZeroOrderState:
    """The pivot of each image, and the best neighbor so far. Each image has its own rounds.

    Attributes:
        pivot, best: `(B, C, H, W)`: the pivot, and the best noise of the round, the pivot included.
        pivot_loss, best_loss: `(B,)`, their losses.
        evaluated: `(B,)`, the neighbors evaluated in this round; −1 if the pivot is still to be evaluated.
        rounds, stuck: `(B,)`, finished rounds, and those without a better neighbor.
    """

    def __init__(self, fresh: CandidateNoise, neighbors: int, cosine: float, restart: bool) -> None:
        self.fresh, self.neighbors, self.cosine, self.restart = fresh, neighbors, cosine, restart
        self.pivot = self.best = fresh.like
        self.pivot_loss = torch.full((len(fresh.like),), torch.inf, device=fresh.like.device)
        self.best_loss = self.pivot_loss
        self.evaluated = torch.full_like(self.pivot_loss, -1, dtype=torch.long)
        self.rounds = self.stuck = torch.zeros_like(self.evaluated)

    def update(self, noise: torch.Tensor, loss: torch.Tensor, active: torch.Tensor) -> None:
        """Record the evaluation of a pivot or a neighbor for the active images."""
        first = active & (self.evaluated < 0)
        self.pivot = torch.where(per_image(first, noise), noise, self.pivot)
        self.pivot_loss = torch.where(first, loss, self.pivot_loss)
        better = first | (active & (loss < self.best_loss))
        self.best = torch.where(per_image(better, noise), noise, self.best)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.evaluated = self.evaluated + active.long()
        self.end_rounds()

    def end_rounds(self) -> None:
        """Choose the next pivot of the images that have evaluated all neighbors."""
        over = self.evaluated == self.neighbors
        stuck = over & ~(self.best_loss < self.pivot_loss)
        self.rounds, self.stuck = self.rounds + over, self.stuck + stuck
        self.pivot = torch.where(per_image(over, self.best), self.best, self.pivot)
        self.pivot_loss = torch.where(over, self.best_loss, self.pivot_loss)
        self.evaluated = torch.where(over, torch.where(stuck & self.restart, -1, 0), self.evaluated)

    def propose(self) -> torch.Tensor:
        """Return the next noise `(B, C, H, W)`: a neighbor of the pivot, or a fresh pivot after a restart."""
        draw = self.fresh.draw()
        return torch.where(per_image(self.evaluated < 0, draw), draw, neighbor(self.pivot, draw, self.cosine))


def neighbor(pivot: torch.Tensor, direction: torch.Tensor, cosine: float) -> torch.Tensor:
    """Return `‖p‖·(λ·p/‖p‖ + √(1−λ²)·w)`, where w is the unit vector of `direction` orthogonal to the pivot.

    Args:
        pivot: p, `(B, ...)`.
        direction: `(B, ...)`, Gaussian for a w that is uniform.
        cosine: λ, in [0, 1): the cosine of the result to p.
    """
    along = unit(pivot)
    across = unit(direction - per_image((direction * along).flatten(1).sum(1), direction) * along)
    return per_image(per_sample_norm(pivot), pivot) * (cosine * along + math.sqrt(1 - cosine**2) * across)
