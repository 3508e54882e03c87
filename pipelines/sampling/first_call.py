"""The stock `__call__` of a pipeline, its first model call, and its end."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...private_names import interrupt, own_timestep_count
from ...schedulers.x0_prediction import predict_x0
from ..memory.module_copies import with_forward
from ..memory.replaced import with_gradient
from .module_state import DENOISERS


class Step(NamedTuple):
    """What `scheduler.step` returns, as a tuple and by name, which some pipelines read."""

    prev_sample: Any
    pred_original_sample: Any


def stock_call(cls: type) -> Callable[..., Any]:
    """Return the `__call__` of the stock pipeline class under our hook, without its `@torch.no_grad`."""
    for base in cls.__mro__:
        if "__call__" in vars(base) and not hasattr(base, "_optimizes_noise"):
            return with_gradient(vars(base)["__call__"], f"{base.__name__}.__call__")
    raise TypeError(f"Expected a diffusers pipeline with a `__call__`, but {cls.__name__} has none.")


def refuse_writes(cls: type) -> None:
    """Raise `ValueError` for a call that writes over its tensors at each step, as MultiDiffusion does."""
    if "zero_" in stock_call(cls).__code__.co_names:
        raise ValueError(
            f"Expected a call whose tensors stay as they are until the backward pass, but that of {cls.__name__} "
            "writes over them at each step. Use a method without gradients, such as `BestOfN`."
        )


def submodules_of(pipe, names: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the named modules that a pipeline has."""
    return {name: module for name in names if (module := getattr(pipe, name, None)) is not None}


def x0_of_step(scheduler: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return the x0 estimate of a call of `scheduler.step`, by its arguments: their order differs in CogVideoX."""
    output = arguments["model_output"]
    return predict_x0(scheduler, output, arguments["timestep"], arguments["sample"]).to(output.dtype)


@contextlib.contextmanager
def first_step_only(pipe) -> Iterator[list[torch.Tensor]]:
    """Stop a pipeline after its first model call, with the x0 estimate as the result of `scheduler.step`.

    The loop is stopped by `pipe.interrupt`, or by shortening the timesteps in families that do not check it. The
    pipeline and its scheduler must be copies.

    Yields:
        A list that is empty at first, and holds the estimate after the call.

    Raises:
        TypeError: If the pipeline calls `scheduler.step` not at all, or before its denoiser.
    """
    scheduler, interruptible = pipe.scheduler, "interrupt" in stock_call(type(pipe)).__code__.co_names
    ends = getattr(pipe, "end_steps", None)  # of a modular pipeline, whose denoiser may look at the next timestep
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    parameters = inspect.signature(step)
    calls: list[int] = []
    stepped: list[bool] = []  # for each step, whether a denoiser had been called
    estimates: list[torch.Tensor] = []

    @functools.wraps(set_timesteps)
    def set_one(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if not interruptible and ends is None:
            scheduler.timesteps = scheduler.timesteps[:1]

    @functools.wraps(step)
    def estimate(*args, **kwargs):
        stepped.append(bool(calls))
        x0 = x0_of_step(scheduler, parameters.bind(*args, **kwargs).arguments)
        estimates.append(x0)
        if ends is not None:
            ends(x0)
        if interruptible:
            interrupt(pipe)
        return Step(x0, x0)

    vars(scheduler).update(set_timesteps=set_one, step=estimate)
    # copies, since a hook on shared modules would have to be removed whatever happens
    denoisers = submodules_of(pipe, DENOISERS)
    vars(pipe).update({name: with_forward(model, counted(model.forward, calls)) for name, model in denoisers.items()})
    try:
        yield estimates
    finally:
        del scheduler.set_timesteps, scheduler.step
    if not all(stepped or [False]):
        raise TypeError(
            f"Expected a pipeline that calls its denoiser ({', '.join(DENOISERS)}) before the first `scheduler.step`, "
            f"but {type(pipe).__name__} does not, and no x0 can be estimated. Use a method that evaluates images."
        )


@contextlib.contextmanager
def steps_skipped(pipe, result: torch.Tensor | None = None) -> Iterator[None]:
    """Let a pipeline, a copy with a copy of its scheduler, go from the latents that it prepares to the decoder.

    With a `result` one step is taken, which returns it, for families that decode what a step returns.
    """
    if hasattr(pipe, "end_steps"):
        vars(pipe)["_skips_steps"] = True
        yield
        return
    scheduler, interruptible = pipe.scheduler, "interrupt" in stock_call(type(pipe)).__code__.co_names
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_few(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if not interruptible:
            scheduler.timesteps = scheduler.timesteps[: 0 if result is None else 1]
        elif result is None:
            interrupt(pipe)

    def step(*_, **__):
        if interruptible:
            interrupt(pipe)
        return Step(result, result)

    vars(scheduler).update(set_timesteps=set_few, step=step)
    try:
        yield
    finally:
        del scheduler.set_timesteps, scheduler.step


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """Return the function with an entry in `calls` for each call."""

    @functools.wraps(function)
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return count


def count_timesteps(pipe) -> int:
    """Return the number of timesteps of the last call, which may be fewer than those of the scheduler."""
    return own_timestep_count(pipe) or len(pipe.scheduler.timesteps)
