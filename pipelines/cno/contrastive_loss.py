"""The contrastive loss on x0 estimates: away from the other images of the set, close to the own first estimate."""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..noise_math import sets
from ..objective import Objective
from ..sampling.sample import Sample


def attraction_gamma(size: int, tau: float) -> float:
    """Return the γ at which the strongest attraction equals the strongest repulsion.

    The solution of `exp(1/(γτ)) = (size − 1)·exp(1/τ)`, `1 / (τ·ln(size − 1) + 1)`, of CNO,
    https://arxiv.org/abs/2510.03813: 0.878 for 5 images and τ = 0.1, and 1 for two. A smaller γ attracts more.

    Args:
        size: The number of images, at least 2.
        tau: τ, above 0.

    Raises:
        ValueError: For other arguments.
    """
    if size < 2:
        raise ValueError(
            f"Expected at least 2 images to contrast, but got {size}. Pass `num_images_per_prompt=5`, say."
        )
    if not 0 < tau < math.inf:
        raise ValueError(f"Expected a temperature above 0, but got {tau!r}.")
    return 1 / (tau * math.log(size - 1) + 1)


def pooled_directions(x0: torch.Tensor, window_size: int) -> torch.Tensor:
    """Return unit vectors along the channels of a pooled grid, `(B, C, P)` in float32 or better.

    Args:
        x0: Latents `(B, C, H, W)` or `(B, 1, C, H, W)`.
        window_size: The number of cells down and across, at most H and W. The grid has P cells.
    """
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32)).flatten(1, -3)
    down, across = (min(window_size, side) for side in x0.shape[-2:])
    return F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """InfoNCE that attracts each image of a set to its reference and repels it from the others; CNO, https://arxiv.org/abs/2510.03813.

    In every pooled cell, with `f` the cosine along the channels, the loss of image i is

        −log( exp(f(i, refᵢ)/(γτ)) / (exp(f(i, refᵢ)/(γτ)) + Σ_{j≠i} exp(f(i, j)/τ)) ),

    a cross-entropy whose right class is the reference of the image, and whose wrong classes are the other images. The
    loss of image i is the mean over the cells; the loss of the paper is the mean over the images. Both images of a pair
    get a gradient.

    Attributes:
        tau: τ, above 0.
        gamma: γ, above 0, or "auto" for `attraction_gamma`.
        attraction: Whether to use the numerator; without it images only move away from the others.
        repulsion: Whether to use the denominator.
    """

    tau: float
    gamma: float | str
    attraction: bool
    repulsion: bool

    def __call__(self, directions: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the losses `(B,)` of the unit vectors `(B, C, P)` of one set, B >= 2, and of its reference."""
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
    """`ContrastiveLoss` of the x0 estimates of one model call, separately for each group of images with one prompt.

    The first evaluation is the reference, so the reference costs no model call. An object serves one run.

    Args:
        loss: The loss of one set.
        window_size: The number of cells down and across of the pooled grid, at most the latent's.
    """

    continues = ("reference",)

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
        if not isinstance(self.reference, torch.Tensor):  # a file may hold anything else
            self.reference = directions.detach()
        if self.reference.shape != directions.shape:
            raise ValueError(
                f"Expected first estimates of shape {tuple(directions.shape)}, but the interrupted run had "
                f"{tuple(self.reference.shape)}. Start anew without `resume_from`."
            )
        losses, similarities = directions.new_zeros(2, len(directions))
        for rows in sets(sample.groups):
            part = directions[rows]
            losses = losses.index_put((rows,), self.loss(part, self.reference[rows]))
            similarities[rows] = mean_similarity(part.detach())
        return losses, {"similarity": similarities}

    def describe(self) -> dict[str, float | int | str | bool]:
        return {**dataclasses.asdict(self.loss), "window_size": self.window_size}


def mean_similarity(directions: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of each image to the B − 1 others, `(B,)` in [-1, 1], of unit vectors `(B, C, P)`."""
    cosines = torch.einsum("icp,jcp->ij", directions, directions) / directions.shape[-1]
    return (cosines.sum(1) - cosines.diagonal()) / (len(directions) - 1)
