"""The optimisation hook in `prepare_latents`, and `optimize_noise` for pipelines that already exist."""

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..callbacks.noise_callback import CallbackSpec, as_callbacks
from ..schedulers.noise_samplers import NoiseSamplerSpec, as_noise_sampler
from .memory.tiny_decoder import as_loop_decoder
from .method import NoiseOptimizer
from .objective import Objective
from .problem import NoiseProblem
from .registry import as_noise_optimizer
from .results.noise_file import NoiseFile
from .results.noise_result import NoiseResult
from .results.pipeline_code import SavedWithCode
from .sampling.first_call import parts_of, stock_call
from .sampling.internals import execution_device
from .sampling.latent_space import LatentSpace, drawing_function, latents_with_image
from .sampling.module_state import DENOISERS, frozen_modules, refuse_unsuited
from .sampling.random_state import RandomState
from .sampling.sampler import PipelineSampler


class NoiseFound(Exception):
    """Ends a pipeline call once its noise is known, when nobody asked for the final image."""


class NoiseDraw:
    """One pipeline call on noise of a sampler, and nothing optimised."""

    def __init__(self, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> None:
        prompts_of(request, required=False)
        self.noise_sampler = noise_sampler_of(noise_sampler, request, groups_of(request))

    def encode_prompt(self, encode, *args, **kwargs):
        return encode(*args, **kwargs)

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: the stock method, on noise of the sampler."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        return space.on(pipe, space.draw_noise)


class NoiseRun:
    """One pipeline call under optimisation: what it was asked for, encoded, and found."""

    def __init__(
        self,
        pipe,
        method: NoiseOptimizer,
        request: dict[str, Any],
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None,
        render: bool = True,
        noise_sampler: NoiseSamplerSpec | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
    ) -> None:
        self.method, self.request, self.render = method, request, render
        self.callbacks = as_callbacks(callbacks)
        method.check()
        check_class(pipe, request)
        if torch.is_inference_mode_enabled():
            raise ValueError("Expected a call outside `torch.inference_mode()`, where no gradient exists. Remove it.")
        refuse_unsuited(pipe, method.gradient)
        self.objective: Objective = method.objective(pipe)
        self.prompts = prompts_of(request, self.objective.requires_prompt)
        self.groups = groups_of(request)
        self.objective.check_groups(self.groups)
        check_latents(request, len(self.prompts))
        self.noise_sampler = noise_sampler_of(noise_sampler, request, self.groups)
        self.noise_file = None if save_noise_to is None else NoiseFile(save_noise_to)
        if size := image_size(pipe, request):
            self.objective.try_out(self.prompts[0], *size, gradient=method.gradient is not None)
        self.decoder = as_loop_decoder(method.decoder, pipe, list(parts_of(pipe, DENOISERS).values()))
        self.encoded: list[Any] = []
        self.result: NoiseResult | None = None

    def encode_prompt(self, encode, *args, **kwargs):
        """Record what the stock method returns, for the inner runs."""
        self.encoded.append(encode(*args, **kwargs))
        return self.encoded[-1]

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: draw the base noise as the stock method does, optimise it, prepare the result."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        device = torch.device(space.arguments.get("device") or execution_device(pipe))
        random_state = RandomState(self.request.get("generator"), device)
        noise, drew = space.draw(pipe)
        sampler = PipelineSampler(
            pipe,
            self.request,
            self.encoded,
            space,
            random_state,
            drew,
            clamp=self.method.clamp,
            decoder=self.decoder,
            checkpointing=self.method.checkpointing,
            through_denoiser=self.method.gradient == "full",
        )
        master = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
        prompts, groups = self.prompts, self.groups
        problem = NoiseProblem(pipe, sampler, space, master, prompts, groups, noise.dtype, self.request)
        with torch.enable_grad(), sampler.checkpoints:
            self.result = self.method.run(problem, self.objective, self.callbacks, self.noise_file)
        if not self.render:
            raise NoiseFound
        return sampler.prepare(pipe, self.result.noise.to(noise.dtype))


def check_class(pipe, request: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for a pipeline whose noise cannot be had in this call."""
    parameters = inspect.signature(drawing_function(type(pipe))(randn_tensor)).parameters
    if request.get("latents") is not None and "latents" not in parameters:
        raise latents_with_image(pipe)


def check_latents_taken(pipe) -> None:
    """Raise `TypeError` for a pipeline that cannot draw a noise again."""
    if "latents" not in inspect.signature(stock_call(type(pipe))).parameters:
        name = type(pipe).__name__
        raise TypeError(
            f"Expected a pipeline that takes `latents`, to draw the noise that was found, but {name} takes none. Give "
            f"it the hook, `class Ours(NoiseOptimizationMixin, {name})`, and call that with `noise_optimizer=...`: it "
            "draws the image in the same call."
        )


def prompts_of(request: dict[str, Any], required: bool) -> list[str]:
    """The prompt of each image, in the order in which pipelines lay them out."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    if prompt is None and required:
        raise ValueError(
            "Expected the text of the prompt for the rewards, but got `prompt_embeds` only. Name it in the method: "
            "`ReNO(..., reward_prompt=...)`."
        )
    if prompt is None:
        prompt = [""] * len(embeds)  # pyright: ignore[reportArgumentType]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(request.get("num_images_per_prompt") or 1)]


def groups_of(request: dict[str, Any]) -> list[int]:
    """For each image the index of the first prompt, or the first embedding, that equals its own."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        first = [texts.index(text) for text in texts]
    else:
        rows = list(embeds)  # pyright: ignore[reportArgumentType]
        first = [next(i for i, other in enumerate(rows) if torch.equal(row, other)) for row in rows]
    return [group for group in first for _ in range(request.get("num_images_per_prompt") or 1)]


def check_latents(request: dict[str, Any], batch: int) -> None:
    latents, generator = request.get("latents"), request.get("generator")
    if latents is not None and len(latents) != batch:
        raise ValueError(
            f"Expected `latents` for {batch} images (prompts × `num_images_per_prompt`), but got {len(latents)}."
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Expected one generator for each of {batch} images, but got {len(generator)}.")


def noise_sampler_of(
    noise_sampler: NoiseSamplerSpec | None, request: dict[str, Any], groups: list[int]
) -> Callable[..., torch.Tensor] | None:
    """The noise sampler of a call, coupled where it couples: among the images of a prompt.

    Raises `ValueError` beside `latents`, where there is nothing to draw.
    """
    found = as_noise_sampler(noise_sampler)
    if found is None:
        return None
    if request.get("latents") is not None:
        raise ValueError(
            "Expected `noise_sampler` or `latents`, but got both. Given latents are taken as they are: leave one out."
        )
    return found.within(groups) if hasattr(found, "within") else found  # pyright: ignore[reportFunctionMemberAccess]


def image_size(pipe, request: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images in pixels, if they can be told before the call."""
    if request.get("height") and request.get("width"):
        return request["height"], request["width"]
    if request.get("image") is not None:
        return size_of_image(pipe, request["image"])
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    return (side * scale, side * scale) if isinstance(side, int) and isinstance(scale, int) else None


def size_of_image(pipe, image: Any) -> tuple[int, int] | None:
    """Height and width that a pipeline makes of a given image, or of the first of several."""
    image = image[0] if isinstance(image, list) else image
    size_of = getattr(getattr(pipe, "image_processor", None), "get_default_height_width", None)
    is_latents = isinstance(image, torch.Tensor) and image.shape[-3] != 3
    return None if size_of is None or is_latents else size_of(image)


class NoiseOptimizationMixin(SavedWithCode):
    """Gives any diffusers text-to-image pipeline an optimisation hook in `prepare_latents`.

    `class ReNOTurboPipeline(NoiseOptimizationMixin, StableDiffusionXLPipeline)` is all that a pipeline needs. With
    `noise_optimizer=None` and no `noise_sampler` every call goes straight to the stock class, bit-identical to it.

    The stock `__call__` runs once as it is. When it reaches `prepare_latents`, its prompts are encoded; there the noise
    is optimised, each evaluation being the same stock `__call__` on a shallow twin (see `PipelineSampler`). Then the
    call goes on with the noise that was found: only this final run fires `callback_on_step_end`.
    """

    _noise_run: NoiseRun | NoiseDraw | None = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The stock method; unless `dtype` is given, the modules that both pipelines share keep theirs.

        The stock method converts them to float32 then, in the pipeline that they came from too.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        as_they_are = {"to": lambda pipe, *_, **__: pipe, "__module__": cls.__module__}
        unconverted = type(cls.__name__, (cls,), as_they_are)
        made = super(NoiseOptimizationMixin, unconverted).from_pipe(pipeline, **kwargs)  # pyright: ignore
        made.__class__ = cls
        return made

    def __call__(
        self,
        *args,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: CallbackSpec | Iterable[CallbackSpec] | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call, with the initial noise optimised first if `noise_optimizer` is given.

        Args:
            noise_optimizer: A method, such as `ReNO(rewards={"clipscore": 1.0})`.
            noise_sampler: What the initial noise is drawn from, optimised or not: `"white"`, as in the stock pipeline,
                `"pink"`, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step; see `NoiseCallback`.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call; see
                `optimize_noise`.
            args, kwargs: Those of the stock pipeline.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute. An exception on
            the way, Ctrl-C among them, carries the best so far as its `noise_result`.
        """
        stock = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if noise_optimizer is None and save_noise_to is not None:
            raise ValueError(
                "Expected something to optimise beside `save_noise_to`, but got nothing: no noise would be found. "
                "Leave it out, or pass what the noise is to be optimised for."
            )
        if noise_optimizer is None and noise_sampler is None:
            return stock(*args, **kwargs)
        request = bind_request(self, args, kwargs)
        if noise_optimizer is None:
            with hook_on(self, NoiseDraw(request, noise_sampler)):
                return stock(*args, **kwargs)
        callbacks = callback_on_optimization_step_end
        own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
        run = NoiseRun(self, noise_optimizer, request, callbacks, **own)
        try:
            with frozen_modules(self, run.decoder), hook_on(self, run):
                output = stock(*args, **kwargs)
        except BaseException as error:
            if run.result is not None:
                vars(error)["noise_result"] = run.result
            raise
        result = found_by(run, self)
        if not isinstance(output, tuple):
            output.noise_result = result
        return output

    def encode_prompt(self, *args, **kwargs):
        """The stock method; under optimisation its results are kept for the inner runs."""
        encode = super().encode_prompt  # pyright: ignore[reportAttributeAccessIssue]
        run = self._noise_run
        return encode(*args, **kwargs) if run is None else run.encode_prompt(encode, *args, **kwargs)

    def prepare_latents(self, *args, **kwargs):
        """The stock method, or under optimisation the hook: its noise is optimised before it is handed on."""
        run = self._noise_run
        if run is None:
            return super().prepare_latents(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return run.prepare_latents(self, *args, **kwargs)


def found_by(run: NoiseRun, pipe) -> NoiseResult:
    """The result of a call that is over."""
    if run.result is None:
        raise TypeError(
            f"Expected a call that prepares its latents by `prepare_latents`, but that of {type(pipe).__name__} did "
            "not, and nothing was optimised. Leave out the argument that takes the place of the noise."
        )
    return run.result


@contextlib.contextmanager
def hook_on(pipe, run: NoiseRun | NoiseDraw) -> Iterator[None]:
    """Let a run have the prompts and latents of a pipeline's call."""
    vars(pipe)["_noise_run"] = run
    try:
        yield
    finally:
        vars(pipe).pop("_noise_run", None)


def bind_request(pipe, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stock call by name. Raises `TypeError` for an unknown one."""
    bound = dict(inspect.signature(stock_call(type(pipe))).bind(pipe, *args, **kwargs).arguments)
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "self"}


@functools.cache
def hooked(cls: type) -> type:
    """A subclass of a pipeline class with the hook, unless it has one."""
    if hasattr(cls, "_noise_run"):
        return cls
    return type(cls.__name__, (NoiseOptimizationMixin, cls), {"__module__": cls.__module__})


def optimize_noise(
    pipe,
    prompt: str | list[str] | None,
    method: NoiseOptimizer | str,
    *,
    method_kwargs: dict[str, Any] | None = None,
    callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    save_noise_to: str | os.PathLike[str] | None = None,
    **call_kwargs,
) -> NoiseResult:
    """Find the initial noise of a call to any diffusers text-to-image pipeline, which stays as it is.

    Args:
        pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise.
        prompt: As in the pipeline's call. Each image is a problem of its own.
        method: Such as `ReNO(rewards={"pickscore": 1.0})`, or a name of `list_noise_optimizers()`.
        method_kwargs: The settings of a method given by name.
        callbacks: Per optimisation step; see `NoiseCallback`.
        noise_sampler: What noise is drawn from, that of candidates too: `"white"`, as in the pipeline itself, `"pink"`,
            `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, `PinkNoise(0.3)`, or any function `(shape,
            generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
        save_noise_to: A file for the best noise so far, for `NoiseResult.load`: there from the first step on, brought
            up to date every few seconds, when the run ends and when an exception or Ctrl-C ends it; always whole. One
            that is there already is replaced.
        call_kwargs: What `pipe(prompt, ...)` takes: steps, guidance, size, generator, latents ...

    Returns:
        The result; `pipe(prompt, latents=result.latents, **call_kwargs)` draws it. An exception on the way, Ctrl-C
        among them, leaves the pipeline as it was, and carries the best so far as its `noise_result`.

    Raises:
        ValueError: Before any model runs, for settings or a pipeline state that cannot work.
        TypeError: For an argument that the pipeline does not take, or a pipeline without a noise to optimise.
    """
    optimizer = as_noise_optimizer(method, method_kwargs)
    twin = copy.copy(pipe)
    twin.__class__ = hooked(type(pipe))
    vars(twin)["scheduler"] = copy.deepcopy(pipe.scheduler)  # a call sets the timesteps of its scheduler
    check_latents_taken(twin)
    request = bind_request(twin, (), {"prompt": prompt, **call_kwargs})
    own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
    run = NoiseRun(twin, optimizer, request, callbacks, render=False, **own)
    vars(twin)["_noise_run"] = run
    with frozen_modules(twin, run.decoder), torch.no_grad(), contextlib.suppress(NoiseFound):
        stock_call(type(pipe))(twin, **request)
    return found_by(run, twin)
