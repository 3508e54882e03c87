"""Samplers that draw from no generator: what they draw differs from one evaluation to the next."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class GlobalDraws(TorchFunctionMode):
    """Inside this context a random number that comes from no generator raises `ValueError`. Other threads may draw.

    Args:
        sampler: What the error says that draws.
    """

    def __init__(self, sampler: str) -> None:
        super().__init__()
        self.sampler = sampler

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            raise ValueError(
                f"Expected all noise to come from `generator`, but {self.sampler} draws some on the way from torch's "
                "own stream, so that no two evaluations would see the same. Use a scheduler that draws nothing, as "
                "`FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`, or whose seed is a setting, as "
                "`DPMSolverSDEScheduler(noise_sampler_seed=0)`."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_global_draws(pipe) -> Iterator[list[torch.Tensor]]:
    """Let no `scheduler.step` of a pipeline draw from torch's own stream; see `GlobalDraws`. Its scheduler is a copy.

    Every inner run begins with the generators in the same state, so that all of them see the same noise on the way.
    Yields an empty list, as `first_step_only` does.
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
