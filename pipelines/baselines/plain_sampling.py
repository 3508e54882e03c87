"""The method that leaves the noise as it is."""

import dataclasses

import torch

from ..method import NoiseOptimizer
from ..objective import FunctionObjective, Objective
from ..sampling.sampler import Gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainSampling(NoiseOptimizer):
    """Takes the noise as it is drawn; runs no denoiser. Its result has one loss of 0 and no scores."""

    steps: int = 1
    gradient: Gradient = None

    def objective(self, pipe) -> Objective:
        return FunctionObjective(lambda sample: torch.zeros(len(sample.noise), device=sample.noise.device))
