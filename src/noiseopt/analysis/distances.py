"""L2 distances between noises, and between noises and their images."""

import torch
from torch import Tensor

from .coherence import check_pair

INITIAL_OPTIMIZED = "initial noise, optimized noise"
TWO_INITIAL = "two different initial noises"
INITIAL_IMAGE = "initial noise, its image"
OPTIMIZED_IMAGE = "optimized noise, its image"
RANDOM_IMAGE = "random noise, random image"


def l2_table(
    initial: Tensor, optimized: Tensor, initial_latents: Tensor | None = None, optimized_latents: Tensor | None = None
) -> dict[str, float]:
    """Return mean L2 distances between noises and images, to see how far the optimization moved the noise.

    The rows are those of "Manipulation of noise in generative modeling", slides of the Akata Lab on ReNO.

    Two independent noises of d entries are √(2d) apart. An "image" is its latents, as returned by the pipeline with
    `output_type="latent"`. The last row compares initial noises with the images of other noises. Identical noises
    (prompts sampled with one seed) do not count as different.

    Args:
        initial, optimized: `(B, C, H, W)`, unit variance.
        initial_latents, optimized_latents: `(B, C, H, W)`, their images, in the layout of the noise.

    Returns:
        Distance by row. Rows that need latents that are missing, or a second noise, are left out.
    """
    check_pair(initial, optimized)
    z, moved = flat(initial), flat(optimized)
    rows = {INITIAL_OPTIMIZED: mean_distance(z, moved)}
    differ = different(z)
    if differ.any():
        rows[TWO_INITIAL] = float(torch.cdist(z, z)[differ].mean())
    if initial_latents is not None:
        rows[INITIAL_IMAGE] = mean_distance(z, flat(initial_latents))
    if optimized_latents is not None:
        rows[OPTIMIZED_IMAGE] = mean_distance(moved, flat(optimized_latents))
    if initial_latents is not None and differ.any():
        rows[RANDOM_IMAGE] = float(torch.cdist(z, flat(initial_latents))[differ].mean())
    return rows


def flat(tensor: Tensor) -> Tensor:
    """Reshape `(B, ...)` to `(B, d)`, in float64 on the CPU."""
    return tensor.detach().double().cpu().flatten(1)


def mean_distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm(dim=1).mean())


def different(noise: Tensor) -> Tensor:
    """Return `(B, B)` bool, the pairs of noises that are not identical."""
    group = torch.unique(noise, dim=0, return_inverse=True)[1]
    return group[:, None] != group
