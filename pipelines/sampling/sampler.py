"""A stock pipeline as a function of its initial noise, differentiable from image to noise."""

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from ...schedulers.x0_prediction import predict_x0
from ..memory.checkpointing import Checkpointing, Checkpoints, scales_lora
from ..memory.chunks import BatchLayout, WholeBatchDraws, run_in_chunks
from .global_draws import no_global_draws
from .latent_space import LatentSpace
from .module_state import CALLED_IN_STEPS, DENOISERS, converted_apart, is_offloaded, with_forward, without_gradient

Gradient = Literal["full", "frozen"] | None
Clamp = Literal["straight_through", "hard"]


def stock_call(cls: type):
    """The `__call__` of the stock pipeline class under our hook, without its `@torch.no_grad`."""
    for base in cls.__mro__:
        if "__call__" in vars(base) and not hasattr(base, "_noise_run"):
            return inspect.unwrap(vars(base)["__call__"])
    raise TypeError(f"Expected a diffusers pipeline with a `__call__`, but {cls.__name__} has none.")


class RandomState:
    """The random streams of a call, as they were at one moment: every inner run starts from the same state."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.several = isinstance(generator, list)
        streams = generator if isinstance(generator, list) else [generator or default_generator(device)]
        self.states = [(stream.device, stream.get_state(), stream.initial_seed()) for stream in streams]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, _, seed in self.states]

    def generator(self) -> torch.Generator | list[torch.Generator]:
        """Fresh generators in this state, in the form that the pipeline was given."""
        fresh = []
        for device, state, _ in self.states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.several else fresh[0]

    def of_rows(self, rows: list[int]) -> "RandomState":
        """The streams of some images, or the one that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on `device` when none is given."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


