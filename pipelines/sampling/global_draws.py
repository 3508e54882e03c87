"""Detection of samplers that draw from torch's global random stream, so that evaluations are not repeatable."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class GlobalDraws(TorchFunctionMode):
    """Context in which random numbers without a generator raise `ValueError`, in this thread only.

    Args:
        sampler: Name of the sampler for the error.
    """

    def __init__(self, sampler: str) -> None:
        super().__init__()
        self.sampler = sampler

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            raise ValueError(
                f"Expected all noise to come from `generator`, but {self.sampler} draws from torch's global stream, so "
                "that no two evaluations see the same noise. Use a deterministic scheduler, such as "
                "`FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`, or one with a seed, such as "
                "`DPMSolverSDEScheduler(noise_sampler_seed=0)`."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_global_draws(pipe) -> Iterator[list[torch.Tensor]]:
    """Refuse a `scheduler.step` that draws from torch's global stream; see `GlobalDraws`.

    Evaluations start from the same state of the generators, and so see the same noise at each step. The scheduler must
    be a copy. Yields an empty list, for the same form as `first_step_only`.
    """
    scheduler, sampler = pipe.scheduler, f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}"
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args, **kwargs):
        with GlobalDraws(sampler):
            return step(*args, **kwargs)

    vars(scheduler)["step"] = watched
    try:
        yield []
    finally:
        del scheduler.step
