"""Shallow copies of modules that share all weights and compute in another way."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..sampling.internals import MODULE_CONTENTS


def without_gradient(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and whose forward pass leaves no graph."""
    return with_forward(module, torch.no_grad()(module.forward))


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy that shares all weights and has another forward pass."""
    twin = copy.copy(module)
    vars(twin)["forward"] = forward
    return twin


def converted_apart(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights, until it is converted to another dtype: then it has a copy of them.

    A half-precision pipeline whose VAE has `force_upcast` converts the shared VAE to decode, and back, which swaps the
    weights under the graph. This one is converted as well, and leaves the shared one alone.
    """
    twin = copy.copy(module)
    vars(twin).pop("decode", None)  # a compiled one is bound to the shared weights
    contents: dict[torch.dtype, dict[str, Any]] = {module.dtype: vars(module)}  # pyright: ignore

    def to(dtype: torch.dtype) -> nn.Module:
        if dtype not in contents:
            contents[dtype] = vars(copy.deepcopy(module).to(dtype))
        vars(twin).update({kind: contents[dtype][kind] for kind in MODULE_CONTENTS})
        return twin

    vars(twin)["to"] = to
    return twin
