"""The weighted sum of set rewards: what a `diversity=` argument becomes."""

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.reward import NonDifferentiableReward
from ..contract.reward_sum import AttachedGradient, distinct_names
from ..features.auto_features import AutoFeatures, find_features
from ..features.features import Features
from .set_reward import SetReward, find_set_reward

SetRewardsLike = str | SetReward | nn.Module | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class SetRewardSumOutput:
    """Values of one set of images.

    Attributes:
        total: a scalar, the weighted sum, with its gradient.
        components: name -> a scalar, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class SetRewardSum(nn.Module):
    """`sum_i weight_i * set_reward_i(images)`, one number for the whole set, higher is better.

    What is plain is enough, so that it can be given to a pipeline from the Hub:

        {"dpp": 150.0}                                      # name -> weight, on its default features
        {"dpp": ("clip", 150.0), "pairwise": ("lpips", 60.0)}   # name -> (features, weight)
        [("dpp", 150.0), ("dpp", "clip", 50.0)]             # the same reward on two features
        "dpp"                                               # weight 1

    Features are a registered name, a Hub id, a folder or a `Features`. Those of the same name are loaded once, and all
    set rewards on the same features share their forward pass.

    In the memory of one image, whatever their number, with the same gradient: all features without a graph, the
    gradient with respect to them, then one image at a time.

        parts = [total.known_features(image) for image in generated_one_by_one]     # first pass, no graph
        output, gradient = total.gradient(join_features(parts), known)
        for index, image in enumerate(generated_again_with_a_graph):                # second pass
            total.linearized(image, {name: rows[index : index + 1] for name, rows in gradient.items()}).backward()

    Args:
        diversity: one of the above; a `SetReward` in place of a name; or another `SetRewardSum`. A set reward of
            weight 0 is evaluated and reported, not optimised.
        dtype, device: of the features that are loaded by name.

    Attributes:
        rewards: the set rewards, in the order given.
        names: their names; the second `dpp` becomes `dpp_2`.
        weights: name -> weight.
        feature_maps: the features that they look at, each once.
        feature_names: the names of these, under which `features` gives them.

    Raises:
        TypeError: something that is no set reward.
        ValueError: an unknown name, or a weight that is negative or not finite. Names and weights are checked before
            anything is loaded.
    """

    def __init__(
        self,
        diversity: SetRewardsLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        entries = set_reward_entries(diversity)
        for entry in entries:
            check_set_reward_entry(*entry)
        rewards = build_set_rewards(entries, dtype, device)
        self.rewards = nn.ModuleList(rewards)
        self.names = distinct_names([str(reward.name) for reward in rewards])
        self.weights = {name: float(weight) for name, (_, _, weight) in zip(self.names, entries, strict=True)}
        maps = list({id(reward.features): reward.features for reward in rewards}.values())
        self.feature_maps = nn.ModuleList(maps)
        self.feature_names = distinct_names([str(each.name) for each in maps])
        names_of = {id(each): name for each, name in zip(maps, self.feature_names, strict=True)}
        self.features_of = {
            name: names_of[id(reward.features)] for name, reward in zip(self.names, rewards, strict=True)
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to the features (B, ...) of each map, by its name, with their gradient.

        Raises:
            ValueError: images that do not meet the contract.
        """
        return {name: encode(images) for name, encode in self.maps().items()}

    @torch.no_grad()
    def known_features(self, images: Tensor, chunk_size: int = 1) -> dict[str, Tensor]:
        """`features` without a graph, of a few images at a time: those of references, to be kept.

        A set that grows is `join_features([known, total.known_features(new)])`.
        """
        return join_features([self.features(chunk) for chunk in images.split(chunk_size)])

    def forward(
        self,
        images: Tensor,
        references: Tensor | Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
    ) -> SetRewardSumOutput:
        """The value of the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W), images that are given, or their `known_features`: they count and get no gradient.
            chunk_size: pass the features with at most so many images at a time, twice, with the memory of so many; the
                gradient is the same, and cannot be differentiated again. `None` for all at once.

        Raises:
            ValueError: fewer than two images in all, or images that do not meet the contract.
            NonFiniteReward: a value that is NaN or infinite.
        """
        known = self.known_features(references) if isinstance(references, Tensor) else references
        if chunk_size is not None:
            return self.in_chunks(images, known, chunk_size)
        output = self.of_features(self.features(images), known)
        return SetRewardSumOutput(output.total.to(images.device), output.components)

    def in_chunks(self, images: Tensor, references: Mapping[str, Tensor] | None, chunk_size: int) -> SetRewardSumOutput:
        """`forward`: all features without a graph, the gradient in them, then chunk by chunk that in the pixels."""
        features = self.known_features(images.detach(), chunk_size)
        if not (images.requires_grad and torch.is_grad_enabled()):
            output = self.of_features(features, references)
            return SetRewardSumOutput(output.total.to(images.device), output.components)
        output, rows = self.gradient(features, references)
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            part = slice(start, start + chunk_size)
            gradient[part] = self.pixel_gradient(images[part], {name: each[part] for name, each in rows.items()})
        total = AttachedGradient.apply(images, output.total.to(images.device), gradient)
        return SetRewardSumOutput(total, output.components)  # pyright: ignore[reportArgumentType]

    def pixel_gradient(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """The gradient of `linearized` with respect to the pixels (B, 3, H, W); its graph is freed on return."""
        leaf = images.detach().requires_grad_()
        value = self.linearized(leaf, gradient)
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(value, leaf)[0]

    def of_features(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> SetRewardSumOutput:
        """The same of features (B, ...) and (M, ...) by name, as `features` and `known_features` give them."""
        for given in (features, references or features):
            self.check_feature_names(given)
        total, components = torch.zeros((), device=features[self.feature_names[0]].device), {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            its_name, weight = self.features_of[name], self.weights[name]
            own = features[its_name] if weight else features[its_name].detach()
            value = reward.of_features(own, None if references is None else references[its_name])  # pyright: ignore[reportCallIssue]
            components[name] = value.detach()
            total = total + weight * value.to(total.device)
        return SetRewardSumOutput(total, components)

    def gradient(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> tuple[SetRewardSumOutput, dict[str, Tensor]]:
        """The value, and its gradient with respect to the features (B, ...) of each map that is optimised, by name."""
        wanted = {self.features_of[name] for name, weight in self.weights.items() if weight}
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in features.items()}
        with torch.enable_grad():
            output = self.of_features(leaves, references)
        named = {name: leaf for name, leaf in leaves.items() if name in wanted}
        gradients = torch.autograd.grad(output.total, list(named.values())) if named else ()
        output = SetRewardSumOutput(output.total.detach(), output.components)
        return output, dict(zip(named, gradients, strict=True))

    def linearized(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """A scalar whose gradient with respect to some images (B, 3, H, W) of a set is that of the total.

        Args:
            images: the same as the features were taken of.
            gradient: their rows (B, ...) of what `gradient` gave.
        """
        maps = self.maps()
        products = [(maps[name](images) * rows).sum().to(images.device) for name, rows in gradient.items()]
        return torch.stack(products).sum() if products else images.new_zeros(())

    def maps(self) -> dict[str, nn.Module]:
        """The features by name."""
        return dict(zip(self.feature_names, self.feature_maps, strict=True))

    def check_feature_names(self, features: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` unless there are features of each map."""
        if missing := [name for name in self.feature_names if name not in features]:
            raise ValueError(
                f"Expected features of {self.feature_names}, but got those of {list(features)}: {missing} are missing. "
                "Take them of `features(images)` or `known_features(images)` of the same sum."
            )

    def check_differentiable(self) -> None:
        """What a method with gradients calls before any model runs.

        Raises:
            NonDifferentiableReward: naming the set rewards whose features give no gradient.
        """
        entries = zip(self.weights.items(), self.rewards, strict=True)
        names = [name for (name, weight), reward in entries if weight and not reward.features.differentiable]  # pyright: ignore
        if names:
            raise NonDifferentiableReward(
                f"Expected set rewards with a gradient, but the features of {names} are not differentiable. Give them "
                "weight 0 to have them reported only, or use a method without gradients."
            )

    def describe(self) -> dict[str, dict[str, Any]]:
        """name -> its features and its weight: plain values for the provenance of a result."""
        return {name: {"features": self.features_of[name], "weight": weight} for name, weight in self.weights.items()}


def join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Features (B_i, ...) by name of several batches as those (sum of B_i, ...) of one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def set_reward_entries(diversity: SetRewardsLike) -> list[tuple[Any, Any, Any]]:
    """Every accepted form of `diversity=` as a list of (set reward, features or None, weight)."""
    if isinstance(diversity, Mapping):
        pairs = diversity.items()
        entries = [(each, *value) if isinstance(value, (tuple, list)) else (each, value) for each, value in pairs]
    elif isinstance(diversity, (list, tuple)):
        entries = [tuple(each) if isinstance(each, (tuple, list)) else (each, 1.0) for each in diversity]
    elif isinstance(parts := getattr(diversity, "rewards", None), nn.ModuleList):
        # A sum is known by its attributes: a pipeline from the Hub has its own copy of the class.
        entries = list(zip(parts, diversity.weights.values(), strict=True))  # pyright: ignore
    else:
        entries = [(diversity, 1.0)]
    if not entries:
        raise ValueError("Expected at least one set reward, but got none. Pass for example `diversity={'dpp': 150.0}`.")
    return [with_features(entry) for entry in entries]


def with_features(entry: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """(set reward, weight) or (set reward, features, weight) as the latter."""
    if len(entry) not in (2, 3):
        raise ValueError(
            f"Expected a set reward, features if not the default ones, and a weight, but got {entry!r}. Write "
            "`{'dpp': 150.0}`, `{'dpp': ('clip', 150.0)}` or `[('dpp', 'clip', 150.0)]`."
        )
    return entry if len(entry) == 3 else (entry[0], None, entry[1])


def check_set_reward_entry(reward: Any, features: Any, weight: Any) -> None:
    """Raise unless `reward` can become a set reward on `features`, and `weight` is a finite number of at least 0."""
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
    """Raise unless `reward` is a registered name, or a set reward that brings its features."""
    if isinstance(reward, str):
        find_set_reward(reward)
    elif isinstance(reward, type) or not (hasattr(reward, "of_features") and isinstance(reward, nn.Module)):
        raise TypeError(
            f"Expected a set reward by name or as an instance of `SetReward`, but got {reward!r}. Weighted ones are "
            "written `{'dpp': 150.0}` or `[('dpp', 150.0), ...]`."
        )
    elif features is not None:
        raise ValueError(
            f"Expected no features beside the set reward '{reward.name}', which brings its own, but got {features!r}. "
            "Leave them out."
        )


def build_set_rewards(
    entries: Sequence[tuple[Any, Any, Any]], dtype: torch.dtype | None, device: torch.device | str | None
) -> list[SetReward]:
    """The set rewards; features that several name are loaded once."""
    loaded: dict[str, Features] = {}

    def load(features: Any) -> Any:
        if not isinstance(features, (str, os.PathLike)):
            return features
        path = os.fspath(features)
        if path not in loaded:
            loaded[path] = AutoFeatures.from_pretrained(path, dtype=dtype, device=device)
        return loaded[path]

    classes = [find_set_reward(reward) if isinstance(reward, str) else None for reward, _, _ in entries]
    return [
        reward if found is None else found(load(features or found.default_features))
        for found, (reward, features, _) in zip(classes, entries, strict=True)
    ]
