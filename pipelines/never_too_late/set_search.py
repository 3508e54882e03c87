"""The search before the steps of It's Never Too Late: the candidates that are the best set together."""

from collections.abc import Callable
from typing import Any

import torch

from ...callbacks.noise_state import NoiseState
from ..problem import CandidateNoise, NoiseProblem
from ..searches.previews import assigned_positions
from ..stages import SEARCH_SHARE

SWEEPS = 10  # at most, over the positions of a set
Loss = Callable[[torch.Tensor], float]


class SetSearch:
    """The search of a run: the given noises, then fresh ones, and at the end the best set of all.

    Args:
        problem: The call.
        count: k, the number of noises to score at each position of the batch.

    Attributes:
        searching: Whether noises are still scored.
        scored: The number of noises scored so far.
        chosen: `(B, C, H, W)`, the noises of the best sets, once they are known.
    """

    def __init__(self, problem: NoiseProblem, count: int) -> None:
        self.count, self.scored, self.searching = count, 0, count > 0
        self.fresh = CandidateNoise(problem) if count else None
        self.chosen: torch.Tensor | None = None

    @property
    def stage(self) -> str:
        """The stage of the run, as in runs of several stages; empty without a search."""
        return "search" if self.searching else "start 1" if self.scored else ""

    def inspect(self, run: NoiseState, objective: Any, good: torch.Tensor, seconds: float | None) -> None:
        """Take in an evaluation, of which `good` `(B,)` bool may be chosen, and choose the sets if it is the last."""
        self.scored += 1
        objective.refuse(~good)
        late = seconds is not None and run.elapsed > SEARCH_SHARE * seconds
        if late or self.scored == self.count:
            self.chosen, origins = chosen_sets(objective)
            steps, rows = zip(*origins, strict=True)
            run.reports["search"] = {"noises": self.scored, "from_step": list(steps), "from_image": list(rows)}
            objective.end_search()

    def step(self) -> torch.Tensor:
        """Return the next noises to score, or those to begin with."""
        if self.chosen is None:
            assert self.fresh is not None
            return self.fresh.draw()
        self.searching = False
        return self.chosen


def chosen_sets(objective: Any) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return the noises `(B, C, H, W)` of the best set of each prompt, and the step and position each was drawn at.

    A candidate keeps its position in the batch if that is free.
    """
    noises = torch.stack([noise for noise, *_ in objective.candidates])  # (T, B, C, H, W)
    noise, origins = noises[0].clone(), [(0, row) for row in range(noises.shape[1])]
    for rows in objective.sets:
        drawn = [(step, row) for step in range(len(noises)) for row in rows.tolist()]
        best = best_set(objective.loss_of_candidates(rows), len(drawn), len(rows))
        places = assigned_positions([drawn[index][1] for index in best], rows.tolist(), 1)
        for index, (_, row) in zip(best, places, strict=True):
            origins[row] = drawn[index]
            noise[row] = noises[drawn[index]]
    return noise, origins


def best_set(loss: Loss, count: int, size: int) -> list[int]:
    """Return the K of N candidates with the lowest loss that exchanges of one candidate reach.

    They start from the best of the sets that were drawn together: candidates 0 to K − 1, K to 2K − 1, and so on.

    Args:
        loss: Maps `(K,)` different indices to the loss of the set, infinite for one that is not allowed.
        count: N, a multiple of K.
        size: K.
    """
    value, best = min((loss(part), part.tolist()) for part in torch.arange(count).split(size))
    for _ in range(SWEEPS):
        before = value
        for place in range(size):
            others = best[:place] + best[place + 1 :]
            tried = [[*best[:place], index, *best[place + 1 :]] for index in range(count) if index not in others]
            found, group = min((loss(torch.tensor(group)), group) for group in tried)
            if found < value:
                value, best = found, group
        if value == before:
            break
    return best
