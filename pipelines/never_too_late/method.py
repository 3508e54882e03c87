"""It's Never Too Late: a set of images that differ, by joint optimisation of their noises."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_callback import NoiseCallback
from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward_sum import reward_weight_pairs
from ...rewards.sets.set_reward_sum import SetRewardSum
from ..cno.contrastive_loss import sets
from ..memory.checkpointing import Checkpointing
from ..memory.graph_size import ChunkSetting
from ..method import NoiseOptimizer
from ..noise_math import ChiPrior, per_image, per_sample_norm
from ..objective import differentiable_rewards
from ..problem import NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Clamp
from .quality_guard import GUARD_REPORT, GuardedNoise, GuardWarning, as_guards
from .set_objective import SetObjective, check_reachable

TARGETS = ("hinge", "stop_at", "stop_ratio")
NEVER_TOO_LATE_SIZE = 4 * 4 * 64 * 64  # entries of the set of noises that the paper's learning rates were chosen for
Targets = float | Mapping[str, float]


@register_noise_optimizer("never_too_late")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverTooLate(NoiseOptimizer):
    """Gradient descent of a whole set of noises: the images of a prompt come to differ, and stay good.

    "It's Never Too Late: Noise Optimization for Collapse Recovery in Trained Diffusion Models", Harrington et al., CVPR
    2026, https://arxiv.org/abs/2601.00090.

    The images of each prompt in a call are a set with the loss `L = Σ λ_q·(1 − mean r) − Σ λ_div·v + λ_reg·mean χ`: r
    the rewards, v the set rewards, χ the prior of the norm of the noise. SGD with momentum moves all noises of the set,
    with one clip of their common gradient, and the noises of the lowest loss (without the prior) are returned, together
    as they were. Start from `noise_sampler="pink"` for more diversity.

    `mode="parity"` takes the steps of the released code; `mode="default"` takes them in units of √(entries of the set /
    65536), so that a learning rate suits any latent and set size, and lets saturated pixels keep their gradient. Where
    the released code is followed in neither: noise, momentum and norms are float32; a step in which the guard rejected
    an image does not count as the best, so noises and images always belong together; a guard needs no reward that is
    optimised; the rewards count for the best in the warm-up as well; a set ends as a whole.

    Args:
        diversity: What `SetRewardSum` takes, with the weights λ_div: a name ("dpp", "dpp_patch", "pairwise", "vendi",
            "vendi_2"), `{"dpp": 150.0}`, or on other features `{"dpp": ("clip", 150.0)}`.
        rewards: What `RewardSum` takes, with the weights λ_q, or `None`. The paper: `{"hpsv2.1": 3.0}`. All may have
            weight 0 if each is guarded.
        guard: Limits for each image: `{"hpsv2.1": 0.05}` allows a drop of so much from the plain image, `{"sharpness":
            {"keep": 0.8}}` four fifths of it; see `QualityGuard`. The reward need not be optimised.
        steps: Evaluations, the plain result included. The paper: 50 to 150.
        mode: "default" or "parity".
        learning_rate: At least 0.
        momentum: In [0, 1); not Nesterov's.
        max_grad_norm: The gradient of a set is clipped to this L2 norm; with the learning rate it sets the length of a
            step, and where it is active only ratios of the weights matter.
        regularization: λ_reg, at least 0.
        hinge: τ_D: the first form of the paper, `λ_div·max(0, τ_D − v)`, which goes on for the rewards once a set is
            diverse enough. A number for one set reward, or a dict by name.
        stop_at: End a set as soon as v is at least this, in the units of the set reward: 0.98 of "dpp" is the rule of
            the released code. A number for one set reward, or a dict by name, all of which must be reached.
        stop_ratio: The same as a multiple of the v of the plain set. Of both for one set reward the lower counts.
        warm_up: So many steps at the beginning leave the rewards out of the gradient.
        references: `(M, 3, H, W)` images in [0, 1] that belong to every set and are not moved, or their features as
            `SetRewardSum.known_features` gives them. One image of a prompt is enough then.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        preview: Look at the x0 estimate of one model call instead of the whole chain.
        chunk_size: How many images are in memory with their graphs at a time: "auto", as many as fit; a number of 1 or
            more, the same gradient in constant memory for one more forward pass; or `None` for the whole batch.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where rewards and features that are given by name are loaded, by default where the pipeline is.
    """

    diversity: Any = (("dpp", 150.0),)
    rewards: Any = None
    guard: Any = None
    steps: int = 50
    mode: Literal["default", "parity"] = "default"
    learning_rate: float = 6.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularization: float = 0.01
    hinge: Targets | None = None
    stop_at: Targets | None = None
    stop_ratio: Targets | None = None
    warm_up: int = 0
    references: torch.Tensor | Mapping[str, torch.Tensor] | None = None
    reward_prompt: str | Sequence[str] | None = None
    preview: bool = False
    chunk_size: ChunkSetting = "auto"
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None

    @property
    def clamp(self) -> Clamp:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "hard" if self.mode == "parity" else "straight_through"

    def check(self) -> None:
        super().check()
        if self.mode not in ("default", "parity"):
            raise ValueError(f'Expected `mode` to be "default" or "parity", but got {self.mode!r}.')
        if not (0 <= self.learning_rate < math.inf and self.max_grad_norm > 0 and 0 <= self.momentum < 1):
            raise ValueError(
                "Expected a finite learning_rate >= 0, max_grad_norm > 0 and momentum in [0, 1), but got "
                f"{self.learning_rate}, {self.max_grad_norm} and {self.momentum}."
            )
        if not (isinstance(self.warm_up, int) and self.warm_up >= 0):
            raise ValueError(f"Expected `warm_up` to be an integer of 0 or more, but got {self.warm_up!r}.")
        ChiPrior(self.regularization)
        as_guards(self.guard)

    def objective(self, pipe) -> SetObjective:
        guards = as_guards(self.guard)
        weighted = optimised_rewards(self.rewards, guards)
        diversity = SetRewardSum(self.diversity, device=self.device_of_rewards(pipe))
        diversity.check_differentiable()
        if not any(diversity.weights.values()) and weighted is None:
            raise ValueError(
                "Expected a set reward with a weight above 0, or `rewards`, but got neither: there is nothing to do."
            )
        hinge, stop_at, _ = (targets_by_name(getattr(self, name), diversity, name) for name in TARGETS)
        return SetObjective(
            diversity,
            None if weighted is None else differentiable_rewards(weighted, self.device_of_rewards(pipe)),
            guards,
            hinge=hinge,
            stop_at=stop_at,
            references=self.references,
            prompts=self.reward_prompt,
            warm_up=self.warm_up,
        )

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor:
        return ChiPrior(self.regularization)(noise)

    def watchers(self) -> list[NoiseCallback]:
        return [GuardWarning()] if as_guards(self.guard) else []

    def start(self, problem: NoiseProblem) -> "SetStanding":
        return SetStanding(problem)

    def inspect(self, state: NoiseState, objective: Any, memory: "SetStanding") -> torch.Tensor:
        """Ask the guard, end the sets that are diverse enough; the samples whose set is good throughout."""
        whole = memory.of_whole_sets(state.active)
        if (state.active & ~whole).any():
            state.stop("part of the set ended", ~whole)
        accepted = memory.look(state, objective.guards) & whole
        if state.step == 0:
            memory.targets = self.targets(state, objective, memory)
        memory.stop_reached(state, accepted)
        return accepted

    def targets(self, state: NoiseState, objective: Any, memory: "SetStanding") -> dict[str, torch.Tensor]:
        """Name of a set reward to the value `(B,)` at which a set ends. Raises `ValueError` for one out of reach."""
        found = {name: torch.full_like(state.scores[name], target) for name, target in objective.stop_at.items()}
        for name, ratio in targets_by_name(self.stop_ratio, objective.diversity, "stop_ratio").items():
            plain = state.scores[name]
            for rows in memory.rows:
                count = len(rows) + objective.reference_count
                check_reachable(objective.diversity, name, ratio, count, "stop_ratio", unit=plain[rows[0]].item())
            found[name] = found.get(name, torch.full_like(plain, torch.inf)).minimum(plain * ratio)
        return found

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: "SetStanding") -> torch.Tensor:
        gradient = memory.clipped(gradient, self.max_grad_norm)
        guarded = memory.guarded
        stays = per_image(~guarded.good | guarded.held, gradient)
        memory.velocity = (self.momentum * memory.velocity + gradient).where(~stays, 0)
        moved = state.noise - self.learning_rate * per_image(self.scale(memory), gradient) * memory.velocity
        return torch.where(stays, guarded.last_good, moved)

    def scale(self, memory: "SetStanding") -> torch.Tensor:
        """`(B,)`: the unit of the learning rate for the set of each image."""
        if self.mode == "parity":
            return torch.ones_like(memory.sizes)
        return (memory.sizes * memory.velocity[0].numel() / NEVER_TOO_LATE_SIZE).sqrt()


class SetStanding:
    """What a run remembers of its sets.

    Attributes:
        rows: The samples of each set.
        sizes: `(B,)`, how many there are in the set of each sample.
        velocity: `(B, C, H, W)`, the momentum.
        guarded: The noises under the guard.
        targets: Name of a set reward to `(B,)`, the value at which a set ends.
        accepted_steps, rejected_steps: `(B,)`, of the set of each sample, by the guard, the first not counted.
    """

    def __init__(self, problem: NoiseProblem) -> None:
        noise = problem.noise
        self.rows = [rows.to(noise.device) for rows in sets(problem.groups)]
        self.sizes = torch.tensor([problem.groups.count(group) for group in problem.groups]).to(noise)
        self.velocity = torch.zeros_like(noise)
        self.guarded = GuardedNoise(noise)
        self.targets: dict[str, torch.Tensor] = {}
        self.accepted_steps = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.rejected_steps = torch.zeros_like(self.accepted_steps)

    def look(self, state: NoiseState, guards: Mapping[str, Any]) -> torch.Tensor:
        """`(B,)` bool: all images of the set are good. Ends the sets whose images are all held."""
        self.guarded.look(state, guards)
        accepted = self.of_whole_sets(self.guarded.good)
        if guards:
            self.report(state, accepted)
            state.stop("guard holds all images", self.of_whole_sets(self.guarded.held))
        return accepted

    def report(self, state: NoiseState, accepted: torch.Tensor) -> None:
        """Keep what the guard did for the result."""
        if state.step > 0:
            self.accepted_steps += accepted & state.active
            self.rejected_steps += ~accepted & state.active
        stuck = (self.rejected_steps > 0) | self.of_whole_sets(self.guarded.held)
        state.reports[GUARD_REPORT] = {
            **self.guarded.report(),
            "accepted_steps": self.accepted_steps.tolist(),
            "kept_plain": (stuck & (self.accepted_steps == 0)).tolist(),
        }

    def stop_reached(self, state: NoiseState, accepted: torch.Tensor) -> None:
        """End the sets that have all targets, in a step that is accepted."""
        if self.targets:
            reached = torch.stack([state.scores[name] >= value for name, value in self.targets.items()]).all(0)
            state.stop("diversity reached", reached.to(accepted.device) & accepted)

    def of_whole_sets(self, flags: torch.Tensor) -> torch.Tensor:
        """`(B,)` bool to whether they hold for the whole set of each sample."""
        found = torch.zeros_like(flags)
        for rows in self.rows:
            found[rows] = flags[rows].all()
        return found

    def clipped(self, gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
        """The gradient of the sum over images to that of each set's loss, clipped by one norm for each set."""
        gradient = gradient / per_image(self.sizes, gradient)
        factors = torch.ones_like(self.sizes)
        for rows in self.rows:
            norm = per_sample_norm(gradient[rows].flatten()[None])[0]
            factors[rows] = (max_norm / (norm + 1e-6)).clamp(max=1).to(factors)
        return gradient * per_image(factors, gradient)


