"""Conversion between the initial noise and the latents of a pipeline."""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..memory.replaced import with_gradient
from .first_call import stock_call


def drawing_function(cls: type) -> Callable[..., types.FunctionType]:
    """Return a function `draw -> prepare_latents`: the stock function of `cls` with `draw` instead of `randn_tensor`.

    A copy of the function with that one global replaced passes our noise through the stock scaling and packing, without
    a global patch and differentiably. Without `draw` it is the stock function.

    Raises:
        TypeError: If the class does not sample its noise with `randn_tensor`.
    """
    base = next((base for base in cls.__mro__ if "prepare_latents" in vars(base)), None)
    function: Any = None if base is None else vars(base)["prepare_latents"]
    if base is not None:
        function = with_gradient(function, f"{base.__name__}.prepare_latents")
    if "randn_tensor" in getattr(getattr(function, "__code__", None), "co_names", ()):
        return lambda draw=None: function if draw is None else with_globals(function, randn_tensor=draw)
    raise TypeError(
        "Expected a text-to-image pipeline whose `prepare_latents` samples its noise with diffusers' `randn_tensor`, "
        f"but {cls.__name__} draws its noise elsewhere, or none. Call `randn_tensor` there, and no `super()`."
    )


def with_globals(function: types.FunctionType, **replaced: Any) -> types.FunctionType:
    """Return a copy of a function with some of its global names replaced."""
    names = {**function.__globals__, **replaced}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def may_take_latents(cls: type) -> bool:
    """Return whether the stock call of a pipeline class takes `latents`, or any keyword."""
    parameters = inspect.signature(stock_call(cls)).parameters
    return "latents" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def drawing_with(
    noise_sampler: Callable[..., torch.Tensor] | None, function: types.FunctionType
) -> Callable[..., torch.Tensor]:
    """Return the replacement of `randn_tensor`: a noise sampler with its shape checked, or that of a stock function.

    Its module may have another one than diffusers, such as a user's that draws as another program does.
    """
    if noise_sampler is None:
        return function.__globals__["randn_tensor"]

    def draw(shape, generator=None, device=None, dtype=None, layout=None) -> torch.Tensor:
        noise = noise_sampler(tuple(shape), generator=generator, device=device, dtype=dtype)
        if not isinstance(noise, torch.Tensor) or noise.shape != torch.Size(shape):
            got = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise ValueError(
                f"Expected the noise sampler to return noise of shape {tuple(shape)}, but got {got}. Return the shape "
                "that it is called with."
            )
        return noise.to(device=device, dtype=dtype)

    return draw


def first_of(prepared):
    """Return the latents that `prepare_latents` returned, alone or first in a tuple."""
    return prepared[0] if isinstance(prepared, tuple) else prepared


