"""Access to the problem of a pipeline call, for code that computes gradients itself."""

from collections.abc import Callable
from typing import Any

from ..pipelines.baselines.plain_sampling import PlainSampling
from ..pipelines.problem import NoiseProblem
from ..pipelines.sampling.sampler import Clamp, Gradient


class Looking(PlainSampling):
    """Method that only calls a function with the problem of a pipeline call, for measurements.

    The noise is unchanged. The modules are prepared for gradients while the function runs, as for every method.

    Args:
        then: Called with the problem; its return value is ignored.
        settings: Fields of a method, such as `checkpointing="blocks"`.
    """

    gradient_mode: Gradient = "full"  # pyright: ignore[reportIncompatibleMethodOverride]
    clamp: Clamp = "straight_through"  # pyright: ignore[reportIncompatibleMethodOverride]
    previews: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, then: Callable[[NoiseProblem], Any], **settings: Any) -> None:
        super().__init__()
        if "gradient" in settings:
            settings["gradient_mode"] = settings.pop("gradient")
        vars(self).update(then=then, **settings)

    def start(self, problem: NoiseProblem) -> None:
        vars(self)["then"](problem)

    def check(self) -> None:
        """Accept any settings."""
