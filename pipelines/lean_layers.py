"""Layers of frozen networks that keep no more for the backward pass than a gradient of their input needs.

Autograd saves the input of each convolution, for a gradient of its weights that nobody asks for while they are frozen,
and the input of each SiLU, which the group normalization before it gives again in one pass over memory. Without the two
the graph of a VAE decoder or UNet is half as large or less, at next to no cost: no convolution is computed twice.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAN_BYTES = 2**18  # smaller inputs are left to autograd: there is nothing to gain


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps its weights and not its input, as long as they are frozen.

    On a CPU it also computes with the channels last, which is faster in both directions and the same up to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        if not frozen or self.padding_mode != "zeros" or isinstance(self.padding, str) or not is_lean(input):
            return super().forward(input)
        if input.device.type == "cpu":
            input = input.contiguous(memory_format=torch.channels_last)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(input, self.weight, self.bias, settings)  # pyright: ignore[reportReturnType]


class FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = input.shape, settings
        return F.conv2d(input, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        if gradient.device.type == "cpu":
            gradient, weight = (each.contiguous(memory_format=torch.channels_last) for each in (gradient, weight))
        return nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.settings), None, None, None


class LeanGroupNorm(nn.GroupNorm):
    """A group normalization whose output knows what it was made of, for a `LeanSiLU` that comes next."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_lean(input) and output.requires_grad:
            vars(output)["normalized_from"] = (input, (self.num_groups, self.weight, self.bias, self.eps))
        return output


class LeanSiLU(nn.SiLU):
    """A SiLU that keeps the input of the group normalization before it, which is kept anyway, and not its own."""

    def forward(self, input: Tensor) -> Tensor:
        source = vars(input).get("normalized_from")
        if source is None or self.inplace or not is_lean(input):
            return super().forward(input)
        return NormalizedSiLU.apply(input, *source)  # pyright: ignore[reportReturnType]


class NormalizedSiLU(torch.autograd.Function):
    """`silu(normalized)`, where `normalized` is computed again from what was normalized in the backward pass."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, before: Tensor, settings: tuple) -> Tensor:
        ctx.save_for_backward(before)
        ctx.settings = settings
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (before,) = ctx.saved_tensors
        groups, weight, bias, eps = ctx.settings
        normalized = F.group_norm(before, groups, weight, bias, eps)
        return torch.ops.aten.silu_backward(gradient, normalized), None, None


def is_lean(input: Tensor) -> bool:
    """Whether a graph is being made of something large, in the precision of its own tensors."""
    graph = torch.is_grad_enabled() and input.requires_grad and not torch.is_autocast_enabled(input.device.type)
    return graph and input.ndim == 4 and input.numel() * input.element_size() >= LEAN_BYTES


LEAN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    nn.GroupNorm: LeanGroupNorm,
    nn.SiLU: LeanSiLU,
}


@contextlib.contextmanager
def lean_layers(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Layers of these modules are lean inside, and what they were outside; subclasses and compiled modules stay."""
    changed = [(layer, type(layer)) for root in roots for layer in plain_layers(root)]
    try:
        for layer, kind in changed:
            layer.__class__ = LEAN_LAYERS[kind]
        yield
    finally:
        for layer, kind in changed:
            layer.__class__ = kind


def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that have a lean form; a compiled module would be compiled again for them."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return
    if type(module) in LEAN_LAYERS:
        yield module
    for child in module.children():
        yield from plain_layers(child)
