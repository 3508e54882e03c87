"""A floor under the quality of each image of a set, independent of the objective."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ..noise_math import per_image

GUARD_REPORT = "quality guard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityGuard:
    """Returns an image to its last good noise when a reward of it falls to a limit.

    The guard of It's Never Too Late, https://arxiv.org/abs/2601.00090, per image and for any reward, which need not be
    optimized nor differentiable. "sharpness" and "complexity" as guards prevent blur and plain backgrounds, which the
    paper leaves open. Of several limits the lowest counts. An image whose baseline is at its limit is frozen there.

    Args:
        reward: A name, Hub id or folder of a reward, or any callable `(images, prompts) -> (B,)`. The name of an
            optimized reward means that reward.
        drop: The distance of the limit below the baseline's reward, above 0. The paper's intention: 0.05 of HPSv2.1.
        keep: The limit as a share of the baseline's reward, in (0, 1), for positive rewards.
        threshold: The limit itself. The paper for FLUX.1-schnell: 0.31 of HPSv2.1.
        mode: "revert" goes on from the last good noise without momentum; "freeze" leaves the image there.

    Raises:
        ValueError: For settings that cannot work.
    """

    reward: Any
    drop: float | None = None
    keep: float | None = None
    threshold: float | None = None
    mode: Literal["revert", "freeze"] = "revert"

    def __post_init__(self) -> None:
        for name, low, high in (("drop", 0.0, math.inf), ("keep", 0.0, 1.0), ("threshold", -math.inf, math.inf)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and low < value < high):
                raise ValueError(f"Expected `{name}` of a guard to be a number in ({low}, {high}), but got {value!r}.")
        if self.drop is None and self.keep is None and self.threshold is None:
            raise ValueError(
                f"Expected a limit for the guard {self.reward!r}, but got none. Pass `drop`, `keep` or `threshold`, as "
                'in `guard={"hpsv2.1": 0.05}` or `guard={"sharpness": {"keep": 0.8}}`.'
            )
        if self.mode not in ("revert", "freeze"):
            raise ValueError(f'Expected `mode` of a guard to be "revert" or "freeze", but got {self.mode!r}.')

    def limits(self, initial: torch.Tensor) -> torch.Tensor:
        """Return the limit of each image, `(B,)`, from the rewards of the baselines.

        Raises:
            ValueError: For a share of a negative reward.
        """
        if self.keep is not None and (initial < 0).any():
            raise ValueError(
                f"Expected rewards of 0 or more for a guard with `keep`, but the baselines have {initial.tolist()}. "
                "Use `drop` or `threshold`."
            )
        limits = torch.full_like(initial, torch.inf)
        if self.drop is not None:
            limits = limits.minimum(initial - self.drop)
        if self.keep is not None:
            limits = limits.minimum(initial * self.keep)
        return limits if self.threshold is None else limits.clamp(max=self.threshold)


def shares_reward(guard: QualityGuard, names: Sequence[str]) -> bool:
    """Return whether a guard means one of the optimized rewards with these names, rather than one of its own."""
    return isinstance(guard.reward, str) and guard.reward in names


def loaded_guards(
    guards: Sequence[QualityGuard], names: Sequence[str], load: Callable[[str], Any]
) -> list[QualityGuard]:
    """Return guards whose rewards given by name are loaded, but for those that mean optimized ones with `names`."""
    return [
        dataclasses.replace(guard, reward=load(guard.reward))
        if isinstance(guard.reward, str) and not shares_reward(guard, names)
        else guard
        for guard in guards
    ]


def as_guards(guard: Any) -> list[QualityGuard]:
    """Return the guards of a `guard` argument.

    Args:
        guard: `None`, a `QualityGuard`, a list of them, or a dict of rewards to the drop or to settings by name:
            `{"hpsv2.1": 0.05, "sharpness": {"keep": 0.8}}`.

    Raises:
        TypeError, ValueError: For anything else, and for settings that cannot work.
    """
    if guard is None:
        return []
    if isinstance(guard, Mapping):
        return [guard_from(reward, settings) for reward, settings in guard.items()]
    entries = guard if isinstance(guard, list | tuple) else [guard]
    for entry in entries:
        if not hasattr(entry, "limits"):  # duck-typed: the class may be a Hub copy
            raise TypeError(
                f'Expected a guard such as `{{"hpsv2.1": 0.05}}` or `QualityGuard(reward=..., drop=0.05)`, but got '
                f"{entry!r}."
            )
    rewards = [entry.reward for entry in entries]
    if twice := [reward for index, reward in enumerate(rewards) if reward in rewards[:index]]:
        raise ValueError(
            f"Expected one guard for each reward, but got two for {twice[0]!r}. Of several limits of one guard the "
            "lowest counts."
        )
    return list(entries)


def guard_from(reward: Any, settings: Any) -> QualityGuard:
    known = [field.name for field in dataclasses.fields(QualityGuard) if field.name != "reward"]
    if not isinstance(settings, Mapping):
        return QualityGuard(reward=reward, drop=settings)
    if unknown := sorted(settings.keys() - set(known), key=str):
        raise ValueError(f"Expected settings of a guard out of {known}, but got {unknown}.")
    return QualityGuard(reward=reward, **settings)


class GuardedNoise:
    """The noises of a run under guards: which are good, and the noise to which each reverts.

    Args:
        noise: `(B, C, H, W)`, the noises of the baselines.

    Attributes:
        good: `(B,)` bool, whether the last image is above its limits, or frozen.
        frozen: `(B,)` bool, frozen at the last good noise.
        last_good: `(B, C, H, W)`.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.last_good = noise
        self.good = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        self.frozen = ~self.good
        self.rejections = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.limits: dict[str, torch.Tensor] = {}

    def set_limits(self, run: NoiseState, guards: Mapping[str, QualityGuard]) -> None:
        """Set the limits from the evaluation of the given noises."""
        self.limits = {name: guard.limits(run.scores[name]) for name, guard in guards.items()}

    def carry_limits(self, rows: list[int]) -> None:
        """Give each position the limits of the position at which its noise was drawn."""
        self.limits = {name: limits[rows] for name, limits in self.limits.items()}

    def begin(self, run: NoiseState, guards: Mapping[str, QualityGuard]) -> None:
        """Begin with the noises of an evaluation; those that are not above their limits are frozen."""
        self.last_good, self.frozen = run.noise, self.fallen(run, guards)

    def update(self, run: NoiseState, guards: Mapping[str, QualityGuard]) -> None:
        """Compare the rewards of a later evaluation with their limits.

        Args:
            run: The evaluation.
            guards: Name of a reward in the scores to its guard.
        """
        if self.limits.keys() != guards.keys():
            raise ValueError(
                f"Expected limits of {list(guards)} from the interrupted run, but got those of {list(self.limits)}. "
                "Start anew without `resume_from`."
            )
        fallen = self.fallen(run, guards) & ~self.frozen
        self.good = ~fallen
        freezing = {name: guard for name, guard in guards.items() if guard.mode == "freeze"}
        self.frozen = self.frozen | (fallen & self.fallen(run, freezing))
        self.rejections += fallen & run.active
        self.last_good = torch.where(per_image(self.good & ~self.frozen, run.noise), run.noise, self.last_good)

    def fallen(self, run: NoiseState, guards: Mapping[str, QualityGuard]) -> torch.Tensor:
        """Return `(B,)` bool, whether a reward is at its limit, below it, or NaN."""
        found = torch.zeros_like(self.good)
        for name in guards:
            found |= ~(run.scores[name] > self.limits[name]).to(found.device)
        return found

    def report(self) -> dict[str, Any]:
        """Return plain values, each a list with one entry for each image."""
        return {
            "limits": {name: limits.tolist() for name, limits in self.limits.items()},
            "rejections": self.rejections.tolist(),
            "frozen": self.frozen.tolist(),
        }