class PipelineSampler:
    """One pipeline call as `images(noise)` and `x0(noise)`.

    Works on a shallow twin of the pipeline that shares its modules: the scheduler is a copy, `encode_prompt` replays
    what the outer call recorded, in call order, and `prepare_latents` returns our noise through the stock scaling and
    packing.

    Args:
        pipe: The pipeline whose call is under way, after its prompts were encoded.
        request: The arguments of that call.
        encoded: What `encode_prompt` returned, in call order.
        space: The noise and latents of the call.
        random_state: The streams before the base noise was drawn.
        drew: Whether the outer call drew its base noise; if so each inner call draws and discards, to leave samplers
            that add noise on the way the same stream.
        clamp: How pixels are brought into [0, 1]: "straight_through" keeps the gradient of saturated pixels, so that
            they can come back; "hard" (as stock pipelines do) has none there. The values are equal.
        decoder: What decodes latents in the place of the pipeline's VAE; `None` for that.
        checkpointing: What is computed again in the backward pass, once `checkpoints` are in force.
        through_denoiser: Whether gradients pass through the denoiser, so that there is anything of it to be kept.

    Attributes:
        timesteps: How many the whole chain has, once it has been run; `None` before.
        checkpoints: What is computed again, of the whole batch and of its parts.
    """

    timesteps: int | None = None

    def __init__(
        self,
        pipe,
        request: dict[str, Any],
        encoded: list,
        space: LatentSpace,
        random_state: RandomState,
        drew: bool,
        clamp: Clamp = "straight_through",
        decoder: Any = None,
        checkpointing: Checkpointing = "none",
        through_denoiser: bool = True,
    ) -> None:
        self.space, self.encoded, self.random_state, self.drew = space, encoded, random_state, drew
        self.call = stock_call(type(pipe))
        ours = ("latents", "generator", "output_type", "return_dict", "callback_on_step_end", "callback")
        self.request = {name: value for name, value in request.items() if name not in ours}
        self.image_embeds: list[Any] = []  # of an IP-Adapter: what its method returned in the first run, in call order
        self.twin = self.make_twin(pipe, clamp)
        self.own_decoder, self.decoder = vars(self.twin).get("vae"), decoder
        if decoder is not None:
            vars(self.twin)["vae"] = decoder
        called = parts_of(self.twin, CALLED_IN_STEPS).values() if through_denoiser else ()
        decodes = vars(self.twin).get("vae")
        self.checkpoints = Checkpoints(checkpointing, tuple(called), decodes, scales_lora(self.request))
        # as it was before any run: schedulers hold the graph of one afterwards, so that each run has its own copy
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.part_of: tuple[int, list[int]] | None = None  # the size of the whole batch, and which rows of it are drawn
        self.chunks: dict[tuple[int, ...], PipelineSampler] = {}

    def make_twin(self, pipe, clamp: str):
        twin = copy.copy(pipe)
        attributes = vars(twin)
        attributes.pop("_noise_run", None)
        attributes["_progress_bar_config"] = {"disable": True}
        # both go through numpy, which no gradient passes; the final run has them
        attributes.update({name: None for name in ("safety_checker", "watermark") if name in attributes})
        vae = attributes.get("vae")
        upcast = vae is not None and vae.config.get("force_upcast") and vae.dtype == torch.float16
        if upcast and not is_offloaded(vae):  # no gradient passes one that is offloaded
            attributes["vae"] = converted_apart(vae)
        if clamp == "straight_through" and hasattr(pipe, "image_processor"):
            attributes["image_processor"] = copy.copy(pipe.image_processor)
            vars(twin.image_processor)["denormalize"] = denormalize_straight_through
        return twin

    def with_own_decoder(self) -> "PipelineSampler":
        """The same sampler with the pipeline's own decoder."""
        found = copy.copy(self)
        found.twin, found.chunks, found.decoder = copy.copy(self.twin), {}, None
        vars(found.twin)["vae"] = self.own_decoder
        return found

    def random_state_after_draw(self) -> RandomState:
        """The random streams once the base noise is drawn."""
        generator = self.random_state.generator()
        if self.drew:
            self.space.on(self.twin, self.space.draw_noise, generator=generator)
        return RandomState(generator, torch.device("cpu"))

    def prepare(self, pipe, noise: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None):
        """What `prepare_latents` of the call returns for another noise; all else that it draws is the same."""
        generator = generator or self.random_state.generator()
        return self.space.prepare(pipe, noise, draw=self.drew, generator=generator)

    def to_latents(self, pipe, noise: torch.Tensor) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in its dtype."""
        return self.space.to_latents(pipe, noise, draw=self.drew, generator=self.random_state.generator())

    def states_after_draw(self) -> list[tuple[str, torch.Tensor]]:
        """Device type and state of each random stream once the base noise is drawn."""
        return [(device.type, state) for device, state, _ in self.random_state_after_draw().states]

    def chunk(self, rows: list[int]) -> "PipelineSampler":
        """A sampler of some images of the batch alone: what the whole batch draws in these rows, but for rounding.

        Samplers that add noise on the way see the same noise, if they draw it from the generator of the call.

        Raises:
            ValueError: Naming an argument of the call that cannot be told apart by image, such as a list of images.
        """
        if tuple(rows) not in self.chunks:
            batch = self.space.arguments.get("batch_size", 0)
            layout = BatchLayout(self.request, batch)
            part = copy.copy(self)
            part.space = self.space.for_images(len(rows))
            part.request = layout.request_of(rows)
            part.encoded = [layout.encoded_of(each, rows) for each in self.encoded]
            part.random_state, part.drew = self.random_state_after_draw().of_rows(rows), False
            part.part_of, part.chunks, part.image_embeds = (batch, rows), {}, []
            self.chunks[tuple(rows)] = part
        return self.chunks[tuple(rows)]

    def images(
        self,
        noise: torch.Tensor,
        gradient: Gradient = None,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """`noise` (B, C, H, W) to images (B, 3, H, W) in [0, 1], float32 or better.

        Args:
            noise: The initial noise.
            gradient: "full" back-propagates through the whole chain; "frozen" holds the model's outputs constant, so no
                graph is kept in the denoiser; `None` keeps no graph at all.
            preview: Draw the x0 estimate of the first model call instead of the whole chain.
            chunk_size: Draw at most so many images at a time, and draw them again, with their graph, in the backward
                pass: the same gradient in the memory of so many images, for one more forward pass. `None` for all.
        """
        if chunk_size is not None and chunk_size < len(noise):

            def draw(rows: list[int], part: torch.Tensor) -> torch.Tensor:
                return self.chunk(rows).images(part, gradient, preview)

            return run_in_chunks(draw, noise, chunk_size, gradient is not None)
        images = self.run(noise, gradient, preview, "pt")
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def x0(self, noise: torch.Tensor, gradient: Gradient = None, chunk_size: int | None = None) -> torch.Tensor:
        """`noise` (B, C, H, W) to the x0 estimate of the first model call, in the layout of the noise; see `images`."""
        if chunk_size is not None and chunk_size < len(noise):
            return run_in_chunks(
                lambda rows, part: self.chunk(rows).x0(part, gradient), noise, chunk_size, gradient is not None
            )
        latents = self.run(noise, gradient, True, "latent")
        return self.space.unpack(self.twin, latents)

    def run(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        """What the pipeline puts out for a noise; the latents of a preview are the x0 estimate, in no other layout.

        With a graph, it is as the checkpointing says.
        """
        if gradient is None or not noise.requires_grad:
            return self.run_once(noise, gradient, preview, output_type)
        kind = (preview, output_type)
        return self.checkpoints.fitted(kind, noise.device, lambda: self.run_once(noise, gradient, preview, output_type))

    def run_once(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        twin = self.fresh_twin(noise, gradient)
        watched = first_step_only(twin) if preview else no_global_draws(twin)
        ours = {"generator": twin.sampling_generator, "output_type": output_type, "return_dict": False}
        draws, graph = self.draws_from(twin.sampling_generator), gradient is not None and noise.requires_grad
        try:
            with watched as estimates, draws, torch.set_grad_enabled(graph):
                output = self.call(twin, **self.request, **ours)[0]
            if estimates and output_type == "latent":  # families unpack and scale what they put out
                output = estimates[0]
            if not preview:  # some families set their timesteps after `prepare_latents`: no scheduler knows them before
                self.timesteps = count_timesteps(twin)
        finally:  # its methods refer to it: its scheduler would keep the graph until the next collection
            vars(twin).clear()
        if noise.requires_grad and gradient is not None and not output.requires_grad:
            raise ValueError(
                f"Expected {type(twin).__name__} to be differentiable from image to noise, but its result carries no "
                "gradient. Use a method without gradients, such as `BestOfN`."
            )
        return output

    def draws_from(self, generator: torch.Generator | list[torch.Generator]) -> contextlib.AbstractContextManager[Any]:
        """Lets a part of a batch that shares one generator draw from it as the whole batch does."""
        if self.part_of is None or isinstance(generator, list):
            return contextlib.nullcontext()
        return WholeBatchDraws(generator, *self.part_of)

    def fresh_twin(self, noise: torch.Tensor, gradient: Gradient):
        twin = copy.copy(self.twin)
        generator = self.random_state.generator()
        replay = iter(self.encoded)

        vars(twin).update(
            scheduler=copy.deepcopy(self.scheduler),
            encode_prompt=lambda *_, **__: next(replay),
            prepare_latents=lambda *_, **__: self.prepare(twin, noise, generator),
            sampling_generator=generator,
        )
        if hasattr(twin, "prepare_ip_adapter_image_embeds"):
            embed = twin.prepare_ip_adapter_image_embeds
            vars(twin)["prepare_ip_adapter_image_embeds"] = replayed(embed, self.image_embeds)
        if gradient == "frozen":
            vars(twin).update({name: without_gradient(part) for name, part in parts_of(twin, CALLED_IN_STEPS).items()})
        elif gradient == "full":
            parts = parts_of(twin, CALLED_IN_STEPS)
            vars(twin).update({name: self.checkpoints.call_of(part) for name, part in parts.items()})
        return twin


def parts_of(pipe, names: tuple[str, ...]) -> dict[str, Any]:
    """The modules that a pipeline has of these."""
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def replayed(function: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """A function that returns what is kept of its earlier calls, in call order, and keeps what it computes beyond."""
    index = itertools.count()

    def replay(*args, **kwargs):
        call = next(index)
        if call == len(kept):
            with torch.no_grad():
                kept.append(function(*args, **kwargs))
        return kept[call]

    return replay


@contextlib.contextmanager
def first_step_only(pipe) -> Iterator[list[torch.Tensor]]:
    """Let a pipeline make one model call, whose `step` returns the x0 estimate. It and its scheduler must be copies.

    The loop is stopped by `pipe.interrupt`, or in families that do not look at it by cutting the list of timesteps.

    Yields:
        An empty list, for the estimate.

    Raises:
        TypeError: If the pipeline takes no step, or takes one before a denoiser was called.
    """
    scheduler, interruptible = pipe.scheduler, "interrupt" in stock_call(type(pipe)).__code__.co_names
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    calls: list[int] = []
    stepped: list[bool] = []  # for each step whether a denoiser had been called
    estimates: list[torch.Tensor] = []

    @functools.wraps(set_timesteps)
    def set_one(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if not interruptible:
            scheduler.timesteps = scheduler.timesteps[:1]

    @functools.wraps(step)
    def estimate(model_output, timestep, sample, *_, **__):
        stepped.append(bool(calls))
        x0 = predict_x0(scheduler, model_output, timestep, sample).to(model_output.dtype)
        estimates.append(x0)
        pipe._interrupt = True
        return (x0, x0)

    vars(scheduler).update(set_timesteps=set_one, step=estimate)
    # copies that count: a hook on modules that others have too would have to be taken off again, whatever happens
    parts = parts_of(pipe, DENOISERS)
    vars(pipe).update({name: with_forward(part, counted(part.forward, calls)) for name, part in parts.items()})
    try:
        yield estimates
    finally:
        del scheduler.set_timesteps, scheduler.step
    if not all(stepped or [False]):
        raise TypeError(
            f"Expected a pipeline that calls its denoiser ({', '.join(DENOISERS)}) before the first `scheduler.step`, "
            f"but {type(pipe).__name__} does not, and no x0 can be estimated. Use a method that looks at images."
        )


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, with an entry in `calls` for each call."""

    @functools.wraps(function)
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return count


