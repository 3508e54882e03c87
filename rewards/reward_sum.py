"""The weighted sum of rewards: what the `rewards=` argument of every pipeline becomes."""

import itertools
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .registry import AutoReward, find_reward
from .reward import CallableReward, NonDifferentiableReward, Reward, callable_name, check_gradient

RewardLike = str | os.PathLike[str] | Callable[..., Any]
RewardsLike = RewardLike | Mapping[Any, float] | Sequence[Any]


@dataclass(frozen=True)
class RewardSumOutput:
    """Scores of B images.

    Attributes:
        total: (B,) float32, the weighted sum, with its gradient.
        components: name -> (B,) float32, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class RewardSum(nn.Module):
    """`sum_i weight_i * reward_i(images, prompts)`, higher is better.

    Args:
        rewards: a registered name, Hub id or folder; a `Reward` or any callable `(images, prompts) -> (B,)`; a dict of
            these to weights; a list of them, or of (reward, weight) pairs; or another `RewardSum`.
        weights: one per entry of a list without pairs; 1 by default. A reward of weight 0 is evaluated and reported,
            not optimised.
        dtype, device: of the rewards that are loaded by name.

    Attributes:
        rewards: the rewards, in the order given.
        names: their names; the second `clipscore` becomes `clipscore_2`.
        weights: name -> weight.

    Raises:
        TypeError: something that is no reward.
        ValueError: an unknown name, or weights that are negative, not finite, or all zero. It is raised before anything
            is loaded.
    """

    def __init__(
        self,
        rewards: RewardsLike,
        weights: Sequence[float] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        pairs = reward_weight_pairs(rewards, weights)
        for reward, weight in pairs:
            check_reward_pair(reward, weight)
        if not any(weight for _, weight in pairs):
            raise ValueError(
                "Expected a reward with a weight above 0, but all weights are 0: nothing would be optimised."
            )
        self.rewards = nn.ModuleList(as_reward(reward, dtype, device) for reward, _ in pairs)
        self.names = distinct_names([str(reward.name) for reward in self.rewards])
        self.weights = {name: float(weight) for name, (_, weight) in zip(self.names, pairs, strict=True)}

    @property
    def differentiable(self) -> bool:
        """Whether every reward that is optimised has a gradient."""
        return not self.without_gradient()

    @property
    def requires_prompt(self) -> bool:
        return any(reward.requires_prompt for reward in self.rewards)

    def without_gradient(self) -> list[str]:
        """The names of the rewards that are optimised and have no gradient."""
        entries = zip(self.weights.items(), self.rewards, strict=True)
        return [name for (name, weight), reward in entries if weight and not reward.differentiable]

    def check_differentiable(
        self, height: int | None = None, width: int | None = None, prompts: str | None = "a photo"
    ) -> None:
        """What a method with gradients calls before any model runs.

        With the size of the images it also tries each optimised reward on a random image (see `check_gradient`), which
        finds callables that cut the graph.

        Raises:
            NonDifferentiableReward: naming the rewards that give no gradient.
            NonFiniteReward: a score or gradient that is NaN or infinite.
        """
        if names := self.without_gradient():
            raise NonDifferentiableReward(
                f"Expected rewards with a gradient, but {names} are not differentiable. Give them weight 0 to have "
                "them reported only, or use a method without gradients, such as best-of-N."
            )
        if height is not None and width is not None:
            for weight, reward in zip(self.weights.values(), self.rewards, strict=True):
                if weight and isinstance(reward, Reward):
                    check_gradient(reward, prompts, height, width)

    def forward(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, return_dict: bool = True
    ) -> RewardSumOutput | tuple[Tensor, dict[str, Tensor]]:
        """Score (B, 3, H, W) images in [0, 1]; see `Reward.forward` for the arguments and errors."""
        total, components = images.new_zeros(len(images), dtype=torch.float32), {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            scores = reward(images if weight else images.detach(), prompts)
            components[name] = scores.detach()
            if weight:
                total = total + weight * scores
        return RewardSumOutput(total, components) if return_dict else (total, components)


def reward_weight_pairs(rewards: RewardsLike, weights: Sequence[float] | None) -> list[tuple[Any, Any]]:
    """Every accepted form of `rewards=` as a list of (reward, weight)."""
    entries = reward_entries(rewards)
    malformed = [entry for entry in entries if isinstance(entry, tuple) and len(entry) != 2]
    if malformed:
        raise ValueError(f"Expected (reward, weight) pairs, but got {malformed[0]!r}.")
    if not entries:
        raise ValueError("Expected at least one reward, but got none. Pass for example `rewards={'clipscore': 1.0}`.")
    if weights is None:
        return [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in entries]
    if any(isinstance(entry, tuple) for entry in entries):
        raise ValueError(
            "Expected weights once, but got them within `rewards` and as `weights`. Leave one of them out."
        )
    if len(weights) != len(entries):
        raise ValueError(f"Expected {len(entries)} weights, one per reward, but got {len(weights)}.")
    return list(zip(entries, weights, strict=True))


def reward_entries(rewards: RewardsLike) -> list[Any]:
    """The entries of `rewards=`: a reward each, or a (reward, weight) tuple."""
    if isinstance(rewards, Mapping):
        return list(rewards.items())
    if isinstance(rewards, (list, tuple)):
        return [tuple(entry) if isinstance(entry, list) else entry for entry in rewards]
    # A sum is known by its attributes: a pipeline from the Hub has its own copy of the class.
    parts, weights = getattr(rewards, "rewards", None), getattr(rewards, "weights", None)
    if isinstance(parts, nn.ModuleList) and isinstance(weights, Mapping):
        return list(zip(parts, weights.values(), strict=True))
    return [rewards]


def check_reward_pair(reward: Any, weight: Any) -> None:
    """Raise unless `reward` can become a reward and `weight` is a finite number of at least 0."""
    if isinstance(reward, (str, os.PathLike)):
        find_reward(os.fspath(reward))
    elif isinstance(reward, type):
        raise TypeError(f"Expected a reward, but got the class `{reward.__name__}`. Pass an instance of it.")
    elif not callable(reward):
        raise TypeError(
            f"Expected a reward name, a Hub id, a folder or a callable `(images, prompts) -> (B,)`, but got "
            f"{reward!r}. Weighted rewards are written `{{reward: weight}}` or `[(reward, weight), ...]`."
        )
    name = reward if isinstance(reward, str) else callable_name(reward)
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"Expected a finite number as the weight of reward '{name}', but got {weight!r}.")
    if weight < 0:
        raise ValueError(
            f"Expected a weight of at least 0 for reward '{name}', but got {weight}. To minimise it, pass a callable "
            "that returns the negated score: `lambda images, prompts: -reward(images, prompts)`."
        )


def as_reward(reward: RewardLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Reward:
    """A name, Hub id or folder is loaded, a plain callable is wrapped, a `Reward` stays as it is."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, (str, os.PathLike)):
        return AutoReward.from_pretrained(reward, dtype=dtype, device=device)
    return CallableReward(reward)


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, with `_2`, `_3` ... appended to those that have been taken."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{count}" for count in itertools.count(2))
        distinct.append(name if name not in distinct else next(new for new in numbered if new not in distinct))
    return distinct
