"""It's Never Too Late: joint optimization of the noises of a set, so that its images differ."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ...rewards.contract.reward_sum import checked_reward_pairs, reward_weight_pairs
from ...rewards.sets.set_reward_sum import SetRewardSum, checked_set_reward_entries
from ..loading import loaded_models
from ..method import NoiseOptimizer
from ..noise_math import ChiPrior, per_image, per_sample_norm, rate_unit, sets
from ..problem import NoiseProblem
from ..registry import register_method
from ..sampling.sampler import Gradient
from ..white_noise import WHITE_RATE, WhiteNoiseSteps
from .quality_guard import GUARD_REPORT, GuardedNoise, as_guards, loaded_guards
from .set_objective import SetObjective, check_reachable
from .set_search import SetSearch

PAPER_RATE = 6.0
TARGETS = ("hinge", "stop_at", "stop_ratio")
Targets = float | Mapping[str, float]


@register_method("never_too_late")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverTooLate(NoiseOptimizer):
    """Gradient descent on a whole set of noises: the images of a prompt come to differ, and stay good.

    "It's Never Too Late: Noise Optimization for Collapse Recovery in Trained Diffusion Models", Harrington et al., CVPR
    2026, https://arxiv.org/abs/2601.00090.

    The images of each prompt are a set with the loss `L = Σ λ_q·(1 − mean r) − Σ λ_div·v + λ_reg·mean χ`: r the
    rewards, v the set rewards, χ the prior of the norm of the noise. SGD with momentum moves all noises of the set,
    with one clip of their joint gradient, and the set of noises with the lowest loss (without the prior) is returned.
    Start from `noise_sampler="pink"` for more diversity.

    The learning rate is in units of √(H·W) / 64, with H × W the size of the noise: at 512 px the steps are those of the
    released code on all its models. `mode="parity"` has its pixels as well: its clamp, DINOv2 and `tiny_image` resized
    without antialiasing, rewards as in `ReNO(mode="parity")`; in `mode="default"` saturated pixels keep their gradient.

    Both modes follow the paper where the released code differs from it: that takes the loss and the guard of HPS from
    the first image of a set alone (`torch.diagonal` of a `(B, 1)` matrix), so that its mode "freeze" ends a set once
    image 0 falls; here the loss is the mean over the set, each image has its own guard, and a set ends once all its
    images are frozen. Other differences: noise, momentum and norms are float32; a step in which the guard rejected an
    image does not count as the best, so noises and images always belong together; a guard needs no reward that is
    optimized; the rewards count for the best during the warm-up too; a set stops as a whole.

    Args:
        diversity: Set rewards as `SetRewardSum` takes them, with the weights λ_div: a name ("dpp", "dpp_patch",
            "pairwise", "vendi", "vendi_2"), `{"dpp": 150.0}`, or with other features `{"dpp": ("clip", 150.0)}`.
        rewards: Rewards as `RewardSum` takes them, with the weights λ_q, or `None`. The paper: `{"hpsv2.1": 3.0}`. All
            may have weight 0 if each is guarded.
        guard: Limits for each image: `{"hpsv2.1": 0.05}` allows that drop from the baseline, `{"sharpness": {"keep":
            0.8}}` four fifths of it. See `QualityGuard`. The reward need not be optimized.
        steps: Evaluations, the baseline included. The paper: 50 to 150.
        mode: "default" or "parity".
        geometry: "white" projects the gradient of each noise and the noise after each step on white noise, as
            `ReNO(geometry="white")` does, in place of clip and prior. `None` is the step of the paper.
        learning_rate: The step size, in units of √(H·W) / 64, 6 by default. The paper: 6 for SDXL-Turbo, 2 to 6 for
            FLUX.1-schnell. With `geometry="white"` in standard deviations of the noise, 0.1 by default.
        momentum: The coefficient of momentum; not Nesterov's.
        max_grad_norm: The L2 norm to which the gradient of a set is clipped; with the learning rate it sets the length
            of a step. Where the clip is active only ratios of the weights matter.
        regularization: λ_reg.
        hinge: τ_D of the paper's first form, `λ_div·max(0, τ_D − v)`, which optimizes only the rewards once a set is
            diverse enough. A number for one set reward, or a dict by name.
        stop_at: The value of v at which a set stops: 0.98 of "dpp" is the rule of the released code. A number for one
            set reward, or a dict by name, in which all must be reached.
        stop_ratio: The same as a multiple of the baseline's v. If both are given, the lower counts.
        warm_up: The number of first steps, after a search, in which the rewards give no gradient.
        search: k, the number of noises that are scored at each position of the batch before the first step, the given
            one included, each an evaluation of `steps` or `budget`; 0 runs from the given noises. The steps begin from
            the set of them with the lowest loss that exchanges find, as in group inference
            (https://arxiv.org/abs/2508.15773), but for any set reward. Of a time budget at most 30% is for the search.
            A guard excludes candidates, but never the given noises; an image of the chosen set that is not above its
            limit is frozen.
            `result.reports["search"]` has the number of `noises`, and for each image `from_step` and `from_image`,
            where its first noise was drawn.
        references: `(M, 3, H, W)` images in [0, 1] that belong to every set and are not moved, or their features from
            `SetRewardSum.known_features`. One image of a prompt is enough then.
        gradient: "full" differentiates the whole chain; "frozen" holds the model outputs constant.
        preview: Evaluate the x0 estimate of one model call instead of the whole chain.
    """

    diversity: Any = (("dpp", 150.0),)
    rewards: Any = None
    guard: Any = None
    mode: Literal["default", "parity"] = "default"
    geometry: Literal["white"] | None = None
    learning_rate: float | None = checked(None, "[0, inf)")
    momentum: float = checked(0.9, "[0, 1)")
    max_grad_norm: float = checked(0.1, "(0, inf)")
    regularization: float = checked(0.01, "[0, inf)")
    hinge: Targets | None = None
    stop_at: Targets | None = None
    stop_ratio: Targets | None = None
    warm_up: int = checked(0, "[0, inf)")
    search: int = checked(0, "[0, inf)")
    references: torch.Tensor | Mapping[str, torch.Tensor] | None = None
    gradient: Literal["full", "frozen"] = "full"
    preview: bool = False
    chunk_size: int | Literal["auto"] | None = checked("auto", "[1, inf)")

    def check(self) -> None:
        super().check()
        checked_set_reward_entries(self.diversity)
        if (weighted := weighted_rewards(self.rewards, as_guards(self.guard))) is not None:
            checked_reward_pairs(weighted)
        check_references(self.references)
        if self.search and self.evaluations is not None and self.evaluations <= self.search:
            raise ValueError(
                f"Expected at least {self.search + 1} evaluations, for `search={self.search}` and a step, but got "
                f"{self.evaluations}. Pass more `steps`, or a smaller `search`."
            )

    def objective(self, pipe) -> SetObjective:
        guards = as_guards(self.guard)
        weighted = weighted_rewards(self.rewards, guards)
        diversity = SetRewardSum(self.diversity, device=self.device_of_rewards(pipe), loaded=loaded_models(pipe))
        diversity.check_differentiable()
        if not any(diversity.weights.values()) and weighted is None:
            raise ValueError(
                "Expected a set reward with a weight above 0, or `rewards`, but got neither: there is nothing to do."
            )
        hinge, stop_at, _ = (targets_by_name(getattr(self, name), diversity, name) for name in TARGETS)
        rewards = None if weighted is None else self.differentiable_rewards(pipe, weighted)
        optimized = [] if rewards is None else rewards.names
        return SetObjective(
            diversity,
            rewards,
            loaded_guards(guards, optimized, lambda reward: self.load_rewards(pipe, reward).rewards[0]),
            hinge=hinge,
            stop_at=stop_at,
            references=self.references,
            warm_up=self.warm_up,
            released=self.mode == "parity",
            search=self.search > 0,
        )

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        return 0.0 if self.geometry == "white" else ChiPrior(self.regularization)(noise)

    def start(self, problem: NoiseProblem) -> "NeverTooLateState":
        white = self.geometry == "white"
        steps = WhiteNoiseSteps(problem, self.rate, self.momentum) if white else None
        return NeverTooLateState(problem, steps, self.search)

    def needs(self, step: int, state: "NeverTooLateState") -> tuple[Gradient, bool]:
        return None if state.search.searching else self.gradient, self.preview

    @property
    def rate(self) -> float:
        """The learning rate, or the default of the geometry."""
        default = WHITE_RATE if self.geometry == "white" else PAPER_RATE
        return default if self.learning_rate is None else self.learning_rate

    def inspect(self, run: NoiseState, objective: Any, state: "NeverTooLateState") -> torch.Tensor:
        """Apply the guard, stop the sets that are diverse enough, and return the samples whose whole set is good."""
        run.stage = state.search.stage
        whole = state.of_whole_sets(run.active)
        if (run.active & ~whole).any():
            run.stop("part of the set ended", ~whole)
        if run.step == 0:
            state.guarded.set_limits(run, objective.guards)
            state.targets = self.targets(run, objective, state)
        if state.search.searching:
            good = ~state.guarded.fallen(run, objective.guards) | (run.step == 0)
            accepted = state.of_whole_sets(good) & whole
            state.search.inspect(run, objective, good, self.seconds)
            if state.search.chosen is not None:
                state.guarded.carry_limits(run.reports["search"]["from_image"])
            return accepted
        accepted = state.apply_guard(run, objective.guards) & whole
        state.stop_reached(run, accepted)
        return accepted

    def targets(self, run: NoiseState, objective: Any, state: "NeverTooLateState") -> dict[str, torch.Tensor]:
        """Return by set reward the value `(B,)` at which a set stops. Raises `ValueError` for one out of reach."""
        found = {name: torch.full_like(run.scores[name], target) for name, target in objective.stop_at.items()}
        for name, ratio in targets_by_name(self.stop_ratio, objective.diversity, "stop_ratio").items():
            baseline = run.scores[name]
            for rows in state.rows:
                count = len(rows) + objective.reference_count
                check_reachable(objective.diversity, name, ratio, count, "stop_ratio", unit=baseline[rows[0]].item())
            found[name] = found.get(name, torch.full_like(baseline, torch.inf)).minimum(baseline * ratio)
        return found

    def step(self, run: NoiseState, gradient: torch.Tensor, state: "NeverTooLateState") -> torch.Tensor:
        guarded = state.guarded
        if state.search.searching:
            return state.search.step()
        stays = per_image(~guarded.good | guarded.frozen, gradient)
        white = state.white if self.geometry == "white" else None
        if white is not None:
            moved = white.moved(run.noise, gradient)
            white.mean = white.mean.where(~stays, 0)
        else:
            gradient = state.clipped(gradient, self.max_grad_norm)
            state.velocity = (self.momentum * state.velocity + gradient).where(~stays, 0)
            moved = run.noise - self.rate * rate_unit(run.noise) * state.velocity
        return torch.where(stays, guarded.last_good, moved)

    def finish(self, run: NoiseState, objective: Any, state: "NeverTooLateState") -> Iterable[torch.Tensor]:
        """Warn about sets for which the guard accepted no step, so that they are returned as they began."""
        kept = run.reports.get(GUARD_REPORT, {}).get("kept_baseline", [])
        if images := [index for index, baseline in enumerate(kept) if baseline]:
            warnings.warn(
                f"The quality guard accepted no step of the sets of images {images}: they are returned as they "
                "began, from the baseline or the search. Allow a larger drop, use a smaller learning rate, or give the "
                "guarded reward a weight.",
                stacklevel=2,
            )
        return ()


class NeverTooLateState:
    """The sets of a run: their momentum, their guard, and their targets.

    Attributes:
        rows: The samples of each set.
        sizes: `(B,)`, the number of images in the set of each sample.
        velocity: `(B, C, H, W)`, the momentum of the paper's step.
        white: The steps on white noise, or `None` for those of the paper.
        search: The search before the first step.
        guarded: Which noises are good, and where each reverts.
        targets: By set reward, `(B,)`, the value at which the set of each sample stops.
        accepted_steps, rejected_steps: `(B,)`, the steps that the guard accepted and rejected for the set of each
            sample, without the evaluation that they begin with.
    """

    def __init__(self, problem: NoiseProblem, white: WhiteNoiseSteps | None = None, search: int = 0) -> None:
        noise, self.white, self.search = problem.noise, white, SetSearch(problem, search)
        self.rows = [rows.to(noise.device) for rows in sets(problem.groups)]
        self.sizes = torch.tensor([problem.groups.count(group) for group in problem.groups]).to(noise)
        self.velocity = torch.zeros_like(noise)
        self.guarded = GuardedNoise(noise)
        self.targets: dict[str, torch.Tensor] = {}
        self.accepted_steps = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.rejected_steps = torch.zeros_like(self.accepted_steps)

    def apply_guard(self, run: NoiseState, guards: Mapping[str, Any]) -> torch.Tensor:
        """Return `(B,)` bool, whether all images of the set are good. Stops the sets whose images are all frozen."""
        if run.step == self.search.scored:
            self.guarded.begin(run, guards)
        else:
            self.guarded.update(run, guards)
        accepted = self.of_whole_sets(self.guarded.good)
        if guards:
            self.report(run, accepted)
            run.stop("guard holds all images", self.of_whole_sets(self.guarded.frozen))
        return accepted

    def report(self, run: NoiseState, accepted: torch.Tensor) -> None:
        """Count accepted and rejected steps, and report them in the result."""
        if run.step > self.search.scored:
            self.accepted_steps += accepted & run.active
            self.rejected_steps += ~accepted & run.active
        stuck = (self.rejected_steps > 0) | self.of_whole_sets(self.guarded.frozen)
        run.reports[GUARD_REPORT] = {
            **self.guarded.report(),
            "accepted_steps": self.accepted_steps.tolist(),
            "kept_baseline": (stuck & (self.accepted_steps == 0)).tolist(),
        }

    def stop_reached(self, run: NoiseState, accepted: torch.Tensor) -> None:
        """Stop the sets that reach all targets in an accepted step."""
        if self.targets:
            reached = torch.stack([run.scores[name] >= value for name, value in self.targets.items()]).all(0)
            run.stop("diversity reached", reached.to(accepted.device) & accepted)

    def of_whole_sets(self, flags: torch.Tensor) -> torch.Tensor:
        """Return `(B,)` bool, whether the flags hold for the whole set of each sample."""
        found = torch.zeros_like(flags)
        for rows in self.rows:
            found[rows] = flags[rows].all()
        return found

    def clipped(self, gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
        """Return the gradient of each set's loss, clipped by one norm per set, from that of the sum over images."""
        gradient = gradient / per_image(self.sizes, gradient)
        factors = torch.ones_like(self.sizes)
        for rows in self.rows:
            norm = per_sample_norm(gradient[rows].flatten()[None])[0]
            factors[rows] = (max_norm / (norm + 1e-6)).clamp(max=1).to(factors)
        return gradient * per_image(factors, gradient)


def check_references(references: Any) -> None:
    """Raise `TypeError` unless references are images, features of images by name, or `None`."""
    parts = list(references.values()) if isinstance(references, Mapping) else [references]
    if references is not None and not (parts and all(isinstance(part, torch.Tensor) and part.ndim for part in parts)):
        raise TypeError(
            "Expected `references` to be images (M, 3, H, W) or their features by name, but got "
            f"{type(references).__name__}."
        )


def weighted_rewards(rewards: Any, guards: Sequence[Any]) -> Any:
    """Return `rewards`, or `None` if they need not be computed: all have weight 0, and the guards score them anyway."""
    if rewards is None or any(weight for _, weight in reward_weight_pairs(rewards, None)):
        return rewards
    guarded = [guard.reward for guard in guards]
    return None if all(reward in guarded for reward, _ in reward_weight_pairs(rewards, None)) else rewards


def targets_by_name(targets: Targets | None, diversity: Any, argument: str) -> dict[str, float]:
    """Return targets as a dict of numbers by name. Raises `ValueError` for unknown names and for other values."""
    if targets is None:
        return {}
    names = list(diversity.names)
    if not isinstance(targets, Mapping) and len(names) > 1:
        raise ValueError(f"Expected `{argument}` by name for the set rewards {names}, but got {targets!r}.")
    named = dict(targets) if isinstance(targets, Mapping) else {names[0]: targets}
    if unknown := sorted(named.keys() - set(names), key=str):
        raise ValueError(f"Expected `{argument}` of set rewards out of {names}, but got {unknown}.")
    for name, target in named.items():
        if not isinstance(target, int | float) or isinstance(target, bool) or not math.isfinite(target):
            raise ValueError(f"Expected `{argument}` of '{name}' to be a finite number, but got {target!r}.")
    return {name: float(target) for name, target in named.items()}
