"""Private names of diffusers, accelerate and torch that this package relies on, all in one place for upgrades."""

import copy
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func")  # of a diffusers block
MODULE_CONTENTS = ("_modules", "_parameters", "_buffers")  # of a torch module


def private(owner: Any, name: str, library: str) -> Any:
    """Return `owner.name`.

    Raises:
        ImportError: If this version of the library has no such name.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        version = importlib.metadata.version(library)
        raise ImportError(
            f"Expected {library} to have the private name `{name}`, but version {version} has none on "
            f"{getattr(owner, '__name__', type(owner).__name__)}. Install a version that noiseopt was tested with, or "
            "update noiseopt."
        ) from None


def execution_device(pipe) -> torch.device:
    """Return the device that a pipeline computes on, also when its modules are offloaded."""
    return private(pipe, "_execution_device", "diffusers")


def interrupt(pipe) -> None:
    """Let a pipeline whose loop checks `pipe.interrupt` skip the remaining steps."""
    private(pipe, "_interrupt", "diffusers")
    pipe._interrupt = True


def progress_bar_is_off(pipe) -> bool:
    """Return whether `pipe.set_progress_bar_config(disable=True)` turned off the progress bar of a pipeline."""
    return bool(getattr(pipe, "_progress_bar_config", {}).get("disable"))


def own_timestep_count(pipe) -> int | None:
    """Return the number of timesteps of the last call, if the pipeline records it."""
    return getattr(pipe, "_num_timesteps", None)


def name_or_path(component: Any) -> str | None:
    """Return the Hub id or folder that a pipeline or one of its components was loaded from."""
    config = getattr(component, "config", None)
    source = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(component, "name_or_path", None)
    source = source or getattr(component, "_pretrained_model_name_or_path", None)  # of a modular pipeline
    return str(source) if source else None


def treat_as(cls: type, stock: type) -> None:
    """Let `AutoPipelineFor….from_pipe`, which goes by names, take pipelines of a class for those of a stock class."""
    from diffusers.pipelines import auto_pipeline  # imports all pipelines: not for those who only want rewards

    model_of = private(auto_pipeline, "_get_model", "diffusers")
    if (model := model_of(stock.__name__)) and not model_of(cls.__name__):
        auto_pipeline.SUPPORTED_TASKS_MAPPINGS.append({model: cls})


def is_modular(pipe: Any) -> bool:
    """Return whether a pipeline is a modular one, by name: importing the class imports all of them."""
    return any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)


def blocks_of(pipe: Any) -> Any:
    """Return the blocks of a modular pipeline; the public `blocks` are a copy."""
    return private(pipe, "_blocks", "diffusers")


def with_blocks(pipe: Any, blocks: Any) -> Any:
    """Return a modular pipeline with the components of another one and these blocks."""
    twin = copy.copy(pipe)
    vars(twin).update(_blocks=blocks)
    return twin


def input_param(name: str, hint: Any, description: str) -> Any:
    """Return the specification of an optional input of a block."""
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

    return InputParam(name, type_hint=hint, description=description)


def output_param(name: str, hint: Any, description: str) -> Any:
    """Return the specification of an output of a block."""
    from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam

    return OutputParam(name, type_hint=hint, description=description)


def has_loop(block: Any) -> bool:
    """Return whether a block runs the denoising steps."""
    return any(cls.__name__ == "LoopSequentialPipelineBlocks" for cls in type(block).__mro__)


def new_state(pipe: Any, request: Mapping[str, Any]) -> Any:
    """Return the state with which the call of a modular pipeline begins."""
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    state = PipelineState()
    for each in blocks_of(pipe).inputs:
        if each.name is not None:
            state.set(each.name, request.get(each.name, each.default), each.kwargs_type)
    return state


def accelerate_hook(module: nn.Module) -> Any:
    """Return the accelerate hook of a module, or `None`."""
    return getattr(module, "_hf_hook", None)


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """Return the diffusers hooks of a module by name."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def is_stateful(hook: Any) -> bool:
    """Return whether a diffusers hook carries state from one denoising step to the next."""
    return private(hook, "_is_stateful", "diffusers")


