"""Previews: candidates that are evaluated by one model call, a few of which are sampled fully."""

from collections.abc import Iterator, Sequence

import torch

from ...callbacks.noise_state import NoiseState
from ..objective import Objective, RewardObjective
from ..problem import seed_from
from ..sampling.sample import Sample


class Candidates:
    """Evaluated candidates in order of evaluation, with their rewards and features, on the CPU.

    Args:
        limit: The number of candidates to store for each position, those with the highest rewards; `None` for all.

    Attributes:
        origins: The step and the position in the batch of each.
        noises: `(C, H, W)` each.
        unary: The reward of each.
        features: `(...)` each; empty tensors if none were given.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.origins: list[tuple[int, int]] = []
        self.noises: list[torch.Tensor] = []
        self.unary: list[float] = []
        self.features: list[torch.Tensor] = []
        self.known: set[tuple[int, int]] = set()

    def add(self, step: int, noise: torch.Tensor, unary: torch.Tensor, features: torch.Tensor | None = None) -> None:
        """Add a batch. A noise that repeats at its position, as that of a stopped sample does, is not added."""
        features = noise.new_zeros(len(noise), 0) if features is None else features
        for row, each in enumerate(noise.detach().cpu()):
            key = (row, seed_from(each))
            if key not in self.known:
                self.known.add(key)
                self.origins.append((step, row))
                self.noises.append(each)
                self.unary.append(float(unary[row]))
                self.features.append(features[row].detach().cpu())
                self.forget(row)

    def forget(self, row: int) -> None:
        """Drop the candidate with the lowest reward if a position has more than the limit; of equal ones the latest."""
        found = self.of([row])
        if self.limit is not None and len(found) > self.limit:
            worst = self.highest(found)[-1]
            for values in (self.origins, self.noises, self.unary, self.features):
                del values[worst]

    def of(self, rows: Sequence[int]) -> list[int]:
        """Return the candidates of these positions."""
        return [index for index, (_, row) in enumerate(self.origins) if row in rows]

    def highest(self, found: Sequence[int]) -> list[int]:
        """Sort candidates by descending reward; ties go to the earliest."""
        return sorted(found, key=lambda index: -self.unary[index])


class CandidateObjective(Objective):
    """The objective of a choice among candidates: all sampled fully, or most of them previewed first.

    An object serves one run. A preview is the x0 estimate of one model call; its loss is NaN, so that only fully
    sampled noises are returned. A subclass defines the measure, and the best candidates of a set.

    Args:
        rewards: The rewards of candidates, or `None`.
        preview: Preview from the second evaluation until `kept` is called. If the pipeline makes a single step, its
            images cost no more than previews, and all are sampled fully.
        limit: The limit of previews; see `Candidates`.

    Attributes:
        step: The number of evaluations so far.
        sets: The positions in the batch of candidates that form one set.
        previews: The candidates that were previewed.
    """

    sets: list[list[int]]
    continues = None

    def __init__(self, rewards: RewardObjective | None, preview: bool, limit: int | None = None) -> None:
        self.rewards, self.preview = rewards, preview
        self.requires_prompt = rewards is not None and rewards.requires_prompt
        self.step, self.previewing = 0, False
        self.previews = Candidates(limit)

    def measure(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss `(B,)` and raw scores of a batch, and store them: in `previews` when previewing."""
        raise NotImplementedError(f"{type(self).__name__} must define `measure(sample)`.")

    def best(self, seen: Candidates, rows: Sequence[int], count: int) -> list[int]:
        """Return the `count` best candidates of a set, or all if there are fewer."""
        raise NotImplementedError(f"{type(self).__name__} must define `best(seen, rows, count)`.")

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        if self.rewards is not None:
            self.rewards.try_out(prompt, height, width, gradient)

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sample.preview = self.previewing
        loss, scores = self.measure(sample)
        if self.previewing:
            loss = torch.full_like(loss, torch.nan)
        if self.step == 0:  # a whole chain has been run by now
            self.previewing = self.preview and sample.sampler.timesteps != 1
        self.step += 1
        return loss, scores

    def kept(self, run: NoiseState, rounds: int) -> Iterator[torch.Tensor]:
        """Yield the best previews as noises to sample fully, at most `rounds` of `(B, C, H, W)`. Ends the previewing.

        A set that was stopped before gets one round, and an image that is stopped on the way no further one. Positions
        without a candidate are filled with the best noise so far.
        """
        self.previewing, plan = False, {}
        for rows in self.sets:
            plan.update(self.assigned(self.previews, rows, rounds if run.active[rows].any() else 1))
        going_on = torch.ones_like(run.active)
        for turn in range(1 + max((turn for turn, _ in plan), default=-1)):
            noise = run.best.noise.clone()
            for row in range(len(noise)):
                if (turn, row) in plan and going_on[row]:
                    noise[row] = self.previews.noises[plan[turn, row]].to(noise)
            yield noise
            going_on = going_on & run.active
            if not going_on.any():
                return

    def assigned(self, seen: Candidates, rows: Sequence[int], rounds: int) -> dict[tuple[int, int], int]:
        """Return the index of the candidate to sample at each (round, position in the batch).

        The candidates are the best of one set, enough for `rounds` rounds; `rows` are the positions of the set.
        """
        best = self.best(seen, rows, rounds * len(rows))
        return dict(
            zip(assigned_positions([seen.origins[index][1] for index in best], rows, rounds), best, strict=True)
        )


class PreviewedRewards(CandidateObjective):
    """Minus the rewards of each image; the previews with the highest rewards are kept.

    Args:
        rewards: The rewards.
        keep: The number of previews of each image that may be sampled fully.
    """

    rewards: RewardObjective

    def __init__(self, rewards: RewardObjective, keep: int) -> None:
        super().__init__(rewards, preview=True, limit=keep)

    def check_groups(self, groups: Sequence[int]) -> None:
        self.sets = [[row] for row in range(len(groups))]

    def measure(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, scores = self.rewards.evaluate(sample)
        if self.previewing:
            self.previews.add(self.step, sample.noise, -loss)
        return loss, scores

    def best(self, seen: Candidates, rows: Sequence[int], count: int) -> list[int]:
        return seen.highest(seen.of(rows))[:count]

    def describe(self) -> dict:
        return self.rewards.describe()


def assigned_positions(origins: Sequence[int], rows: Sequence[int], rounds: int) -> list[tuple[int, int]]:
    """Assign each candidate a (round, position), preferring the position at which it was drawn.

    Args:
        origins: The position at which each candidate was drawn.
        rows: The positions of the set.
        rounds: The number of batches to fill.
    """
    free = {row: list(range(rounds)) for row in rows}
    taken = [(free[row].pop(0), row) if free[row] else None for row in origins]
    left = iter(sorted((turn, row) for row, turns in free.items() for turn in turns))
    return [pair or next(left) for pair in taken]
