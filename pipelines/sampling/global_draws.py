"""Detection of calls that draw from torch's global random stream, so that evaluations are not repeatable."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from ...private_names import TorchMode, is_compiled

DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class GlobalDraws(TorchMode):
    """Context in which random numbers without a generator raise `ValueError`, in this thread only.

    Args:
        drawer: Name of what draws, for the error.
        remedy: The remedy, for the error.
    """

    def __init__(self, drawer: str, remedy: str) -> None:
        super().__init__()
        self.drawer, self.remedy = drawer, remedy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            raise ValueError(
                f"Expected all noise to come from `generator`, but {self.drawer} draws from torch's global stream, so "
                f"that no two evaluations see the same noise. {self.remedy}"
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_global_draws(pipe) -> Iterator[list[torch.Tensor]]:
    """Refuse draws from torch's global stream after the latents were prepared; see `GlobalDraws`.

    Evaluations start from the same state of the generators, and so see the same noise at each step; they repeat what a
    call draws before. The scheduler must be a copy. Yields an empty list, for the same form as `first_step_only`.
    """
    scheduler, name = pipe.scheduler, type(pipe).__name__
    step, prepare_latents = scheduler.step, pipe.prepare_latents
    modules = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]

    @functools.wraps(step)
    def watched_step(*args, **kwargs):
        with GlobalDraws(f"{name} with {type(scheduler).__name__}", DETERMINISTIC):
            return step(*args, **kwargs)

    with contextlib.ExitStack() as rest_of_call:

        def watch_from_here(*args, **kwargs):
            prepared = prepare_latents(*args, **kwargs)
            if not any(map(is_compiled, modules)):  # a mode would compile them once more
                rest_of_call.enter_context(GlobalDraws(name, "Pass `generator` on to everything that draws there."))
            return prepared

        vars(scheduler)["step"], vars(pipe)["prepare_latents"] = watched_step, watch_from_here
        try:
            yield []
        finally:
            del scheduler.step


DETERMINISTIC = (
    "Use a deterministic scheduler, such as `FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`, or one with "
    "a seed, such as `DPMSolverSDEScheduler(noise_sampler_seed=0)`. A `step` that was "
    "replaced needs the signature of the stock one, as by `functools.wraps`: pipelines look there for `generator`."
)
