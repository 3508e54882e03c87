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
from .reward import (
    CallableReward,
    NonDifferentiableReward,
    Reward,
    callable_name,
    check_gradient,
    prompts_per_image,
)
from .transforms import at_least_float32

RewardLike = str | os.PathLike[str] | Callable[..., Any]
RewardsLike = RewardLike | Mapping[Any, float] | Sequence[Any]


# the weights that a paper's own code has, by its name: https://arxiv.org/abs/2406.04312
REWARD_PRESETS: dict[str, dict[str, float]] = {
    "reno": {"hpsv2.1": 5.0, "imagereward": 1.0, "clipscore": 0.01, "pickscore": 0.05}
}


@dataclass(frozen=True)
class RewardSumOutput:
    """Scores of B images.

    Attributes:
        total: (B,) float32, the weighted sum, with its gradient.
        components: name -> (B,) float32, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class AttachedGradient(torch.autograd.Function):
    """Values (B,), or one of the set, with a gradient with respect to images (B, 3, H, W) that is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        if torch.is_grad_enabled():  # asked for by `create_graph=True`
            raise RuntimeError(
                "Expected a first derivative of a `RewardSum` or `SetRewardSum`, whose gradient is a constant once "
                "taken."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values.to(gradient.dtype).reshape(-1, 1, 1, 1), None, None


class RewardSum(nn.Module):
    """`sum_i weight_i * reward_i(images, prompts)`, higher is better.

    The gradients of the rewards with respect to the pixels are taken one after the other, when the scores are, and only
    their weighted sum is kept: so a decoder and a diffusion model before them are passed once, backwards too, and of
    the rewards' own activations no more than those of the largest are held at any time. It is the gradient of the sum,
    as the score of an image depends on that image alone; it cannot be differentiated again.

    Args:
        rewards: a registered name, Hub id or folder; a `Reward` or any callable `(images, prompts) -> (B,)`; a dict of
            these to weights; a list of them, or of (reward, weight) pairs; another `RewardSum`; or the name of a preset
            in `REWARD_PRESETS`: "reno" has the rewards and weights of the ReNO paper.
        weights: one per entry of a list without pairs; 1 by default. A reward of weight 0 is evaluated and reported,
            not optimised.
        normalization: name -> (mean, std) of a reward that counts as `(score - mean) / std`, as `calibrated` measures
            them: weights then compare rewards of different units. Raw scores are reported all the same.
        dtype, device: of the rewards that are loaded by name.

    Attributes:
        rewards: the rewards, in the order given.
        names: their names; the second `clipscore` becomes `clipscore_2`.
        weights: name -> weight.
        normalization: name -> (mean, std), of those that have one.

    Raises:
        TypeError: something that is no reward.
        ValueError: an unknown name, weights that are negative, not finite, or all zero, or a normalisation that is
            none. Names and weights are checked before anything is loaded.
    """

    def __init__(
        self,
        rewards: RewardsLike,
        weights: Sequence[float] | None = None,
        *,
        normalization: Mapping[str, tuple[float, float]] | None = None,
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
        given = getattr(rewards, "normalization", {}) if normalization is None else normalization
        self.normalization = checked_normalization(given, self.names)

    @property
    def differentiable(self) -> bool:
        """Whether every reward that is optimised has a gradient."""
        return not self.without_gradient()

    @property
    def has_gradient(self) -> bool:
        """Whether any reward that is optimised has a gradient."""
        return any(
            weight and reward.differentiable for weight, reward in zip(self.weights.values(), self.rewards, strict=True)
        )

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
        self,
        images: Tensor,
        prompts: str | Sequence[str] | None = None,
        return_dict: bool = True,
        chunk_size: int | None = None,
    ) -> RewardSumOutput | tuple[Tensor, dict[str, Tensor]]:
        """Score (B, 3, H, W) images in [0, 1]; see `Reward.forward` for the other arguments and errors.

        Args:
            chunk_size: score at most so many images at a time, with the memory of so many; `None` for all at once.
        """
        with_gradient = images.requires_grad and torch.is_grad_enabled() and self.has_gradient
        if not isinstance(prompts, (str, type(None))):
            prompts = prompts_per_image(prompts, len(images), self.names[0], False)
        pixels, size = images.detach(), chunk_size or max(1, len(images))
        dtype = torch.promote_types(images.dtype, torch.float32)
        gradient = torch.zeros_like(pixels, dtype=dtype) if with_gradient else None
        parts = []
        for start in range(0, max(1, len(images)), size):
            rows = slice(start, start + size)
            its_gradient = None if gradient is None else gradient[rows]
            parts.append(self.scores(pixels[rows], part_of_prompts(prompts, rows), its_gradient))
        components = {name: torch.cat([part[name] for part in parts]) for name in self.names}
        total = images.new_zeros(len(images), dtype=torch.float32)
        for name, weight in self.weights.items():
            total = total + weight * self.normalized(name, components[name])
        if gradient is not None:
            total = AttachedGradient.apply(images, total, gradient.to(images.dtype))
        return RewardSumOutput(total, components) if return_dict else (total, components)  # pyright: ignore

    def scores(self, images: Tensor, prompts: Any, gradient: Tensor | None) -> dict[str, Tensor]:
        """The scores (B,) by name, detached; the gradient of their weighted sum is added to `gradient` (B, 3, H, W)."""
        components = {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            if weight and gradient is not None and reward.differentiable:
                components[name], its_gradient = score_and_gradient(reward, images, prompts)
                gradient.add_(its_gradient, alpha=weight / self.scale(name))
            else:
                components[name] = reward(images, prompts).detach()
        return components

    def normalized(self, name: str, scores: Tensor) -> Tensor:
        mean, std = self.normalization.get(name, (0.0, 1.0))
        return (scores - mean) / std

    def scale(self, name: str) -> float:
        return self.normalization.get(name, (0.0, 1.0))[1]

    def optimised(self) -> "RewardSum":
        """The sum without the rewards of weight 0; weights of the models are shared."""
        parts = zip(self.names, self.rewards, strict=True)
        return self.like({name: reward for name, reward in parts if self.weights[name]})

    def like(self, rewards: Mapping[str, nn.Module]) -> "RewardSum":
        """A sum of rewards by the names of some here, each with the weight and the normalisation of that name.

        Names are given anew: where the first of two `clipscore` is left out, `clipscore_2` becomes `clipscore`.
        """
        names = distinct_names([str(reward.name) for reward in rewards.values()])
        renamed = zip(names, rewards, strict=True)
        normalization = {new: self.normalization[name] for new, name in renamed if name in self.normalization}
        return RewardSum(
            [(reward, self.weights[name]) for name, reward in rewards.items()], normalization=normalization
        )

    @torch.no_grad()
    def calibrated(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, batch_size: int = 8
    ) -> "RewardSum":
        """The same rewards, each in units of its own spread over a calibration set.

        Args:
            images: (N, 3, H, W) in [0, 1], N of at least 2: such as the plain results of your own pipeline and prompts.
            prompts: one per image, or one for all.
            batch_size: how many are scored at once.

        Returns:
            A `RewardSum` of the same rewards and weights; its `normalization` is plain numbers, to be kept and given to
            another `RewardSum`.

        Raises:
            ValueError: fewer than 2 images, or a reward that gives all of them the same score.
        """
        if len(images) < 2:
            raise ValueError(f"Expected at least 2 images to calibrate by, but got {len(images)}.")
        texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else list(prompts)
        normalization = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            parts = range(0, len(images), batch_size)
            scores = [reward(images[i : i + batch_size], as_prompts(texts[i : i + batch_size])) for i in parts]
            std, mean = torch.std_mean(torch.cat(scores).double())
            normalization[name] = (mean.item(), std.item())
        pairs = list(zip(self.rewards, self.weights.values(), strict=True))
        return RewardSum(pairs, normalization=normalization)

    def drop_text_encoders(self, prompts: str | Sequence[str]) -> None:
        """`Reward.drop_text_encoder` of each reward that has one."""
        for reward in self.rewards:
            if hasattr(reward, "drop_text_encoder"):
                reward.drop_text_encoder(prompts)  # pyright: ignore[reportCallIssue]

    def describe(self) -> dict[str, Any]:
        """Weights, and the normalisation if there is one: plain values for the provenance of a result."""
        normalization = {name: list(pair) for name, pair in self.normalization.items()}
        return self.weights | ({"normalization": normalization} if normalization else {})


def score_and_gradient(reward: nn.Module, images: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
    """Scores (B,), detached, and their gradient (B, 3, H, W) in float32 or better; the graph is freed on return."""
    pixels = at_least_float32(images.detach()).requires_grad_()
    scores = reward(pixels, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, materialize_grads=True)
    return scores.detach(), gradient


def part_of_prompts(prompts: str | Sequence[str] | None, rows: slice) -> Any:
    """The prompts of some images: those of a list, or the one for all."""
    return prompts if prompts is None or isinstance(prompts, str) else prompts[rows]


def as_prompts(texts: Sequence[str | None]) -> list[str] | None:
    """What a reward takes: a list of prompts, or None where none are given."""
    return None if None in texts else list(texts)  # pyright: ignore[reportReturnType]


def checked_normalization(
    normalization: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """name -> (mean, std) as floats. Raises `ValueError` for another name, another number of values, or no spread."""
    checked = {}
    for name, values in normalization.items():
        if name not in names:
            raise ValueError(f"Expected a normalisation of rewards out of {list(names)}, but got one of '{name}'.")
        mean, std = (float(value) for value in values) if len(values) == 2 else (math.nan, math.nan)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"Expected (mean, std) with a finite mean and a std above 0 for reward '{name}', but got "
                f"{tuple(values)}. Calibrate on images that it scores differently."
            )
        checked[name] = (mean, std)
    return checked


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
    if isinstance(rewards, str) and rewards in REWARD_PRESETS:
        return list(REWARD_PRESETS[rewards].items())
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
