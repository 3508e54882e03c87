"""Layers of frozen networks that keep and compute no more than a gradient of their input needs.

Autograd saves the input of each convolution, for a gradient of its weights that nobody asks for while they are frozen,
and the input of each SiLU, which the group normalization before it gives again in one pass over memory. Without the two
the graph of a VAE decoder is a third as large, and no convolution is computed twice for it. The gates of the linear
units in a transformer of a U-Net follow in the same way from the projection before them. A convolution of an image that
was just doubled in size computes most products several times over; one of 4 x 4 on the small image does not.

Values and gradients are those of the stock layers up to rounding. Without a graph the stock layers run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ..sampling.internals import has_forward_hooks, is_compiled, version_of
from .restore import undoing

LEAN_BYTES = 2**18  # smaller inputs are left to autograd: there is nothing to gain


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps its weights and not its input, as long as they are frozen."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_frozen(self) or self.padding_mode != "zeros" or isinstance(self.padding, str) or not is_lean(input):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(input, self.weight, self.bias, settings)  # pyright: ignore[reportReturnType]


class FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = input.shape, settings
        return F.conv2d(suited(input, weight), weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        gradient = suited(gradient, weight)
        if has_channels_last(gradient) and (turned := turned_settings(weight, *ctx.settings)):
            found = F.conv2d(gradient, weight.flip(2, 3).transpose(0, 1), None, *turned)
        else:
            found = conv2d_input(ctx.shape, weight, gradient, *ctx.settings)
        return found, None, None, None


def turned_settings(weight: Tensor, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> tuple | None:
    """Of the convolution with the turned kernel that is the gradient of one of stride 1.

    With the channels last CPUs are faster at it than at the gradient of a convolution.
    """
    turned = tuple(dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in range(2))
    return (stride, turned, dilation, groups) if stride == (1, 1) and groups == 1 and min(turned) >= 0 else None


class LeanUpsample2D(Upsample2D):
    """Doubles an image in size and convolves it, in one transposed convolution of the small image: 4/9 of the products.

    Pixels that repeat meet several weights of the kernel, whose sum they can be multiplied with. In half precision the
    sums would have to be rounded: it keeps to the stock way.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        fits = is_plain(self) and output_size is None and not args and not kwargs and is_lean(hidden_states)
        # the kernel takes longer to add up than it saves where it is larger than the image
        fits = fits and self.conv.weight.numel() <= 4 * hidden_states.numel()  # pyright: ignore
        if not fits or torch.finfo(hidden_states.dtype).bits < 32:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return FrozenUpsampling.apply(hidden_states, self.conv.weight, self.conv.bias)  # pyright: ignore


class FrozenUpsampling(torch.autograd.Function):
    """A 3 x 3 convolution of the nearest neighbour upsampling by 2, with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv_transpose2d(suited(input), doubling_kernel(weight), bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return F.conv2d(suited(gradient), doubling_kernel(weight), stride=2, padding=1), None, None


def doubling_kernel(weight: Tensor) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) to that of a transposed convolution (I, O, 4, 4) which also doubles the image.

    Doubling is a transposed convolution with four ones; this is the two after one another.
    """
    wide = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    wide = wide[..., 1:, :] + wide[..., :-1, :]
    return suited(wide[..., 1:] + wide[..., :-1])


class LeanGroupNorm(nn.GroupNorm):
    """A group normalization whose output knows what it was made of, for a `LeanSiLU` that comes next."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_lean(input) and output.requires_grad:
            settings = (self.num_groups, self.weight, self.bias, self.eps)
            vars(output)["normalized_from"] = version_of(output), input, settings
        return output


class LeanSiLU(nn.SiLU):
    """A SiLU that keeps the input of the group normalization before it, which is kept anyway, and not its own."""

    def forward(self, input: Tensor) -> Tensor:
        version, *source = vars(input).get("normalized_from", (None,))
        if not is_lean(input) or self.inplace or version != version_of(input):  # of something else, or written to since
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


class LeanGEGLU(GEGLU):
    """A gated linear unit that keeps its projection, and not the gate that follows from it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden_states.device.type == "npu" or not is_lean(hidden_states, dimensions=3):
            return super().forward(hidden_states, *args, **kwargs)
        return GatedProjection.apply(self.proj(hidden_states))  # pyright: ignore[reportReturnType]


class GatedProjection(torch.autograd.Function):
    """`values * gelu(gates)` of the two halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        values, gates = projected.chunk(2, dim=-1)
        return values * F.gelu(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        (projected,) = ctx.saved_tensors
        values, gates = projected.chunk(2, dim=-1)
        of_gates = torch.ops.aten.gelu_backward(gradient * values, gates)
        return torch.cat([gradient * F.gelu(gates), of_gates], dim=-1)


def is_frozen(layer: nn.Conv2d) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def is_plain(layer: Upsample2D) -> bool:
    """Whether a layer doubles by repeating pixels, and then does nothing but a frozen 3 x 3 convolution."""
    conv = layer.conv if layer.use_conv and layer.name == "conv" else None
    if type(conv) is not LeanConv2d or layer.norm is not None or not layer.interpolate or layer.use_conv_transpose:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    hooked = has_forward_hooks(conv) or "forward" in vars(conv)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and is_frozen(conv) and not hooked


def suited(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """In the order in which a CPU convolves fastest with a weight; as they are on other devices.

    With the channels last, unless the weight is not much smaller: those of the middle of a U-Net are larger than its
    images. Where a kernel is of one pixel a change of the order takes as long as it saves.
    """
    if values.device.type != "cpu" or (weight is not None and weight[0, 0].numel() == 1):
        return values
    last = weight is None or values.numel() >= 4 * weight.numel()
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def has_channels_last(values: Tensor) -> bool:
    """Whether values on a CPU are in that order, and in no other at the same time."""
    last = values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()
    return last and values.device.type == "cpu"


def is_lean(input: Tensor, dimensions: int = 4) -> bool:
    """Whether a graph is being made of something large, in the precision of its own tensors."""
    graph = torch.is_grad_enabled() and input.requires_grad and input.ndim == dimensions
    return graph and input.numel() * input.element_size() >= LEAN_BYTES and not in_autocast(input.device.type)


def in_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


LEAN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    nn.GroupNorm: LeanGroupNorm,
    nn.SiLU: LeanSiLU,
    Upsample2D: LeanUpsample2D,
    GEGLU: LeanGEGLU,
}


@contextlib.contextmanager
def lean_layers(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Layers of these modules are lean inside, and what they were outside; subclasses and compiled modules stay."""
    changed = [(layer, type(layer)) for root in roots for layer in plain_layers(root)]

    def put_back() -> None:
        for layer, kind in changed:
            layer.__class__ = kind

    with undoing(put_back):
        for layer, kind in changed:
            layer.__class__ = LEAN_LAYERS[kind]
        yield


def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that have a lean form; a compiled module would be compiled again for them."""
    if is_compiled(module):
        return
    if type(module) in LEAN_LAYERS:
        yield module
    for child in module.children():
        yield from plain_layers(child)
