"""Modular pipelines in the form of standard ones: they encode, prepare the latents, and run the other blocks."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..private_names import blocks_of, has_loop, is_modular, new_state
from .memory.replaced import with_gradient
from .sampling.latent_space import with_globals
from .sampling.module_state import DENOISERS

NECESSARY = ("scheduler", *DENOISERS, "vae", "text_encoder", "tokenizer")
PLAIN_DEFAULTS = (str, int, float, bool, type(None))


class StepsEnded(Exception):
    """Ends the loop over the steps with latents."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


def as_standard(pipe: Any) -> Any:
    """Return a loaded modular pipeline as one that runs can take, with the same components; any other as it is.

    Its blocks are copies whose calls record gradients. The pipeline itself stays as it was.

    Raises:
        ValueError: For one whose components are not loaded.
    """
    if not is_modular(pipe) or isinstance(pipe, StandardCall):
        return pipe
    check_is_loaded(pipe)
    inputs = tuple(
        (each.name, each.default if isinstance(each.default, PLAIN_DEFAULTS) else None) for each in inputs_of(pipe)
    )
    found = object.__new__(standard_class(type(pipe), inputs))
    found.__dict__ = {**vars(pipe), **guiders_of(pipe), "_blocks": recording(blocks_of(pipe))}
    return found


def check_is_loaded(pipe: Any) -> None:
    """Raise `ValueError` for a modular pipeline without a component that each call from text needs."""
    expected = blocks_of(pipe).get_execution_blocks(prompt=True).component_names
    missing = [name for name in expected if name in NECESSARY and getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"Expected a modular pipeline with its components, but {', '.join(missing)} of {type(pipe).__name__} "
            "are not loaded. Call `pipe.load_components()`, or `pipe.update_components(...)` with your own."
        )


def guiders_of(pipe: Any) -> dict[str, Any]:
    """Return copies of the components that remember the step that they are in."""
    return {name: copy.copy(part) for name, part in pipe.components.items() if hasattr(part, "set_state")}


def inputs_of(pipe: Any) -> list[Any]:
    """Return the named inputs of the blocks of a modular pipeline."""
    return [each for each in blocks_of(pipe).inputs if each.name is not None]


@functools.cache
def standard_class(cls: type, inputs: tuple[tuple[str, Any], ...]) -> type:
    """Return a subclass of the class of a modular pipeline whose call takes the inputs of its blocks by name."""
    call: Any = with_globals(StandardCall.call)  # pyright: ignore[reportArgumentType]
    known = {**dict(inputs), "return_dict": False}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=known[name]) for name in known]
    call.__signature__ = inspect.Signature(parameters)
    return type(cls.__name__, (StandardCall, cls), {"__call__": call, "__module__": cls.__module__})


def recording(block: Any) -> Any:
    """Return a shallow copy of a block and those in it, without the `torch.no_grad` around their calls."""
    twin = copy.copy(block)
    twin.__class__ = recording_class(type(block))
    if block.sub_blocks:
        vars(twin)["sub_blocks"] = type(block.sub_blocks)(
            (name, recording(each)) for name, each in block.sub_blocks.items()
        )
    if hasattr(twin, "set_progress_bar_config"):
        twin.set_progress_bar_config(disable=True)
    return twin


@functools.cache
def recording_class(kind: type) -> type:
    call = with_gradient(kind.__call__, f"{kind.__name__} of a block")
    replaced = {"__call__": call, **({"loop_step": loop_step} if hasattr(kind, "loop_step") else {})}
    return type(kind.__name__, (kind,), {**replaced, "__module__": kind.__module__})


