"""Weighted sum of set rewards, built from a `diversity=` argument."""

import copy
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.registry import LoadedModels
from ..contract.reward import NonDifferentiableReward
from ..contract.reward_sum import AttachedGradient, distinct_names
from ..features.auto_features import AutoFeatures, find_features
from .set_reward import SetReward, find_set_reward

SetRewardsLike = str | SetReward | nn.Module | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class SetRewardSumOutput:
    """Values of one set of images.

    Attributes:
        total: The weighted sum, a differentiable scalar.
        components: Name -> scalar, unweighted, in the units of the set reward, and detached.
    """

    total: Tensor
    components: dict[str, Tensor]


class SetRewardSum(nn.Module):
    """`sum_i weight_i * set_reward_i(images)`, a scalar for the whole set, higher is better.

    Plain values are accepted, so that they can be passed to a pipeline from the Hub:

        {"dpp": 150.0}                                      # name -> weight, on its default features
        {"dpp": ("clip", 150.0), "pairwise": ("lpips", 60.0)}   # name -> (features, weight)
        [("dpp", 150.0), ("dpp", "clip", 50.0)]             # the same reward on two features
        "dpp"                                               # weight 1

    Features are given by a registered name, a Hub id, a folder or as a `Features` object. The same name is loaded once,
    and set rewards on the same features share a forward pass.

    The exact gradient is also available with the memory of one image: compute all features without a graph, then the
    gradient with respect to them, then backpropagate through one image at a time.

        chunks = [total.known_features(image) for image in generated_one_by_one]    # first pass, no graph
        output, gradient = total.gradient(join_features(chunks), known)
        for index, image in enumerate(generated_again_with_a_graph):                # second pass
            total.linearized(image, {name: rows[index : index + 1] for name, rows in gradient.items()}).backward()

    Args:
        diversity: One of the forms above, with a `SetReward` allowed instead of a name; or another `SetRewardSum`. A
            set reward of weight 0 is evaluated and reported, but not optimized.
        dtype: The weights' dtype of features that are loaded by name.
        device: The device of features that are loaded by name.
        loaded: The features that were loaded before, to which those that are loaded now are added.

    Attributes:
        rewards: The set rewards, in the given order.
        names: Their names; the second `dpp` becomes `dpp_2`.
        weights: Name -> weight.
        feature_maps: The distinct features of the set rewards.
        feature_names: The names of the features, which are the keys of `features(images)`.
        released: Whether the features are computed `as_released()`.

    Raises:
        TypeError: For an object that is not a set reward.
        ValueError: For an unknown name, or a weight that is negative or not finite. Names and weights are checked
            before any model is loaded.
    """

    def __init__(
        self,
        diversity: SetRewardsLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        loaded: LoadedModels | None = None,
    ) -> None:
        super().__init__()
        entries = checked_set_reward_entries(diversity)
        rewards = build_set_rewards(entries, dtype, device, loaded or LoadedModels())
        self.rewards = nn.ModuleList(rewards)
        self.names = distinct_names([str(reward.name) for reward in rewards])
        self.weights = {name: float(weight) for name, (_, _, weight) in zip(self.names, entries, strict=True)}
        maps = list({id(reward.features): reward.features for reward in rewards}.values())
        self.feature_maps = nn.ModuleList(maps)
        self.feature_names = distinct_names([str(each.name) for each in maps])
        names_of = {id(each): name for each, name in zip(maps, self.feature_names, strict=True)}
        self.released = bool(getattr(diversity, "released", False))
        self.features_of = {
            name: names_of[id(reward.features)] for name, reward in zip(self.names, rewards, strict=True)
        }

    def __repr__(self) -> str:
        return f"SetRewardSum({self.weights})"

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return all features (B, ...) of images (B, 3, H, W) in [0, 1], by name, with their graph.

        Raises:
            ValueError: For invalid images.
        """
        return {name: encode(images) for name, encode in self.maps().items()}

    @torch.no_grad()
    def known_features(self, images: Tensor, chunk_size: int = 1) -> dict[str, Tensor]:
        """Return `features` without a graph, computed `chunk_size` images at a time, for example to cache references.

        To add images to a growing set: `join_features([known, total.known_features(new)])`.
        """
        return join_features([self.features(chunk) for chunk in images.split(chunk_size)])

    def forward(
        self,
        images: Tensor,
        references: Tensor | Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
    ) -> SetRewardSumOutput:
        """Score the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W) fixed images of the set, or their `known_features`; they get no gradient.
            chunk_size: The number of images encoded at a time, to save memory; `None` for all at once. Images are
                encoded twice then, and the gradient is the same but cannot be differentiated again.

        Raises:
            ValueError: For fewer than two images in total, or invalid images.
            NonFiniteReward: For a value that is NaN or infinite.
        """
        known = self.known_features(references) if isinstance(references, Tensor) else references
        if chunk_size is not None:
            return self.in_chunks(images, known, chunk_size)
        output = self.of_features(self.features(images), known)
        return SetRewardSumOutput(output.total.to(images.device), output.components)

    def in_chunks(self, images: Tensor, references: Mapping[str, Tensor] | None, chunk_size: int) -> SetRewardSumOutput:
        """Compute `forward` by chunks: features without a graph, their gradient, then the pixel gradient by chunk."""
        features = self.known_features(images.detach(), chunk_size)
        if not (images.requires_grad and torch.is_grad_enabled()):
            output = self.of_features(features, references)
            return SetRewardSumOutput(output.total.to(images.device), output.components)
        output, rows = self.gradient(features, references)
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            chunk = slice(start, start + chunk_size)
            gradient[chunk] = self.pixel_gradient(images[chunk], {name: each[chunk] for name, each in rows.items()})
        total = AttachedGradient.apply(images, output.total.to(images.device), gradient)
        return SetRewardSumOutput(total, output.components)  # pyright: ignore[reportArgumentType]

    def pixel_gradient(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient of `linearized` with respect to the pixels (B, 3, H, W), and free its graph."""
        leaf = images.detach().requires_grad_()
        value = self.linearized(leaf, gradient)
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(value, leaf)[0]

    def of_features(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> SetRewardSumOutput:
        """Score a set by features (B, ...) and (M, ...) by name, from `features` or `known_features`."""
        for given in (features, references or features):
            self.check_feature_names(given)
        total, components = torch.zeros((), device=features[self.feature_names[0]].device), {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            key, weight = self.features_of[name], self.weights[name]
            encoded = features[key] if weight else features[key].detach()
            value = reward.of_features(encoded, None if references is None else references[key])  # pyright: ignore[reportCallIssue]
            components[name] = value.detach()
            total = total + weight * value.to(total.device)
        return SetRewardSumOutput(total, components)

    def gradient(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> tuple[SetRewardSumOutput, dict[str, Tensor]]:
        """Return the value, and its gradient with respect to the features (B, ...) of optimized rewards, by name."""
        wanted = {self.features_of[name] for name, weight in self.weights.items() if weight}
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in features.items()}
        with torch.enable_grad():
            output = self.of_features(leaves, references)
        named = {name: leaf for name, leaf in leaves.items() if name in wanted}
        gradients = torch.autograd.grad(output.total, list(named.values())) if named else ()
        output = SetRewardSumOutput(output.total.detach(), output.components)
        return output, dict(zip(named, gradients, strict=True))

    def linearized(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar whose gradient with respect to images (B, 3, H, W) of a set is that of the total.

        Args:
            images: Images whose features were passed to `gradient`.
            gradient: By features, `(B, ...)`, the part for these images of the gradient that `gradient` returned.
        """
        maps = self.maps()
        products = [(maps[name](images) * rows).sum().to(images.device) for name, rows in gradient.items()]
        return torch.stack(products).sum() if products else images.new_zeros(())

    def maps(self) -> dict[str, nn.Module]:
        """Return the feature maps by name."""
        maps: list[Any] = list(self.feature_maps)
        if self.released:
            maps = [each.as_released() if hasattr(each, "as_released") else each for each in maps]
        return dict(zip(self.feature_names, maps, strict=True))

    def as_released(self) -> "SetRewardSum":
        """Return the sum on features that see images as in the released code of It's Never Too Late."""
        released = copy.copy(self)
        released.released = True
        return released

    def check_feature_names(self, features: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` if features of a feature map are missing."""
        if missing := [name for name in self.feature_names if name not in features]:
            raise ValueError(
                f"Expected features of {self.feature_names}, but got those of {list(features)}: {missing} are missing. "
                "Compute them with `features(images)` or `known_features(images)` of the same sum."
            )

    def check_differentiable(self) -> None:
        """Check that a method with gradients can use this sum, before any diffusion model runs.

        Raises:
            NonDifferentiableReward: If features of optimized set rewards have no gradient; the message names them.
        """
        entries = zip(self.weights.items(), self.rewards, strict=True)
        names = [name for (name, weight), reward in entries if weight and not reward.features.differentiable]  # pyright: ignore[reportAttributeAccessIssue]
        if names:
            raise NonDifferentiableReward(
                f"Expected set rewards with a gradient, but the features of {names} are not differentiable. Give them "
                "weight 0 to only report them, or use a method without gradients."
            )

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return name -> features and weight as plain values, for the provenance of a result."""
        return {name: {"features": self.features_of[name], "weight": weight} for name, weight in self.weights.items()}


def join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the features of several batches by name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def checked_set_reward_entries(diversity: SetRewardsLike) -> list[tuple[Any, Any, Any]]:
    """Return `set_reward_entries`, after a check of all names and weights. Nothing is loaded."""
    entries = set_reward_entries(diversity)
    for entry in entries:
        check_set_reward_entry(*entry)
    return entries


def set_reward_entries(diversity: SetRewardsLike) -> list[tuple[Any, Any, Any]]:
    """Convert any accepted form of `diversity=` to a list of (set reward, features or None, weight)."""
    if isinstance(diversity, Mapping):
        pairs = diversity.items()
        entries = [(each, *value) if isinstance(value, (tuple, list)) else (each, value) for each, value in pairs]
    elif isinstance(diversity, (list, tuple)):
        entries = [tuple(each) if isinstance(each, (tuple, list)) else (each, 1.0) for each in diversity]
    elif isinstance(parts := getattr(diversity, "rewards", None), nn.ModuleList):
        # Duck typing, because a pipeline from the Hub has its own copy of the class.
        entries = list(zip(parts, diversity.weights.values(), strict=True))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    else:
        entries = [(diversity, 1.0)]
    if not entries:
        raise ValueError("Expected at least one set reward, but got none. Pass for example `diversity={'dpp': 150.0}`.")
    return [with_features(entry) for entry in entries]


def with_features(entry: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Return an entry as (set reward, features, weight), with `None` for the default features if it has none."""
    if len(entry) not in (2, 3):
        raise ValueError(
            f"Expected a set reward, optional features, and a weight, but got {entry!r}. Write "
            "`{'dpp': 150.0}`, `{'dpp': ('clip', 150.0)}` or `[('dpp', 'clip', 150.0)]`."
        )
    return entry if len(entry) == 3 else (entry[0], None, entry[1])


def check_set_reward_entry(reward: Any, features: Any, weight: Any) -> None:
    """Raise unless `build_set_rewards` accepts the entry and `weight` is a finite number of at least 0."""
    check_set_reward(reward, features)
    name = reward if isinstance(reward, str) else reward.name
    if isinstance(features, (str, os.PathLike)):
        find_features(os.fspath(features))
    elif features is not None and not isinstance(features, nn.Module):
        raise TypeError(
            f"Expected features for the set reward '{name}' by name, Hub id, folder or as `Features`, but got "
            f"{features!r}. Write (features, weight): `{{'{name}': ('clip', 150.0)}}`."
        )
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"Expected a finite weight of at least 0 for the set reward '{name}', but got {weight!r}. Higher values "
            f"mean more diversity. Write `{{'{name}': 150.0}}`, or `{{'{name}': ('clip', 150.0)}}` on other features."
        )


def check_set_reward(reward: Any, features: Any) -> None:
    """Raise unless `reward` is a registered name, or a `SetReward` without separate `features`."""
    if isinstance(reward, str):
        find_set_reward(reward)
    elif isinstance(reward, type) or not (hasattr(reward, "of_features") and isinstance(reward, nn.Module)):
        raise TypeError(
            f"Expected a set reward by name or as an instance of `SetReward`, but got {reward!r}. Weighted ones are "
            "written `{'dpp': 150.0}` or `[('dpp', 150.0), ...]`."
        )
    elif features is not None:
        raise ValueError(
            f"Expected no features for the set reward '{reward.name}', which has its own, but got {features!r}. Omit "
            "them."
        )


def build_set_rewards(
    entries: Sequence[tuple[Any, Any, Any]],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    loaded: LoadedModels,
) -> list[SetReward]:
    """Build the set rewards, loading each of the features once."""

    def load(features: Any) -> Any:
        if not isinstance(features, (str, os.PathLike)):
            return features
        return loaded.load("features", AutoFeatures.from_pretrained, features, dtype, device)

    classes = [find_set_reward(reward) if isinstance(reward, str) else None for reward, _, _ in entries]
    return [
        reward if found is None else found(load(features or found.default_features))
        for found, (reward, features, _) in zip(classes, entries, strict=True)
    ]
