"""Shallow copies of modules that share all weights with the original."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...private_names import MODULE_CONTENTS


def without_gradient(module: nn.Module) -> nn.Module:
    """Return a shallow copy whose forward pass builds no graph."""
    return with_forward(module, torch.no_grad()(module.forward))


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy with another forward pass."""
    twin = copy.copy(module)
    vars(twin)["forward"] = forward
    return twin


def converted_apart(module: Any) -> nn.Module:
    """Return a shallow copy of a VAE that shares its weights until `to(dtype)`, which converts a copy of them.

    A half-precision pipeline whose VAE has `force_upcast` converts the VAE to decode and back, which replaces the
    weights under the graph. This copy converts its own weights and leaves the shared VAE alone.
    """
    twin = copy.copy(module)
    vars(twin).pop("decode", None)  # a compiled one is bound to the shared weights
    contents: dict[torch.dtype, dict[str, Any]] = {module.dtype: vars(module)}

    def to(dtype: torch.dtype) -> nn.Module:
        if dtype not in contents:
            contents[dtype] = vars(copy.deepcopy(module).to(dtype))
        vars(twin).update({name: contents[dtype][name] for name in MODULE_CONTENTS})
        return twin

    vars(twin)["to"] = to
    return twin
