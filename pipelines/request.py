"""The arguments of a pipeline call, read and refused before any model runs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.noise_samplers import NoiseSamplerSpec, as_noise_sampler
from .sampling.first_call import stock_call
from .sampling.latent_space import drawing_function, latents_with_image


def bind_request(pipe, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stock call by name. Raises `TypeError` for an unknown one."""
    bound = dict(inspect.signature(stock_call(type(pipe))).bind(pipe, *args, **kwargs).arguments)
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "self"}


def check_noise_is_drawn(pipe, request: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for a pipeline that draws no noise of its own in this call."""
    parameters = inspect.signature(drawing_function(type(pipe))(randn_tensor)).parameters
    if request.get("latents") is not None and "latents" not in parameters:
        raise latents_with_image(pipe)


def check_takes_latents(pipe) -> None:
    """Raise `TypeError` for a pipeline that does not take the optimized noise back as `latents`."""
    if "latents" not in inspect.signature(stock_call(type(pipe))).parameters:
        name = type(pipe).__name__
        raise TypeError(
            f"Expected a pipeline that takes `latents`, to generate from the noise that was found, but {name} takes "
            f"none. Give it the hook, `class Ours(NoiseOptimizationMixin, {name})`, and call that with `method=...`: "
            "it generates the image in the same call."
        )


def images_per_prompt(request: dict[str, Any]) -> int:
    return request.get("num_images_per_prompt") or 1


def prompts_of(request: dict[str, Any]) -> list[str]:
    """Return the prompt of each image, in the order of the batch; empty strings for a call with embeddings."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    if prompt is None:
        prompt = [""] * len(embeds)  # pyright: ignore[reportArgumentType]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(images_per_prompt(request))]


def reward_prompts_of(
    request: dict[str, Any], reward_prompt: str | Sequence[str] | None, batch: int, required: bool
) -> list[str]:
    """Return the prompt that rewards are asked about for each image.

    Args:
        request: The arguments of the call.
        reward_prompt: One prompt for all images, or one for each; `None` for the prompts of the call.
        batch: The number of images.
        required: Whether a reward reads its prompt.

    Raises:
        ValueError: For another number of prompts, and for a reward that reads a prompt in a call with embeddings only.
    """
    if reward_prompt is None:
        if required and request.get("prompt") is None:
            raise ValueError(
                "Expected the text of the prompt for the rewards, but got `prompt_embeds` only. Pass `reward_prompt`."
            )
        return prompts_of(request)
    texts = [reward_prompt] * batch if isinstance(reward_prompt, str) else list(reward_prompt)
    if len(texts) != batch or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"Expected `reward_prompt` to be one text, or one for each of {batch} images, but got {reward_prompt!r}."
        )
    return texts


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


def check_tensors(request: dict[str, Any]) -> None:
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
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    return (side * scale, side * scale) if isinstance(side, int) and isinstance(scale, int) else None


def size_of_input_image(pipe, image: Any) -> tuple[int, int] | None:
    """Return the height and width to which a pipeline resizes an input image, or the first of several."""
    image = image[0] if isinstance(image, list) else image
    size_of = getattr(getattr(pipe, "image_processor", None), "get_default_height_width", None)
    is_latents = isinstance(image, torch.Tensor) and image.shape[-3] != 3
    return None if size_of is None or is_latents else size_of(image)
