"""A stock pipeline call that is changed from its first model call on."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from ...checked_fields import check_fields
from ...schedulers.noise_samplers import Generators, NoiseSamplerSpec
from ..hook import NoiseDraw
from ..modular import as_standard
from ..request import (
    bind_request,
    check_argument_names,
    check_pipeline,
    check_pipeline_class,
    check_request,
    prompts_of,
)
from ..sampling.apart import apart, hooked
from ..sampling.first_call import stock_call
from ..sampling.latent_space import LatentSpace
from ..sampling.module_state import shared_parts
from ..sampling.turns import TURNS


class SteeredRun(NoiseDraw):
    """One stock call, its request and what changes it; `hooks` take the place of the pipeline's methods."""

    def __init__(self, pipe, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> None:
        super().__init__(pipe, request, noise_sampler)
        self.request = request

    def prepare_latents(self, pipe, *args, **kwargs):
        """Run the stock method on the noise of the call, or on that of the sampler."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        return self.prepared(pipe, space, space.on(pipe, space.draw_noise, space.given))

    def prepared(self, pipe, space: LatentSpace, latents: Any) -> Any:
        """Return what `prepare_latents` returns, once it is known."""
        return latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeredCall(abc.ABC):
    """Changes the calls of any stock pipeline, in their first model call too, which a callback cannot do.

    Args:
        generator: The source of the random numbers: one generator, a list with one for each image, or `None` for
            torch's global one. Like that of a pipeline, it continues from call to call.
    """

    generator: Generators = None

    def check(self) -> None:
        """Raise `ValueError` or `TypeError` for settings that cannot work."""
        check_fields(self)
        streams = self.generator if isinstance(self.generator, list | tuple) else [self.generator]
        if self.generator is not None and not all(isinstance(each, torch.Generator) for each in streams):
            raise TypeError(
                f"Expected `generator` to be a `torch.Generator` or a list of them, but got {self.generator!r:.200}. A "
                "seed is written `torch.Generator().manual_seed(0)`."
            )

    @abc.abstractmethod
    def run(self, pipe, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> SteeredRun:
        """Return a run. Raises `TypeError` or `ValueError` for a pipeline or a call that it cannot change."""

    def generate(
        self,
        pipe,
        prompt: str | list[str] | None = None,
        *,
        noise_sampler: NoiseSamplerSpec | None = None,
        **call_kwargs,
    ) -> Any:
        """Run `pipe(prompt, ...)`, changed. The pipeline stays unmodified.

        Args:
            pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise.
            prompt: As in the pipeline's call.
            noise_sampler: The distribution of the initial noise, as in `optimize_noise`.
            call_kwargs: The other arguments of `pipe(prompt, ...)`.

        Returns:
            The output of the stock pipeline; for a modular one a tuple with its images.

        Raises:
            ValueError: For settings or a call that cannot work.
            TypeError: For an argument that the pipeline does not take, or a pipeline that cannot be changed so.
        """
        check_pipeline(pipe)
        pipe = as_standard(pipe)
        check_pipeline_class(type(pipe))
        check_argument_names(pipe, call_kwargs, ("noise_sampler",), self)
        self.check()
        with TURNS.take(shared_parts(pipe)), apart(pipe) as twin:
            request = bind_request(twin, (), {"prompt": prompt, **call_kwargs})
            check_request(twin, request)
            self.check_count(len(prompts_of(request)))
            run = self.run(twin, request, noise_sampler)
            with hooked(twin, **run.hooks(twin)), torch.no_grad():
                return stock_call(type(pipe))(twin, **run.request)

    def draws(self, rows: int) -> list[Callable[..., torch.Tensor]]:
        """Return for each of some images a function `(draw, *shape) -> Tensor` of `torch.rand` or `torch.randn`.

        The numbers are float32 on the CPU, if the generators are.
        """
        self.check_count(rows)
        streams = self.generator
        if streams is None or isinstance(streams, torch.Generator):
            return [drawing(streams)] * rows
        return [drawing(stream) for stream in streams]

    def check_count(self, images: int) -> None:
        """Raise `ValueError` for a list of generators with too few or too many for some images."""
        streams = self.generator
        if isinstance(streams, list | tuple) and len(streams) != images:
            raise ValueError(
                f"Expected one generator, or one for each image, but got {len(streams)} for {images} images. Pass as "
                "many as there are images."
            )


def drawing(stream: torch.Generator | None) -> Callable[..., torch.Tensor]:
    """Return a function that calls `torch.rand` or `torch.randn` with a generator."""

    def draw(function: Callable[..., torch.Tensor], *shape: int) -> torch.Tensor:
        return function(shape, generator=stream, device=stream.device if stream else "cpu")

    return draw


def part_of(share: float, count: int) -> int:
    """Return a share of some things, rounded up, but not for the rounding of numbers such as 0.2 · 5."""
    return math.ceil(share * count - 1e-9)
