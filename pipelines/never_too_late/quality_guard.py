"""A floor under the quality of each image of a set, whatever the set is optimised for."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_callback import NoiseCallback
from ...callbacks.noise_state import NoiseState
from ..noise_math import per_image

GUARD_REPORT = "quality guard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityGuard:
    """Takes an image back to its last good noise where a reward of it falls to a limit.

    The guard of It's Never Too Late, https://arxiv.org/abs/2601.00090, per image, for any reward: it need not be
    optimised, nor have a gradient. "sharpness" and "complexity" as guards answer blur and plain backgrounds, which the
    paper leaves open. Of several limits the lowest counts. An image that is at its limit to begin with is held at its
    plain noise.

    Args:
        reward: A name, Hub id or folder of a reward, or any callable `(images, prompts) -> (B,)`; the name of one that
            is optimised means that one.
        drop: The limit is so far below the plain image's reward, above 0 in its units. The paper's intention: 0.05 of
            HPSv2.1.
        keep: The limit is this share of the plain image's reward, in (0, 1), for rewards that are positive.
        threshold: The limit itself. The paper for FLUX.1-schnell: 0.31 of HPSv2.1.
        mode: "revert" goes on from the last good noise without momentum; "freeze" leaves the image there for good.

    Raises:
        ValueError: for settings that cannot work.
    """

    reward: Any
    drop: float | None = None
    keep: float | None = None
    threshold: float | None = None
    mode: Literal["revert", "freeze"] = "revert"

    def __post_init__(self) -> None:
        for name, low, high in (("drop", 0.0, math.inf), ("keep", 0.0, 1.0), ("threshold", -math.inf, math.inf)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low < value < high):
                raise ValueError(f"Expected `{name}` of a guard to be a number in ({low}, {high}), but got {value!r}.")
        if self.drop is None and self.keep is None and self.threshold is None:
            raise ValueError(
                f"Expected a limit for the guard {self.reward!r}, but got none. Pass `drop`, `keep` or `threshold`, as "
                'in `guard={"hpsv2.1": 0.05}` or `guard={"sharpness": {"keep": 0.8}}`.'
            )
        if self.mode not in ("revert", "freeze"):
            raise ValueError(f'Expected `mode` of a guard to be "revert" or "freeze", but got {self.mode!r}.')

    def limits(self, initial: torch.Tensor) -> torch.Tensor:
        """The rewards `(B,)` of the plain images to the limit of each.

        Raises:
            ValueError: for a share of a reward that is negative.
        """
        if self.keep is not None and (initial < 0).any():
            raise ValueError(
                f"Expected rewards of 0 or more for a guard with `keep`, but the plain images have {initial.tolist()}. "
                "Use `drop` or `threshold`."
            )
        limits = torch.full_like(initial, torch.inf)
        if self.drop is not None:
            limits = limits.minimum(initial - self.drop)
        if self.keep is not None:
            limits = limits.minimum(initial * self.keep)
        return limits if self.threshold is None else limits.clamp(max=self.threshold)


def shares_reward(guard: QualityGuard, names: Sequence[str]) -> bool:
    """Whether a guard means one of the rewards that are optimised under these names, rather than one of its own."""
    return isinstance(guard.reward, str) and guard.reward in names


def as_guards(guard: Any) -> list[QualityGuard]:
    """What `guard=` takes as a list of guards.

    That is `None`, a `QualityGuard`, a list of them, or a dict of rewards to the drop, or to settings by name:
    `{"hpsv2.1": 0.05, "sharpness": {"keep": 0.8}}`.

    Raises:
        TypeError, ValueError: for anything else, and for settings that cannot work.
    """
    if guard is None:
        return []
    if isinstance(guard, Mapping):
        return [guard_from(reward, settings) for reward, settings in guard.items()]
    entries = guard if isinstance(guard, list | tuple) else [guard]
    for entry in entries:
        if not hasattr(entry, "limits"):  # of a Hub copy as well
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
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"Expected settings of a guard out of {known}, but got {unknown}.")
    return QualityGuard(reward=reward, **settings)


class GuardedNoise:
    """The noises of a run under guards: which of them are good, and where each goes back to.

    Args:
        noise: `(B, C, H, W)`, the plain noises.

    Attributes:
        good: `(B,)` bool, whether the image that was looked at last is above its limits, or held.
        held: `(B,)` bool, frozen at the last good noise.
        last_good: `(B, C, H, W)`.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.last_good = noise
        self.good = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        self.held = ~self.good
        self.rejections = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.limits: dict[str, torch.Tensor] = {}

    def look(self, state: NoiseState, guards: Mapping[str, QualityGuard]) -> None:
        """Compare the rewards of what was evaluated with their limits, which those of the plain images set.

        Args:
            state: The step.
            guards: Name of a reward in the scores to its guard.
        """
        if state.step == 0:
            self.limits = {name: guard.limits(state.scores[name]) for name, guard in guards.items()}
            self.held = self.fallen(state, guards)
            return
        fallen = self.fallen(state, guards) & ~self.held
        self.good = ~fallen
        freezing = {name: guard for name, guard in guards.items() if guard.mode == "freeze"}
        self.held = self.held | (fallen & self.fallen(state, freezing))
        self.rejections += fallen & state.active
        self.last_good = torch.where(per_image(self.good & ~self.held, state.noise), state.noise, self.last_good)

    def fallen(self, state: NoiseState, guards: Mapping[str, QualityGuard]) -> torch.Tensor:
        """`(B,)` bool: a reward is at its limit or below, or NaN."""
        found = torch.zeros_like(self.good)
        for name in guards:
            found |= ~(state.scores[name] > self.limits[name]).to(found.device)
        return found

    def report(self) -> dict[str, Any]:
        """Plain values, each a list with one entry for each image."""
        return {
            "limits": {name: limits.tolist() for name, limits in self.limits.items()},
            "rejections": self.rejections.tolist(),
            "held": self.held.tolist(),
        }


class GuardWarning(NoiseCallback):
    """Say so where a guard accepted no step at all, and the plain images are what is returned."""

    def on_run_end(self, state: NoiseState) -> None:
        kept = state.reports.get(GUARD_REPORT, {}).get("kept_plain", [])
        images = [index for index, plain in enumerate(kept) if plain]
        if images:
            warnings.warn(
                f"The quality guard accepted no step of the sets of images {images}: they stay the plain ones. Allow a "
                "larger drop, take a smaller learning rate, or give the guarded reward a weight.",
                stacklevel=2,
            )
