"""A stock pipeline as a function of its initial noise, differentiable from image to noise."""

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..memory.checkpointing import Checkpointing, Checkpoints, scales_lora
from ..memory.chunks import BatchLayout, WholeBatchDraws, run_in_chunks
from ..memory.module_copies import converted_apart, without_gradient
from .first_call import count_timesteps, first_step_only, parts_of, stock_call
from .global_draws import no_global_draws
from .latent_space import LatentSpace
from .module_state import CALLED_IN_STEPS, is_offloaded
from .random_state import RandomState

Gradient = Literal["full", "frozen"] | None
Clamp = Literal["straight_through", "hard"]


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
        twin.set_progress_bar_config(disable=True)
        # both go through numpy, which no gradient passes; the final run has them
        attributes.update({name: None for name in ("safety_checker", "watermark") if name in attributes})
        vae: Any = attributes.get("vae")
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


def denormalize_straight_through(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1] as diffusers does it, with the clamp's value and the identity's gradient."""
    pixels = images * 0.5 + 0.5
    clamped = pixels.clamp(0, 1)
    return clamped.detach() + (pixels - pixels.detach()) if pixels.requires_grad else clamped  # adds exactly 0
