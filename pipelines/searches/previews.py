"""Candidates that are looked at by one model call each, and the few of them that are drawn wholly."""

from collections.abc import Iterator, Sequence

import torch

from ...callbacks.noise_state import NoiseState
from ..objective import Objective, RewardObjective
from ..problem import seed_from
from ..sampling.sample import Sample


class SeenNoises:
    """Candidates that were evaluated, in that order, and what they are chosen by; on the CPU.

    Args:
        limit: Of each place keep only so many, those of the highest reward; `None` for all.

    Attributes:
        origins: The step and the place in the batch of each.
        noises: `(C, H, W)` each.
        unary: The reward of each.
        features: `(...)` each, empty for those that came without.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.origins: list[tuple[int, int]] = []
        self.noises: list[torch.Tensor] = []
        self.unary: list[float] = []
        self.features: list[torch.Tensor] = []
        self.known: set[tuple[int, int]] = set()

    def add(self, step: int, noise: torch.Tensor, unary: torch.Tensor, features: torch.Tensor | None = None) -> None:
        """A batch; a noise that comes again at its place, as that of a sample that was stopped, is no new candidate."""
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
        """The candidate of the lowest reward of a place that has more than the limit; of equals the last."""
        found = self.of([row])
        if self.limit is not None and len(found) > self.limit:
            worst = self.highest(found)[-1]
            for values in (self.origins, self.noises, self.unary, self.features):
                del values[worst]

    def of(self, rows: Sequence[int]) -> list[int]:
        """The candidates that were drawn at these places."""
        return [index for index, (_, row) in enumerate(self.origins) if row in rows]

    def highest(self, found: Sequence[int]) -> list[int]:
        """These candidates from the highest reward to the lowest; equals as they came."""
        return sorted(found, key=lambda index: -self.unary[index])


class CandidateObjective(Objective):
    """What a choice among candidates looks at: all of them drawn wholly, or most of them as previews first.

    An object serves one run. A preview is the x0 estimate of one model call; it has no loss (NaN), so that only what
    was drawn wholly is returned. A subclass says what is measured, and which candidates are the best of a set.

    Args:
        rewards: What candidates are worth; `None` for those of a subclass.
        preview: Look at previews from the second evaluation until `kept` is called. Where the pipeline makes a single
            step, its images take no longer than previews, and all are drawn.
        limit: Of previews; see `SeenNoises`.

    Attributes:
        step: Evaluations so far.
        sets: The places in the batch of candidates that are chosen among together.
        previews: The candidates that were previewed.
    """

    sets: list[list[int]]

    def __init__(self, rewards: RewardObjective | None, preview: bool, limit: int | None = None) -> None:
        self.rewards, self.preview = rewards, preview
        self.requires_prompt = rewards is not None and rewards.requires_prompt
        self.step, self.previewing = 0, False
        self.previews = SeenNoises(limit)

    def measure(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss `(B,)` and raw scores of a batch, and remember them: in `previews` when previewing."""
        raise NotImplementedError(f"{type(self).__name__} must define `measure(sample)`.")

    def best(self, seen: SeenNoises, rows: Sequence[int], count: int) -> list[int]:
        """The candidates of a set that are best: `count` of them, or all if there are fewer."""
        raise NotImplementedError(f"{type(self).__name__} must define `best(seen, rows, count)`.")

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        if self.rewards is not None:
            self.rewards.try_out(prompt, height, width, gradient)

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sample.preview = self.previewing
        loss, scores = self.measure(sample)
        if self.previewing:
            loss = torch.full_like(loss, torch.nan)
        if self.step == 0:  # by now a whole chain has been run
            self.previewing = self.preview and sample.sampler.timesteps != 1
        self.step += 1
        return loss, scores

    def kept(self, state: NoiseState, rounds: int) -> Iterator[torch.Tensor]:
        """The best previews, as noises to draw wholly: at most `rounds` of `(B, C, H, W)`. Ends the previewing.

        A set that was stopped before has one round, and an image that is stopped on the way no further one. Where there
        is nothing to draw the best noise so far fills up.
        """
        self.previewing, plan = False, {}
        for rows in self.sets:
            plan.update(self.seated(self.previews, rows, rounds if state.active[rows].any() else 1))
        going_on = torch.ones_like(state.active)
        for turn in range(1 + max((turn for turn, _ in plan), default=-1)):
            noise = state.best_noise.clone()  # pyright: ignore[reportOptionalMemberAccess]
            for row in range(len(noise)):
                if (turn, row) in plan and going_on[row]:
                    noise[row] = self.previews.noises[plan[turn, row]].to(noise)
            yield noise
            going_on = going_on & state.active
            if not going_on.any():
                return

    def seated(self, seen: SeenNoises, rows: Sequence[int], rounds: int) -> dict[tuple[int, int], int]:
        """Round and place to the candidate to draw there: the best of a set that has the places `rows`."""
        best = self.best(seen, rows, rounds * len(rows))
        return dict(zip(seats([seen.origins[index][1] for index in best], rows, rounds), best, strict=True))


class PreviewedRewards(CandidateObjective):
    """Minus the rewards, each image by itself; the previews of the highest rewards are kept.

    Args:
        rewards: The rewards.
        keep: How many previews of each image may be drawn wholly.
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

    def best(self, seen: SeenNoises, rows: Sequence[int], count: int) -> list[int]:
        return seen.highest(seen.of(rows))[:count]

    def describe(self) -> dict:
        return self.rewards.describe()


def seats(origins: Sequence[int], rows: Sequence[int], rounds: int) -> list[tuple[int, int]]:
    """For each of some candidates, by the place it was drawn at, a round and a place: its own one as long as it lasts.

    There are `rounds` batches to fill, of which a set has the places `rows`.
    """
    free = {row: list(range(rounds)) for row in rows}
    taken = [(free[row].pop(0), row) if free[row] else None for row in origins]
    left = iter(sorted((turn, row) for row, turns in free.items() for turn in turns))
    return [seat or next(left) for seat in taken]
