"""The one place that converts between the initial noise and the latents of a pipeline."""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor


def drawing_function(cls: type) -> Callable[..., types.FunctionType]:
    """`draw -> prepare_latents`: the stock function of `cls` with `draw` in the place of its `randn_tensor`.

    A copy of the function with that one global replaced hands our noise to the stock scaling and packing: no global
    patch, and differentiable. Raises `TypeError` if the class does not draw that way.
    """
    stock = next((vars(base) for base in cls.__mro__ if defines_latents(base)), {})
    function = inspect.unwrap(stock.get("prepare_latents", lambda: None))
    if "randn_tensor" in function.__code__.co_names:
        return lambda draw: with_globals(function, randn_tensor=draw)
    raise TypeError(
        "Expected a text-to-image pipeline whose `prepare_latents` draws its noise with diffusers' `randn_tensor`, but "
        f"that of {cls.__name__} does not. Draw the noise by `randn_tensor` there, and call no `super()`."
    )


def defines_latents(cls: type) -> bool:
    """Whether a class has a `prepare_latents` of its own that is not our hook."""
    return "prepare_latents" in vars(cls) and not hasattr(cls, "_noise_run")


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
    * prepared: what `prepare_latents` returns: scaled by `init_noise_sigma`, packed into tokens where the family packs,
      mixed with the encoded image where it begins with one.
    * latents: what the pipeline accepts as `latents=`: packed, not scaled; what is prepared, where it begins with an
      image.

    No family is named here: the stock function does the packing, and is asked which form it takes back.

    Functions that draw more than the noise, as from the posterior of an encoded image, need a generator in the state
    that they first had: give it as `generator=...` wherever `overrides` are taken.

    Args:
        pipe, args, kwargs: The call.
        noise_sampler: Draws the noise of the call in the place of diffusers' `randn_tensor`, which `None` leaves there.
    """

    def __init__(
        self, pipe, args: tuple, kwargs: dict[str, Any], noise_sampler: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.with_draw = drawing_function(type(pipe))
        self.noise_sampler, self.draw_noise = noise_sampler, drawing_with(noise_sampler)
        signature = inspect.signature(self.with_draw(randn_tensor))
        arguments = dict(signature.bind(pipe, *args, **kwargs).arguments)
        self.takes_latents = "latents" in signature.parameters
        self.given = arguments.pop("latents", None)
        extra = arguments.pop("kwargs", {})
        self.arguments = {name: value for name, value in {**arguments, **extra}.items() if name != "self"}
        self.known_packing: Packing | None = None

    def for_images(self, count: int) -> "LatentSpace":
        """The same space for so many images.

        Raises:
            ValueError: The family is not told how many there are, or begins with an image for each.
        """
        if "batch_size" not in self.arguments or "image" in self.arguments:
            raise ValueError(
                "Expected a `prepare_latents` with the argument `batch_size` and without an image, to draw some images "
                f"by themselves, but got one with {list(self.arguments)}. Use `chunk_size=None`."
            )
        space = copy.copy(self)
        space.known_packing = None
        # generators are given with each call: one for each image would not fit the new number
        unset = {"generator": None} if "generator" in self.arguments else {}
        space.arguments = {**self.arguments, "batch_size": count, **unset}
        return space

    def on(self, pipe, draw: Callable[..., torch.Tensor], latents: torch.Tensor | None = None, **overrides):
        """Run the stock function on `pipe` with `draw(shape, **kwargs)` for its random numbers."""
        given = {"latents": latents} if self.takes_latents else {}
        return self.with_draw(draw)(pipe, **{**self.arguments, **given, **overrides})

    def draw(self, pipe) -> tuple[torch.Tensor, bool]:
        """The base noise of the call, and whether it was drawn (rather than given as `latents=`)."""
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
                "nothing to optimise. Leave out the argument that lets it begin without, such as `denoising_start`."
            )
        noise = self.to_noise(pipe, self.given)
        again = first_of(self.prepare(pipe, noise))
        comparable = again.shape == prepared.shape  # families that pack hand spatial noise on as it is
        if comparable and not torch.allclose(again.float(), prepared.float(), rtol=0.05, atol=0.05):
            raise latents_with_image(pipe)  # the tolerance is that of half precision
        return noise, False

    def prepare(self, pipe, noise: torch.Tensor, draw: bool = False, **overrides):
        """Noise to what `prepare_latents` returns, differentiable; with `draw` what it draws is drawn and discarded."""

        def put(*args, **kwargs) -> torch.Tensor:
            if draw:
                self.draw_noise(*args, **kwargs)
            return noise.to(kwargs.get("dtype") or noise.dtype)

        return self.on(pipe, put, **overrides)

    def to_latents(self, pipe, noise: torch.Tensor, **overrides) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in the pipeline's dtype."""
        prepared = first_of(self.prepare(pipe, noise, **overrides))
        if not self.takes_latents:  # then the pipeline goes on with `latents` as they are
            return prepared
        for candidate in (noise.to(prepared.dtype), prepared):
            if self.accepts(pipe, candidate, prepared):
                return candidate
        raise TypeError(f"{type(pipe).__name__} takes neither its own noise nor its own latents as `latents=`.")

    def to_noise(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """What a user passed as `latents=` to noise. Raises `ValueError` if the shape fits neither form."""
        shape, packed = self.packing(pipe).noise, self.packing(pipe).packed
        if latents.shape not in (shape, packed):
            raise ValueError(
                f"Expected `latents` of shape {tuple(shape)} or {tuple(packed)}, but got {tuple(latents.shape)}."
            )
        return self.unpack(pipe, latents)

    def unpack(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the layout of the denoiser to the spatial layout of the noise, differentiable."""
        packing = self.packing(pipe)
        if latents.shape == packing.noise:
            return latents
        return latents.flatten(1).gather(1, packing.places.to(latents.device)).view(packing.noise)

    def packing(self, pipe) -> "Packing":
        """How the family packs."""
        if self.known_packing is None:
            leaves: list[torch.Tensor] = []

            def draw(shape, *_, device=None, dtype=None, **__) -> torch.Tensor:
                leaves.append(torch.zeros(shape, device=device, dtype=dtype, requires_grad=True))
                return leaves[-1]

            any_generator: Any = torch.Generator().manual_seed(0)  # not the one of the call, which would go on
            with torch.enable_grad():
                prepared = first_of(self.on(pipe, draw, generator=any_generator))
            self.known_packing = Packing(leaves[0].shape, prepared.shape, places_in(prepared, leaves[0]))
        return self.known_packing

    def accepts(self, pipe, latents: torch.Tensor, prepared: torch.Tensor) -> bool:
        try:
            returned = first_of(self.on(pipe, randn_tensor, latents))
        except ValueError:  # the family checks the shape of given latents
            return False
        return returned.shape == prepared.shape and torch.equal(returned, prepared)


class Packing(NamedTuple):
    """The shape of the noise and of what is prepared, and `(B, C·H·W)` where each entry of the noise is put there."""

    noise: torch.Size
    packed: torch.Size
    places: torch.Tensor


def places_in(prepared: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """For each entry of the noise its place among those that are `prepared` from it, each image by itself.

    Preparing permutes, scales by one number and adds, so the gradient leads back from each place to its entry. Numbers
    go that way digit by digit, since half precision has no large ones.
    """

    def lead_back(values: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(prepared, noise, values.to(prepared), retain_graph=True)[0].flatten(1).double()

    scale = lead_back(torch.ones_like(prepared))
    numbers = torch.arange(prepared[0].numel()).view(prepared.shape[1:]).expand(prepared.shape)
    places, unit = torch.zeros_like(scale, dtype=torch.long), 1
    while unit < prepared[0].numel():
        places += unit * (lead_back(numbers // unit % 64) / scale).round().long()
        unit *= 64
    return places


def latents_with_image(pipe) -> ValueError:
    """The error about `latents` that are not the noise alone."""
    return ValueError(
        f"Expected no `latents`, as {type(pipe).__name__} takes there what its image and the noise make together, and "
        "only the noise is optimised. Leave them out, and choose the noise by `generator` or `noise_sampler`."
    )