def optimised_rewards(rewards: Any, guards: Sequence[Any]) -> Any:
    """`rewards`, or `None` where all have weight 0 and are guarded: then the guards score them.

    Elsewhere `RewardSum` says what is wrong.
    """
    if rewards is None or any(weight for _, weight in reward_weight_pairs(rewards, None)):
        return rewards
    guarded = [guard.reward for guard in guards]
    return None if all(reward in guarded for reward, _ in reward_weight_pairs(rewards, None)) else rewards


def targets_by_name(targets: Targets | None, diversity: Any, argument: str) -> dict[str, float]:
    """Targets as name -> number. Raises `ValueError` for other names and for what is no number."""
    if targets is None:
        return {}
    names = list(diversity.names)
    if not isinstance(targets, Mapping) and len(names) > 1:
        raise ValueError(f"Expected `{argument}` by name for the set rewards {names}, but got {targets!r}.")
    named = dict(targets) if isinstance(targets, Mapping) else {names[0]: targets}
    if unknown := sorted(named.keys() - set(names)):
        raise ValueError(f"Expected `{argument}` of set rewards out of {names}, but got {unknown}.")
    for name, target in named.items():
        if not isinstance(target, int | float) or isinstance(target, bool) or not math.isfinite(target):
            raise ValueError(f"Expected `{argument}` of '{name}' to be a finite number, but got {target!r}.")
    return {name: float(target) for name, target in named.items()}
