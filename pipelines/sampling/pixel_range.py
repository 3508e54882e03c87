"""The range of the pixels that a pipeline returns for `output_type="pt"`."""

import types
from typing import Any

import torch

from .first_call import stock_call


def mentions(cls: type, *names: str) -> bool:
    """Return whether the stock `__call__` of a pipeline class has one of the names, as an attribute or a string."""
    return not {*names}.isdisjoint(words_of(stock_call(cls).__code__))


def words_of(code: types.CodeType) -> set[str]:
    """Return the names and strings of a function and of the functions in it."""
    words: set[Any] = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            words |= words_of(constant)
        words |= {constant} if isinstance(constant, str) else set()
        words |= {each for each in constant if isinstance(each, str)} if isinstance(constant, tuple) else set()
    return words


def check_returns_tensors(cls: type) -> None:
    """Raise `TypeError` for a pipeline class that has no `output_type="pt"`, and so no gradient."""
    if not mentions(cls, "postprocess", "pt") and mentions(cls, "numpy_to_pil"):
        raise TypeError(
            f'Expected a pipeline with `output_type="pt"`, but {cls.__name__} returns numpy arrays instead of tensors, '
            "which carry no gradient. Use a pipeline whose `__call__` ends with `image_processor.postprocess`."
        )


def on_white(images: torch.Tensor) -> torch.Tensor:
    """Return images `(..., 3 or 4, H, W)` in [0, 1] without a fourth channel, opacity: as they look on white."""
    colors, opacity = images[..., :3, :, :], images[..., 3:, :, :]
    return colors * opacity + (1 - opacity) if opacity.shape[-3] else images


def is_centered(sampler) -> bool:
    """Return whether the images of a `PipelineSampler` are in [-1, 1] rather than in [0, 1].

    Those of an image processor are in [0, 1]. A pipeline that did not call its own is asked for the baseline twice, as
    a tensor and as a numpy array: the latter is in [0, 1] by the convention of diffusers.

    Raises:
        TypeError: If the tensor is in neither range.
    """
    if sampler.postprocessed:
        return False
    noise = sampler.base_noise if sampler.batch_rows is None else sampler.base_noise[sampler.batch_rows[1]]
    tensor, array = (sampler.run(noise, None, False, output_type) for output_type in ("pt", "np"))
    expected = torch.as_tensor(array).movedim(-1, -3).to(tensor)
    for centered, pixels in ((False, tensor), (True, tensor * 0.5 + 0.5)):
        if pixels.shape == expected.shape and torch.allclose(pixels.clamp(0, 1), expected, rtol=0, atol=0.02):
            return centered
    raise TypeError(
        f'Expected {type(sampler.twin).__name__} to return the same pixels for `output_type="pt"` and "np", in [0, 1] '
        "or in [-1, 1], but got others. Use a height and width that the pipeline does not change."
    )
