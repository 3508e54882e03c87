"""Group selection: of many noises the few whose images are good and differ."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward import NonFiniteReward
from ...rewards.contract.reward_sum import RewardSum
from ...rewards.features.auto_features import AutoFeatures, find_features
from ...rewards.sets.pairwise_distance import PairwiseDistance
from ..cno.contrastive_loss import sets
from ..method import NoiseOptimizer
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sample import Sample
from ..sampling.sampler import Clamp, Gradient
from .group_solver import group_value, pair_bonus, select_group
from .previews import CandidateObjective, SeenNoises

FEATURES_AT_ONCE = 64  # images whose features are compared with as many others at a time


@register_noise_optimizer("group_selection")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSelection(NoiseOptimizer):
    """Draw many noises and return, for each prompt, the set of them that is best together.

    "Scaling Group Inference for Diverse and High-Quality Generation", Parmar et al., ICLR 2026,
    https://arxiv.org/abs/2508.15773: of the candidates of a prompt with K images, the K that maximise
    `Σ u_i y_i + λ Σ_{i<j} b_ij y_i y_j`, y in {0, 1}, where u is the reward of an image and b the distance of two.

    Needs no gradient: any reward does, a black box too. The given noises are candidates, so the set is never worth less
    than plain sampling's. Images of different prompts in one call do not compete. For one image of a prompt it is
    best-of-N.

    The loss of an image is minus the value of the set that was evaluated with it. Each step draws one candidate for
    each image, and the last one the chosen set, in which a candidate keeps the place in the batch that it was drawn at
    wherever that is free. (A sampler that adds noise on the way draws another image from it elsewhere; should that make
    the set worse than the best set of a step, that one is returned.) A callback that stops the run early, such as
    `TimeBudget`, has the set chosen from what was seen, and drawn. `result.reports["group_selection"]` says how many
    candidates there were for the prompt of each image, and at which step and place its noise was first drawn wholly.

    `preview=True` is the paper's pruning as far as a stock pipeline allows it. The paper drops a share ρ of the
    candidates after each denoising step, by their x0 estimates, and goes on with the rest. Here there is one cut: all
    candidates but the given ones are looked at as the x0 estimate of one model call, and `keep` of them for each image,
    the given ones included, are drawn wholly and from the start. Losses of steps that only look are NaN. Where the
    pipeline makes a single step, its images take no longer than previews, and all are drawn.

    Args:
        rewards: u, what `RewardSum` takes; `None` for the distance alone.
        features: b is their distance: a name of `list_features()`, a Hub id, a folder, or `Features`. The paper:
            1 − cos, the mean over the patches of DINOv2.
        candidates: Noises for each image, the given one included: M of them for K images of a prompt are M·K.
        weight: λ, at least 0. The paper: 1.5, to rewards that are cosines of CLIP.
        restarts: Of the search for the best set, where there are more than 10⁶ of them; see `select_group`.
        preview: Look at all candidates by one model call, and draw few wholly.
        keep: With `preview`, how many candidates are drawn wholly for each image, the given one included; 2 or more.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        decoder: A tiny autoencoder that decodes while noises are tried: see `NoiseOptimizer`.
        reward_device: Where rewards and features that are given by name are loaded, by default where the pipeline is.
    """

    rewards: Any = None
    features: Any = "dinov2_patch"
    candidates: int = 16
    weight: float = 1.5
    restarts: int = 10
    preview: bool = False
    keep: int = 2
    reward_prompt: str | Sequence[str] | None = None
    decoder: Any = None
    reward_device: str | torch.device | None = None
    gradient: Gradient = dataclasses.field(default=None, init=False)
    clamp: Clamp = dataclasses.field(default="hard", init=False)

    @property
    def steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.candidates

    @property
    def final_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The chosen set, and before it what is kept of previews."""
        return self.keep if self.preview else 1

    def check(self) -> None:
        for name, least in (("candidates", 1), ("restarts", 0), ("keep", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Expected `{name}` to be an integer of {least} or more, but got {value!r}.")
        super().check()
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Expected `weight` to be a finite number of at least 0, but got {self.weight!r}.")
        if self.rewards is None and not self.weight:
            raise ValueError(
                "Expected `rewards` or a `weight` above 0, but got neither: there is nothing to choose by."
            )
        check_features(self.features)

    def objective(self, pipe) -> "GroupObjective":
        device, rewards, features = self.device_of_rewards(pipe), None, self.features
        if self.rewards is not None:
            rewards = RewardObjective(RewardSum(self.rewards, device=device), self.reward_prompt)
        if isinstance(features, str | os.PathLike):
            features = AutoFeatures.from_pretrained(features, device=device)
        return GroupObjective(rewards, features, self.weight, self.restarts, self.preview)

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, state: NoiseState, gradient: None, memory: CandidateNoise) -> torch.Tensor:
        return memory.draw()

    def finish(self, state: NoiseState, objective: Any, memory: CandidateNoise) -> Iterator[torch.Tensor]:
        """What is kept of previews, and the chosen set, unless that has been evaluated."""
        yield from objective.kept(state, self.keep - 1)
        last, chosen, counts = objective.step, objective.chosen(), objective.counts()
        noise = torch.stack([objective.drawn.noises[index] for index in chosen]).to(state.noise)
        if not torch.equal(noise, state.best_noise):  # pyright: ignore[reportArgumentType]
            yield noise
        assert state.best_step is not None
        best = state.best_step.tolist()
        drawn = [objective.drawn.origins[index] for index in chosen]
        drawn = [origin if best[row] == last else (best[row], row) for row, origin in enumerate(drawn)]
        names = {"from_step": [step for step, _ in drawn], "from_image": [row for _, row in drawn]}
        state.reports["group_selection"] = {"candidates": counts, **names}


def check_features(features: Any) -> None:
    """Raise unless `features` are a name, Hub id or folder, or a module with a metric."""
    if isinstance(features, str | os.PathLike):
        find_features(os.fspath(features))
    elif not (isinstance(features, nn.Module) and hasattr(features, "metric")):
        raise TypeError(
            f"Expected `features` by name, Hub id, folder or as `Features`, but got {features!r}. Pass for example "
            '`features="dinov2_patch"`.'
        )


class GroupObjective(CandidateObjective):
    """Minus the value of the set of images of each prompt: `Σ u_i + λ Σ_{i<j} b_ij`. It keeps what it has seen.

    Args:
        rewards: u is minus their loss; `None` for 0.
        features: b is their distance.
        weight: λ.
        restarts: Of the search for the best set.
        preview: See `CandidateObjective`.

    Attributes:
        drawn: The candidates that were drawn wholly, those of the first evaluation first.
        previews: Those that were looked at otherwise.
    """

    def __init__(
        self, rewards: RewardObjective | None, features: nn.Module, weight: float, restarts: int, preview: bool
    ) -> None:
        super().__init__(rewards, preview)
        self.weight, self.restarts = weight, restarts
        self.distance = PairwiseDistance(features)  # pyright: ignore[reportArgumentType]
        self.drawn = SeenNoises()

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
        (self.previews if self.previewing else self.drawn).add(self.step, sample.noise, unary, features)
        if self.compares:
            scores = {**scores, "distance": distances.to(sample.noise.device, torch.float32)}
        return -values.to(sample.noise.device, torch.float32), scores

    @property
    def compares(self) -> bool:
        """Whether any prompt has images to compare."""
        return any(len(rows) > 1 for rows in self.sets)

    def measured(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """u `(B,)` and features `(B, ...)`, the latter empty where none are compared; and the raw rewards."""
        unary, scores = torch.zeros(len(sample.noise), dtype=torch.float64), {}
        if self.rewards is not None:
            loss, scores = self.rewards.evaluate(sample)
            unary = -loss.detach().double().cpu()
        images = sample.images
        features = self.distance.features(images).detach() if self.compares else images.new_zeros(len(images), 1)
        return unary, features, scores

    def values(self, unary: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each image the value of its set, and its mean distance to the others of the set, `(B,)` in float64."""
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
        """For each place in the batch, which of `drawn` is chosen for it."""
        plan = {}
        for rows in self.sets:
            plan.update(self.seated(self.drawn, rows, 1))
        return [plan[0, row] for row in range(len(plan))]

    def best(self, seen: SeenNoises, rows: Sequence[int], count: int) -> list[int]:
        """The candidates of a set that are best together: `count` of them, or all if there are fewer."""
        found = seen.of(rows)
        if len(found) <= count:
            return found
        unary = torch.tensor([seen.unary[index] for index in found], dtype=torch.float64)
        pairwise = self.distances([seen.features[index] for index in found])
        weight = self.weight if len(rows) > 1 else 0.0
        return [found[index] for index in select_group(unary, pairwise, count, weight, self.restarts)]

    def distances(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Features `(...)` of N images to b, `(N, N)`; a part of them at a time where their model is."""
        device = getattr(self.distance.features, "device", None)
        spans = [slice(start, start + FEATURES_AT_ONCE) for start in range(0, len(features), FEATURES_AT_ONCE)]

        def part(span: slice) -> torch.Tensor:
            return torch.stack(features[span]).to(device)

        rows = [[self.distance.between(some, part(others)).cpu() for others in spans] for some in map(part, spans)]
        return torch.cat([torch.cat(row, 1) for row in rows])

    def counts(self) -> list[int]:
        """For each image how many candidates its prompt has had, before anything is drawn again."""
        sizes = {row: len(rows) + len(self.previews.of(rows)) for rows in self.sets for row in rows}
        if not self.previews.origins:
            sizes = {row: len(self.drawn.of(rows)) for rows in self.sets for row in rows}
        return [sizes[row] for row in range(len(sizes))]

    def describe(self) -> dict[str, Any]:
        rewards = None if self.rewards is None else self.rewards.describe()
        return {"rewards": rewards, "features": str(self.distance.features.name), "weight": self.weight}
