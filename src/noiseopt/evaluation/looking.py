"""Access to the problem of a pipeline call, for code that takes gradients itself."""

from collections.abc import Callable
from typing import Any

from ..pipelines.baselines.plain_sampling import PlainSampling
from ..pipelines.problem import NoiseProblem
from ..pipelines.sampling.sampler import Clamp, Gradient


class Looking(PlainSampling):
    """Hands the problem of a call to a function from inside the run, and leaves the noise as it is.

    The modules are prepared for gradients while the function runs, as for every method.

    Args:
        then: The function, called with the problem; its return value is ignored.
        settings: Settings of any method, such as `checkpointing="blocks"`.
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
