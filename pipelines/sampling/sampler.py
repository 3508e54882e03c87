"""A stock pipeline as a differentiable function of its initial noise."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor

from ...private_names import execution_device
from ..memory.checkpointing import Checkpointing, Checkpoints, scales_lora
from ..memory.chunks import BatchLayout, WholeBatchDraws, run_in_chunks
from ..memory.module_copies import converted_apart, without_gradient
from ..memory.replaced import is_stock_method
from .apart import KeptScheduler, plain_attributes, with_attributes
from .first_call import count_timesteps, first_step_only, stock_call, submodules_of
from .global_draws import no_global_draws
from .latent_space import LatentSpace
from .module_state import CALLED_IN_STEPS, is_offloaded
from .random_state import RandomState

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
        encoded: The return values of `encode_prompt` in call order.
        space: The noise and latents of the call.
        clamp: How pixels are clamped to [0, 1]. "straight_through" keeps the gradient of saturated pixels, so that they
            can recover; "hard", as in stock pipelines, has zero gradient there. The values are equal.
        decoder: Decoder to use instead of the pipeline's VAE, or `None`.
        checkpointing: Checkpointing of the evaluations while `checkpoints` are in force.
        through_denoiser: Whether gradients pass through the denoiser, so that checkpointing it saves memory.

    Attributes:
        random_state: The random streams before the base noise is sampled.
        base_noise: `(B, C, H, W)`, the noise of the call, in the dtype of the pipeline.
        drew: Whether the base noise was sampled rather than given as `latents`. If so, evaluations sample and discard
            it, so that samplers that add noise at each step see the same stream.
        timesteps: The number of timesteps of the whole chain, `None` before its first run.
        checkpoints: The checkpointing, shared by the samplers of chunks.
    """

    timesteps: int | None = None

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
    ) -> None:
        self.space, self.encoded = space, encoded
        device = torch.device(space.arguments.get("device") or execution_device(pipe))
        self.random_state = RandomState(request.get("generator"), device)
        self.base_noise, self.drew = space.draw(pipe)
        self.call = stock_call(type(pipe))
        ours = ("latents", "generator", "output_type", "return_dict", "callback_on_step_end", "callback")
        self.request = {name: value for name, value in request.items() if name not in ours}
        self.image_embeds: list[Any] = []  # of an IP-Adapter, recorded in the first run
        self.pipe, self.twin = pipe, make_twin(pipe, clamp)
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

    def states_after_draw(self) -> list[tuple[str, torch.Tensor]]:
        """Return device type and state of each random stream after the base noise was sampled."""
        return [(device.type, state) for device, state, _ in self.random_state_after_draw().states]

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
        return self.space.prepare(twin, noise, draw=self.drew, generator=generator)

    def to_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Convert noise to what the pipeline takes as `latents=`, in its dtype."""
        with self.again() as twin:
            return self.space.to_latents(twin, noise, draw=self.drew, generator=self.random_state.generator())

    def chunk(self, rows: list[int]) -> "PipelineSampler":
        """Return the sampler of a chunk, whose images equal these rows of the whole batch up to rounding.

        Samplers that add noise at each step see the same noise if they draw it from the generator of the call.

        Raises:
            ValueError: For an argument of the call that cannot be split by image, such as a list of images.
        """
        if tuple(rows) not in self.chunks:
            batch = self.space.arguments.get("batch_size", 0)
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

        Args:
            noise: The initial noise.
            gradient: "full" backpropagates through the whole chain. "frozen" treats the model's outputs as constants,
                so that the denoiser needs no graph. `None` builds no graph at all.
            preview: Decode the x0 estimate of the first model call instead of running the whole chain.
            chunk_size: Generate at most this many images at a time, and generate them again with their graph in the
                backward pass: the same gradient in less memory, for one more forward pass. `None` for all at once.
        """
        images = self.run(noise, gradient, preview, "pt", chunk_size)
        return images.to(torch.promote_types(images.dtype, torch.float32))

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

            return run_in_chunks(run_chunk, noise, chunk_size, differentiable)
        if not differentiable:
            return self.run_once(noise, gradient, preview, output_type)
        kind = (preview, output_type)
        return self.checkpoints.fitted(kind, noise.device, lambda: self.run_once(noise, gradient, preview, output_type))

    def run_once(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        generator = self.random_state.generator()
        differentiable = gradient is not None and noise.requires_grad
        ours = {"generator": generator, "output_type": output_type, "return_dict": False}
        with self.again() as twin:
            self.take_over(twin, noise, generator, gradient)
            # a sampler that draws from the global stream does so in its first run
            whole = no_global_draws(twin) if self.timesteps is None else contextlib.nullcontext([])
            limited = first_step_only(twin) if preview else whole
            with limited as estimates, self.shared_draws(generator), torch.set_grad_enabled(differentiable):
                output = self.call(twin, **self.request, **ours)[0]
            if estimates and output_type == "latent":  # families unpack and scale their output
                output = estimates[0]
            if not preview:  # counted after the run, as some families set their timesteps after `prepare_latents`
                self.timesteps = count_timesteps(twin)
        if differentiable and not output.requires_grad:
            raise ValueError(
                f"Expected {type(twin).__name__} to be differentiable from image to noise, but its result carries no "
                "gradient. Use a method without gradients, such as `BestOfN`."
            )
        return output

    def shared_draws(
        self, generator: torch.Generator | list[torch.Generator]
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a chunk draws from a generator that its batch shares as the whole batch does."""
        if self.batch_rows is None or isinstance(generator, list):
            return contextlib.nullcontext()
        return WholeBatchDraws(generator, *self.batch_rows)

    def take_over(
        self,
        twin,
        noise: torch.Tensor,
        generator: torch.Generator | list[torch.Generator],
        gradient: Gradient,
    ) -> None:
        """Let a twin run on `noise` and the recorded prompts."""
        attributes, recorded = vars(twin), iter(self.encoded)
        attributes.update(
            encode_prompt=lambda *_, **__: next(recorded),
            prepare_latents=lambda *_, **__: self.prepare_on(twin, noise, generator),
        )
        if hasattr(twin, "prepare_ip_adapter_image_embeds"):
            embed = twin.prepare_ip_adapter_image_embeds
            attributes["prepare_ip_adapter_image_embeds"] = replayed(embed, self.image_embeds)
        wrap = {"frozen": without_gradient, "full": self.checkpoints.call_of}.get(gradient or "")
        if wrap is not None:
            attributes.update({name: wrap(model) for name, model in submodules_of(twin, CALLED_IN_STEPS).items()})


def make_twin(pipe, clamp: Clamp):
    """Return a shallow copy of a pipeline that is differentiable from image to noise."""
    twin = copy.copy(pipe)
    twin.__dict__ = attributes = plain_attributes(pipe)
    twin.set_progress_bar_config(disable=True)
    # both use numpy, which has no gradient; the final run has them
    attributes.update({name: None for name in ("safety_checker", "watermark") if name in attributes})
    if "vae" in attributes and needs_upcast(attributes["vae"]):
        attributes["vae"] = converted_apart(attributes["vae"])
    if clamp == "straight_through" and has_stock_clamp(attributes.get("image_processor")):
        attributes["image_processor"] = copy.copy(attributes["image_processor"])
        vars(twin.image_processor)["denormalize"] = denormalize_straight_through
    return twin


def has_stock_clamp(image_processor: Any) -> bool:
    """Return whether an image processor clamps pixels by diffusers' own function."""
    own = getattr(image_processor, "denormalize", None)
    return own is VaeImageProcessor.denormalize and is_stock_method(VaeImageProcessor, "denormalize")


def needs_upcast(vae: Any) -> bool:
    """Return whether the pipeline converts its VAE to float32 to decode.

    An offloaded VAE needs no copy that is safe for gradients, so the answer is no.
    """
    if vae is None or not vae.config.get("force_upcast"):
        return False
    return vae.dtype == torch.float16 and not is_offloaded(vae)


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
