"""Module states that an optimization needs: frozen, in `eval()`, and none that breaks the gradient."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...private_names import accelerate_hook, attention_backend_of, diffusers_hooks, is_compiled, is_stateful
from ..memory.lean_layers import is_tiny, lean_layers
from ..memory.module_copies import refers_to_itself

DENOISERS = ("unet", "transformer", "transformer_2")
CALLED_IN_STEPS = (*DENOISERS, "controlnet")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENCODERS = ("text_encoder", "image_encoder", "safety_checker")


def modules_of(pipe) -> dict[str, nn.Module]:
    """Return the pipeline's components that are torch modules, by name."""
    return {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}


def shared_parts(pipe, decoder: Any = None) -> list[Any]:
    """Return what no two runs may use at the same time: a pipeline, its scheduler, and all modules."""
    roots = [*modules_of(pipe).values(), *([decoder] if isinstance(decoder, nn.Module) else [])]
    return [pipe, pipe.scheduler, *(module for root in roots for module in root.modules())]


@contextlib.contextmanager
def frozen_modules(
    pipe, gradient: str | None, decoder: nn.Module | None = None, image_size: tuple[int, int] | None = None
) -> Iterator[None]:
    """Freeze all modules of a pipeline and a separate decoder; the previous state is restored on exit.

    Inside they are in `eval()`. For a method with gradients no parameter requires a gradient, and the layers are lean
    unless the images are known to be tiny; see `lean_layers`. Otherwise parameters stay as they are: torch multiplies
    matrices in another order, with another rounding, if a weight requires no gradient.
    """
    roots = [*modules_of(pipe).values(), *([] if decoder is None else [decoder])]
    modules = [module for root in roots for module in root.modules()]
    training = [module for module in modules if module.training]
    # by name, since offloading replaces the parameters
    trainable = [(module, name) for module in modules for name in trainable_parameters(module) if gradient]

    def switch(on: bool) -> None:
        for module in training:
            module.training = on
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(on)

    try:
        switch(False)
        with lean_layers(roots if gradient and not is_tiny(image_size) else []):
            yield
    finally:
        switch(True)


def trainable_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that require a gradient."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]


def refuse_replaced_latents(pipe) -> None:
    """Raise `ValueError` for a `prepare_latents` that was replaced on the pipeline, whose noise a run could not set."""
    if "prepare_latents" in vars(pipe):
        raise ValueError(
            f"Expected the `prepare_latents` of {type(pipe).__name__}, but it was replaced on the pipeline itself, and "
            "the noise that it draws is out of reach. Define it in a subclass and draw with diffusers' `randn_tensor` "
            "there, or pass `noise_sampler` or `latents` instead. `del pipe.prepare_latents` brings back the stock one."
        )


def refuse_replaced_step(pipe) -> None:
    """Raise `ValueError` for a `scheduler.step` that was replaced on the scheduler, for methods with x0 estimates."""
    if "step" in vars(pipe.scheduler):
        raise ValueError(
            f"Expected the `step` of {type(pipe.scheduler).__name__}, but it was replaced on the scheduler itself, and "
            "the x0 estimate of one model call would bypass it. Use a method that evaluates images of the whole chain, "
            "or `del pipe.scheduler.step` first."
        )


def refuse_unsuited(pipe, gradient: str | None) -> None:
    """Raise `ValueError`, with the remedy, for modules in a state that a method cannot work with.

    Modules outside the gradient path may be offloaded and may use any attention backend.

    Args:
        pipe: The pipeline.
        gradient: Gradient mode of the method; see `PipelineSampler.images`.
    """
    refuse_replaced_latents(pipe)
    for name, root in modules_of(pipe).items():
        warn_of_dropout(name, root)
        refuse_cache(name, root)
        if gradient is not None:
            refuse_inference_tensors(name, root)
        if passes(name, gradient):
            refuse_offload(name, root)
            refuse_attention(name, root)
            refuse_casting(name, root)
            refuse_upcast(name, root)


def warn_of_dropout(name: str, root: nn.Module) -> None:
    """Warn about active dropout, which a run turns off for its time."""
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in root.modules()):
        warnings.warn(
            f"The `{name}` is in training mode with dropout. The run turns it off, and its images differ from those "
            f"of a plain call: call `pipe.{name}.eval()` before both.",
            stacklevel=3,
        )


def is_upcast(vae: Any) -> bool:
    """Return whether pipelines convert a VAE to float32 to decode, and back."""
    return vae is not None and bool(vae.config.get("force_upcast")) and vae.dtype == torch.float16


