"""A stock pipeline as a differentiable function of its initial noise."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor
from torch.autograd.graph import get_gradient_edge

from ...frames import Frames, frame_numbers
from ...private_names import execution_device
from ..memory.checkpointing import Checkpointing, Checkpoints, scales_lora
from ..memory.chunks import BatchLayout, WholeBatchDraws, run_in_chunks
from ..memory.module_copies import converted_apart, refers_to_itself, without_gradient
from ..memory.replaced import is_stock_method
from .apart import KeptScheduler, plain_attributes, with_attributes
from .first_call import count_timesteps, counted, first_step_only, steps_skipped, stock_call, submodules_of
from .global_draws import no_global_draws
from .latent_space import LatentSpace, first_of
from .module_state import CALLED_IN_STEPS, is_offloaded, is_upcast
from .pixel_range import is_centered, on_white
from .random_state import CallStart, RandomState
from .redraw import Redraw, find_redraw

Gradient = Literal["full", "frozen"] | None
Clamp = Literal["straight_through", "hard"]


class PipelineSampler:
    """One pipeline call as the functions `images(noise)` and `x0(noise)`.

    Each evaluation runs the stock `__call__` on a shallow twin of the pipeline that shares its modules: the scheduler
    is a copy, `encode_prompt` replays what the outer call recorded, and `prepare_latents` returns our noise through the
    stock scaling and packing. A patched pipeline has the attributes of the twin itself for the time of an evaluation,
    since the code of others may refer to it.

    Args:
        pipe: The pipeline whose call is in progress, after its prompts were encoded.
        request: The arguments of that call.
        encoded: The return values of `encode_prompt` so far, in call order.
        space: The noise and latents of the call.
        clamp: How pixels are clamped to [0, 1]. "straight_through" keeps the gradient of saturated pixels, so that they
            can recover; "hard", as in stock pipelines, has zero gradient there. The values are equal.
        decoder: Decoder to use instead of the pipeline's VAE, or `None`.
        checkpointing: Checkpointing of the evaluations while `checkpoints` are in force.
        through_denoiser: Whether gradients pass through the denoiser, so that checkpointing it saves memory.
        start: The random streams at the start of the call; `None` if it drew nothing since.
        frames: The frames of a video that are returned; see `NoiseOptimizer`.

    Attributes:
        random_state: The random streams before the base noise is sampled.
        base_noise: `(B, C, H, W)`, the noise of the call, in the dtype of the pipeline.
        drew: Whether the base noise was sampled rather than given as `latents`. If so, evaluations sample and discard
            it, so that samplers that add noise at each step see the same stream.
        timesteps: The number of timesteps of the whole chain, `None` before its first run.
        checkpoints: The checkpointing, shared by the samplers of chunks.
    """

    timesteps: int | None = None
    differentiated = False  # whether a result was found to depend on its noise

    def __init__(
        self,
        pipe,
        request: dict[str, Any],
        encoded: list,
        space: LatentSpace,
        *,
        clamp: Clamp = "straight_through",
        decoder: Any = None,
        checkpointing: Checkpointing = "none",
        through_denoiser: bool = True,
        start: CallStart | None = None,
        frames: Frames = "all",
    ) -> None:
        self.space, self.encoded, self.pipe = space, list(encoded), pipe  # some calls encode after the preparation
        self.frames: Frames = frames
        self.device = torch.device(space.arguments.get("device") or execution_device(pipe))
        self.random_state = RandomState(request.get("generator"), self.device)
        self.start = start or CallStart(request.get("generator"), self.device)
        self.draws_globally = self.start.drew_from_global()
        self.draws_early = self.draws_globally or not self.start.own.equals(self.random_state)
        self.preparation = CallStart(request.get("generator"), self.device)
        self.base_noise, self.drew = space.draw(pipe, generator=self.random_state.generator())
        self.prepares_globally = self.preparation.drew_from_global()
        self.call = stock_call(type(pipe))
        ours = ("latents", "generator", "output_type", "return_dict", "callback_on_step_end", "callback")
        self.request = {name: value for name, value in request.items() if name not in ours}
        self.image_embeds: list[Any] = []  # of an IP-Adapter, recorded in the first run
        self.postprocessed: list[int] = []  # has an entry once the pipeline's image processor converted pixels
        self.centered: bool | None = None  # whether its pixels are in [-1, 1]; unknown before the first images
        self.clamp: Clamp = clamp
        self.twin = make_twin(pipe, clamp, self.postprocessed)
        self.own_decoder, self.decoder = vars(self.twin).get("vae"), decoder
        if decoder is not None:
            vars(self.twin)["vae"] = decoder
        denoisers = tuple(submodules_of(self.twin, CALLED_IN_STEPS).values()) if through_denoiser else ()
        self.checkpoints = Checkpoints(checkpointing, denoisers, vars(self.twin).get("vae"), scales_lora(self.request))
        self.scheduler = KeptScheduler(pipe)
        self.batch_rows: tuple[int, list[int]] | None = None  # of a chunk: size of the whole batch, and its rows
        self.chunks: dict[tuple[int, ...], PipelineSampler] = {}

    def with_own_decoder(self) -> "PipelineSampler":
        """Return the same sampler with the pipeline's own decoder."""
        found = copy.copy(self)
        found.twin, found.chunks, found.decoder = copy.copy(self.twin), {}, None
        vars(found.twin)["vae"] = self.own_decoder
        return found

    def random_state_after_draw(self) -> RandomState:
        """Return the random streams after the base noise was sampled."""
        generator = self.random_state.generator()
        if self.drew:
            self.space.on(self.twin, self.space.draw_noise, generator=generator)
        return RandomState(generator, torch.device("cpu"))

    @functools.cached_property
    def redraw(self) -> Redraw | None:
        """The way to draw images again by a plain call, if there is one."""
        with self.again() as twin:
            return find_redraw(self, twin)

    def states_for_redraw(self) -> list[tuple[str, torch.Tensor]]:
        """Return device type and state of each random stream that a call with the found latents starts from."""
        streams = self.start.own if self.redraw is None else self.redraw.streams
        return [(device.type, state) for device, state, _ in streams.states]

    @contextlib.contextmanager
    def again(self) -> Iterator[Any]:
        """Yield a twin for one more run of the call."""
        twin = copy.copy(self.twin)
        with self.scheduler.fresh() as scheduler:
            attributes = vars(twin)
            attributes["scheduler"] = scheduler
            try:
                if not self.scheduler.in_place:
                    yield twin
                    return
                with with_attributes(self.pipe, attributes):
                    yield self.pipe
            finally:  # a reference cycle through its methods would keep the graph until the next garbage collection
                attributes.clear()

    def prepare(self, noise: torch.Tensor):
        """Return what `prepare_latents` of the call returns for another noise and the same other random numbers."""
        with self.again() as twin:
            return self.prepare_on(twin, noise, self.random_state.generator())

    def prepare_on(self, twin, noise: torch.Tensor, generator: torch.Generator | list[torch.Generator]):
        # some functions sample the encoded image from the global stream, whatever the generator
        with self.preparation.replayed() if self.prepares_globally else contextlib.nullcontext():
            return self.space.prepare(twin, noise, draw=self.drew, generator=generator)

    def to_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Convert noise to what the pipeline takes as `latents=`, in its dtype, or to the prepared latents."""
        prepared = first_of(self.prepare(noise))
        return noise.to(prepared.dtype) if self.redraw is not None and self.redraw.form == "noise" else prepared

    def chunk(self, rows: list[int]) -> "PipelineSampler":
        """Return the sampler of a chunk, whose images equal these rows of the whole batch up to rounding.

        Samplers that add noise at each step see the same noise if they draw it from the generator of the call.

        Raises:
            ValueError: For a call that cannot be split by image, such as one with a list of images.
        """
        if tuple(rows) not in self.chunks:
            batch = self.space.arguments.get("batch_size", 0)
            if self.draws_early:
                raise ValueError(
                    "Expected a call whose first random numbers are its noise, to generate images in chunks, but "
                    f"{type(self.pipe).__name__} draws others before. Use `chunk_size=None`."
                )
            layout = BatchLayout(self.request, batch)
            chunk = copy.copy(self)
            chunk.space = self.space.for_images(len(rows))
            chunk.request = layout.request_of(rows)
            chunk.encoded = [layout.encoded_of(each, rows) for each in self.encoded]
            chunk.random_state, chunk.drew = self.random_state_after_draw().of_rows(rows), False
            chunk.batch_rows, chunk.chunks, chunk.image_embeds = (batch, rows), {}, []
            self.chunks[tuple(rows)] = chunk
        return self.chunks[tuple(rows)]

    def images(
        self,
        noise: torch.Tensor,
        gradient: Gradient = None,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """Generate images (B, 3, H, W) in [0, 1] from noise (B, C, H, W), in float32 or better.

        Of videos these are the chosen frames, (B, F, 3, H, W).

        Args:
            noise: The initial noise.
            gradient: "full" backpropagates through the whole chain. "frozen" treats the model's outputs as constants,
                so that the denoiser needs no graph. `None` builds no graph at all.
            preview: Decode the x0 estimate of the first model call instead of running the whole chain.
            chunk_size: Generate at most this many images at a time, and generate them again with their graph in the
                backward pass: the same gradient in less memory, for one more forward pass. `None` for all at once.
        """
        return self.pixels(self.run(noise, gradient, preview, "pt", chunk_size))

    def images_of_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Generate the images of a plain call with `latents=` and the generator of `redraw`."""
        assert self.redraw is not None
        generator = self.redraw.streams.generator()
        again = {"latents": latents, "generator": generator, "output_type": "pt", "return_dict": False}
        with self.again() as twin, torch.no_grad():
            self.take_over(twin, self.base_noise, generator, None)
            del vars(twin)["prepare_latents"]
            images = self.images_in(self.call(twin, **self.request, **again), twin)
        return self.pixels(images)

    def decoded(self, latents: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of clean latents, by what the call does after its steps.

        Args:
            latents: Those of the denoiser's layout, with or without a graph.
            prepared: What `prepare_latents` of the call returned.
        """
        ended = (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents
        try:
            return self.pixels(self.run_end(ended, None, latents.requires_grad))
        except UnboundLocalError:  # of a family that decodes what a step returns beside the latents
            return self.pixels(self.run_end(prepared, latents, latents.requires_grad))

    def run_end(self, prepared: Any, result: torch.Tensor | None, gradient: bool) -> torch.Tensor:
        """Run the call without its steps, or with one that has a result; see `steps_skipped`."""
        generator = self.random_state.generator()
        ours = {"generator": generator, "output_type": "pt", "return_dict": False}
        with self.again() as twin, steps_skipped(twin, result):
            self.take_over(twin, self.base_noise, generator, "frozen")
            vars(twin)["prepare_latents"] = lambda *_, **__: prepared
            with self.draws_of(generator), torch.set_grad_enabled(gradient):
                return self.images_in(self.call(twin, **self.request, **ours), twin)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Convert the images of the pipeline to colors in [0, 1], in float32 or better."""
        if self.centered is None:
            self.centered = is_centered(self)
        if self.centered and self.clamp == "straight_through":
            images = denormalize_straight_through(images)
        elif self.centered:
            images = (images * 0.5 + 0.5).clamp(0, 1)
        return on_white(images.to(torch.promote_types(images.dtype, torch.float32)))

    def x0(self, noise: torch.Tensor, gradient: Gradient = None, chunk_size: int | None = None) -> torch.Tensor:
        """Return the x0 estimate of the first model call in the layout of the noise (B, C, H, W); see `images`."""
        return self.space.unpack(self.twin, self.run(noise, gradient, True, "latent", chunk_size))

    def run(
        self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str, chunk_size: int | None = None
    ) -> torch.Tensor:
        """Run the pipeline on `noise` and return its output.

        With `preview` and `output_type="latent"` this is the x0 estimate in the denoiser's layout.
        """
        differentiable = gradient is not None and noise.requires_grad
        if chunk_size is not None and chunk_size < len(noise):

            def run_chunk(rows: list[int], chunk: torch.Tensor) -> torch.Tensor:
                return self.chunk(rows).run(chunk, gradient, preview, output_type)

            output = run_in_chunks(run_chunk, noise, chunk_size, differentiable)
            if not preview:
                self.timesteps = self.chunk(list(range(chunk_size))).timesteps
            return output
        if not differentiable:
            return self.run_once(noise, gradient, preview, output_type)
        kind = (preview, output_type)
        return self.checkpoints.fitted(kind, noise.device, lambda: self.run_once(noise, gradient, preview, output_type))

    def run_once(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        streams = self.start.own if self.draws_early else self.random_state
        generator = streams.generator()
        differentiable = gradient is not None and noise.requires_grad
        ours = {"generator": generator, "output_type": output_type, "return_dict": False}
        with self.again() as twin:
            self.take_over(twin, noise, generator, gradient)
            # what draws from the global stream does so in the first run
            whole = no_global_draws(twin) if self.timesteps is None else contextlib.nullcontext([])
            limited = first_step_only(twin) if preview else whole
            try:
                with self.draws_of(generator), limited as estimates, torch.set_grad_enabled(differentiable):
                    output = self.images_in(self.call(twin, **self.request, **ours), twin, output_type)
            except (AttributeError, RuntimeError) as error:
                why, _, _ = str(error).partition(". ")
                if not differentiable or (isinstance(error, RuntimeError) and "requires grad" not in why):
                    raise
                raise TypeError(
                    f"Expected {type(twin).__name__} to be differentiable from image to noise, but its code fails "
                    f'where gradients are recorded ({why}). Use `gradient="frozen"`, or a method without gradients, '
                    "such as `BestOfN`."
                ) from error
            if estimates and output_type == "latent":  # families unpack and scale their output
                output = estimates[0]
            if not preview:  # counted after the run, as some families set their timesteps after `prepare_latents`
                self.timesteps = count_timesteps(twin)
        if differentiable and not self.differentiated:
            if not depends_on(output, noise):
                raise ValueError(
                    f"Expected {type(twin).__name__} to be differentiable from image to noise, but its result carries "
                    "no gradient. Use a method without gradients, such as `BestOfN`."
                )
            self.differentiated = True
        return output

    def images_in(self, output: Any, pipe, output_type: str = "pt") -> Any:
        """Return `images_in`, of videos the chosen frames."""
        images = images_in(output, pipe, output_type)
        if output_type == "latent" or getattr(images, "ndim", 4) != 5:
            return images
        numbers = frame_numbers(self.frames, images.shape[1])
        return images if numbers == list(range(images.shape[1])) else images[:, numbers]

    @contextlib.contextmanager
    def draws_of(self, generator: torch.Generator | list[torch.Generator]) -> Iterator[None]:
        """Let a run draw what the call draws.

        A chunk draws from a generator that its batch shares as the whole batch does, and what the call drew from the
        global streams before its latents is drawn again.
        """
        shared = self.batch_rows is not None and not isinstance(generator, list)
        chunk = WholeBatchDraws(generator, *self.batch_rows) if shared else contextlib.nullcontext()  # pyright: ignore[reportArgumentType, reportOptionalIterable]
        with chunk, self.start.replayed() if self.draws_globally else contextlib.nullcontext():
            yield

    def take_over(
        self,
        twin,
        noise: torch.Tensor,
        generator: torch.Generator | list[torch.Generator],
        gradient: Gradient,
    ) -> None:
        """Let a twin run on `noise` and the recorded prompts."""
        attributes, ours = vars(twin), [noise]

        def prepare_latents(*_, **__):
            if not ours:
                raise TypeError(
                    f"Expected a call that prepares its latents once, but that of {type(twin).__name__} does so for "
                    "one model after another, such as a prior. Use the pipeline of its last model."
                )
            self.random_state.rewind(generator)
            return self.prepare_on(twin, ours.pop(), generator)

        recorded = {"encode_prompt": self.encoded, "prepare_ip_adapter_image_embeds": self.image_embeds}
        attributes.update(
            {name: replayed(getattr(twin, name), values) for name, values in recorded.items() if hasattr(twin, name)}
        )
        attributes["prepare_latents"] = prepare_latents
        wrap = {"frozen": without_gradient, "full": self.checkpoints.call_of}.get(gradient or "")
        if wrap is not None:
            attributes.update({name: wrap(model) for name, model in submodules_of(twin, CALLED_IN_STEPS).items()})


def depends_on(output: torch.Tensor, noise: torch.Tensor) -> bool:
    """Return whether a backward pass from an output reaches a noise. Some calls start a graph of their own midway."""
    goal, waiting, seen = get_gradient_edge(noise).node, [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is goal:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return False


def images_in(output: Any, pipe, output_type: str = "pt") -> Any:
    """Return the images that a pipeline call returned with `return_dict=False`.

    Raises:
        TypeError: If they are no tensor `(B, 3, H, W)`, nor one with a channel for opacity, or `(B, F, 3, H, W)`, for
            `output_type="pt"`.
    """
    images = output[0] if isinstance(output, tuple) else output
    pictures = isinstance(images, torch.Tensor) and images.ndim in (4, 5) and images.shape[-3] in (3, 4)
    if output_type == "pt" and not pictures:
        got = f"some of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(
            f'Expected {type(pipe).__name__} to return images (B, 3, H, W) for `output_type="pt"`, or videos '
            f"(B, F, 3, H, W), but got {got}. Use a pipeline that generates images or videos, as tensors."
        )
    return images


def make_twin(pipe, clamp: Clamp, postprocessed: list[int]):
    """Return a shallow copy of a pipeline that is differentiable from image to noise.

    Each call of its image or video processor leaves an entry in `postprocessed`.
    """
    twin = copy.copy(pipe)
    twin.__dict__ = attributes = plain_attributes(pipe)
    twin.set_progress_bar_config(disable=True)
    # both use numpy, which has no gradient; the final run has them
    own = attributes.get("safety_checker")
    left_out = ("watermark",) if hasattr(own, "check_text_safety") else ("watermark", "safety_checker")  # Cosmos asks
    attributes.update({name: None for name in left_out if name in attributes})
    if "vae" in attributes and needs_upcast(attributes["vae"]):
        attributes["vae"] = converted_apart(attributes["vae"])
    for name in ("image_processor", "video_processor"):
        if not hasattr(attributes.get(name), "postprocess"):
            continue
        processor = attributes[name] = copy.copy(attributes[name])
        vars(processor)["postprocess"] = counted(processor.postprocess, postprocessed)
        if clamp == "straight_through" and has_stock_clamp(processor):
            vars(processor)["denormalize"] = denormalize_straight_through
    return twin


def has_stock_clamp(image_processor: Any) -> bool:
    """Return whether an image processor clamps pixels by diffusers' own function."""
    own = getattr(image_processor, "denormalize", None)
    return own is VaeImageProcessor.denormalize and is_stock_method(VaeImageProcessor, "denormalize")


def needs_upcast(vae: Any) -> bool:
    """Return whether the pipeline converts its VAE to float32 to decode.

    The answer is no for a VAE that is offloaded, or that has functions of others which refer to it: neither can be
    copied, and both run without a gradient only.
    """
    return is_upcast(vae) and not is_offloaded(vae) and not refers_to_itself(vae)


def replayed(function: Callable[..., Any], recorded: list[Any]) -> Callable[..., Any]:
    """Return a function that replays the recorded return values in call order and records further ones."""
    index = itertools.count()

    def replay(*args, **kwargs):
        call = next(index)
        if call == len(recorded):
            with torch.no_grad():
                recorded.append(function(*args, **kwargs))
        return recorded[call]

    return replay


def denormalize_straight_through(images: torch.Tensor) -> torch.Tensor:
    """Convert [-1, 1] to [0, 1] as diffusers does, with the value of the clamp and the gradient of the identity."""
    pixels = images * 0.5 + 0.5
    clamped = pixels.clamp(0, 1)
    return clamped.detach() + (pixels - pixels.detach()) if pixels.requires_grad else clamped  # adds exactly 0
