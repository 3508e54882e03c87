"""Frozen layers that do not store activations that only a weight gradient would need.

Autograd saves the input of each convolution for the gradient of its weights, although nobody asks for it while they are
frozen. It also saves the input of each SiLU, which one cheap pass recomputes from the input of the group normalization
before it. Without the two, the graph of a VAE decoder is a third as large. The gates of the gated linear units (GEGLU)
in the transformer blocks of a U-Net are recomputed from their projection in the same way.

Values and gradients equal those of the stock layers up to rounding. Without a graph the stock layers run. They also run
wherever somebody replaced what a lean layer stands in for, on a layer or on its class, and inside compiled functions.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ...private_names import is_compiled, version_of
from .replaced import is_stock_function, is_stock_method, replaced_methods

LEAN_BYTES = 2**18  # below this size there is nothing to gain
LEAN_PIXELS = 128 * 128  # below this size of an image lean layers cost more time than their memory is worth


class LeanConv2d(nn.Conv2d):
    """Convolution that saves its weights but not its input, as long as it is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_lean(input) or not is_frozen(self) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(input, self.weight, self.bias, settings)  # pyright: ignore[reportReturnType]


class FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input only."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = input.shape, settings
        return F.conv2d(input, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.settings), None, None, None


class LeanGroupNorm(nn.GroupNorm):
    """Group normalization that attaches its input to its output, for a `LeanSiLU` that follows."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_lean(input) and output.requires_grad:
            settings = (self.num_groups, self.weight, self.bias, self.eps)
            vars(output)["normalized_from"] = version_of(output), input, settings
        return output


class LeanSiLU(nn.SiLU):
    """SiLU that does not save its input, but recomputes it from the input of the group normalization before it.

    That one is saved anyway.
    """

    def forward(self, input: Tensor) -> Tensor:
        version, *source = vars(input).get("normalized_from", (None,)) if is_lean(input) else (None,)
        # another input, or a normalized one that was written to since
        if self.inplace or version != version_of(input):
            return super().forward(input)
        return NormalizedSiLU.apply(input, *source)  # pyright: ignore[reportReturnType]


class NormalizedSiLU(torch.autograd.Function):
    """`silu(normalized)` that recomputes `normalized` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, before: Tensor, settings: tuple) -> Tensor:
        ctx.save_for_backward(before)
        ctx.settings = settings
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (before,) = ctx.saved_tensors
        normalized = F.group_norm(before, *ctx.settings)
        return torch.ops.aten.silu_backward(gradient, normalized), None, None


class LeanGEGLU(GEGLU):
    """Gated linear unit that saves its projection but not the gate computed from it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden_states.device.type == "npu" or not is_lean(hidden_states, dimensions=3):
            return super().forward(hidden_states, *args, **kwargs)
        return GatedProjection.apply(self.proj(hidden_states))  # pyright: ignore[reportReturnType]


class GatedProjection(torch.autograd.Function):
    """`values * gelu(gates)`, where `values` and `gates` are the two halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        values, gates = projected.chunk(2, dim=-1)
        return values * F.gelu(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (projected,) = ctx.saved_tensors
        values, gates = projected.chunk(2, dim=-1)
        gate_gradient = torch.ops.aten.gelu_backward(gradient * values, gates)
        return torch.cat([gradient * F.gelu(gates), gate_gradient], dim=-1)


def is_frozen(layer: nn.Conv2d) -> bool:
    """Return whether no gradient passes the weights, which a hook may have computed."""
    return not any(tensor is not None and tensor.requires_grad for tensor in (layer.weight, layer.bias))


def is_tiny(image_size: tuple[int, int] | None) -> bool:
    """Return whether images are known to be so small, in pixels, that lean layers do not pay."""
    return image_size is not None and image_size[0] * image_size[1] < LEAN_PIXELS


def is_lean(input: Tensor, dimensions: int = 4) -> bool:
    """Return whether a layer has to build a graph for a large input outside autocast, and is not being compiled."""
    if torch.compiler.is_compiling():
        return False
    if input.nbytes < LEAN_BYTES or not input.requires_grad or input.ndim != dimensions:
        return False
    return torch.is_grad_enabled() and not in_autocast(input.device.type)


def in_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


LEAN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    nn.GroupNorm: LeanGroupNorm,
    nn.SiLU: LeanSiLU,
    GEGLU: LeanGEGLU,
}
STANDS_FOR: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {  # methods of a layer, function of torch
    nn.Conv2d: (("forward", "_conv_forward"), "conv2d"),
    nn.GroupNorm: (("forward",), "group_norm"),
    nn.SiLU: (("forward",), "silu"),
    GEGLU: (("forward", "gelu"), "gelu"),
}


@contextlib.contextmanager
def lean_layers(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Make the layers of these modules lean inside the context.

    Subclasses of the stock layers, layers with a replaced method, all layers of a class with one, and compiled modules,
    which would be compiled again, are left alone.
    """
    kinds = {kind: lean for kind, lean in LEAN_LAYERS.items() if is_stock(kind)}
    layers = {layer for root in roots for layer in uncompiled_modules(root) if type(layer) in kinds}
    changed = [(layer, type(layer)) for layer in layers if not replaced_methods(layer)]
    try:
        for layer, kind in changed:
            layer.__class__ = kinds[kind]
        yield
    finally:
        for layer, kind in changed:
            layer.__class__ = kind


def is_stock(kind: type[nn.Module]) -> bool:
    """Return whether nobody replaced the methods of a layer class that its lean form stands in for."""
    methods, function = STANDS_FOR[kind]
    return is_stock_function(F, function) and all(is_stock_method(kind, method) for method in methods)


def uncompiled_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all modules in it, but no compiled ones."""
    if is_compiled(module):
        return
    yield module
    for child in module.children():
        yield from uncompiled_modules(child)
