"""What the modules of a pipeline must be during an optimisation, and what rules one out."""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

from .lean_layers import lean_layers


def modules_of(pipe) -> dict[str, nn.Module]:
    """The pipeline's components that are torch modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@contextlib.contextmanager
def frozen_modules(pipe, decoder: nn.Module | None = None) -> Iterator[None]:
    """All modules, and a decoder that is used beside them, in `eval()`, without parameter gradients and with lean
    layers inside; exactly as before outside."""
    roots = [*modules_of(pipe).values(), *([] if decoder is None else [decoder])]
    modules = [module for root in roots for module in root.modules()]
    trained = [module for module in modules if module.training]
    learning = [parameter for module in modules for parameter in module.parameters(False) if parameter.requires_grad]
    try:
        for module in trained:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        with lean_layers(roots):
            yield
    finally:
        for module in trained:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


def refuse_offload(pipe) -> None:
    """Raise `ValueError` if a module is offloaded: weights that move between forward and backward break gradients."""
    for name, root in modules_of(pipe).items():
        for module in root.modules():
            if offloads(getattr(module, "_hf_hook", None)) or group_offloaded(module):
                raise ValueError(
                    f"Expected all weights on one device, but `{name}` is offloaded, and weights that move between the "
                    "forward and the backward pass break the gradient. Call `pipe.remove_all_hooks()` (or load the "
                    "pipeline without offloading) and `pipe.to(device)` first."
                )


def offloads(hook) -> bool:
    """Whether an accelerate hook moves weights: `CpuOffload`, or `AlignDevicesHook(offload=True)`, alone or nested."""
    nested = getattr(hook, "hooks", ())
    return type(hook).__name__ == "CpuOffload" or bool(getattr(hook, "offload", False)) or any(map(offloads, nested))


def group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any("group_offloading" in name for name in getattr(registry, "hooks", {}))


def without_gradient(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and whose forward pass leaves no graph."""
    twin = copy.copy(module)
    vars(twin)["forward"] = torch.no_grad()(module.forward)
    return twin


def float32_decoder(vae):
    """A float32 copy of a VAE that takes latents of any dtype.

    A half-precision pipeline whose VAE has `force_upcast` casts the shared VAE up to decode and down again, which swaps
    the weights under the graph. The copy decodes the same values and leaves the shared one alone.
    """
    twin = copy.deepcopy(vae).float()
    decode = twin.decode
    vars(twin)["decode"] = functools.wraps(decode)(lambda z, *args, **kwargs: decode(z.float(), *args, **kwargs))
    return twin