def count_timesteps(pipe) -> int:
    """How many timesteps the loop of a call had: pipelines may take a part of those of the scheduler."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def denormalize_straight_through(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1] as diffusers does it, with the clamp's value and the identity's gradient."""
    pixels = images * 0.5 + 0.5
    clamped = pixels.clamp(0, 1)
    return clamped.detach() + (pixels - pixels.detach()) if pixels.requires_grad else clamped  # adds exactly 0


class Sample:
    """What an objective may look at, computed once and only if asked for.

    Attributes:
        noise: `(B, C, H, W)`, the initial noise.
        prompts: `B` prompts.
        groups: `B` integers, equal where images share their prompt.
        seeds: `B` integers that differ from step to step and from image to image: for objectives that draw at random.
        images: `(B, 3, H, W)` in [0, 1]: the result of the whole chain, or of one model call for a preview.
        x0: `(B, C, H, W)`: the estimate of the clean latents after one model call.
        chunk_size: At most so many images are held in memory with their graphs at a time, `None` for all; objectives
            with models of their own keep to it.
    """

    def __init__(
        self,
        sampler: PipelineSampler,
        noise: torch.Tensor,
        prompts: list[str],
        groups: list[int],
        seeds: list[int],
        gradient: Gradient,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.sampler, self.noise, self.prompts = sampler, noise, prompts
        self.groups, self.seeds = groups, seeds
        self.gradient: Gradient = gradient
        self.preview, self.chunk_size = preview, chunk_size

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return self.sampler.images(self.noise, self.gradient, self.preview, self.chunk_size)

    @functools.cached_property
    def x0(self) -> torch.Tensor:
        return self.sampler.x0(self.noise, self.gradient, self.chunk_size)

    @property
    def drawn_images(self) -> torch.Tensor | None:
        """The images if the objective asked for them, without their graph."""
        images = vars(self).get("images")
        return None if images is None else images.detach()
