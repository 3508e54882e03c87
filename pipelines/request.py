"""The arguments of a pipeline call, read and refused before any model runs."""

import contextlib
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..checked_fields import refused_signature
from ..private_names import is_modular
from ..registry import did_you_mean
from ..schedulers.noise_samplers import NoiseSamplerSpec, as_noise_sampler
from .memory.chunks import PER_PROMPT
from .sampling.first_call import stock_call
from .sampling.latent_space import drawing_function, latents_with_image
from .sampling.pixel_range import check_returns_tensors, mentions
from .sampling.redraw import in_the_same_call

# The largest values of arguments that a mistake makes so large that a call would hang.
MOST_OF_ARGUMENT = {
    "num_inference_steps": 100_000,
    **dict.fromkeys(PER_PROMPT, 4096),
    **dict.fromkeys(("height", "width", "num_frames"), 65_536),
}
FOOTAGE = ("image", "video", "control_video", "conditioning_frames", "conditions", "reference_conditions", "controls")
OF_MODULAR_CALLS = {
    "guidance_scale": " Its guider has one: `pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2))`.",
    "output": " The result is returned. `pipe(latents=result.latents, output=...)` draws what you need.",
    "state": " A run begins with the inputs of the call: pass them by name.",
}
"""Remedies for arguments that no block of a modular pipeline takes."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
OF_DIFFUSERS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)


def check_pipeline(pipe: Any) -> None:
    """Raise `TypeError` for anything but a loaded diffusers pipeline."""
    if not (isinstance(pipe, DiffusionPipeline) or is_modular(pipe)):
        got = repr(pipe) if isinstance(pipe, str | os.PathLike | type(None)) else type(pipe).__name__
        load = "Load it first: `DiffusionPipeline.from_pretrained(...)`."
        remedy = "Pass the pipeline that it is a part of." if isinstance(pipe, torch.nn.Module) else load
        raise TypeError(f"Expected a loaded diffusers pipeline, but got {got}. {remedy}")


def stock_calls(cls: type) -> Iterator[Callable[..., Any]]:
    """Yield the `__call__` of a stock class and those of its base classes, without `@torch.no_grad`."""
    for base in cls.__mro__:
        if "__call__" in vars(base) and not hasattr(base, "_optimizes_noise"):
            yield inspect.unwrap(vars(base)["__call__"])


@functools.cache
def known_arguments(cls: type) -> set[str] | None:
    """Return the names of arguments that the stock call of a pipeline class reads.

    Many calls take `**kwargs` only for the sake of a few deprecated names, which stand in their code.

    Returns:
        The names, or `None` if the call passes any on to a function other than the call of its base class.
    """
    known: set[str] = set()
    for function in stock_calls(cls):
        parameters = inspect.signature(function).parameters.values()
        known |= {parameter.name for parameter in parameters if parameter.kind not in VARIADIC} - {"self"}
        rest = next((parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), None)
        if rest is None:
            return known
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            return None
        known |= set(re.findall(rf"""\b{rest}(?:\.pop\(|\.get\(|\[)\s*["'](\w+)""", source))
        known |= set(re.findall(rf"""["'](\w+)["'] (?:not )?in {rest}\b""", source))
        if source.count(f"**{rest}") < 2:  # not passed on
            return known
        if "super().__call__(" not in source:
            return None
    return None


def check_argument_names(pipe: Any, given: Collection[str], ours: Sequence[str] = (), method: Any = None) -> None:
    """Raise `TypeError` for arguments that the stock call of a pipeline does not know, with the closest names.

    Args:
        pipe: The pipeline.
        given: The names of the arguments of the stock call.
        ours: The names of other arguments that could have been meant.
        method: The method or its class, whose settings could have been meant; `None` for the stock call.
    """
    known = known_arguments(type(pipe))
    if known is None or not (unknown := [name for name in given if name not in known]):
        return
    name, settings = unknown[0], getattr(method, "__dataclass_fields__", ())
    remedy = did_you_mean(name, [*ours, *sorted(known)])
    if name == "seed":
        remedy = " A seed is written `generator=torch.Generator().manual_seed(0)`."
    if is_modular(pipe):
        remedy = OF_MODULAR_CALLS.get(name, remedy)
    if name in settings:
        own = (method if isinstance(method, type) else type(method)).__name__
        by_name = f" or `method_kwargs={{'{name}': ...}}`" if "method_kwargs" in ours else ""
        remedy = f" It is a setting of {own}: pass `{own}({name}=...)`{by_name}."
    raise TypeError(f"Expected arguments of the call of {type(pipe).__name__}, but got '{name}'.{remedy}")


def bind_request(pipe, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stock call by name. Raises `TypeError` for an unknown, missing or doubled one."""
    signatures = [inspect.signature(call) for call in stock_calls(type(pipe))]
    kinds = [{parameter.kind for parameter in signature.parameters.values()} for signature in signatures]
    named = (
        each for each, found in zip(signatures, kinds, strict=True) if inspect.Parameter.VAR_POSITIONAL not in found
    )
    try:
        bound = dict(next(named, inspect.signature(stock_call(type(pipe)))).bind(pipe, *args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"Expected arguments that {type(pipe).__name__} takes, but got others: {error}.") from None
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "self"}


def check_request(pipe, request: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for arguments of a stock call that cannot work.

    The stock call finds most of these late, or never: its own checks begin with the text encoder at the earliest.
    """
    check_prompt(request)
    check_types(pipe, request)
    check_clip_skip(pipe, request.get("clip_skip"))
    check_latents(request)
    callback = request.get("callback_on_step_end")
    if callback is not None and not callable(callback):
        raise TypeError(f"Expected `callback_on_step_end` to be a function, but got {callback!r}.")
    if callback is not None and (parameters := refused_signature(callback, 4)):
        raise TypeError(
            "Expected `callback_on_step_end` as a function `(pipe, step, timestep, callback_kwargs)`, but got one that "
            f"takes {parameters}. A callback of each optimization step belongs to `callbacks=`."
        )


def check_prompt(request: Mapping[str, Any]) -> None:
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if prompt is not None and not (
        isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"Expected `prompt` to be a text or a list of at least one text, but got {prompt!r:.200}.")
    parts = embeds if isinstance(embeds, list) else [embeds]
    if embeds is not None and not (parts and all(isinstance(part, torch.Tensor) and part.ndim for part in parts)):
        raise TypeError(f"Expected `prompt_embeds` to be a tensor, but got {embeds!r:.200}.")


def check_types(pipe, request: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for arguments that do not fit the annotations of the stock call."""
    function = stock_call(type(pipe))
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):
        hints = {}
    defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    custom = request.get("timesteps") is not None or request.get("sigmas") is not None
    for name, value in request.items():
        if value is defaults.get(name) or (name == "num_inference_steps" and value is None and custom):
            continue
        most, hint = MOST_OF_ARGUMENT.get(name), hints.get(name, Any)
        if most and not (is_number(value, Integral) and 1 <= int(value) <= most):
            raise ValueError(f"Expected `{name}` to be an integer from 1 to {most}, but got {value!r:.200}.")
        # many calls take `None` for a text or a list
        plain = value is not None or hint in (int, float) or get_origin(hint) is tuple
        if plain and not fits_hint(value, hint):
            kind = inspect.formatannotation(hint)
            raise TypeError(f"Expected `{name}` as {kind}, with finite numbers, but got {value!r:.200}.")


def check_clip_skip(pipe, clip_skip: int | None) -> None:
    layers = getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "num_hidden_layers", None)
    if clip_skip is not None and layers is not None and not 0 <= clip_skip < layers:
        raise ValueError(f"Expected `clip_skip` to be an integer from 0 to {layers - 1}, but got {clip_skip}.")


def fits_hint(value: Any, hint: Any) -> bool:
    """Return whether a value is one that an annotation names; true for annotations of anything but plain values."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits_hint(value, kind) for kind in get_args(hint))
    if get_origin(hint) in (list, tuple):
        each = float if get_args(hint)[0] is int else get_args(hint)[0]
        parts = value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value
        if isinstance(value, str):  # calls that ask for `list[str]` make a list of one text
            return get_args(hint)[0] is str
        return isinstance(parts, list | tuple) and all(fits_hint(part, each) for part in parts)
    if hint is float and isinstance(value, torch.Tensor):
        return value.numel() == 1
    if hint in (int, float):
        return is_number(value, Integral) or (hint is float and is_number(value, Real) and math.isfinite(value))
    return value is None if hint is NoneType else hint is not str or isinstance(value, str)


def is_number(value: Any, kind: type) -> TypeGuard[Any]:
    """Return whether a value is a number of a kind, which a bool is not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_latents(request: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for latents that are no tensor, and for what is no generator."""
    latents, generator = request.get("latents"), request.get("generator")
    if latents is not None and not (isinstance(latents, torch.Tensor) and latents.is_floating_point() and latents.ndim):
        got = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else f"{latents!r:.200}"
        raise TypeError(f"Expected `latents` to be a floating-point tensor, but got {got}.")
    streams = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(stream, torch.Generator) for stream in streams):
        raise TypeError(
            f"Expected `generator` to be a `torch.Generator` or a list of them, but got {generator!r:.200}. A seed is "
            "written `torch.Generator().manual_seed(0)`."
        )


def check_paths(**paths: Any) -> None:
    """Raise `TypeError` for arguments that are no paths."""
    for name, path in paths.items():
        if path is not None and not (isinstance(path, str | os.PathLike) and os.fspath(path)):
            raise TypeError(f"Expected `{name}` to be a path, but got {path!r}. Pass a text or a `pathlib.Path`.")


@contextlib.contextmanager
def stock_errors(pipe, run: Any) -> Iterator[None]:
    """Name the pipeline in errors that its call raises before the run began, that is, for its arguments."""
    try:
        yield
    except OF_DIFFUSERS as error:
        if run.began:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Expected arguments that {type(pipe).__name__} accepts, but it raised {type(error).__name__}: {error}"
        ) from error


def check_noise_is_drawn(pipe, request: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for a pipeline that draws no noise of its own in this call, or no image."""
    if hasattr(pipe, "parts_of"):  # a modular one
        pipe.parts_of(request)
    whole = {"denoising_start": (None,), "denoising_end": (None, 1.0)}
    part = next((name for name, values in whole.items() if request.get(name) not in values), None)
    if part is not None:
        raise ValueError(
            f"Expected a call that goes from noise to image, but `{part}` leaves out a part of the way. Leave it out "
            "to find the noise, and pass `latents=result.latents` to the call that has it."
        )
    parameters = inspect.signature(drawing_function(type(pipe))()).parameters
    if request.get("latents") is not None and "latents" not in parameters:
        raise latents_with_image(pipe)


def check_pipeline_class(cls: type) -> None:
    """Raise `TypeError` for a pipeline class whose noise can be found in no call."""
    if "prompt" not in inspect.signature(stock_call(cls)).parameters:
        raise TypeError(
            f"Expected a text-to-image pipeline, but the call of {cls.__name__} takes no `prompt`. Use a pipeline of "
            "the family that takes one."
        )
    check_footage(cls)
    drawing_function(cls)
    check_returns_tensors(cls)


def makes_videos(cls: type) -> bool:
    return mentions(cls, "postprocess_video")


def check_makes_images(cls: type) -> None:
    """Raise `TypeError` for a pipeline class that generates videos, for what stores images."""
    if makes_videos(cls):
        raise TypeError(
            f"Expected a text-to-image pipeline, but {cls.__name__} generates videos, which a set of images does not "
            "store. Use `optimize_noise` with `num_videos_per_prompt`, or with a list of equal prompts."
        )


def check_footage(cls: type) -> None:
    """Raise `TypeError` for a video pipeline that starts from given pictures too."""
    given = [name for name in FOOTAGE if name in inspect.signature(stock_call(cls)).parameters]
    if given and makes_videos(cls):
        raise TypeError(
            f"Expected a text-to-video pipeline, but the call of {cls.__name__} takes `{given[0]}`: noise beside given "
            "pictures is not supported yet. Use the text-to-video pipeline of the family, such as `WanPipeline`."
        )


def check_takes_latents(pipe) -> None:
    """Raise `TypeError` for a pipeline that does not take the optimized noise back as `latents`."""
    if "latents" not in inspect.signature(stock_call(type(pipe))).parameters:
        name = type(pipe).__name__
        raise TypeError(
            "Expected a pipeline that takes `latents`, to generate from the noise that was found, but "
            f"{name} takes none. {in_the_same_call(name)}"
        )


def images_per_prompt(request: dict[str, Any]) -> int:
    return next((count for name in PER_PROMPT if (count := request.get(name))), 1)


def prompts_of(request: dict[str, Any]) -> list[str]:
    """Return the prompt of each image, in the order of the batch; empty strings for a call with embeddings."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None:
        prompt = [""] * len(embeds)  # pyright: ignore[reportArgumentType]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(images_per_prompt(request))]


def reward_prompts_of(request: dict[str, Any], reward_prompt: str | Sequence[str] | None, batch: int) -> list[str]:
    """Return the prompt that rewards are asked about for each image.

    Args:
        request: The arguments of the call.
        reward_prompt: One prompt for all images, or one for each; `None` for the prompts of the call.
        batch: The number of images.

    Raises:
        ValueError: For another number of prompts.
    """
    if reward_prompt is None:
        return prompts_of(request)
    texts = [reward_prompt] * batch if isinstance(reward_prompt, str) else reward_prompt
    if not (isinstance(texts, list | tuple) and len(texts) == batch and all(isinstance(text, str) for text in texts)):
        raise ValueError(
            f"Expected `reward_prompt` to be one text, or one for each of {batch} images, but got "
            f"{reward_prompt!r:.200}."
        )
    return list(texts)


def require_prompt_text(request: dict[str, Any]) -> None:
    """Raise `ValueError` for a call with embeddings only."""
    if request.get("prompt") is None:
        raise ValueError(
            "Expected the text of the prompt for the rewards, but got `prompt_embeds` only. Pass `reward_prompt`."
        )


def groups_of(request: dict[str, Any]) -> list[int]:
    """Return for each image the index of the first prompt, or the first embedding, that equals its own."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        first = [texts.index(text) for text in texts]
    else:
        rows = list(embeds)  # pyright: ignore[reportArgumentType]
        first = [next(i for i, other in enumerate(rows) if torch.equal(row, other)) for row in rows]
    return [group for group in first for _ in range(images_per_prompt(request))]


def check_batch(request: dict[str, Any], batch: int) -> None:
    """Raise `ValueError` for `latents` or generators that are not one for each image."""
    latents, generator = request.get("latents"), request.get("generator")
    if latents is not None and len(latents) != batch:
        raise ValueError(
            f"Expected `latents` for {batch} images (prompts × `num_images_per_prompt`), but got {len(latents)}."
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Expected one generator for each of {batch} images, but got {len(generator)}.")


def check_noise_batch(noise: torch.Tensor, batch: int, name: str) -> None:
    """Raise `ValueError` for noise that is not finite or not spatial, or has not one entry for each prompt."""
    if len(noise) != batch:
        raise ValueError(
            f"Expected noise for {batch} images (prompts × `num_images_per_prompt`), but {name} draws some of shape "
            f"{tuple(noise.shape)}. Pass one prompt for each image, or use another pipeline of the family."
        )
    if noise.ndim < 4:
        raise ValueError(
            f"Expected noise with height and width, (B, C, H, W), but {name} draws some of shape {tuple(noise.shape)}. "
            "Use a pipeline that draws spatial latents first."
        )
    if not noise.isfinite().all():
        raise ValueError("Expected noise of finite numbers, but got NaN or infinity. Correct the `noise_sampler`.")


def check_given_tensors(request: dict[str, Any]) -> None:
    """Raise `ValueError` for tensors that are not finite, or that no gradient can pass."""
    for name, value in request.items():
        for tensor in value if isinstance(value, list) else [value]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.is_inference():
                raise ValueError(
                    f"Expected `{name}` as an ordinary tensor, but it was made under `torch.inference_mode()`. Pass "
                    f"`{name}.clone()`, made outside of it."
                )
            if (name == "latents" or "embeds" in name) and not tensor.isfinite().all():
                raise ValueError(
                    f"Expected finite numbers in `{name}`, but got NaN or infinity. Look for the step that made them, "
                    "such as a division by zero or an overflow in float16."
                )


def noise_sampler_of(
    noise_sampler: NoiseSamplerSpec | None, request: dict[str, Any], groups: list[int]
) -> Callable[..., torch.Tensor] | None:
    """Return the noise sampler of a call, which couples only images of the same prompt.

    Raises:
        ValueError: For a noise sampler beside `latents`.
    """
    found = as_noise_sampler(noise_sampler)
    if found is None:
        return None
    if request.get("latents") is not None:
        raise ValueError(
            "Expected `noise_sampler` or `latents`, but got both. Given latents are used as they are: leave one out."
        )
    return found.within(groups) if hasattr(found, "within") else found  # pyright: ignore[reportFunctionMemberAccess]


def image_size(pipe, request: dict[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images in pixels, if they are known before the call."""
    if request.get("height") and request.get("width"):
        return request["height"], request["width"]
    if request.get("image") is not None:
        return size_of_input_image(pipe, request["image"])
    denoiser = getattr(pipe, "unet", getattr(pipe, "transformer", None))  # a compiled module has no truth value
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    return (side * scale, side * scale) if isinstance(side, int) and isinstance(scale, int) else None


def size_of_input_image(pipe, image: Any) -> tuple[int, int] | None:
    """Return the height and width to which a pipeline resizes an input image, or the first of several."""
    image = image[0] if isinstance(image, list) else image
    size_of = getattr(getattr(pipe, "image_processor", None), "get_default_height_width", None)
    is_latents = isinstance(image, torch.Tensor) and image.shape[-3] != 3
    return None if size_of is None or is_latents else size_of(image)