class LatentSpace:
    """Conversion between spatial noise and the latents of one call of `pipe.prepare_latents(*args, **kwargs)`.

    * noise: `(B, C, H, W)`, unit variance, as the pipeline samples it before scaling and packing (`(B, 1, C, H, W)` for
      Qwen-Image).
    * prepared: the return value of `prepare_latents`: scaled by `init_noise_sigma`, packed into tokens where the family
      packs, mixed with the encoded image in image-to-image pipelines.
    * latents: the form that the pipeline accepts as `latents=`: packed and not scaled, or the prepared ones in
      image-to-image pipelines.

    No family is named here: the stock function does the packing, and is probed for the form that it accepts.

    Functions that draw more than the noise, such as a sample of the posterior of an encoded image, need a generator in
    the state that it had at first: pass `generator=...` wherever `overrides` are accepted.

    Args:
        pipe, args, kwargs: The call.
        noise_sampler: Function that samples the noise of the call instead of diffusers' `randn_tensor`, or `None`.
    """

    def __init__(
        self, pipe, args: tuple, kwargs: dict[str, Any], noise_sampler: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.with_draw = drawing_function(type(pipe))
        self.noise_sampler, self.draw_noise = noise_sampler, drawing_with(noise_sampler, self.with_draw())
        signature = inspect.signature(self.with_draw())
        arguments = dict(signature.bind(pipe, *args, **kwargs).arguments)
        # those of a call that takes none are no noise: Kandinsky passes the encoded image by that name
        self.takes_latents = "latents" in signature.parameters and may_take_latents(type(pipe))
        self.given = arguments.pop("latents", None) if self.takes_latents else None
        extra = arguments.pop("kwargs", {})
        self.arguments = {name: value for name, value in {**arguments, **extra}.items() if name != "self"}
        self.known_packing: Packing | None = None

    def further_draw(self, drawn: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Return the function that draws more noises for a call that has drawn some, `(B, C, H, W)`."""
        further = getattr(self.noise_sampler, "further", None)
        return self.draw_noise if further is None else drawing_with(further(drawn), self.with_draw())

    def for_images(self, count: int) -> "LatentSpace":
        """Return the same space for another number of images.

        Raises:
            ValueError: If `prepare_latents` has no `batch_size`, or takes an image.
        """
        if "batch_size" not in self.arguments or "image" in self.arguments:
            raise ValueError(
                "Expected a `prepare_latents` with the argument `batch_size` and without an image, to generate images "
                f"in chunks, but got one with {list(self.arguments)}. Use `chunk_size=None`."
            )
        space = copy.copy(self)
        space.known_packing = None
        # generators are passed with each call: a list of them would not fit the new number of images
        unset = {"generator": None} if "generator" in self.arguments else {}
        space.arguments = {**self.arguments, "batch_size": count, **unset}
        return space

    def on(self, pipe, draw: Callable[..., torch.Tensor], latents: torch.Tensor | None = None, **overrides):
        """Run the stock function on `pipe` with `draw(shape, **kwargs)` as its source of noise."""
        given = {"latents": latents} if self.takes_latents else {}
        return self.with_draw(draw)(pipe, **{**self.arguments, **given, **overrides})

    def draw(self, pipe, **overrides) -> tuple[torch.Tensor, bool]:
        """Return the base noise of the call, and whether it was sampled (rather than given as `latents=`).

        The generator of the call advances as in the stock call; `overrides` are for checks beside it.
        """
        drawn: list[torch.Tensor] = []

        def record(*args, **kwargs):
            drawn.append(self.draw_noise(*args, **kwargs))
            return drawn[-1]

        prepared = first_of(self.on(pipe, record, self.given))
        if drawn:
            return drawn[0], True
        if self.given is None:
            raise ValueError(
                f"Expected a call that draws its noise, but this one of {type(pipe).__name__} draws none, and there is "
                "nothing to optimize. Leave out the argument that lets it start without, such as `denoising_start`."
            )
        noise = self.to_noise(pipe, self.given)
        again = first_of(self.prepare(pipe, noise, **overrides))
        comparable = again.shape == prepared.shape  # families that pack return spatial latents unchanged
        if comparable and not torch.allclose(again.float(), prepared.float(), rtol=0.05, atol=0.05):
            raise latents_with_image(pipe)  # beyond the rounding of half precision
        return noise, False

    def prepare(self, pipe, noise: torch.Tensor, draw: bool = False, **overrides):
        """Convert noise to the return value of `prepare_latents`, differentiably.

        With `draw` the noise of the call is sampled and discarded, so that the generator advances as in the call.
        """
        ours = [noise]

        def given(*args, **kwargs) -> torch.Tensor:
            if not ours:  # some functions draw more than the noise
                return self.draw_noise(*args, **kwargs)
            if draw:
                self.draw_noise(*args, **kwargs)
            return ours.pop().to(kwargs.get("dtype") or noise.dtype)

        return self.on(pipe, given, **overrides)

    def to_noise(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Convert the `latents=` of a user to noise.

        Raises:
            ValueError: If their shape is neither that of the noise nor that of packed latents.
        """
        shape, packed = self.packing(pipe).noise, self.packing(pipe).packed
        if latents.shape not in (shape, packed):
            raise ValueError(
                f"Expected `latents` of shape {tuple(shape)} or {tuple(packed)}, but got {tuple(latents.shape)}."
            )
        return self.unpack(pipe, latents)

    def unpack(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents from the denoiser's layout to the spatial layout of the noise, differentiably."""
        packing = self.packing(pipe)
        if latents.shape == packing.noise:
            return latents
        return latents.flatten(1).gather(1, packing.positions.to(latents.device)).view(packing.noise)

    def pack(self, pipe, spatial: torch.Tensor) -> torch.Tensor:
        """Convert latents from the spatial layout of the noise to that of the denoiser; inverse of `unpack`."""
        packing = self.packing(pipe)
        if packing.packed == packing.noise:
            return spatial
        flat = spatial.new_zeros(len(spatial), packing.packed[1:].numel())
        return flat.scatter(1, packing.positions.to(flat.device), spatial.flatten(1)).view(packing.packed)

    def packing(self, pipe) -> "Packing":
        """Return the shapes of noise and latents of this call, and the position of each noise entry in the latents."""
        if self.known_packing is None:
            leaves: list[torch.Tensor] = []

            def draw(shape, *_, device=None, dtype=None, **__) -> torch.Tensor:
                leaves.append(torch.zeros(shape, device=device, dtype=dtype, requires_grad=True))
                return leaves[-1]

            any_generator: Any = torch.Generator().manual_seed(0)  # that of the call would advance
            with torch.enable_grad():
                prepared = first_of(self.on(pipe, draw, generator=any_generator))
            self.known_packing = Packing(leaves[0].shape, prepared.shape, positions_in(prepared, leaves[0]))
        return self.known_packing


class Packing(NamedTuple):
    """Shapes of the noise and of the prepared latents, and the position of each noise entry in them, `(B, C·H·W)`."""

    noise: torch.Size
    packed: torch.Size
    positions: torch.Tensor


def positions_in(prepared: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the position of each entry of the noise in the latents `prepared` from it, per image, `(B, C·H·W)`.

    Preparing permutes, scales by one factor and adds, so backpropagating position numbers yields the position of each
    entry. The numbers are sent digit by digit, since half precision cannot represent large ones.
    """

    def backpropagated(values: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(prepared, noise, values.to(prepared), retain_graph=True)[0].flatten(1).double()

    scale = backpropagated(torch.ones_like(prepared))
    numbers = torch.arange(prepared[0].numel()).view(prepared.shape[1:]).expand(prepared.shape)
    positions, unit = torch.zeros_like(scale, dtype=torch.long), 1
    while unit < prepared[0].numel():
        positions += unit * (backpropagated(numbers // unit % 64) / scale).round().long()
        unit *= 64
    return positions


def latents_with_image(pipe) -> ValueError:
    """Return the error for `latents` that mix an image with the noise."""
    return ValueError(
        f"Expected no `latents`, since in {type(pipe).__name__} they mix the image with the noise, and only the noise "
        "is optimized. Leave them out, and choose the noise by `generator` or `noise_sampler`."
    )
