"""The one place that converts between the initial noise and the latents of a pipeline."""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


def drawing_function(cls: type) -> Callable[..., types.FunctionType]:
    """`draw -> prepare_latents`: the stock function of `cls` with `draw` in the place of its `randn_tensor`.

    A copy of the function with that one global replaced hands our noise to the stock scaling and packing: no global
    patch, and differentiable. Raises `TypeError` if no class in the method resolution order draws that way.
    """
    for base in cls.__mro__:
        function = inspect.unwrap(vars(base).get("prepare_latents", None) or (lambda: None))
        if "randn_tensor" in function.__code__.co_names:
            return lambda draw: with_globals(function, randn_tensor=draw)
    raise TypeError(
        "Expected a text-to-image pipeline whose `prepare_latents` draws its noise with diffusers' `randn_tensor`, but "
        f"that of {cls.__name__} does not."
    )


def with_globals(function: types.FunctionType, **replaced: Any) -> types.FunctionType:
    """A copy of a function that sees other values under some of its global names."""
    names = {**function.__globals__, **replaced}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def drawing_with(noise_sampler: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """What stands in for `randn_tensor`: that function itself, or a noise sampler with its shape checked."""
    if noise_sampler is None:
        return randn_tensor

    def draw(shape, generator=None, device=None, dtype=None, layout=None) -> torch.Tensor:
        noise = noise_sampler(tuple(shape), generator=generator, device=device, dtype=dtype)
        if noise.shape != torch.Size(shape):
            raise ValueError(
                f"Expected the noise sampler to return noise of shape {tuple(shape)}, but got {tuple(noise.shape)}. "
                "Draw the shape that it is called with."
            )
        return noise.to(device=device, dtype=dtype)

    return draw


def first_of(prepared):
    """What `prepare_latents` returns is the latents, or a tuple that begins with them."""
    return prepared[0] if isinstance(prepared, tuple) else prepared


class LatentSpace:
    """Between unit, spatial noise and the latents of one call of `pipe.prepare_latents(*args, **kwargs)`.

    * noise: `(B, C, H, W)`, what the pipeline draws, before scaling and packing (`(B, 1, C, H, W)` for Qwen-Image).
    * prepared: what `prepare_latents` returns: scaled by `init_noise_sigma`, packed into tokens where the family packs.
    * latents: what the pipeline accepts as `latents=`: packed, not scaled.

    No family is named here: the stock function does the packing, and is asked which form it takes back.

    Args:
        pipe, args, kwargs: The call.
        noise_sampler: Draws the noise of the call in the place of diffusers' `randn_tensor`, which `None` leaves there.
    """

    def __init__(
        self, pipe, args: tuple, kwargs: dict[str, Any], noise_sampler: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.with_draw = drawing_function(type(pipe))
        self.noise_sampler, self.draw_noise = noise_sampler, drawing_with(noise_sampler)
        bound = inspect.signature(self.with_draw(randn_tensor)).bind(pipe, *args, **kwargs)
        arguments = dict(bound.arguments)
        self.given = arguments.pop("latents", None)
        extra = arguments.pop("kwargs", {})
        self.arguments = {name: value for name, value in {**arguments, **extra}.items() if name != "self"}

    def for_images(self, count: int) -> "LatentSpace":
        """The same space for so many images. Raises `ValueError` if the family is not told how many there are."""
        if "batch_size" not in self.arguments:
            raise ValueError(
                "Expected a `prepare_latents` with the argument `batch_size`, to draw some images by themselves, but "
                f"got one with {list(self.arguments)}. Use `chunk_size=None`."
            )
        space = copy.copy(self)
        # generators are given with each call: one for each image would not fit the new number
        unset = {"generator": None} if "generator" in self.arguments else {}
        space.arguments = {**self.arguments, "batch_size": count, **unset}
        return space

    def on(self, pipe, draw: Callable[..., torch.Tensor], latents: torch.Tensor | None = None, **overrides):
        """Run the stock function on `pipe` with `draw(shape, **kwargs)` for its random numbers."""
        return self.with_draw(draw)(pipe, **{**self.arguments, "latents": latents, **overrides})

    def draw(self, pipe) -> tuple[torch.Tensor, bool]:
        """The base noise of the call, and whether it was drawn (rather than given as `latents=`)."""
        drawn: list[torch.Tensor] = []

        def record(*args, **kwargs):
            drawn.append(self.draw_noise(*args, **kwargs))
            return drawn[-1]

        self.on(pipe, record, self.given)
        return (drawn[0], True) if drawn else (self.to_noise(pipe, self.given), False)

    def prepare(self, pipe, noise: torch.Tensor, **overrides):
        """Noise to what `prepare_latents` returns, differentiable."""
        return self.on(pipe, lambda *_, **kwargs: noise.to(kwargs.get("dtype") or noise.dtype), **overrides)

    def to_latents(self, pipe, noise: torch.Tensor) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in the pipeline's dtype."""
        prepared = first_of(self.prepare(pipe, noise))
        for candidate in (noise.to(prepared.dtype), prepared):
            if self.accepts(pipe, candidate, prepared):
                return candidate
        raise TypeError(f"{type(pipe).__name__} takes neither its own noise nor its own latents as `latents=`.")

    def to_noise(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """What a user passed as `latents=` to noise. Raises `ValueError` if the shape fits neither form."""
        shape, packed = self.unpacking(pipe)
        if latents.shape == shape:
            return latents
        if latents.shape != packed.shape:
            raise ValueError(
                f"Expected `latents` of shape {tuple(shape)} or {tuple(packed.shape)}, but got {tuple(latents.shape)}."
            )
        return self.unpack(pipe, latents)

    def unpack(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the layout of the denoiser to the spatial layout of the noise, differentiable."""
        shape, packed = self.unpacking(pipe)
        if latents.shape == shape:
            return latents
        order = packed.flatten(1).long().to(latents.device)
        return torch.zeros_like(latents).flatten(1).scatter(1, order, latents.flatten(1)).view(shape)

    def unpacking(self, pipe) -> tuple[torch.Size, torch.Tensor]:
        """The shape of the noise, and where packing puts each entry: packing only permutes, so it can number them."""
        shapes: list[torch.Size] = []

        def number(shape, *_, **__):
            shapes.append(torch.Size(shape))
            return torch.arange(shapes[-1][1:].numel(), dtype=torch.float64).view(1, *shape[1:]).expand(shape)

        overrides: dict[str, Any] = {"dtype": torch.float64} if "dtype" in self.arguments else {}
        packed = first_of(self.on(pipe, number, **overrides))
        return shapes[0], packed

    def accepts(self, pipe, latents: torch.Tensor, prepared: torch.Tensor) -> bool:
        try:
            returned = first_of(self.on(pipe, randn_tensor, latents))
        except ValueError:  # the family checks the shape of given latents
            return False
        return returned.shape == prepared.shape and torch.equal(returned, prepared)
