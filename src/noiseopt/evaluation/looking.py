"""What a method gets from a pipeline call, for those who take the gradients themselves."""

from collections.abc import Callable
from typing import Any

import torch

from ..pipelines.method import NoiseOptimizer
from ..pipelines.objective import FunctionObjective, Objective
from ..pipelines.problem import NoiseProblem


class Looking(NoiseOptimizer):
    """Shows a function the problem of a call from inside the run, and leaves the noise as it is.

    The modules are set for gradients while the function runs, as they are for every method.

    Args:
        then: Is given the problem; what it returns does not count.
        settings: Of any method, such as `checkpointing="blocks"`.
    """

    steps = 1

    def __init__(self, then: Callable[[NoiseProblem], Any], **settings: Any) -> None:
        self.then = then
        vars(self).update(settings)

    def objective(self, pipe) -> Objective:
        return FunctionObjective(lambda sample: torch.zeros(len(sample.noise), device=sample.noise.device))

    def start(self, problem: NoiseProblem) -> None:
        self.then(problem)
