"""Shallow copies of modules that share all weights with the original."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...private_names import MODULE_CONTENTS, is_compiled_function
from .replaced import replaced_methods


def without_gradient(module: nn.Module) -> nn.Module:
    """Return a shallow copy whose forward pass builds no graph."""
    return with_forward(module, torch.no_grad()(module.forward))


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy with another forward pass."""
    twin = copy.copy(module)
    vars(twin)["forward"] = forward
    return twin


def refers_to_itself(module: nn.Module) -> bool:
    """Return whether functions on a module may refer to it, so that a copy of the module would run the module itself.

    Methods are bound to the copy when they are copied, and compiled functions are left out.
    """
    replaced = [vars(part)[name] for part in module.modules() for name in replaced_methods(part)]
    return not all(isinstance(function, MethodType) or is_compiled_function(function) for function in replaced)


def converted_apart(module: Any) -> nn.Module:
    """Return a shallow copy of a VAE that shares its weights until `to(dtype)`, which converts a copy of them.

    A half-precision pipeline whose VAE has `force_upcast` converts the VAE to decode and back, which replaces the
    weights under the graph. This copy converts its own weights and leaves the shared VAE alone.
    """
    twin = copy.copy(module)
    for name in replaced_methods(module):
        function = vars(twin).pop(name)  # a compiled one is bound to the shared weights, and left out
        if not is_compiled_function(function):
            vars(twin)[name] = MethodType(function.__func__, twin)
    contents: dict[torch.dtype, dict[str, Any]] = {module.dtype: vars(module)}

    def to(dtype: torch.dtype) -> nn.Module:
        if dtype not in contents:
            contents[dtype] = vars(copy.deepcopy(module).to(dtype))
        vars(twin).update({name: contents[dtype][name] for name in MODULE_CONTENTS})
        return twin

    vars(twin)["to"] = to
    return twin
