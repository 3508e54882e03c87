"""The measurements of an evaluation: rewards, features, the judge of the shapes world, and references."""

import dataclasses
import functools
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import shapes_world
from ..image_files import read_image
from ..pipelines.results.noise_result import NoiseResult
from ..rewards.contract.registry import AutoReward
from ..rewards.contract.reward import Reward
from ..rewards.contract.reward_sum import RewardSum
from ..rewards.features.auto_features import AutoFeatures
from ..rewards.features.features import Features
from ..rewards.sets.set_reward import PairwiseDiversity
from .metrics import coverage, layout_spread, mean_pairwise_similarity, vendi_score
from .noise_statistics import gaussian_limits, noise_statistics
from .plan import EMBEDDED_REWARDS, NEIGHBORS, Plan, diversity_measures, reference_files

RENDERS = 16  # references per prompt, for coverage


def load_reward(name: str, device: torch.device) -> Reward:
    """Load a reward by its registered name or that of an embedded model, and set its `name` to it."""
    reward = AutoReward.from_pretrained(weights_of(name, EMBEDDED_REWARDS), device=device)
    reward.name = name
    return reward


def weights_of(name: str, embedded: Collection[str]) -> str:
    """Return the argument of `from_pretrained`: the folder of an embedded model, or the name itself."""
    return shapes_world.path(name) if name in embedded else name


@dataclasses.dataclass(eq=False)
class Instruments:
    """The loaded instruments of a plan.

    Attributes:
        rewards: The optimized rewards with their weights, as methods take them.
        watched: Rewards that are only measured.
        features: `(B, 3, H, W)` in [0, 1] -> `(B, D)` or `(B, P, D)`, compared by cosine; or `None`.
        more_features: Others, of any distance, by name.
    """

    rewards: list[tuple[Reward, float]]
    watched: list[Reward]
    features: Features | None
    more_features: Mapping[str, Features] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, plan: Plan, device: torch.device) -> "Instruments":
        """Load the instruments. Raises `ValueError` if a method needs a gradient that a reward does not have."""
        rewards = [(load_reward(name, device), weight) for name, weight in plan.rewards]
        if any(method.takes_rewards and method.build(rewards).gradient_mode for method in plan.methods):
            RewardSum(rewards).check_differentiable()
        watched = [load_reward(name, device) for name in plan.watched]
        loaded = {name: load_features(name, plan.is_tower(name), device) for name in plan.all_features}
        features = None if plan.features is None else loaded.pop(plan.features)
        return cls(rewards, watched, features, loaded)

    def scores(self, images: torch.Tensor, prompt: str) -> dict[str, list[float]]:
        """Return each reward of images `(B, 3, H, W)`, by name."""
        every = [*(reward for reward, _ in self.rewards), *self.watched]
        with torch.no_grad():
            return {str(reward.name): reward(images, prompt).tolist() for reward in every}

    def embed(self, images: torch.Tensor) -> torch.Tensor | None:
        """Embed images `(B, 3, H, W)` in [0, 1] as `(B, D)`, in float32 on the CPU."""
        return None if self.features is None else embedded(self.features, images)

    def diversity(self, images: torch.Tensor) -> dict[str, float]:
        """Measure the images of one prompt by each of the other features, as "measure features"."""
        found = {name: diversity_by(features, images) for name, features in self.more_features.items()}
        return {f"{measure} {name}": value for name, values in found.items() for measure, value in values.items()}

    @functools.lru_cache(maxsize=64)  # noqa: B019  lives as long as the process
    def renders(self, prompt: str) -> torch.Tensor | None:
        """Return the features of rendered images of a prompt of the shapes world, `(RENDERS, D)`."""
        return self.embed(render_references(prompt))


def load_features(name: str, is_tower: bool, device: torch.device) -> Features:
    """Load features; for embedded models, `dinov2` and `clip` are the embedded towers."""
    return AutoFeatures.from_pretrained(shapes_world.path(name) if is_tower else name, device=device)


