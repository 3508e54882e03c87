"""Simulation of a second device: tensors that report it and do not mix with others."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

OTHER = torch.device("cuda", 1)


class Elsewhere(torch.Tensor):
    """Tensor on the simulated device `OTHER`."""


class TwoDevices(TorchFunctionMode):
    """Context in which `tensor.to(OTHER)` moves a tensor to the simulated device, with its graph.

    Operations on tensors of both devices raise as in torch, except for zero-dimensional ones.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func == torch.Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return OTHER if isinstance(args[0], Elsewhere) else func(*args)
        if func == torch.Tensor.to:
            return moved(*args, **kwargs)
        if len({isinstance(tensor, Elsewhere) for tensor in tensors if tensor.ndim}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices.")
        if kwargs.get("device") == OTHER:
            return elsewhere(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on `OTHER`."""
    return tensor.as_subclass(Elsewhere)


def weights_elsewhere(module: torch.nn.Module) -> torch.nn.Module:
    """Move all weights of a module to `OTHER`, in place."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            moved_table = {name: elsewhere(each.detach()) for name, each in table.items() if each is not None}
            table.update(moved_table)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return module


def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return `tensor.to(...)` between the two devices."""
    values = [*args, *kwargs.values()]
    devices = [torch.device(value) for value in values if isinstance(value, str | torch.device)]
    likes = [value for value in values if isinstance(value, torch.Tensor)]
    dtypes = [value for value in values if isinstance(value, torch.dtype)] + [like.dtype for like in likes]
    there = isinstance(likes[0] if likes else tensor, Elsewhere)
    there = devices[0] == OTHER if devices else there
    plain = tensor.as_subclass(torch.Tensor)
    plain = plain.to(dtypes[0]) if dtypes else plain
    return elsewhere(plain) if there else plain
