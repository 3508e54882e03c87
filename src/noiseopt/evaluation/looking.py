"""Access to the problem of a pipeline call, for code that computes gradients itself."""

from collections.abc import Callable
from typing import Any

import torch

from ..pipelines.method import NoiseOptimizer
from ..pipelines.objective import FunctionObjective, Objective
from ..pipelines.problem import NoiseProblem


class Looking(NoiseOptimizer):
    """Calls a function with the problem of a pipeline call, and leaves the noise unchanged.

    The modules are prepared for gradients while the function runs, as for every method.

    Args:
        then: Called with the problem; its return value is ignored.
        settings: Fields of a method, such as `checkpointing="blocks"`.
    """

    steps = 1

    def __init__(self, then: Callable[[NoiseProblem], Any], **settings: Any) -> None:
        self.then = then
        vars(self).update(settings)

    def objective(self, pipe) -> Objective:
        return FunctionObjective(lambda sample: torch.zeros(len(sample.noise), device=sample.noise.device))

    def start(self, problem: NoiseProblem) -> None:
        self.then(problem)
