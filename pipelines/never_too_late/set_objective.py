"""The objective of a set of images: their diversity, and the quality of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...rewards.contract.reward_sum import RewardSum
from ...rewards.sets.hinged_set_reward import HingedSetReward
from ...rewards.sets.set_reward_sum import SetRewardSum
from ..noise_math import sets
from ..objective import Objective, RewardObjective, on_released_pixels
from ..sampling.sample import Sample
from .quality_guard import QualityGuard, shares_reward


class SetObjective(Objective):
    """`Σ λ_q·(1 − mean r) − Σ λ_div·v`, or with a hinge `Σ λ_div·max(0, τ_D − v)`, for each set of images of a prompt.

    Every image of a set has the loss of the set. An object serves one run.

    Args:
        diversity: The set rewards v with their weights λ_div.
        rewards: The rewards r with their weights λ_q, or `None`.
        guards: The quality guards; a guard whose reward is the name of one of `rewards` shares it.
        hinge: Name of a set reward to its τ_D.
        stop_at: Name of a set reward to the value at which the method stops a set; checked here, as hinges are.
        references: `(M, 3, H, W)` fixed images in [0, 1] that belong to every set, or their features from
            `diversity.known_features`.
        warm_up: The number of first evaluations without a gradient of the rewards.
        released: Whether features and rewards see the images as in the released code.
        search: Whether the first evaluations are of a search, whose candidates are kept.

    Attributes:
        evaluations: The number of evaluations after the search.
        candidates: For each evaluation of the search the noises `(B, C, H, W)`, the quality losses `(B,)`, and the
            features `(B, ...)` in the order of `diversity.feature_names`.
        sets: The samples of each set.
    """

    continues = ("evaluations", "searching", "candidates")

    def __init__(
        self,
        diversity: SetRewardSum,
        rewards: RewardSum | None = None,
        guards: Sequence[QualityGuard] = (),
        hinge: Mapping[str, float] | None = None,
        stop_at: Mapping[str, float] | None = None,
        references: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        warm_up: int = 0,
        released: bool = False,
        search: bool = False,
    ) -> None:
        self.hinge, self.stop_at = dict(hinge or {}), dict(stop_at or {})
        self.released = released
        self.diversity = hinged(diversity, self.hinge)
        self.diversity = self.diversity.as_released() if released else self.diversity
        self.quality = None if rewards is None else RewardObjective(self.on_pixels(rewards))
        self.guards, self.watched = self.shared_and_own(guards)
        self.references, self.warm_up = references, warm_up
        self.known: Mapping[str, torch.Tensor] | None = None
        if isinstance(references, Mapping):
            diversity.check_feature_names(references)
        self.evaluations, self.searching = 0, search
        self.candidates: list[list[torch.Tensor]] = []
        parts = (self.quality, self.watched)
        self.requires_prompt = any(part.requires_prompt for part in parts if part is not None)

    def shared_and_own(self, guards: Sequence[QualityGuard]) -> tuple[dict[str, QualityGuard], RewardObjective | None]:
        """Return the guards, and an objective with the rewards that only they need.

        The objective is `None` if all their rewards are optimized anyway. The key of a guard is the name under which
        the scores list its reward.
        """
        optimized = [] if self.quality is None else self.quality.rewards.names
        own = [guard for guard in guards if not shares_reward(guard, optimized)]
        named = {guard.reward: guard for guard in guards if guard not in own}
        if not own:
            return named, None
        watched = RewardObjective(self.on_pixels(RewardSum([(guard.reward, 1.0) for guard in own])))
        names = [f"guard {name}" for name in watched.rewards.names]
        return {**named, **dict(zip(names, own, strict=True))}, watched

    def on_pixels(self, rewards: RewardSum) -> RewardSum:
        """Return the rewards with the preprocessing of this objective."""
        return on_released_pixels(rewards) if self.released else rewards

    @property
    def reference_count(self) -> int:
        """M, the number of references."""
        given = self.references
        return 0 if given is None else len(given if isinstance(given, torch.Tensor) else next(iter(given.values())))

    def check_groups(self, groups: Sequence[int]) -> None:
        self.sets = list(sets(groups))
        for group in sorted(set(groups)):
            count = groups.count(group) + self.reference_count
            if count < 2:
                raise ValueError(
                    f"Expected at least 2 images of each prompt, references included, but got 1 of prompt {group}: "
                    "alone it has nothing to differ from. Pass `num_images_per_prompt=4`, say, or `references`."
                )
            for argument, targets in (("hinge", self.hinge), ("stop_at", self.stop_at)):
                for name, target in targets.items():
                    check_reachable(self.diversity, name, target, count, argument)

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        for part, with_gradient in ((self.quality, gradient), (self.watched, False)):
            if part is not None:
                part.try_out(prompt, height, width, with_gradient)
        given = self.references
        if isinstance(given, torch.Tensor) and given.shape[1:] != (3, height, width):
            raise ValueError(
                f"Expected references of shape (M, 3, {height}, {width}), as the images are, but got "
                f"{tuple(given.shape)}. Resize them, or call the pipeline with their height and width."
            )

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = sample.images
        quality, scores = self.quality_of(sample)
        losses = torch.zeros(len(images), device=images.device)
        values = {name: torch.zeros_like(losses) for name in self.diversity.names}
        features: dict[str, torch.Tensor] = {}
        if self.searching:
            features = self.diversity.known_features(images, sample.chunk_size or len(images))
            self.candidates.append([sample.noise.detach(), quality.detach(), *features.values()])
        for rows in self.sets:
            known = self.known_references()
            if features:
                output = self.diversity.of_features({name: each[rows] for name, each in features.items()}, known)
            else:
                output = self.diversity(images[rows], known, sample.chunk_size)
            loss = self.diversity_loss(output.components) - self.carrier(output.total) + quality[rows].mean()
            losses = losses.index_put((rows,), loss.to(losses))
            for name, value in output.components.items():
                values[name][rows] = value.to(losses)
        self.evaluations += not self.searching
        return losses, {**scores, **values}

    def refuse(self, rows: torch.Tensor) -> None:
        """Exclude candidates of the last evaluation, `(B,)` bool, from the choice."""
        quality = self.candidates[-1][1]
        self.candidates[-1][1] = quality.masked_fill(rows.to(quality.device), torch.inf)

    def loss_of_candidates(self, rows: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """Return the loss of a set of candidates at the positions `rows` `(K,)` of the batch, by their indices.

        The index `t·K + i` is that of the candidate at `rows[i]` in the evaluation t.
        """
        _, quality, *features = (
            torch.cat([each[rows].to(parts[-1].device) for each in parts])  # a resumed run has some on another
            for parts in zip(*self.candidates, strict=True)
        )
        named, known = dict(zip(self.diversity.feature_names, features, strict=True)), self.known_references()

        def loss(chosen: torch.Tensor) -> float:
            output = self.diversity.of_features({name: each[chosen] for name, each in named.items()}, known)
            return float(self.diversity_loss(output.components) + quality[chosen].mean().to(output.total))

        return loss

    def end_search(self) -> None:
        """Forget the candidates; the steps follow."""
        self.searching, self.candidates = False, []

    def quality_of(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the quality loss of each image, `(B,)`, and the scores of all rewards, guards included.

        The loss is `Σ λ_q·(1 − r)` over the rewards r of the image, with λ_q the weight of each.
        """
        loss, scores = torch.zeros(len(sample.images), device=sample.images.device), {}
        if self.quality is not None:
            loss, scores = self.quality.evaluate(sample)
            loss = loss + sum(self.quality.rewards.weights.values())
            loss = loss.detach() if self.evaluations < self.warm_up else loss
        if self.watched is not None:
            with torch.no_grad():
                watched = self.watched.rewards(sample.images.detach(), sample.prompts, chunk_size=sample.chunk_size)
            scores = {**scores, **{f"guard {name}": value for name, value in watched.components.items()}}
        return loss, scores

    def diversity_loss(self, components: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scalar `Σ λ_div·(−v)`, or `Σ λ_div·max(0, τ_D − v)`, without a gradient."""
        weights = self.diversity.weights
        parts = [
            weights[name] * ((self.hinge[name] - value).clamp_min(0) if name in self.hinge else -value)
            for name, value in components.items()
        ]
        return torch.stack(parts).sum()

    @staticmethod
    def carrier(total: torch.Tensor) -> torch.Tensor:
        """Return zero with the gradient of `total`."""
        return total - total.detach()

    def known_references(self) -> Mapping[str, torch.Tensor] | None:
        """Return the features of the references, computed once."""
        if self.reference_count == 0:
            return None
        if self.known is None and isinstance(self.references, torch.Tensor):
            self.known = self.diversity.known_features(self.references)
        return self.references if isinstance(self.references, Mapping) else self.known

    def describe(self) -> dict[str, Any]:
        quality = None if self.quality is None else self.quality.describe()
        guards = {name: {**vars(guard), "reward": name} for name, guard in self.guards.items()}
        targets = {"hinge": self.hinge, "stop_at": self.stop_at}
        return {
            "diversity": self.diversity.describe(),
            "rewards": quality,
            "guards": guards,
            "references": self.reference_count,
            **{name: values for name, values in targets.items() if values},
        }


def hinged(diversity: SetRewardSum, hinge: Mapping[str, float]) -> SetRewardSum:
    """Return `diversity` with a hinge: a set reward that has passed its target τ_D in `hinge` has no gradient."""
    if not hinge:
        return diversity
    rewards: Any = diversity.rewards
    entries = [
        (HingedSetReward(reward, hinge[name]) if name in hinge else reward, diversity.weights[name])
        for name, reward in zip(diversity.names, rewards, strict=True)
    ]
    return SetRewardSum(entries)


def check_reachable(
    diversity: SetRewardSum, name: str, target: float, count: int, argument: str, unit: float = 1.0
) -> None:
    """Raise `ValueError` for a target, in multiples of `unit`, that no set of `count` images can reach."""
    reward: Any = diversity.rewards[diversity.names.index(name)]
    bounds = reward.bounds(count)
    if bounds is not None and target * unit > bounds[1]:
        most = f"{bounds[1]:.4g}" if unit == 1 else f"{bounds[1]:.4g}, where the baseline has {unit:.4g}"
        raise ValueError(
            f"Expected `{argument}` of '{name}' to be at most {bounds[1] / unit:.4g}, as {count} images have at most "
            f"{most}, but got {target:.4g}: it can never be reached."
        )
