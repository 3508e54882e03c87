"""A prescribed coupling of noises and images, with which one-step generation can be learned directly.

A diffusion model may be trained with noises that depend on the data, as long as their marginal stays Gaussian: the
deterministic sampler still samples the data (stochastic interpolants, https://arxiv.org/abs/2303.08797; reflow,
https://arxiv.org/abs/2209.03003, obtains such a coupling by sampling a first model). Here the lowest spatial
frequencies of the noise determine layout and ground, as in large models, and the rest of the noise is free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from noiseopt.shapes_world.world import LAYOUT, LOOKS

_FLAT, _ACROSS, _DOWN = (0, 0), (0, 1), (1, 0)
# (channel, (vertical, horizontal) frequency) of each number of the layout, then of the looks, in the order of `world`
FEATURES = (
    *((0, _FLAT), (1, _FLAT), (2, _FLAT), (3, _FLAT), (4, _FLAT), (5, _FLAT), (6, _FLAT), (0, _ACROSS)),
    *((1, _ACROSS), (7, _FLAT), (2, _ACROSS), (3, _ACROSS), (4, _ACROSS), (7, _ACROSS), (7, _DOWN)),
    *((5, _ACROSS), (5, _DOWN), (6, _ACROSS), (6, _DOWN), (4, _DOWN)),
)


def basis(channels: int = 8, size: int = 8) -> Tensor:
    """Return the orthonormal cosine patterns of `FEATURES`, (LAYOUT + LOOKS, channels, size, size)."""
    grid = math.pi * (torch.arange(size) + 0.5) / size
    patterns = torch.zeros(LAYOUT + LOOKS, channels, size, size)
    for row, (channel, (down, across)) in enumerate(FEATURES):
        pattern = torch.cos(down * grid)[:, None] * torch.cos(across * grid)
        patterns[row, channel] = pattern / pattern.norm()
    return patterns


def couple(noise: Tensor, chance: Tensor) -> Tensor:
    """Make Gaussian noises (B, 8, 8, 8) determine the given numbers, (B, LAYOUT + LOOKS) in (0, 1)."""
    patterns = basis().flatten(1).to(noise)
    wanted = torch.special.ndtri(chance.to(noise).clamp(1e-4, 1 - 1e-4))
    flat = noise.flatten(1)
    return (flat + (wanted - flat @ patterns.T) @ patterns).view_as(noise)