def attention_backend_of(module: nn.Module) -> str | None:
    """Return the backend of an attention module: its own or the active one; `None` if it does not dispatch."""
    processor: Any = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    active, _ = private(attention_dispatch, "_AttentionBackendRegistry", "diffusers").get_active_backend()
    return attention_dispatch.AttentionBackendName(processor._attention_backend or active).value


def supports_block_checkpointing(module: Any) -> bool:
    """Return whether diffusers can checkpoint the blocks of a model."""
    return bool(getattr(module, "_supports_gradient_checkpointing", False))


def block_settings(module: nn.Module) -> dict[str, Any]:
    """Return the checkpointing settings that are set on a block itself."""
    return {name: vars(module)[name] for name in BLOCK_SETTINGS if name in vars(module)}


def replace_block_settings(module: nn.Module, settings: dict[str, Any]) -> None:
    """Give a block exactly these `block_settings`."""
    for name in BLOCK_SETTINGS:
        vars(module).pop(name, None)
    vars(module).update(settings)


def checkpoint_blocks(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let a block run through `function(block, *inputs)`, such as `torch.utils.checkpoint.checkpoint`."""
    vars(module).update(zip(BLOCK_SETTINGS, (True, function), strict=True))


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled by `torch.compile(module)` or `module.compile()`, or one of its methods."""
    whole = private(module, "_compiled_call_impl", "torch") is not None or hasattr(module, "_orig_mod")
    return whole or any(map(is_compiled_function, vars(module).values()))


def is_compiled_function(function: Any) -> bool:
    """Return whether a function or method was compiled by `torch.compile`."""
    partial = getattr(function, "func", None)
    return callable(function) and any(hasattr(each, "_torchdynamo_orig_callable") for each in (function, partial))


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that run before or after its forward pass."""
    return bool(private(module, "_forward_hooks", "torch") or private(module, "_forward_pre_hooks", "torch"))


def is_context_decorated(function: Callable[..., Any]) -> bool:
    """Return whether a function was decorated by a context manager of torch, such as `torch.no_grad()`."""
    return getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib"


class TorchMode(TorchFunctionMode):
    """A torch function mode that ends in order after an interrupt.

    While torch runs a function under a mode, the mode is off its stack. An interrupt then can leave it there, and the
    exit of the mode would take another's place.
    """

    def __exit__(self, *error: Any) -> None:
        if self in private(overrides, "_get_current_function_mode_stack", "torch")():
            super().__exit__(*error)


def base_of_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor that `tensor` is a view of, or `None`."""
    return tensor._base


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of in-place writes to a tensor."""
    return tensor._version


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage for as long as it lives."""
    return storage._cdata


def default_mps_generator() -> torch.Generator:
    """Return the generator that torch draws from on Apple GPUs."""
    return private(torch.mps, "_get_default_mps_generator", "torch")()


def step_index(scheduler: Any, timestep: Any) -> int:
    """Return the index of the step that a scheduler is about to take, which it counts from `timestep` on."""
    if scheduler.step_index is None:
        private(scheduler, "_init_step_index", "diffusers")(timestep)
    return private(scheduler, "_step_index", "diffusers")


def alpha_cumprod(scheduler: Any, time: torch.Tensor) -> torch.Tensor:
    """Return ᾱ at a time in [0, 1], by the cosine schedule of Würstchen's scheduler."""
    return private(scheduler, "_alpha_cumprod", "diffusers")(time, time.device)


def threshold_sample(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Return an x0 estimate after the dynamic thresholding of a scheduler."""
    return private(scheduler, "_threshold_sample", "diffusers")(x0)


def guidance_scale(pipe) -> float:
    """Return the guidance scale of the call in progress."""
    return private(pipe, "_guidance_scale", "diffusers")


def set_guidance_scale(pipe, scale: float) -> None:
    """Change the guidance scale of the call in progress."""
    pipe._guidance_scale = scale
