"""Weighted sum of rewards, built from the `rewards=` argument of every pipeline."""

import itertools
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checked_fields import refused_signature
from ...frames import folded, for_each_frame, mean_of_frames
from .registry import AutoReward, LoadedModels, find_reward
from .reward import (
    CallableReward,
    NonDifferentiableReward,
    Reward,
    callable_name,
    check_gradient,
    prompts_per_image,
)
from .transforms import at_least_float32
from .weight_by_kind import AUTO_REWARDS, WeightByKind

RewardLike = str | os.PathLike[str] | Callable[..., Any]
RewardsLike = RewardLike | Mapping[Any, float] | Sequence[Any]

# Rewards and weights from the released code of a paper; ReNO is https://arxiv.org/abs/2406.04312.
REWARD_PRESETS: dict[str, dict[str, float]] = {
    "auto": AUTO_REWARDS,
    "reno": {"hpsv2.1": 5.0, "imagereward": 1.0, "clipscore": 0.01, "pickscore": 0.05},
}


@dataclass(frozen=True)
class RewardSumOutput:
    """Scores of B images.

    Attributes:
        total: (B,) float32, the weighted sum, differentiable with respect to the images.
        components: Reward name -> (B,) float32, unweighted, in the reward's own units, and detached.
    """

    total: Tensor
    components: dict[str, Tensor]


