"""Runs that begin with a search: a few of many noises are chosen, and a method runs from each of them."""

from collections.abc import Iterable
from typing import Any

import torch

from ..callbacks.noise_state import NoiseState
from .problem import CandidateNoise, NoiseProblem
from .sampling.sampler import Gradient

SEARCH_SHARE = 0.3  # of a time budget; half of it leaves too few steps, see benchmarks/search_and_starts.py


class StagedMethod:
    """The stages of a method with `search`, in the place of the method. See `GradientOptimizer`.

    Args:
        method: The method, a `GradientOptimizer`.
        problem: The call.
    """

    def __init__(self, method: Any, problem: NoiseProblem) -> None:
        self.method, self.problem, self.searched = method, problem, method.searched(problem)

    def start(self, problem: NoiseProblem) -> "StagedState":
        return StagedState(problem, self.method.starts, self.method.start(problem))

    def needs(self, step: int, state: "StagedState") -> tuple[Gradient, bool]:
        """Return what an evaluation needs: no gradient in the search, and where a start ends."""
        if not state.stage:
            return None, self.method.previews or state.previews
        ends = self.method.evaluations is not None and step + 1 == self.end(state)
        return None if ends else self.method.gradient_mode, self.method.previews

    def inspect(self, run: NoiseState, objective: Any, state: "StagedState") -> torch.Tensor | None:
        """Score a noise of the search, or let the method inspect its own."""
        run.stage = f"start {state.stage}" if state.stage else "search"
        run.reports["search"] = state.report(run)
        if state.stage:
            return self.method.inspect(run, objective, state.inner)
        if run.step == 0:  # a whole chain has been run by now
            state.previews = not self.method.previews and self.problem.sampler.timesteps != 1
        if run.step or not state.previews:
            state.score(run)
        if run.step and state.previews:
            run.loss = torch.full_like(run.loss, torch.nan)
        return None

    def step(self, run: NoiseState, gradient: torch.Tensor | None, state: "StagedState") -> torch.Tensor:
        """Return the next noise of the search, of the method, or the first one of the next start."""
        if self.ends(run, state):
            noise = state.begin(run)
            state.inner = self.method.start(self.problem.beginning_at(noise, state.stage))
            return noise
        if state.stage:
            return self.method.step(run, gradient, state.inner)
        return state.fresh.draw() if state.scored else self.problem.noise

    def finish(self, run: NoiseState, objective: Any, state: "StagedState") -> Iterable[torch.Tensor]:
        run.reports["search"] = state.report(run)
        return self.method.finish(run, objective, state.inner)

    def ends(self, run: NoiseState, state: "StagedState") -> bool:
        """Return whether the stage ends with this step."""
        method, seconds = self.method, self.method.seconds
        if not state.stage:
            late = seconds is not None and run.elapsed > SEARCH_SHARE * seconds and state.scored >= method.starts
            return late or state.scored == self.searched
        return state.stage < method.starts and (run.step + 1 if seconds is None else run.elapsed) >= self.end(state)

    def end(self, state: "StagedState") -> float:
        """Return the number of evaluations, or the seconds, after which a start ends: each has an equal share."""
        if self.method.seconds is not None:
            return state.seconds + (self.method.seconds - state.seconds) * state.stage / self.method.starts
        begin, evaluations = state.first_steps[0], self.method.evaluations
        assert evaluations is not None
        return begin + (evaluations - begin) * state.stage // self.method.starts


class StagedState:
    """The stage of a run, the best noises of its search, and the state of the method.

    Attributes:
        stage: 0 for the search, then the number of the start.
        fresh: The source of noises.
        scored: The number of noises scored so far.
        previews: Whether they are scored by previews.
        noises: `(B, starts, C, H, W)`, the best of them so far.
        losses, steps: `(B, starts)`, their losses, infinite where there is none yet, and when they were scored.
        first_steps: The first step of each start that has begun.
        seconds: The time of the search.
        inner: The state of the method, for the present start.
    """

    def __init__(self, problem: NoiseProblem, starts: int, inner: Any) -> None:
        noise = problem.noise
        self.stage, self.scored, self.previews, self.seconds = 0, 0, False, 0.0
        self.fresh, self.inner = CandidateNoise(problem), inner
        self.noises = noise[:, None].repeat(1, starts, *[1] * (noise.ndim - 1))
        self.losses = torch.full((len(noise), starts), torch.inf, device=noise.device)
        self.steps = torch.zeros_like(self.losses, dtype=torch.long)
        self.first_steps: list[int] = []

    def score(self, run: NoiseState) -> None:
        """Take in an evaluated noise; of equal ones the earliest is kept."""
        loss = torch.where(run.loss.isnan(), torch.inf, run.loss).to(self.losses)  # NaN: stopped
        losses = torch.cat((self.losses, loss[:, None]), 1)
        best = losses.argsort(dim=1, stable=True)[:, :-1]
        rows = torch.arange(len(best), device=best.device)[:, None]
        self.losses = losses[rows, best]
        self.noises = torch.cat((self.noises, run.noise[:, None]), 1)[rows, best]
        self.steps = torch.cat((self.steps, torch.full_like(self.steps[:, :1], run.step)), 1)[rows, best]
        self.scored += 1

    def begin(self, run: NoiseState) -> torch.Tensor:
        """Begin the next start, and return its noise `(B, C, H, W)`."""
        if not self.stage:
            self.seconds = run.elapsed
        self.stage += 1
        self.first_steps.append(run.step + 1)
        return self.noises[:, self.stage - 1]

    def report(self, run: NoiseState) -> dict[str, Any]:
        best = [sum(first <= step for first in self.first_steps) for step in run.best.step.tolist()]
        return {
            "noises": self.scored,
            "previews": self.previews,
            "first_steps": list(self.first_steps),
            "found_at": self.steps.tolist(),
            "losses": self.losses.tolist(),
            "best_start": best,
        }
