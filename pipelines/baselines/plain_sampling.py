"""The method that leaves the noise as it is."""

import dataclasses
from typing import Literal

import torch

from ...checked_fields import checked
from ..method import NoiseOptimizer
from ..objective import FunctionObjective, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainSampling(NoiseOptimizer):
    """Returns the base noise without running the denoiser. The result has one loss of 0 and no scores."""

    steps: int = checked(1, "[1, 1]")
    budget: Literal[1] | None = None

    def objective(self, pipe) -> Objective:
        return FunctionObjective(lambda sample: torch.zeros(len(sample.noise), device=sample.noise.device))