@torch.no_grad()
def embedded(features: Features, images: torch.Tensor) -> torch.Tensor:
    """Embed images as `(B, D)`, in float32 on the CPU."""
    found = features(images).cpu()
    # the cosine of concatenated unit vectors is the mean of their cosines
    return F.normalize(found, dim=-1).flatten(1) if found.ndim > 2 else found


@torch.no_grad()
def diversity_by(features: Features, images: torch.Tensor) -> dict[str, float]:
    """Return MSS and Vendi score of a set, or by features of another distance its mean over pairs, "distance"."""
    if len(images) < 2:
        return {}
    if features.metric != "cosine":
        return {"distance": float(PairwiseDiversity(features)(images))}
    return similarity_measures(embedded(features, images))


def similarity_measures(embedding: torch.Tensor) -> dict[str, float]:
    """Return MSS and Vendi score of two or more images `(B, D)`."""
    return {"mss": float(mean_pairwise_similarity(embedding)), "vendi": float(vendi_score(embedding))}


def render_references(prompt: str) -> torch.Tensor:
    """Render images of a prompt, always the same, `(RENDERS, 3, 128, 128)`."""
    request = shapes_world.parse(prompt)
    chance = random.Random(str(request))  # a string seed is the same in every process
    scenes = [shapes_world.sample_scene(chance, request) for _ in range(RENDERS)]
    return shapes_world.render(scenes, torch.Generator().manual_seed(chance.getrandbits(32)))


def read_images(folder: str, instruments: Instruments) -> torch.Tensor:
    """Return the features `(N, D)` of all images in a folder. Raises `ValueError` for too few, or an unreadable one."""
    found = (instruments.embed(read_image(path)) for path in reference_files(folder))
    return torch.cat([features for features in found if features is not None])


def set_measures(
    images: torch.Tensor, features: torch.Tensor | None, references: torch.Tensor | None, prompt: str | None
) -> dict[str, float]:
    """Measure the diversity of the images of one prompt, as far as it applies.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        features: `(B, D)`, or `None`.
        references: `(N, D)` for coverage, or `None`.
        prompt: A prompt of the shapes world, or `None` to skip the layout.
    """
    found = {}
    several = len(images) > 1
    if features is not None and several:
        found |= similarity_measures(features)
    if features is not None and references is not None:
        found["coverage"] = float(coverage(features, references, NEIGHBORS))
    if prompt is not None and several:
        found["layout spread"] = layout_spread(images, prompt)
    return found


def set_measure_names(plan: Plan, judged: bool) -> list[str]:
    """Return the names of all that is measured of a set, for images that the judge can or cannot read."""
    several, embedded = plan.seeds > 1, plan.features is not None
    applies = {
        "mss": embedded and several,
        "vendi": embedded and several,
        "coverage": embedded and judged,
        "layout spread": judged and several,
    }
    more = [f"{measure} {name}" for name in plan.more_features for measure in diversity_measures(name)]
    return [name for name, holds in applies.items() if holds] + more * several


def verdicts(images: torch.Tensor, prompt: str) -> dict[str, Any]:
    """Judge images `(B, 3, H, H)` in [0, 1], with H a multiple of 64."""
    found: Sequence[shapes_world.Verdict] = shapes_world.judge(images, prompt)
    return {"right": [verdict.correct for verdict in found], "found": [verdict.found for verdict in found]}


def noise_measures(result: NoiseResult) -> dict[str, Any]:
    """Return the `NoiseStatistics` of a set's noise, and as "... z" their deviation in standard errors."""
    noise = result.noise
    noise = noise.flatten(1, -3) if noise.ndim > 4 else noise  # (B, 1, C, H, W) in families that generate videos
    statistics = noise_statistics(noise)
    scores = dataclasses.asdict(gaussian_limits(tuple(noise.shape)).z_scores(statistics))
    return {**dataclasses.asdict(statistics), **{f"{name} z": value for name, value in scores.items()}}
