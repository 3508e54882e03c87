"""L2 distances between noises, and between noises and what they draw."""

import torch
from torch import Tensor

from .coherence import check_pair

INITIAL_OPTIMISED = "initial noise, optimised noise"
TWO_INITIAL = "two different initial noises"
INITIAL_IMAGE = "initial noise, its image"
OPTIMISED_IMAGE = "optimised noise, its image"
RANDOM_IMAGE = "random noise, random image"


def l2_table(
    initial: Tensor, optimised: Tensor, initial_latents: Tensor | None = None, optimised_latents: Tensor | None = None
) -> dict[str, float]:
    """Mean L2 distances, the table of the analysis of ReNO (https://arxiv.org/abs/2406.04312) by its authors' group.

    Two independent noises of d entries are √(2d) apart. An "image" is its latents, as the pipeline returns them with
    `output_type="latent"`. The last row is of initial noises with the images of others. Pairs of equal noises, as of
    prompts that were drawn with one seed, are no pairs of different ones.

    Args:
        initial, optimised: `(B, C, H, W)`, unit variance.
        initial_latents, optimised_latents: `(B, C, H, W)`, what each draws; in the layout of the noise.

    Returns:
        Row to distance. Rows that need latents which are not given, or a second noise, are left out.
    """
    check_pair(initial, optimised)
    z, moved = flat(initial), flat(optimised)
    rows = {INITIAL_OPTIMISED: mean_distance(z, moved)}
    differ = different(z)
    if differ.any():
        rows[TWO_INITIAL] = float(torch.cdist(z, z)[differ].mean())
    if initial_latents is not None:
        rows[INITIAL_IMAGE] = mean_distance(z, flat(initial_latents))
    if optimised_latents is not None:
        rows[OPTIMISED_IMAGE] = mean_distance(moved, flat(optimised_latents))
    if initial_latents is not None and differ.any():
        rows[RANDOM_IMAGE] = float(torch.cdist(z, flat(initial_latents))[differ].mean())
    return rows


def flat(tensor: Tensor) -> Tensor:
    """`(B, ...)` to `(B, d)`, float64 on the CPU."""
    return tensor.detach().double().cpu().flatten(1)


def mean_distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm(dim=1).mean())


def different(noise: Tensor) -> Tensor:
    """`(B, B)` bool: which pairs of rows are not the same noise."""
    group = torch.unique(noise, dim=0, return_inverse=True)[1]
    return group[:, None] != group
