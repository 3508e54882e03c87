"""The plane quality × diversity, as in a figure of CNO (https://arxiv.org/abs/2510.03813), and its Pareto front."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bootstrap import Estimate
from .plan import PLAIN, Contender

if TYPE_CHECKING:
    from .table import Metric, Results


@dataclasses.dataclass(frozen=True)
class Spot:
    """A contender in the plane: its means with intervals, and whether it is on the Pareto front."""

    contender: Contender
    diversity: Estimate
    quality: Estimate
    on_front: bool


@dataclasses.dataclass(frozen=True)
class Plane:
    """The contenders of one model, by how different the images of a prompt are, and how well they fit it.

    Attributes:
        diversity: The name of the horizontal axis.
        quality: The metric of the vertical axis.
        spots: Those of the contenders that have both, in order.
    """

    diversity: str
    quality: "Metric"
    spots: tuple[Spot, ...]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return whether each point is on the Pareto front: no other is at least as high in both and higher in one.

    Equal points are on it together. A point with NaN never is, and beats none.
    """
    front = [False] * len(points)
    known = [place for place, point in enumerate(points) if not any(map(math.isnan, point))]
    last, highest = None, -math.inf
    for place in sorted(known, key=lambda place: points[place], reverse=True):
        if last in (None, points[place]) or points[place][1] > highest:
            front[place], last, highest = True, points[place], points[place][1]
    return front


def plane_of(results: "Results", model: str) -> Plane | None:
    """Return the plane of a model, or `None` without features or sets of images.

    Diversity is 1 − MSS of the embedding, or the mean distance of the first features if there is none. Quality is the
    share of images that are right by the judge, or else the first reward.
    """
    known = [metric for metric in results.metrics if not results.values(model, PLAIN.key, metric).isnan().all()]
    differs = next((metric for metric in known if metric.is_diversity), None)
    quality = next((metric for metric in known if metric.is_quality), None)
    if differs is None or quality is None:
        return None
    similar = differs.name == "MSS"
    found = []
    for contender in results.plan.contenders:
        value = results.entry(model, contender, differs).estimate
        found.append((contender, opposite(value) if similar else value, results.entry(model, contender, quality)))
    front = pareto_front([(x.value, y.estimate.value) for _, x, y in found])
    spots = [Spot(who, x, y.estimate, on) for (who, x, y), on in zip(found, front, strict=True)]
    kept = tuple(spot for spot in spots if not math.isnan(spot.diversity.value + spot.quality.value))
    features = str(results.plan.features).rstrip("/").rpartition("/")[2]
    return Plane(f"1 − MSS ({features})" if similar else differs.name, quality, kept)


def opposite(similarity: Estimate) -> Estimate:
    """Return the estimate of 1 − similarity."""
    return Estimate(1 - similarity.value, 1 - similarity.high, 1 - similarity.low)


def front_notes(results: "Results") -> list[str]:
    """Return a sentence for each model with a plane: who is on its Pareto front."""
    found = []
    for model in results.plan.models:
        if plane := plane_of(results, model.name):
            names = ", ".join(results.title(model.name, spot.contender) for spot in plane.spots if spot.on_front)
            axes = f"{plane.quality.title} and {plane.diversity}"
            found.append(f"On the Pareto front of {axes}, on {model.name}: {names}.")
    return found
