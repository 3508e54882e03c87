"""Group selection: from many noises the few whose images are good and differ."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ...rewards.contract.reward import NonFiniteReward
from ...rewards.contract.reward_sum import checked_reward_pairs
from ...rewards.features.auto_features import AutoFeatures, find_features
from ...rewards.sets.pairwise_distance import PairwiseDistance
from ..loading import loaded_models
from ..method import NoiseOptimizer
from ..noise_math import sets
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_method
from ..sampling.sample import Sample
from .group_solver import group_value, pair_bonus, select_group
from .previews import CandidateObjective, Candidates

FEATURES_AT_ONCE = 64  # images whose features are compared with as many others at a time


@register_method("group_selection")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSelection(NoiseOptimizer):
    """Draws many noises and returns, for each prompt, the set of them that is best together.

    "Scaling Group Inference for Diverse and High-Quality Generation", Parmar et al., ICLR 2026,
    https://arxiv.org/abs/2508.15773: from the candidates of a prompt with K images, the K that maximize
    `Σ u_i y_i + λ Σ_{i<j} b_ij y_i y_j`, y in {0, 1}, where u is the reward of an image and b the distance of two.

    Needs no gradient, so any reward works, also a black box. The given noises are candidates, so the set is never worth
    less than that of plain sampling. Images of different prompts do not compete. For one image of a prompt this is
    best-of-N.

    The loss of an image is minus the value of the set that was evaluated with it. Each step draws one candidate for
    each image, and the last one samples the chosen set, in which a candidate keeps its position in the batch if that is
    free. (At another position, a scheduler that adds noise between steps generates another image. If that makes the
    chosen set worse than the best set of a step, the latter is returned.) If a time budget or a callback stops the
    run early, the set is chosen from the candidates so far. `result.reports["group_selection"]` has the number of
    candidates for the prompt of each image, and the step and the position at which its noise was first sampled fully.

    `preview=True` is the paper's pruning as far as a stock pipeline allows it. The paper drops a share ρ of the
    candidates after each denoising step, by their x0 estimates, and continues the rest. Here there is one cut: all
    candidates but the given ones are evaluated by the x0 estimate of one model call, and `keep` of them for each image,
    the given ones included, are sampled fully from the start. Losses of preview steps are NaN. If the pipeline makes a
    single step, its images cost no more than previews, and all are sampled fully.

    Args:
        steps: Candidates for each image, the given one included: M of them for K images of a prompt are M·K.
        rewards: u, rewards as `RewardSum` takes them; `None` for the distance alone.
        features: The features of the distance b: a name of `list_features()`, a Hub id, a folder, or `Features`. The
            paper: 1 − cos, the mean over the patches of DINOv2.
        weight: λ. The paper: 1.5, with rewards that are cosines of CLIP.
        preview: Evaluate the candidates by one model call, and sample only a few fully.
        keep: With `preview`, the number of candidates sampled fully for each image, the given one included.
    """

    steps: int = checked(16, "[1, inf)")
    rewards: Any = None
    features: Any = "dinov2_patch"
    weight: float = checked(1.5, "[0, inf)")
    preview: bool = False
    keep: int = checked(2, "[2, inf)")

    @property
    def closing(self) -> int:
        return self.keep if self.preview else 1

    def check(self) -> None:
        super().check()
        if self.rewards is None and not self.weight:
            raise ValueError(
                "Expected `rewards` or a `weight` above 0, but got neither: there is nothing to choose by."
            )
        if self.rewards is not None:
            checked_reward_pairs(self.rewards)
        check_features(self.features)

    def objective(self, pipe) -> "GroupObjective":
        rewards, features = None, self.features
        if self.rewards is not None:
            rewards = RewardObjective(self.load_rewards(pipe, self.rewards))
        if isinstance(features, str | os.PathLike):
            load, device = AutoFeatures.from_pretrained, self.device_of_rewards(pipe)
            features = loaded_models(pipe).load("features", load, features, device=device)
        return GroupObjective(rewards, features, self.weight, self.preview)

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, run: NoiseState, gradient: None, state: CandidateNoise) -> torch.Tensor:
        return state.draw()

    def finish(self, run: NoiseState, objective: Any, state: CandidateNoise) -> Iterator[torch.Tensor]:
        """Sample the best previews fully, and the chosen set unless it was evaluated."""
        yield from objective.kept(run, self.keep - 1)
        last, chosen, counts = objective.step, objective.chosen(), objective.counts()
        noise = torch.stack([objective.sampled.noises[index] for index in chosen]).to(run.noise)
        if not torch.equal(noise, run.best.noise):
            yield noise
        best = run.best.step.tolist()
        origins = [objective.sampled.origins[index] for index in chosen]
        origins = [origin if best[row] == last else (best[row], row) for row, origin in enumerate(origins)]
        names = {"from_step": [step for step, _ in origins], "from_image": [row for _, row in origins]}
        run.reports["group_selection"] = {"candidates": counts, **names}


def check_features(features: Any) -> None:
    """Raise `ValueError` or `TypeError` unless `features` are a name, Hub id or folder, or a module with a metric."""
    if isinstance(features, str | os.PathLike):
        find_features(os.fspath(features))
    elif not (isinstance(features, nn.Module) and hasattr(features, "metric")):
        raise TypeError(
            f"Expected `features` by name, Hub id, folder or as `Features`, but got {features!r}. Pass for example "
            '`features="dinov2_patch"`.'
        )


class GroupObjective(CandidateObjective):
    """Minus the value of the set of images of each prompt: `Σ u_i + λ Σ_{i<j} b_ij`. Stores the candidates.

    Args:
        rewards: u is minus their loss; `None` for 0.
        features: The features of the distance b.
        weight: λ.
        preview: See `CandidateObjective`.

    Attributes:
        sampled: The candidates that were sampled fully, those of the first evaluation first.
        previews: The candidates that were previewed.
    """

    def __init__(self, rewards: RewardObjective | None, features: nn.Module, weight: float, preview: bool) -> None:
        super().__init__(rewards, preview)
        self.weight = weight
        self.distance = PairwiseDistance(features)  # pyright: ignore[reportArgumentType]
        self.sampled = Candidates()

    def check_groups(self, groups: Sequence[int]) -> None:
        self.sets = [rows.tolist() for rows in sets(groups)]
        if self.rewards is None and (alone := [rows[0] for rows in self.sets if len(rows) == 1]):
            raise ValueError(
                f"Expected `rewards` or at least 2 images of each prompt, but got 1 of the prompt of image {alone[0]}: "
                "alone it has nothing to differ from. Pass `num_images_per_prompt=4`, say."
            )

    def measure(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        unary, features, scores = self.measured(sample)
        values, distances = self.values(unary, features)
        (self.previews if self.previewing else self.sampled).add(self.step, sample.noise, unary, features)
        if self.compares:
            scores = {**scores, "distance": distances.to(sample.noise.device, torch.float32)}
        return -values.to(sample.noise.device, torch.float32), scores

    @property
    def compares(self) -> bool:
        """Return whether any prompt has several images."""
        return any(len(rows) > 1 for rows in self.sets)

    def measured(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total reward `(B,)`, the features `(B, ...)`, and the score of each reward.

        The features are zeros if no prompt has several images.
        """
        unary, scores = torch.zeros(len(sample.noise), dtype=torch.float64), {}
        if self.rewards is not None:
            loss, scores = self.rewards.evaluate(sample)
            unary = -loss.detach().double().cpu()
        images = sample.images
        features = self.distance.features(images).detach() if self.compares else images.new_zeros(len(images), 1)
        return unary, features, scores

    def values(self, unary: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each image the value of its set and its mean distance to the others, `(B,)` in float64."""
        values, distances = torch.zeros(2, len(unary), dtype=torch.float64)
        for rows in self.sets:
            pairwise = self.distance.between(features[rows], features[rows])
            values[rows] = group_value(unary[rows], pairwise, torch.arange(len(rows)), self.weight)
            distances[rows] = pair_bonus(pairwise, 1.0).sum(1) / max(1, len(rows) - 1)
        if not values.isfinite().all():
            raise NonFiniteReward(
                f"Expected finite features '{self.distance.features.name}', but some are NaN or infinite. Load them "
                "with `dtype=torch.float32` if they ran in half precision."
            )
        return values, distances

    def chosen(self) -> list[int]:
        """Return for each position in the batch the index of the chosen candidate in `sampled`."""
        plan = {}
        for rows in self.sets:
            plan.update(self.assigned(self.sampled, rows, 1))
        return [plan[0, row] for row in range(len(plan))]

    def best(self, seen: Candidates, rows: Sequence[int], count: int) -> list[int]:
        """Return the `count` candidates of a set that are best together, or all if there are fewer."""
        found = seen.of(rows)
        if len(found) <= count:
            return found
        unary = torch.tensor([seen.unary[index] for index in found], dtype=torch.float64)
        pairwise = self.distances([seen.features[index] for index in found])
        weight = self.weight if len(rows) > 1 else 0.0
        return [found[index] for index in select_group(unary, pairwise, count, weight)]

    def distances(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the distance between each two of N images, `(N, N)`, from their features.

        Computed a chunk at a time on the device of the feature model.
        """
        device = getattr(self.distance.features, "device", None)
        spans = [slice(start, start + FEATURES_AT_ONCE) for start in range(0, len(features), FEATURES_AT_ONCE)]

        def part(span: slice) -> torch.Tensor:
            return torch.stack(features[span]).to(device)

        rows = [[self.distance.between(some, part(others)).cpu() for others in spans] for some in map(part, spans)]
        return torch.cat([torch.cat(row, 1) for row in rows])

    def counts(self) -> list[int]:
        """Return for each image the number of candidates of its prompt."""
        sizes = {row: len(rows) + len(self.previews.of(rows)) for rows in self.sets for row in rows}
        if not self.previews.origins:
            sizes = {row: len(self.sampled.of(rows)) for rows in self.sets for row in rows}
        return [sizes[row] for row in range(len(sizes))]

    def describe(self) -> dict[str, Any]:
        rewards = None if self.rewards is None else self.rewards.describe()
        return {"rewards": rewards, "features": str(self.distance.features.name), "weight": self.weight}