def refuse_upcast(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for a VAE that is converted to decode, with functions on it that may refer to it."""
    if name == "vae" and is_upcast(root) and refers_to_itself(root):
        raise ValueError(
            "Expected a VAE without replaced functions in a half-precision pipeline that converts it to float32 to "
            "decode, since the gradient needs a copy, which they would not reach. Use bfloat16, a VAE that works in "
            "float16, or a method without gradients, such as `BestOfN`."
        )


def refuse_inference_tensors(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for weights that were made in inference mode, which no gradient can pass."""
    if any(tensor.is_inference() for tensor in (*root.parameters(), *root.buffers())):
        raise ValueError(
            f"Expected weights that a gradient can pass, but those of `{name}` were made under "
            "`torch.inference_mode()`. Load the pipeline outside of it, or use a method without gradients, such as "
            "`BestOfN`."
        )


def passes(name: str, gradient: str | None) -> bool:
    """Return whether a gradient passes a component of a pipeline. Prompts are encoded without one."""
    if gradient is None or name.startswith(ENCODERS):
        return False
    return gradient == "full" or name not in DENOISERS


def refuse_offload(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module is offloaded: weights that move between forward and backward break gradients."""
    expected = (
        f"Expected `{name}` to stay on its device, but it is offloaded, and weights that move between the forward and "
        "the backward pass break the gradient. Use a method without gradients, such as `BestOfN`, or "
    )
    for module in root.modules():
        if group_offloaded(module):
            raise ValueError(f"{expected}load the pipeline again without group offloading.")
        if offloads(accelerate_hook(module)):
            raise ValueError(f"{expected}call `pipe.remove_all_hooks()` and `pipe.to(device)` first.")


def is_offloaded(root: nn.Module) -> bool:
    """Return whether the weights of a module or of one of its submodules move between devices."""
    return any(group_offloaded(module) or offloads(accelerate_hook(module)) for module in root.modules())


def offloads(hook) -> bool:
    """Return whether an accelerate hook moves weights.

    These are `CpuOffload`, that of a `ComponentsManager`, and `AlignDevicesHook(offload=True)`, alone or in a
    `SequentialHook`.
    """
    nested = getattr(hook, "hooks", ())
    return (
        type(hook).__name__ in ("CpuOffload", "CustomOffloadHook")
        or bool(getattr(hook, "offload", False))
        or any(map(offloads, nested))
    )


def group_offloaded(module: nn.Module) -> bool:
    return any("group_offloading" in name for name in diffusers_hooks(module))


def refuse_attention(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for an attention backend without a backward pass; some of them drop the gradient silently."""
    if "sage" in str(getattr(F.scaled_dot_product_attention, "__module__", "")):
        raise ValueError(
            "Expected an attention with a backward pass, but `torch.nn.functional.scaled_dot_product_attention` was "
            "replaced by Sage attention, which has none. Put torch's own function back, or use a method without "
            "gradients, such as `BestOfN`."
        )
    for module in root.modules():
        backend = attention_backend_of(module)
        if backend is not None and ("sage" in backend or backend == "_flash_3"):
            raise ValueError(
                f'Expected an attention backend with a backward pass, but `{name}` uses "{backend}", which has none. '
                f'Call `pipe.{name}.set_attention_backend("native")` first, outside any `attention_backend` context, '
                "or use a method without gradients, such as `BestOfN`."
            )


def compiled_parts(pipe) -> list[str]:
    """Return the names of the components that `torch.compile` compiled, or parts or methods of them."""
    return [name for name, root in modules_of(pipe).items() if any(map(is_compiled, root.modules()))]


def refuse_lost_gradient(pipe, gradient: str | None = None) -> None:
    """Raise `ValueError` for a gradient of exactly zero where its reason is known.

    The backward pass that torch 2.13 compiles for the CPU returns zeros for some decoders. With zero terminal SNR a
    stochastic solver such as CogVideoX's replaces the noise in its first step, and it acts through the denoiser only.
    """
    if gradient == "frozen" and pipe.scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "Expected images that depend on the noise, but their gradient is zero: with zero terminal SNR, as "
            f"{type(pipe.scheduler).__name__} has here, its first step keeps nothing of the noise once the output of "
            'the denoiser is held constant. Use `gradient="full"`, or a method without gradients, such as `BestOfN`.'
        )
    if names := compiled_parts(pipe):
        raise ValueError(
            f"Expected a gradient from the images to the noise, but it is exactly zero, and {', '.join(names)} is "
            "compiled, which may lose it. Load the pipeline again without `torch.compile`, or use a method without "
            "gradients, such as `BestOfN`."
        )


def refuse_backward_error(pipe, error: RuntimeError) -> None:
    """Raise `ValueError` with the remedy for an error of the backward pass that is known."""
    remedy = "use a method without gradients, such as `BestOfN`."
    if "inplace operation" in str(error):
        raise ValueError(
            f"Expected a call whose tensors stay as they are until the backward pass, but {type(pipe).__name__}, code "
            f"that was added to it, or a reward writes into one in place. Remove that, or {remedy}"
        ) from error
    if names := compiled_parts(pipe):
        raise ValueError(
            f"Expected compiled modules with a backward pass, but with {', '.join(names)} compiled it fails "
            f"({type(error).__name__}). Load the pipeline again without `torch.compile`, or {remedy}"
        ) from error


def refuse_casting(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for convolutions under layerwise casting.

    Their backward pass reads the weights in the storage dtype. Linear layers save the ones that they computed with.
    """
    for module in root.modules():
        if isinstance(module, CONVOLUTIONS) and "layerwise_casting" in diffusers_hooks(module):
            raise ValueError(
                f"Expected convolutions that are stored in the dtype they compute in, but those of `{name}` are cast "
                "layer by layer, which breaks the gradient. Load the pipeline again and leave them out: "
                f"`pipe.{name}.enable_layerwise_casting(..., skip_modules_classes=(torch.nn.Conv2d,))`."
            )


def refuse_cache(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module reuses results of earlier denoising steps.

    Some caches ask the pipeline for its timestep, but evaluations run on a copy of it. All of them carry the graph of
    one step into the next, and their state would outlive an interrupted run.
    """
    for module in root.modules():
        stateful = [hook for hook in diffusers_hooks(module).values() if is_stateful(hook)]
        if stateful:
            raise ValueError(
                f"Expected modules without a cache across denoising steps, but `{name}` has one "
                f"({type(stateful[0]).__name__}). Call `pipe.{name}.disable_cache()` first; the final image may be "
                "generated with the cache again."
            )
