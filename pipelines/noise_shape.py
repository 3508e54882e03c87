"""The shape of the initial noise of a pipeline's call."""

import inspect
from typing import Any

import torch

from .modular import as_standard
from .request import PER_PROMPT, bind_request, check_pipeline, check_pipeline_class, check_request
from .sampling.apart import apart, hooked
from .sampling.first_call import stock_call
from .sampling.latent_space import LatentSpace
from .sampling.module_state import shared_parts
from .sampling.turns import TURNS


class ShapeFound(Exception):
    """Ends a call once it prepares its latents."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape


def noise_shape(
    pipe, height: int | None = None, width: int | None = None, num_images: int = 1, **call_kwargs: Any
) -> torch.Size:
    """Return the shape of the initial noise that a call draws, before it is scaled and packed.

    It is `(B, C, H, W)`, or `(B, C, F, H, W)` for videos, in the order of dimensions of the pipeline.

    It is that of `NoiseResult.noise`, of what a `noise_sampler` is asked for, and of `latents=` in families that do not
    pack them. The call itself tells it, so it is right for every family. The prompt "a" is encoded; the denoiser does
    not run.

    Args:
        pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise, a modular one too.
        height, width: Of the images, in pixels; `None` for the pipeline's own.
        num_images: B, the number of images or videos.
        call_kwargs: Other arguments of the call that it needs, such as `image` or `num_frames`.

    Raises:
        ValueError: For arguments that cannot work.
        TypeError: For a pipeline that draws no such noise.
    """
    check_pipeline(pipe)
    pipe = as_standard(pipe)
    check_pipeline_class(type(pipe))
    known = inspect.signature(stock_call(type(pipe))).parameters
    several = {name: num_images for name in PER_PROMPT if name in known}
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    prompt = "a" if several or num_images == 1 else ["a"] * num_images
    with TURNS.take(shared_parts(pipe)), apart(pipe) as twin:
        request = bind_request(twin, (), {"prompt": prompt, **several, **size, **call_kwargs})
        check_request(twin, request)

        def prepare_latents(*args: Any, **kwargs: Any) -> None:
            raise ShapeFound(LatentSpace(twin, args, kwargs).packing(twin).noise)

        try:
            with hooked(twin, prepare_latents=prepare_latents), torch.no_grad():
                stock_call(type(pipe))(twin, **request)
        except ShapeFound as found:
            return found.shape
    raise TypeError(
        f"Expected a call that prepares its latents with `prepare_latents`, but {type(pipe).__name__} did not."
    )
