"""A pipeline for calls beside one of its own, in its place if code of others may refer to it."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...private_names import has_forward_hooks
from ..memory.lean_layers import LEAN_LAYERS
from ..memory.replaced import replaced_methods

LIBRARIES = ("builtins", "torch", "diffusers", "transformers", "accelerate", "peft")


class KeptScheduler:
    """The scheduler of a call in its state at construction, from which each run starts.

    A run takes a copy. If code of others may refer to the scheduler, as a closure in the place of its `step` does, no
    copy would be reached: then the scheduler itself is in this state for the time of a run.
    """

    def __init__(self, pipe: Any) -> None:
        self.scheduler, self.in_place = pipe.scheduler, is_patched(pipe)
        self.constants = constants_of(self.scheduler)
        if self.in_place:
            attributes = vars(self.scheduler)
            replaced = [attributes[name] for name in replaced_methods(self.scheduler)]
            self.constants |= {id(part): part for part in (self.scheduler, *replaced)}
        # what users put on a scheduler, such as an open file, may have no copy
        values = [value for value in vars(self.scheduler).values() if id(value) not in self.constants]
        self.constants |= {id(value): value for value in values if not has_copy(value)}
        # schedulers refer to the graph of a run, so that each run gets its own
        self.kept = self.copied(vars(self.scheduler) if self.in_place else self.scheduler)

    def copied(self, thing: Any) -> Any:
        return copy.deepcopy(thing, dict(self.constants))

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Any]:
        """Yield the scheduler for one run."""
        if not self.in_place:
            yield self.copied(self.kept)
            return
        with with_attributes(self.scheduler, self.copied(self.kept)):
            yield self.scheduler


def has_copy(value: Any) -> bool:
    if isinstance(value, torch.Tensor | int | float | str | None):
        return True
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def constants_of(scheduler: Any) -> dict[int, Any]:
    """Return the parts of a scheduler that no call changes, its configuration and its training tables, by id.

    Copies of the scheduler share them: copying tables takes longer than a step of a small scheduler.
    """
    length = scheduler.config.get("num_train_timesteps")
    tensors = (value for value in vars(scheduler).values() if isinstance(value, torch.Tensor))
    tables = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.shape == (length,)]
    return {id(part): part for part in (scheduler.config, *tables)}


@contextlib.contextmanager
def with_attributes(thing: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Give an object these attributes alone, and its own again on exit."""
    own = vars(thing)
    try:
        thing.__dict__ = attributes  # one step, which no interrupt divides
        yield
    finally:
        thing.__dict__ = own


def is_patched(pipe: Any) -> bool:
    """Return whether code of others runs in the calls of a pipeline, and so may refer to it or to its scheduler.

    These are methods replaced on the pipeline, its scheduler, its models or the modules in them, forward hooks, and
    modules and attention processors that are defined elsewhere. (A replaced `encode_prompt` runs outside of
    evaluations.)
    """
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    own = plain_attributes(pipe)
    replaced = [name for name in replaced_methods(pipe) if name in own and name != "encode_prompt"]
    if replaced or any(map(replaced_methods, (pipe.scheduler, *models))):
        return True
    return runs_code_of_others([module for model in models for module in model.modules()])


def runs_code_of_others(modules: list[nn.Module]) -> bool:
    if any("forward" in vars(module) or has_forward_hooks(module) for module in modules):
        return True
    kinds = set(map(type, modules)) - set(LEAN_LAYERS.values())
    processors = {type(getattr(module, "processor", None)) for module in modules}
    return not all(map(is_of_a_library, kinds | {kind.forward for kind in kinds} | processors))


@functools.cache
def is_of_a_library(thing: Any) -> bool:
    """Return whether a class or function is one of the libraries that models are made with."""
    names = getattr(thing, "__globals__", None)
    name = getattr(thing, "__module__", "") if names is None else names.get("__name__", "")
    return name.split(".")[0] in LIBRARIES


class Hook:
    """Function in the place of a pipeline's method while one of its calls is in progress.

    Args:
        function: The function.
        replaced: The attribute of that name on the pipeline itself, `None` if there is none.
    """

    def __init__(self, function: Callable[..., Any], replaced: Any) -> None:
        self.function, self.replaced = function, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def plain_attributes(pipe: Any) -> dict[str, Any]:
    """Return the attributes of a pipeline without the hooks of a call in progress."""
    own, hooks = vars(pipe), {name: value for name, value in vars(pipe).items() if isinstance(value, Hook)}
    replaced = {name: hook.replaced for name, hook in hooks.items() if hook.replaced is not None}
    return {name: value for name, value in own.items() if name not in hooks} | replaced


@contextlib.contextmanager
def hooked(pipe: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Put functions in the place of a pipeline's methods, on the pipeline itself."""
    own = vars(pipe)
    hooks = {name: Hook(function, own.get(name)) for name, function in functions.items()}
    try:
        own.update(hooks)
        yield
    finally:
        for name in hooks:
            own.pop(name, None)
        own.update({name: hook.replaced for name, hook in hooks.items() if hook.replaced is not None})


@contextlib.contextmanager
def apart(pipe: Any) -> Iterator[Any]:
    """Yield a shallow copy of a pipeline with its own scheduler, for a call that leaves the pipeline as it was.

    A patched pipeline is yielded itself, and gets its attributes back on exit.
    """
    kept = KeptScheduler(pipe)
    twin = pipe if kept.in_place else copy.copy(pipe)
    with kept.fresh() as scheduler:
        own = {"_twin_of": vars(pipe).get("_twin_of", pipe), "scheduler": scheduler}
        with with_attributes(twin, vars(twin) | own):
            yield twin


@contextlib.contextmanager
def set_aside(pipe: Any) -> Iterator[None]:
    """Set the call of a pipeline that is in progress aside, so that the pipeline can be used for others.

    Attributes that it gets meanwhile stay.
    """
    own = vars(pipe)
    with KeptScheduler(pipe).fresh() as scheduler, with_attributes(pipe, plain_attributes(pipe)):
        vars(pipe)["scheduler"] = scheduler
        try:
            yield
        finally:
            own.update({name: value for name, value in vars(pipe).items() if name not in own})