def loop_step(self: Any, components: Any, state: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Run the blocks of a step. diffusers' own method also logs what ends it."""
    for block in self.sub_blocks.values():
        components, state = block(components, state, **kwargs)
    return components, state


class StandardCall:
    """The call of a modular pipeline in the three parts of a standard one."""

    # of a run; the bars of its blocks are off
    progress_bar = DiffusionPipeline.progress_bar  # pyright: ignore[reportAttributeAccessIssue]
    set_progress_bar_config = DiffusionPipeline.set_progress_bar_config

    def call(self, **request: Any) -> tuple[Any]:
        """Return the images, or the latents after the last step for `output_type="latent"`."""
        state = self.encode_prompt(request)
        given = {"generator": request.get("generator"), "latents": request.get("latents")}
        latents, prepared = self.prepare_latents(state, images_asked(request) or images_of(state), **given)
        state = copied(state)
        state.kwargs_mapping = dict(prepared.kwargs_mapping)
        state.values.update(prepared.values, latents=latents, output_type=request.get("output_type", "pil"))
        for block in state.parts[2]:
            if not (has_loop(block) and vars(self).get("_skips_steps")):
                try:
                    block(self, state)
                except StepsEnded as ended:
                    state.values["latents"] = ended.latents
            if has_loop(block) and state.get("output_type") == "latent":
                return (state.get("latents"),)
        return (state.get("images"),)

    def encode_prompt(self, request: dict[str, Any]) -> Any:
        """Run the blocks before the latents on a request, and return the state after them."""
        if (given := vars(self).get("_given_state")) is not None:  # of a call in progress
            return given
        # some blocks write their own texts to a list of prompts
        state = new_state(
            self, {name: list(each) if isinstance(each, list) else each for name, each in request.items()}
        )
        state.parts = self.parts_of(request)
        for block in state.parts[0]:
            block(self, state)
        return state

    def parts_of(self, request: dict[str, Any]) -> tuple[list[Any], Any, list[Any]]:
        """Return the blocks before the latents of a request, the one that draws them, and those after.

        Raises:
            TypeError: If they draw no latents, or return no images.
        """
        blocks = blocks_of(self).get_execution_blocks(**{k: v for k, v in request.items() if v is not None})
        return split_at_latents(list(blocks.sub_blocks.values()), type(self).__name__)

    def prepare_latents(self, state: Any, batch_size: int, generator: Any = None, latents: Any = None) -> Any:
        """Run the block that draws the latents, with `randn_tensor`, and return them and what it changed in the state.

        Args:
            state: The state before.
            batch_size: The number of images.
            generator: Their generator.
            latents: Latents in place of those that the block draws, or `None`.
        """
        after, counts = copied(state), {"batch_size": batch_size, "num_images_per_prompt": 1}
        if batch_size != images_of(state):
            after.values.update(counts)
        after.values.update(generator=generator, latents=latents)
        with_draw(after.parts[1], randn_tensor)(self, after)
        prepared = after.get("latents")
        changed = {name: value for name, value in after.values.items() if value is not state.values.get(name)}
        after.values = {name: value for name, value in changed.items() if name not in counts} | {"generator": generator}
        return prepared, after

    def end_steps(self, latents: torch.Tensor) -> None:
        """End the loop over the steps from within."""
        raise StepsEnded(latents)


def split_at_latents(blocks: list[Any], name: str) -> tuple[list[Any], Any, list[Any]]:
    """Return the blocks before the latents, the one that draws them, and those after. `name` is the pipeline's."""
    place = next((place for place, block in enumerate(blocks) if drawing_functions(type(block))), None)
    if place is None:
        raise TypeError(
            "Expected a modular pipeline with a block that draws its latents with diffusers' `randn_tensor`, but "
            f"{name} has none for these inputs. Use a workflow from text to image."
        )
    outputs = {each.name for block in blocks for each in block.intermediate_outputs}
    if "images" not in outputs:
        last = ", ".join(each.name for each in blocks[-1].intermediate_outputs)
        raise TypeError(
            f"Expected a modular pipeline whose blocks return `images`, but those of {name} end with {last or 'none'}. "
            "Use a pipeline that generates images, with the block that decodes them."
        )
    return blocks[:place], blocks[place], blocks[place + 1 :]


def images_asked(request: dict[str, Any]) -> int | None:
    """Return the number of images of the prompts of a request, or `None` without prompts."""
    prompt = request.get("prompt")
    prompts = 1 if isinstance(prompt, str) else len(prompt or ())
    return prompts * (request.get("num_images_per_prompt") or 1) or None


def images_of(state: Any) -> int:
    """Return the number of images of a state, in which some blocks count them as prompts."""
    return (state.get("batch_size") or 1) * (state.get("num_images_per_prompt") or 1)


def copied(state: Any) -> Any:
    """Return a copy of a state that shares its values."""
    twin = copy.copy(state)
    twin.values, twin.kwargs_mapping = dict(state.values), {k: list(v) for k, v in state.kwargs_mapping.items()}
    return twin


@functools.cache
def drawing_functions(kind: type) -> tuple[str, ...]:
    """Return the names of the functions of a block's class that draw with `randn_tensor`, if it prepares latents."""
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    functions = {name: getattr(each, "__func__", each) for name, each in found.items()}
    codes = {
        name: getattr(inspect.unwrap(each), "__code__", None) for name, each in functions.items() if callable(each)
    }
    return tuple(name for name, code in codes.items() if "randn_tensor" in getattr(code, "co_names", ()))


def with_draw(block: Any, draw: Callable[..., torch.Tensor]) -> Any:
    """Return a copy of a block that draws with another function than `randn_tensor`."""
    kind, twin = type(block), copy.copy(block)
    replaced: dict[str, Any] = {}
    for name in drawing_functions(kind):
        static = inspect.getattr_static(kind, name)
        function: Any = with_globals(getattr(static, "__func__", static), randn_tensor=draw)
        replaced[name] = staticmethod(function) if isinstance(static, staticmethod) else function
    twin.__class__ = type(kind.__name__, (kind,), {**replaced, "__module__": kind.__module__})
    return twin
