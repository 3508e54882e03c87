"""The contract of a method: what it minimizes, and how it moves the noise."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch

from ..callbacks.early_stopping import seconds_in
from ..callbacks.noise_state import NoiseState
from ..checked_fields import check_fields, checked
from ..frames import Frames, check_frames
from ..private_names import execution_device
from ..rewards.contract.reward import check_reward_device
from ..rewards.contract.reward_sum import RewardSum, checked_reward_pairs
from .loading import loaded_models
from .memory.checkpointing import Checkpointing
from .objective import Objective, RewardObjective
from .problem import NoiseProblem
from .sampling.sampler import Clamp, Gradient

SETTING = bool | int | float | str | None
AUTO_SEARCH, AUTO_SHARE = 16, 1 / 3  # the most noises, and their share of the evaluations


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseOptimizer:
    """Base class of methods. A method is its mathematics: an `objective`, and a `step` of the noise.

    The loop in `loop.py` evaluates, keeps the best, and runs the callbacks. Subclasses are frozen, keyword-only
    dataclasses whose fields are the settings; a field made by `checked` and one annotated with a `Literal` is checked
    before any model runs. A method that differentiates has a field `gradient: Literal["full", "frozen"]`.

    The last five settings hold for every method, and `budget`. `chunk_size`, `checkpointing` and `reward_device` change
    how a run is computed, not what it finds.

    Args:
        steps: Evaluations, the baseline included.
        budget: Takes the place of `steps`: a number is that of all evaluations, those after the last step included; a
            text such as "20s", "1.5min", "500ms" or "2h" is the time of a run, from its first evaluation on, in which
            as many are done as fit: none begins that would end too late if it took as long as the last one.
        chunk_size: The number of images whose graphs are in memory at a time: the same gradient, for one more forward
            pass. "auto" measures the graph of one image and takes as many as fit into half of the free memory; `None`
            takes the whole batch.
        checkpointing: Gradient checkpointing of denoiser and decoder: "none"; "blocks", for one more forward pass;
            "steps", each call of the denoiser and each block in it, for two more, so that the memory hardly grows with
            the number of denoising steps; or "auto", the first of these whose graph takes at most half of the free
            memory. The images and gradients are the same.
        decoder: A tiny autoencoder that decodes in place of the pipeline's own during the optimization, an
            approximation that saves time and memory: a Hub id such as "madebyollin/taesdxl", a folder, or a loaded
            module. The images of the result are decoded by the pipeline's own. `None` uses that throughout.
        reward_device: The device on which rewards given by name are loaded, such as "cuda:1"; `None` is the pipeline's
            device. Loaded rewards stay where they are.
        frames: Of a video, the frames that rewards and features see, whose values are averaged: a number of evenly
            spaced ones, "first", "middle", "last", "all", or a list of indices. Of no effect on images.

    Attributes:
        returns: "best" returns the noise of the lowest loss: the noise moves `steps − 1` times. "last" returns the
            noise after `steps` moves, the last of which is not evaluated.
    """

    steps: int = checked(50, "[1, inf)")
    budget: str | int | None = None
    chunk_size: int | Literal["auto"] | None = checked(None, "[1, inf)")
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None
    frames: Frames = 4
    returns: ClassVar[Literal["best", "last"]] = "best"

    @property
    def gradient_mode(self) -> Gradient:
        """The gradient that the loop takes: "full", "frozen" or `None`. See `PipelineSampler.images`."""
        return getattr(self, "gradient", None)

    @property
    def previews(self) -> bool:
        """Return whether the objective sees the x0 estimate of one model call instead of the whole chain."""
        return getattr(self, "preview", False)

    def searched(self, problem: NoiseProblem) -> int:
        """Return the number of noises that are scored before the first step. See `GradientOptimizer`."""
        return 0

    @property
    def may_preview(self) -> bool:
        """Return whether a run may evaluate x0 estimates of one model call."""
        return self.previews

    @property
    def closing(self) -> int:
        """The most evaluations that `finish` adds."""
        return 0

    @property
    def evaluations(self) -> int | None:
        """The evaluations of a run without those of `finish`; `None` for as many as a time budget allows."""
        if isinstance(self.budget, str):
            return None
        return self.steps if self.budget is None else self.budget - self.closing

    @property
    def seconds(self) -> float | None:
        """The time budget in seconds, if there is one."""
        return seconds_in(self.budget) if isinstance(self.budget, str) else None

    @property
    def clamp(self) -> Clamp:
        """The clamp of pixels: that of stock pipelines for released loops and for methods without gradients."""
        exact = self.gradient_mode is None or getattr(self, "mode", None) == "parity"
        return "hard" if exact else "straight_through"

    def objective(self, pipe) -> Objective:
        """Return the objective. Called once, before any model runs."""
        raise NotImplementedError(f"{type(self).__name__} must define `objective(pipe)`.")

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        """Return a `(B,)` penalty that steers the noise but does not count when the best is chosen."""
        return 0.0

    def start(self, problem: NoiseProblem) -> Any:
        """Return the state that the method carries from step to step, such as momentum.

        A run can be resumed if the state has only tensors, numbers, texts, `torch.Generator`s and `torch.optim.Adam`,
        in attributes, lists and dicts.
        """
        return None

    def needs(self, step: int, state: Any) -> tuple[Gradient, bool]:
        """Return what the evaluation of a step needs: its gradient, and whether a preview is enough."""
        return self.gradient_mode, self.previews

    def step(self, run: NoiseState, gradient: Any, state: Any) -> torch.Tensor:
        """Return the next noise `(B, C, H, W)`.

        Args:
            run: The evaluation so far: `run.noise` and its `run.loss`, `run.best`.
            gradient: `(B, C, H, W)`, the gradient of loss and regularizer with respect to `run.noise`; `None` for a
                method without gradients.
            state: The object that `start` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `step(run, gradient, state)`.")

    def inspect(self, run: NoiseState, objective: Any, state: Any) -> torch.Tensor | None:
        """Inspect an evaluation before the best is updated; the method may stop samples with `run.stop`.

        Returns:
            A `(B,)` bool mask of the samples for which this step may be the best; `None` for all. Step 0 always counts.
        """
        return None

    def finish(self, run: NoiseState, objective: Any, state: Any) -> Iterable[torch.Tensor]:
        """Yield noises `(B, C, H, W)` to evaluate at the end, also of a run that was stopped.

        The next one is requested after the last one was evaluated. A method that yields some says how many in
        `closing`.
        """
        return ()

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot work."""
        check_fields(self)
        check_reward_device(self.reward_device)
        check_frames(self.frames)
        self.check_budget()

    def check_budget(self) -> None:
        """Raise `ValueError` for a budget that is neither a time nor a number of evaluations, or too few of them."""
        budget, least = self.budget, 1 + self.closing
        if isinstance(budget, str):
            seconds_in(budget)
        elif budget is not None and (type(budget) is not int or budget < least):
            noun = "evaluation" if least == 1 else "evaluations"
            more = f", of which {self.closing} are kept for the end" if self.closing else ""
            raise ValueError(
                f"Expected `budget` to be a time such as '20s' or a number of at least {least} {noun}{more}, but "
                f"got {budget!r}. Seconds are written with their unit."
            )

    def device_of_rewards(self, pipe) -> torch.device:
        """Return the device on which rewards given by name are loaded."""
        return torch.device(self.reward_device or execution_device(pipe))

    def load_rewards(self, pipe, rewards: Any) -> RewardSum:
        """Return rewards as a `RewardSum`, in which names are loaded at their first use for this pipeline."""
        return RewardSum(rewards, device=self.device_of_rewards(pipe), loaded=loaded_models(pipe))

    def differentiable_rewards(self, pipe, rewards: Any) -> RewardSum:
        """Return `load_rewards` for a method that may differentiate.

        Raises:
            NonDifferentiableReward: If a reward with a weight has no gradient, but the method needs one.
        """
        total = self.load_rewards(pipe, rewards)
        if self.gradient_mode is not None:
            total.check_differentiable()
        return total

    def settings(self) -> dict[str, Any]:
        """Return the settings that are plain values, for the provenance."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["frames"] = list(self.frames) if isinstance(self.frames, tuple) else self.frames
        return {name: value for name, value in values.items() if isinstance(value, SETTING) or name == "frames"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptimizer(NoiseOptimizer):
    """Base class of methods that maximize the weighted sum of rewards of each image.

    Args:
        rewards: A reward or rewards as `RewardSum` takes them: a name, a callable, a dict of these to weights, or a
            list of (reward, weight).
    """

    rewards: Any

    def check(self) -> None:
        super().check()
        checked_reward_pairs(self.rewards)

    def objective(self, pipe) -> Objective:
        return RewardObjective(self.differentiable_rewards(pipe, self.rewards))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientOptimizer(RewardOptimizer):
    """Base class of methods that go from one noise to the next along a gradient, and may first search where to begin.

    With `search` a run has stages. The given noise is evaluated as the baseline. Then k noises, the given one and fresh
    ones, are scored without gradients, each by the x0 estimate of one model call, or by its image if the pipeline makes
    a single step. From each of the best `starts` of them, one after the other, the method runs anew, and the best of
    all evaluations is returned, as in CARINOX, https://arxiv.org/abs/2509.17458. The evaluations after the search are
    shared equally among the starts. A time budget is shared in the same way, after at most `SEARCH_SHARE` of it for the
    search. Each image of a batch has fresh noises of its own.

    Losses of previews are NaN. `result.reports["search"]` has the number of `noises` that were scored and whether these
    were `previews`; the `first_steps` of the starts; and for each image the steps `found_at` which its starts were
    scored, their `losses`, and its `best_start`: the number, from 1, of the start that gave the returned noise; 0 for
    one that was found by the search, or the baseline.

    Args:
        search: k, the number of scored noises, each an evaluation of `steps` or `budget`; 0 runs from the given noise.
            "auto" is 16, and at most a third of the evaluations, if the call names a single denoising step and does
            not choose the noise by `latents`, and else 0.
        starts: The number of noises from which the method runs, at most k.
    """

    search: int | Literal["auto"] = checked(0, "[0, inf)")
    starts: int = checked(1, "[1, inf)")

    @property
    def may_preview(self) -> bool:
        return self.previews or self.search not in ("auto", 0)

    def searched(self, problem: NoiseProblem) -> int:
        if self.search != "auto":
            return self.search
        most = AUTO_SEARCH if self.evaluations is None else min(AUTO_SEARCH, int(AUTO_SHARE * self.evaluations))
        chosen = problem.request.get("latents") is not None
        return most if problem.is_single_step and not chosen and most > 1 else 0

    def check(self) -> None:
        super().check()
        search = 0 if self.search == "auto" else self.search
        if self.starts > max(1, search):
            raise ValueError(
                f"Expected a `search` of at least as many noises as there are `starts`, but got {self.search!r} and "
                f"{self.starts}. Pass `search={2 * self.starts}`, say."
            )
        least = 1 + search + self.starts
        if search and self.evaluations is not None and self.evaluations < least:
            raise ValueError(
                f"Expected at least {least} evaluations, for the baseline, `search={self.search}` and "
                f"`starts={self.starts}`, but got {self.evaluations}. Pass more `steps`, or a smaller `search`."
            )