class AttachedGradient(torch.autograd.Function):
    """Attach a precomputed gradient with respect to images (B, 3, H, W) to values (B,), or to one value of a set."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # only with `create_graph=True`
            raise RuntimeError(
                "Expected a first derivative of a `RewardSum` or `SetRewardSum`, but got a request for a second one. "
                "Their gradient is precomputed and has no graph."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values.to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1)), None, None


class RewardSum(nn.Module):
    """`sum_i weight_i * reward_i(images, prompts)`, higher is better.

    The pixel gradient of each of several rewards is computed together with its scores, one after the other, and only
    the weighted sum of the gradients is stored. So memory holds the activations of one reward at a time, and the
    backward pass through the decoder and the diffusion model runs once. The result equals the gradient of the sum,
    since the score of an image depends on that image alone, but that of several cannot be differentiated again.

    Args:
        rewards: A registered name, Hub id or folder; a `Reward` or any callable `(images, prompts) -> (B,)`; a dict
            that maps these to weights; a list of them, or of (reward, weight) pairs; another `RewardSum`. The name of a
            preset stands for its rewards: "reno" for those of the ReNO paper, "auto" for rewards whose weights depend
            on the kind of the prompt of each image (see `prompt_kind` and `CARINOX_FACTORS`).
        weights: One per entry of a list without pairs; 1 by default. A reward of weight 0 is evaluated and reported,
            but not optimized.
        dtype: The weights' dtype of rewards that are loaded by name.
        device: The device of rewards that are loaded by name.
        loaded: The rewards that were loaded before, to which those that are loaded now are added.

    Attributes:
        rewards: The rewards, in the given order.
        names: Their names; the second `clipscore` becomes `clipscore_2`.
        weights: Name -> weight, a `WeightByKind` where it depends on the prompt.

    Raises:
        TypeError: For an object that is not a reward.
        ValueError: For an unknown name, or weights that are negative, not finite, or all zero. Names and weights are
            checked before any model is loaded.
    """

    def __init__(
        self,
        rewards: RewardsLike,
        weights: Sequence[float] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        loaded: LoadedModels | None = None,
    ):
        super().__init__()
        pairs = checked_reward_pairs(rewards, weights)
        models = loaded or LoadedModels()
        self.rewards = nn.ModuleList(as_reward(reward, dtype, device, models) for reward, _ in pairs)
        self.names = distinct_names([str(reward.name) for reward in self.rewards])
        self.weights = {name: as_weight(weight) for name, (_, weight) in zip(self.names, pairs, strict=True)}

    def __repr__(self) -> str:
        return f"RewardSum({self.weights})"

    @property
    def differentiable(self) -> bool:
        """Return whether every optimized reward has a gradient."""
        return not self.without_gradient()

    @property
    def has_gradient(self) -> bool:
        """Return whether any optimized reward has a gradient."""
        return any(
            weight and reward.differentiable for weight, reward in zip(self.weights.values(), self.rewards, strict=True)
        )

    @property
    def requires_prompt(self) -> bool:
        return any(reward.requires_prompt for reward in self.rewards)

    def without_gradient(self) -> list[str]:
        """Return the names of optimized rewards that have no gradient."""
        entries = zip(self.weights.items(), self.rewards, strict=True)
        return [name for (name, weight), reward in entries if weight and not reward.differentiable]

    def check_differentiable(
        self, height: int | None = None, width: int | None = None, prompts: str | None = "a photo"
    ) -> None:
        """Check that a method with gradients can use this sum, before any diffusion model runs.

        Given the image size, it also evaluates each optimized reward on a random image (see `check_gradient`), which
        detects callables that cut the graph.

        Raises:
            NonDifferentiableReward: If optimized rewards have no gradient; the message names them.
            NonFiniteReward: If a score or gradient is NaN or infinite.
        """
        if names := self.without_gradient():
            raise NonDifferentiableReward(
                f"Expected rewards with a gradient, but {names} are not differentiable. Give them weight 0 to only "
                "report them, or use a method without gradients, such as best-of-N."
            )
        if height is not None and width is not None:
            for weight, reward in zip(self.weights.values(), self.rewards, strict=True):
                if weight and isinstance(reward, Reward):
                    check_gradient(reward, prompts, height, width)

    def forward(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, chunk_size: int | None = None
    ) -> RewardSumOutput:
        """Score images.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device; or videos (B, F, 3, H, W), whose score is
                the mean over their frames.
            prompts: One per image, or a single one for all.
            chunk_size: The number of images, or of frames, scored at a time, to save memory; `None` for all at once.

        Raises:
            ValueError, NonFiniteReward, NonDifferentiableReward: As `Reward.forward` does.
        """
        with_gradient = images.requires_grad and torch.is_grad_enabled() and self.has_gradient
        if not isinstance(prompts, (str, type(None))):
            prompts = prompts_per_image(prompts, len(images), self.names[0], False)
        if images.ndim == 5:
            return self.of_videos(images, prompts, chunk_size)
        size = chunk_size or max(1, len(images))
        if with_gradient and len(self.rewards) == 1 and len(images) <= size:  # no other graph to make room for
            (name,), scores = self.names, self.rewards[0](images, prompts)
            return RewardSumOutput(self.weight_of(name, prompts, scores) * scores, {name: scores.detach()})
        pixels = images.detach()
        dtype = torch.promote_types(images.dtype, torch.float32)
        gradient = torch.zeros_like(pixels, dtype=dtype) if with_gradient else None
        chunks = []
        for start in range(0, max(1, len(images)), size):
            rows = slice(start, start + size)
            chunk_gradient = None if gradient is None else gradient[rows]
            chunks.append(self.scores(pixels[rows], prompts_of_rows(prompts, rows), chunk_gradient))
        components = {name: torch.cat([chunk[name] for chunk in chunks]) for name in self.names}
        total = images.new_zeros(len(images), dtype=torch.float32)
        for name in self.names:
            total = total + self.weight_of(name, prompts, total) * components[name]
        if gradient is not None:
            total = AttachedGradient.apply(images, total, gradient.to(images.dtype))
        return RewardSumOutput(total, components)  # pyright: ignore[reportArgumentType]

    def of_videos(self, videos: Tensor, prompts: str | Sequence[str] | None, chunk_size: int | None) -> RewardSumOutput:
        """Score videos (B, F, 3, H, W) by the mean over their frames."""
        count = videos.shape[1]
        output = self(folded(videos), for_each_frame(prompts, count), chunk_size)
        components = {name: mean_of_frames(scores, count) for name, scores in output.components.items()}
        return RewardSumOutput(mean_of_frames(output.total, count), components)

    def scores(self, images: Tensor, prompts: str | Sequence[str] | None, gradient: Tensor | None) -> dict[str, Tensor]:
        """Return detached scores (B,) by name, and add the gradient of their weighted sum to `gradient` in place."""
        components = {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            if weight and gradient is not None and reward.differentiable:
                components[name], pixel_gradient = score_and_gradient(reward, images, prompts)
                weight = self.weight_of(name, prompts, gradient)
                if isinstance(weight, Tensor):
                    gradient.addcmul_(pixel_gradient, weight[:, None, None, None])
                else:
                    gradient.add_(pixel_gradient, alpha=weight)
            else:
                components[name] = reward(images, prompts).detach()
        return components

    def weight_of(self, name: str, prompts: str | Sequence[str] | None, like: Tensor) -> float | Tensor:
        """Return the weight of a reward: a number, or `(B,)` for `like` `(B, ...)` if it depends on the prompts."""
        weight = self.weights[name]
        return like.new_tensor(weight.of(prompts, len(like))) if isinstance(weight, WeightByKind) else weight

    def optimized(self) -> "RewardSum":
        """Return the sum without rewards of weight 0. The models are shared, not copied."""
        pairs = zip(self.names, self.rewards, strict=True)
        return self.like({name: reward for name, reward in pairs if self.weights[name]})

    def like(self, rewards: Mapping[str, nn.Module]) -> "RewardSum":
        """Return the sum of other `rewards`, each with the weight that this sum gives to its name."""
        return RewardSum([(reward, self.weights[name]) for name, reward in rewards.items()])

    def drop_text_encoders(self, prompts: str | Sequence[str]) -> None:
        """Call `Reward.drop_text_encoder` of each reward."""
        for reward in self.rewards:
            if callable(drop := getattr(reward, "drop_text_encoder", None)):
                drop(prompts)

    def describe(self) -> dict[str, Any]:
        """Return the weights as plain values, for the provenance of a result."""
        return {name: getattr(weight, "by_kind", weight) for name, weight in self.weights.items()}


def score_and_gradient(reward: nn.Module, images: Tensor, prompts: str | Sequence[str] | None) -> tuple[Tensor, Tensor]:
    """Return detached scores (B,) and their gradient (B, 3, H, W) in float32 or more; the graph is freed."""
    pixels = at_least_float32(images.detach()).requires_grad_()
    scores = reward(pixels, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, materialize_grads=True)
    return scores.detach(), gradient


def prompts_of_rows(prompts: str | Sequence[str] | None, rows: slice) -> str | Sequence[str] | None:
    """Return the prompts of some rows of the batch; a single prompt, or None, applies to all rows."""
    return prompts if prompts is None or isinstance(prompts, str) else prompts[rows]


def reward_weight_pairs(rewards: RewardsLike, weights: Sequence[float] | None) -> list[tuple[Any, Any]]:
    """Convert any accepted form of `rewards=` to a list of (reward, weight)."""
    entries = reward_entries(rewards)
    malformed = [entry for entry in entries if isinstance(entry, tuple) and len(entry) != 2]
    if malformed:
        raise ValueError(f"Expected (reward, weight) pairs, but got {malformed[0]!r}.")
    if not entries:
        raise ValueError("Expected at least one reward, but got none. Pass for example `rewards={'clipscore': 1.0}`.")
    if weights is None:
        pairs = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in entries]
        return [member for pair in pairs for member in expanded_pair(*pair)]
    if any(isinstance(entry, tuple) for entry in entries):
        raise ValueError("Expected weights once, but got them in `rewards` and as `weights`. Leave one of them out.")
    if len(weights) != len(entries):
        raise ValueError(f"Expected {len(entries)} weights, one per reward, but got {len(weights)}.")
    return [member for pair in zip(entries, weights, strict=True) for member in expanded_pair(*pair)]


def expanded_pair(reward: Any, weight: Any) -> list[tuple[Any, Any]]:
    """Return the members of a preset, each with its weight there times `weight`; other pairs as they are."""
    if not isinstance(reward, str) or reward not in REWARD_PRESETS:
        return [(reward, weight)]
    if not isinstance(weight, numbers.Real):
        return [(member, weight) for member in REWARD_PRESETS[reward]]  # which is refused later
    return [(member, float(weight) * of) for member, of in REWARD_PRESETS[reward].items()]


def checked_reward_pairs(rewards: RewardsLike, weights: Sequence[float] | None = None) -> list[tuple[Any, Any]]:
    """Return `reward_weight_pairs`, after a check of all names and weights. Nothing is loaded."""
    pairs = reward_weight_pairs(rewards, weights)
    for reward, weight in pairs:
        check_reward_pair(reward, weight)
    if not any(weight for _, weight in pairs):
        raise ValueError(
            "Expected a reward with a weight above 0, but all weights are 0. Give a weight to the reward to optimize."
        )
    return pairs


def reward_entries(rewards: RewardsLike) -> list[Any]:
    """Return the entries of `rewards=`: rewards or (reward, weight) tuples."""
    if isinstance(rewards, Mapping):
        return list(rewards.items())
    if isinstance(rewards, (list, tuple)):
        return [tuple(entry) if isinstance(entry, list) else entry for entry in rewards]
    # Duck typing, because a pipeline from the Hub has its own copy of the class.
    parts, weights = getattr(rewards, "rewards", None), getattr(rewards, "weights", None)
    if isinstance(parts, nn.ModuleList) and isinstance(weights, Mapping):
        return list(zip(parts, weights.values(), strict=True))
    return [rewards]


def check_reward_pair(reward: Any, weight: Any) -> None:
    """Raise unless `as_reward` accepts `reward` and `weight` is a finite number of at least 0."""
    if isinstance(reward, (str, os.PathLike)):
        find_reward(os.fspath(reward), also=REWARD_PRESETS)
    elif isinstance(reward, type):
        raise TypeError(f"Expected a reward, but got the class `{reward.__name__}`. Pass an instance of it.")
    elif not callable(reward):
        raise TypeError(
            f"Expected a reward name, a Hub id, a folder or a callable `(images, prompts) -> (B,)`, but got "
            f"{reward!r}. Weighted rewards are written `{{reward: weight}}` or `[(reward, weight), ...]`."
        )
    elif parameters := refused_signature(reward, 2):
        raise TypeError(
            f"Expected a reward `(images, prompts) -> (B,)`, but '{callable_name(reward)}' takes {parameters}. Wrap "
            "it: `lambda images, prompts: reward(images)`, or `reward(images, prompts, [{}] * len(images))[0]` for one "
            "of TRL's with metadata."
        )
    name = reward if isinstance(reward, str) else callable_name(reward)
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"Expected a finite number as the weight of reward '{name}', but got {weight!r}.")
    if weight < 0:
        raise ValueError(
            f"Expected a weight of at least 0 for reward '{name}', but got {weight}. To minimize it, pass a callable "
            "that returns the negated score: `lambda images, prompts: -reward(images, prompts)`."
        )


def as_weight(weight: Any) -> float:
    """Return a weight as a float or, also if it is of the class of a pipeline from the Hub, as a `WeightByKind`."""
    return WeightByKind(weight.by_kind) if hasattr(weight, "by_kind") else float(weight)


def as_reward(
    reward: RewardLike, dtype: torch.dtype | None, device: torch.device | str | None, loaded: LoadedModels
) -> Reward:
    """Load a name, Hub id or folder; wrap a plain callable; return a `Reward` unchanged."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, (str, os.PathLike)):
        return loaded.load("reward", AutoReward.from_pretrained, reward, dtype, device)
    return CallableReward(reward)


def distinct_names(names: Sequence[str]) -> list[str]:
    """Append `_2`, `_3`, ... to repeated names."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{count}" for count in itertools.count(2))
        distinct.append(name if name not in distinct else next(new for new in numbered if new not in distinct))
    return distinct
