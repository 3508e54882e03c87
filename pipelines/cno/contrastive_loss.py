"""The contrastive loss on x0 estimates: away from the others of the set, and not far from where one was."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..objective import Objective
from ..sampling.sample import Sample


def attraction_gamma(size: int, tau: float) -> float:
    """γ at which the strongest attraction equals the strongest repulsion: `exp(1/(γτ)) = (size − 1)·exp(1/τ)`.

    CNO, https://arxiv.org/abs/2510.03813, closed form `1 / (τ·ln(size − 1) + 1)`: 0.878 for 5 images and τ = 0.1, and 1
    for two. A smaller γ attracts more.
    """
    return 1 / (tau * math.log(size - 1) + 1)


def pooled_directions(x0: torch.Tensor, window_size: int) -> torch.Tensor:
    """`(B, C, H, W)` to unit vectors along the channels of a pooled grid, `(B, C, P)` in float32 or better.

    Args:
        x0: Latents; `(B, 1, C, H, W)` as well.
        window_size: The grid has so many cells down and across, at most H and W: P of them.
    """
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32)).flatten(1, -3)
    down, across = (min(window_size, side) for side in x0.shape[-2:])
    return F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """InfoNCE of a set against its own reference, for each image; CNO, https://arxiv.org/abs/2510.03813.

    In every pooled cell, with `f` the cosine along the channels, image i is told from the others by

        −log( exp(f(i, refᵢ)/(γτ)) / (exp(f(i, refᵢ)/(γτ)) + Σ_{j≠i} exp(f(i, j)/τ)) ),

    a cross-entropy whose own logit is the attraction to its reference. The mean over the cells is the loss of image i,
    the mean over the images the loss of the paper. The gradient goes into both members of each pair.

    Attributes:
        tau: τ, above 0.
        gamma: γ, above 0, or "auto" for `attraction_gamma`.
        attraction: Whether the numerator counts; without it only the others are fled from.
        repulsion: Whether the denominator counts.
    """

    tau: float
    gamma: float | str
    attraction: bool
    repulsion: bool

    def __call__(self, directions: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """`(B, C, P)` unit vectors of one set, B >= 2, and of its reference, to the losses `(B,)`."""
        size = len(directions)
        gamma = attraction_gamma(size, self.tau) if self.gamma == "auto" else float(self.gamma)
        own = (directions * reference).sum(1) / (gamma * self.tau)
        loss = -own if self.attraction else torch.zeros_like(own)
        if self.repulsion:
            others = torch.einsum("icp,jcp->ipj", directions, directions) / self.tau
            diagonal = torch.eye(size, dtype=torch.bool, device=own.device)[:, None]
            logits = torch.where(diagonal, own[..., None] if self.attraction else -torch.inf, others)
            loss = loss + logits.logsumexp(-1)
        return loss.mean(1)


class ContrastiveObjective(Objective):
    """`ContrastiveLoss` of the x0 estimates of one model call, each group of images with the same prompt for itself.

    The first evaluation is the reference: it costs no model call of its own. An object serves one run.

    Args:
        loss: The loss of one set.
        window_size: The estimates are pooled to a grid of so many cells down and across, at most the latent's.
    """

    def __init__(self, loss: ContrastiveLoss, window_size: int) -> None:
        self.loss, self.window_size = loss, window_size
        self.reference: torch.Tensor | None = None

    def check_groups(self, groups: Sequence[int]) -> None:
        if alone := [group for group in set(groups) if groups.count(group) == 1]:
            raise ValueError(
                f"Expected at least 2 images of each prompt to contrast, but got 1 of prompt {min(alone)}: alone it "
                "has nothing to differ from. Pass `num_images_per_prompt=5`, say."
            )

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        directions = pooled_directions(sample.x0, self.window_size)
        if self.reference is None:
            self.reference = directions.detach()
        losses, similarities = directions.new_zeros(2, len(directions))
        for rows in sets(sample.groups):
            part = directions[rows]
            losses = losses.index_put((rows,), self.loss(part, self.reference[rows]))
            similarities[rows] = mean_similarity(part.detach())
        return losses, {"similarity": similarities}

    def describe(self) -> dict[str, float | int | str | bool]:
        return {**dataclasses.asdict(self.loss), "window_size": self.window_size}


def sets(groups: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of each group."""
    labels = torch.tensor(groups)
    for group in sorted(set(groups)):
        yield (labels == group).nonzero().flatten()


def mean_similarity(directions: torch.Tensor) -> torch.Tensor:
    """`(B, C, P)` unit vectors to each image's mean cosine to the B − 1 others, `(B,)` in [-1, 1]."""
    cosines = torch.einsum("icp,jcp->ij", directions, directions) / directions.shape[-1]
    return (cosines.sum(1) - cosines.diagonal()) / (len(directions) - 1)
