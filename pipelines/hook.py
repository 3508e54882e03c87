"""Entry points: `optimize_noise` for existing pipelines, and the hook in `prepare_latents` of our classes."""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from ..callbacks.noise_callback import CallbackSpec, NoiseCallback, as_callbacks
from ..checked_fields import check_value
from ..frames import check_frames
from ..private_names import execution_device
from ..schedulers.noise_samplers import NoiseSamplerSpec
from ..schedulers.variations import Vary
from .loading import release_rewards
from .loop import optimize
from .memory.tiny_decoder import as_loop_decoder
from .method import NoiseOptimizer
from .modular import as_standard
from .objective import Objective
from .presets import chosen_method, class_of_method
from .problem import NoiseProblem
from .request import (
    bind_request,
    check_argument_names,
    check_batch,
    check_given_tensors,
    check_noise_batch,
    check_noise_is_drawn,
    check_paths,
    check_pipeline,
    check_pipeline_class,
    check_request,
    check_takes_latents,
    groups_of,
    image_size,
    noise_sampler_of,
    prompts_of,
    require_prompt_text,
    reward_prompts_of,
    stock_errors,
)
from .result_folder import FolderBar, PromptEntry, only_writer, prompt_entries, reward_prompts_for
from .results.noise_file import NoiseFile
from .results.noise_result import NoiseResult
from .results.pipeline_code import SavedWithCode
from .results.resume import call_description, first_generator, known_run
from .sampling.apart import apart, hooked, set_aside
from .sampling.first_call import refuse_writes, stock_call, submodules_of
from .sampling.latent_space import LatentSpace
from .sampling.module_state import (
    DENOISERS,
    frozen_modules,
    refuse_replaced_latents,
    refuse_replaced_step,
    refuse_unsuited,
    shared_parts,
)
from .sampling.random_state import CallStart
from .sampling.redraw import check_redraw
from .sampling.sampler import PipelineSampler
from .sampling.turns import TURNS

Callbacks = CallbackSpec | Iterable[CallbackSpec] | None


class NoiseFound(Exception):
    """Ends the pipeline call of a run once its noise is known, when nobody asked for the final image."""

    def __init__(self, run: "NoiseRun") -> None:
        super().__init__()
        self.run = run


class OutputTuple(tuple):
    """The output of a call with `return_dict=False`, and the `noise_result` that a plain tuple cannot have."""

    noise_result: NoiseResult


class NoiseDraw:
    """One pipeline call on noise of a noise sampler, without optimization."""

    def __init__(self, pipe, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> None:
        refuse_replaced_latents(pipe)
        self.noise_sampler = noise_sampler_of(noise_sampler, request, groups_of(request))

    def hooks(self, pipe) -> dict[str, Callable[..., Any]]:
        return {"prepare_latents": functools.partial(self.prepare_latents, pipe)}

    def prepare_latents(self, pipe, *args, **kwargs):
        """Run the stock method on noise of the sampler."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        return space.on(pipe, space.draw_noise)


class NoiseRun:
    """One pipeline call under optimization: its request, its encoded prompts, and its result.

    Everything that can be refused is refused here, before any model runs.
    """

    def __init__(
        self,
        pipe,
        method: NoiseOptimizer,
        request: dict[str, Any],
        callbacks: Callbacks = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        reward_prompt: str | Sequence[str] | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        render: bool = True,
        known: NoiseResult | None = None,
        call: dict[str, Any] | None = None,
    ) -> None:
        self.method, self.request, self.render, self.known = method, request, render, known
        self.callbacks = as_callbacks(callbacks)
        check_noise_is_drawn(pipe, request)
        if torch.is_inference_mode_enabled():
            raise ValueError("Expected a call outside `torch.inference_mode()`, where no gradient exists. Remove it.")
        refuse_unsuited(pipe, method.gradient_mode)
        if method.may_preview:
            refuse_replaced_step(pipe)
        if method.gradient_mode is not None:
            refuse_writes(type(pipe))
        check_given_tensors(request)
        check_frames(method.frames, request.get("num_frames"))
        self.prompts, self.groups = prompts_of(request), groups_of(request)
        self.reward_prompts = reward_prompts_of(request, reward_prompt, len(self.prompts))
        check_batch(request, len(self.prompts))
        self.noise_sampler = noise_sampler_of(noise_sampler, request, self.groups)
        self.call = call or call_description(pipe, method, request, noise_sampler, reward_prompt)
        check_paths(save_noise_to=save_noise_to)
        self.noise_file = None if save_noise_to is None else NoiseFile(save_noise_to)
        self.objective: Objective = method.objective(pipe)
        if self.objective.requires_prompt and reward_prompt is None:
            require_prompt_text(request)
        self.objective.check_groups(self.groups)
        self.size = image_size(pipe, request)
        if self.size:
            self.objective.try_out(self.reward_prompts[0], *self.size, gradient=method.gradient_mode is not None)
        self.decoder = as_loop_decoder(method.decoder, pipe, list(submodules_of(pipe, DENOISERS).values()))
        self.encoded: list[Any] = []
        self.encoding = 0  # depth of calls of `encode_prompt` in one another
        self.began = False
        self.result: NoiseResult | None = None
        self.start = CallStart(request.get("generator"), execution_device(pipe))

    def frozen_modules(self, pipe) -> contextlib.AbstractContextManager[None]:
        return frozen_modules(pipe, self.method.gradient_mode, self.decoder, self.size)

    def hooks(self, pipe) -> dict[str, Callable[..., Any]]:
        """Return the functions that take the place of methods of the pipeline during its call."""
        hooks: dict[str, Callable[..., Any]] = {"prepare_latents": functools.partial(self.prepare_latents, pipe)}
        if hasattr(pipe, "encode_prompt"):
            hooks["encode_prompt"] = functools.partial(self.encode_prompt, pipe.encode_prompt)
        return hooks

    @contextlib.contextmanager
    def running(self, pipe) -> Iterator[None]:
        """Hook the run into a call of the pipeline; an exception after the optimization carries the result."""
        try:
            with self.frozen_modules(pipe), hooked(pipe, **self.hooks(pipe)), stock_errors(pipe, self):
                yield
        except BaseException as error:
            if self.result is not None:
                vars(error)["noise_result"] = self.result
            raise

    def encode_prompt(self, encode, *args, **kwargs):
        """Record what the call gets from its `encode_prompt`, be it replaced or not, for the inner runs to replay."""
        self.encoding += 1
        try:
            encoded = encode(*args, **kwargs)
        finally:
            self.encoding -= 1
        if not self.encoding:
            self.encoded.append(encoded)
        return encoded

    def prepare_latents(self, pipe, *args, **kwargs):
        """Draw the base noise as the stock method does, optimize it, and prepare the latents of the result."""
        method, self.began = self.method, True
        self.sampler = sampler = PipelineSampler(
            pipe,
            self.request,
            self.encoded,
            LatentSpace(pipe, args, kwargs, self.noise_sampler),
            clamp=method.clamp,
            decoder=self.decoder,
            checkpointing=method.checkpointing,
            through_denoiser=method.gradient_mode == "full",
            start=self.start,
            frames=method.frames,
        )
        check_noise_batch(sampler.base_noise, len(self.prompts), type(pipe).__name__)
        if not self.render:
            check_redraw(sampler)
        problem = NoiseProblem(pipe, sampler, self.prompts, self.reward_prompts, self.groups, self.request, self.call)
        # callbacks and rewards may draw with the pipeline
        with set_aside(pipe), torch.enable_grad(), sampler.checkpoints:
            self.result = optimize(method, problem, self.objective, self.callbacks, self.noise_file, self.known)
        if not self.render:
            raise NoiseFound(self)
        return sampler.prepare(self.result.noise.to(problem.dtype))

    def result_of(self, pipe) -> NoiseResult:
        """Return the result of a call that has ended."""
        if self.result is None:
            raise TypeError(
                f"Expected a call that prepares its latents with `prepare_latents`, but that of {type(pipe).__name__} "
                "did not, and nothing was optimized. Leave out the argument that replaces the noise."
            )
        return self.result


class NoiseOptimizationMixin(SavedWithCode):
    """Adds noise optimization to a diffusers text-to-image pipeline, as a hook in `prepare_latents`.

    `class Ours(NoiseOptimizationMixin, StableDiffusionXLPipeline)` is a whole pipeline class. With `method=None` and no
    `noise_sampler` every call goes to the stock class, bit-identical to it.

    The stock `__call__` runs once. When it reaches `prepare_latents`, its prompts are encoded; there the noise is
    optimized, each evaluation being the same stock `__call__` on a shallow copy (see `PipelineSampler`). Then the call
    goes on with the noise that was found: only this final run fires `callback_on_step_end`.
    """

    _optimizes_noise = True  # marks our classes among the bases of a pipeline

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the parameters of the stock class in `inspect.signature(cls.__call__)`, followed by ours."""
        super().__init_subclass__(**kwargs)
        if "__call__" not in vars(cls) and has_stock_call(cls):
            cls.__call__ = call_with_signature(cls)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Run the stock method, but keep the dtype of shared modules unless `dtype` is given.

        The stock method converts them to float32, in the original pipeline too.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        as_they_are = {"to": lambda pipe, *_, **__: pipe, "__module__": cls.__module__}
        unconverted = type(cls.__name__, (cls,), as_they_are)
        made = super(NoiseOptimizationMixin, unconverted).from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        made.__class__ = cls
        return made

    def __call__(
        self,
        *args,
        method: NoiseOptimizer | str | None = None,
        method_kwargs: Mapping[str, Any] | None = None,
        callbacks: Callbacks = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        variation_seed: int | None = None,
        variation_strength: float | None = None,
        reward_prompt: str | Sequence[str] | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """Run the stock call; with a method the initial noise is optimized first.

        Args:
            args, kwargs: The arguments of the stock pipeline.
            method: A method such as `ReNO(rewards={"clipscore": 1.0})`, a name of `list_methods()`, or a goal,
                "diverse", "faithful" or "best"; see `find_preset`.
            method_kwargs: Settings of the method, by name: `{"chunk_size": 1}`.
            callbacks: Callbacks per optimization step: functions of the state, or objects with `on_step_end(state)`;
                returning `False` stops the run. See `NoiseCallback`.
            noise_sampler: The distribution of the initial noise, optimized or not: `"white"`, as in the stock pipeline,
                `"pink"`, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
            variation_seed: The seed of variations of the noise of the first image of each prompt, one more for each
                image. In place of `noise_sampler`; `Vary` has more settings.
            variation_strength: From 0, the same image, to 1, another one; 0.2 by default.
            reward_prompt: The prompt that rewards are asked about instead of the prompt of the call: one, or one for
                each image.
            save_noise_to: A file for the best noise so far, always complete, whatever ends the call. See
                `optimize_noise`.

        Returns:
            The output of the stock pipeline, with a `noise_result` attribute. An exception, Ctrl-C included, carries
            the best so far as its `noise_result`.

        Raises:
            ValueError: For settings that cannot work, before any model runs.
        """
        stock = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        noise_sampler = varied(noise_sampler, variation_seed, variation_strength)
        if method is None:
            check_nothing_beside(
                method_kwargs=method_kwargs,
                callbacks=callbacks,
                save_noise_to=save_noise_to,
                reward_prompt=reward_prompt,
            )
        found = None
        if method is not None:
            given = (noise_sampler, callbacks, named_arguments(type(self), args, kwargs))
            found, noise_sampler, callbacks = chosen_method(self, method, method_kwargs, *given)
        check_argument_names(self, kwargs, [parameter.name for parameter in self.own_parameters()], found)
        if found is None and noise_sampler is None:
            with TURNS.take([self]):  # another thread may be in a run of this pipeline
                return stock(*args, **kwargs)
        check_pipeline_class(type(self))
        request = bind_request(self, args, kwargs)
        check_request(self, request)
        if found is None:
            draw = NoiseDraw(self, request, noise_sampler)
            with TURNS.take([self]), hooked(self, **draw.hooks(self)):
                return stock(*args, **kwargs)
        with TURNS.take(shared_parts(self, found.decoder)):
            return self.optimized_call(
                NoiseRun(self, found, request, callbacks, noise_sampler, reward_prompt, save_noise_to),
                functools.partial(stock, *args, **kwargs),
            )

    def optimized_call(self, run: NoiseRun, stock: Callable[[], Any]) -> Any:
        """Return the output of a stock call whose noise is optimized first."""
        with run.running(self):
            output = stock()
        result = run.result_of(self)
        if isinstance(output, tuple):
            output = OutputTuple(output)
        output.noise_result = result
        return output

    def release_rewards(self) -> None:
        """Forget the rewards, features and decoders that this pipeline loaded by name, which frees their memory."""
        release_rewards(self)

    @classmethod
    def own_parameters(cls) -> list[inspect.Parameter]:
        """Return the keyword parameters that the class adds to the stock call."""
        parameters = inspect.signature(NoiseOptimizationMixin.__call__).parameters.values()
        return [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

    @classmethod
    def call_documentation(cls) -> str:
        """Return the docstring of `__call__`."""
        return inspect.cleandoc(NoiseOptimizationMixin.__call__.__doc__ or "")


def varied(noise_sampler: NoiseSamplerSpec | None, seed: int | None, strength: float | None) -> NoiseSamplerSpec | None:
    """Return the noise sampler of variations, or the given one if none are asked for."""
    asked = {name: value for name, value in {"seed": seed, "strength": strength}.items() if value is not None}
    if asked and noise_sampler is not None:
        raise ValueError(f"Expected `noise_sampler` or `variation_{next(iter(asked))}`, but got both. Leave one out.")
    limits = {field.name: field.metadata.get("interval") for field in dataclasses.fields(Vary)}
    for name, value in asked.items():
        check_value(f"variation_{name}", value, int if name == "seed" else float, limits[name])
    return Vary(**{"seed": 0, **asked}) if asked else noise_sampler


def check_nothing_beside(**arguments: Any) -> None:
    """Raise `ValueError` for arguments that mean nothing without a method."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(
            f"Expected a method beside `{given[0]}`, but got none: there is nothing to optimize. Leave it out, or pass "
            "`method` or what the noise is to be optimized for."
        )


def has_stock_call(cls: type) -> bool:
    try:
        stock_call(cls)
    except TypeError:
        return False
    return True


def named_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stock call by name, before they are checked."""
    names = [name for name in inspect.signature(stock_call(cls)).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def call_with_signature(cls: Any) -> Any:
    """Return the inherited `__call__` of a pipeline class, with the signature of the stock class and our parameters."""
    inherited = cls.__call__

    @functools.wraps(inherited)
    def call(self, *args, **kwargs):
        return super(cls, self).__call__(*args, **kwargs)

    stock = list(inspect.signature(stock_call(cls)).parameters.values())
    rest = [parameter for parameter in stock if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    ours = cls.own_parameters()
    named = [parameter for parameter in stock if parameter not in rest and parameter.name not in {p.name for p in ours}]
    vars(call)["__signature__"] = inspect.Signature([*named, *ours, *rest])
    call.__doc__ = cls.call_documentation()
    return call


@overload
def optimize_noise(
    pipe,
    prompt: str | list[str] | None,
    method: NoiseOptimizer | str,
    *,
    method_kwargs: Mapping[str, Any] | None = None,
    callbacks: Callbacks = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    reward_prompt: str | Sequence[str] | None = None,
    save_noise_to: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    folder: None = None,
    **call_kwargs,
) -> NoiseResult: ...


@overload
def optimize_noise(
    pipe,
    prompt: list[str],
    method: NoiseOptimizer | str,
    *,
    folder: str | os.PathLike[str],
    method_kwargs: Mapping[str, Any] | None = None,
    callbacks: Callbacks = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    reward_prompt: str | Sequence[str] | None = None,
    **call_kwargs,
) -> list[NoiseResult]: ...


def optimize_noise(
    pipe,
    prompt: str | list[str] | None,
    method: NoiseOptimizer | str,
    *,
    method_kwargs: Mapping[str, Any] | None = None,
    callbacks: Callbacks = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    reward_prompt: str | Sequence[str] | None = None,
    save_noise_to: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    **call_kwargs,
) -> NoiseResult | list[NoiseResult]:
    """Find the initial noise of a call to any diffusers text-to-image pipeline. The pipeline stays unmodified.

    The run waits until no run in another thread uses this pipeline or one of its modules. Callbacks and rewards may
    draw with the pipeline.

    Args:
        pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise, or a loaded modular pipeline
            with blocks from text to image that draw it.
        prompt: As in the pipeline's call. Each image is optimized independently unless the method compares images.
        method: A method such as `ReNO(rewards={"pickscore": 1.0})`, a name of `list_methods()`, or a goal, "diverse",
            "faithful" or "best": the method, settings and noise sampler that `find_preset` picks for this model. A log
            message says which, and so does `result.reports["preset"]`; the arguments of the call remain as they are.
        method_kwargs: The settings of a method given by name; of a goal those that differ from its preset.
        callbacks: Callbacks per optimization step. See `NoiseCallback`.
        noise_sampler: The distribution of the noise, candidates included: `"white"`, as in the pipeline itself,
            `"pink"`, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, `PinkNoise(0.3)`, or any function
            `(shape, generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
        reward_prompt: The prompt that rewards are asked about instead of the prompt of the call: one, or one for each
            image.
        save_noise_to: A file for the best noise so far, to be read by `NoiseResult.load`. It is written after the first
            step, every few seconds, and when the run ends in any way; it is always whole. An existing file is replaced.
        resume_from: The file of a run of the same call that was interrupted. The run goes on where it stopped, and its
            result equals that of one that was never interrupted. A complete one is returned at once, without its
            images. With the path of `save_noise_to`, a missing file and a half-done one of a method whose state cannot
            be stored start anew; so a loop over prompts that gives both can be started again at any time.
        folder: A folder for the results of a list of prompts, each of which is optimized by itself: files such as
            `0007-a-red-square.safetensors`. Finished prompts are not run again, and half-done ones go on, as with
            `resume_from`. `generator` is then a seed s, from which prompt k gets s + k, one seed for each prompt, or a
            generator for its seed and device.
        call_kwargs: The other arguments of `pipe(prompt, ...)`: steps, guidance, size, generator, latents ...

    Returns:
        The result; `pipe(prompt, latents=result.latents, **call_kwargs)` generates its images. An exception, Ctrl-C
        included, leaves the pipeline as it was, and carries the best so far as its `noise_result`. With `folder` a list
        of results on the CPU without images, one for each prompt; an exception carries the complete ones as its
        `noise_results` too.

    Raises:
        ValueError: Before any model runs, for settings or a pipeline state that cannot work, and for a file of another
            call, with the differences.
        FileNotFoundError: If there is no file `resume_from`.
        TypeError: For an argument that the pipeline does not take, or a pipeline without a noise to optimize.
    """
    check_pipeline(pipe)
    pipe = as_standard(pipe)
    check_pipeline_class(type(pipe))
    ours = list(inspect.signature(optimize_noise).parameters)
    check_argument_names(pipe, call_kwargs, ours, class_of_method(pipe, method, call_kwargs))
    given = (noise_sampler, callbacks, {"prompt": prompt, **call_kwargs}, folder is not None)
    method, noise_sampler, callbacks = chosen_method(pipe, method, method_kwargs, *given)
    check_paths(save_noise_to=save_noise_to, resume_from=resume_from, folder=folder)
    if folder is not None:
        check_not_beside_folder(save_noise_to=save_noise_to, resume_from=resume_from)
        texts = reward_prompts_for(prompt, reward_prompt)
        with only_writer(Path(folder)):
            entries = prompt_entries(prompt or (), texts, folder, call_kwargs.pop("generator", None))
            return optimize_entries(pipe, entries, method, callbacks, noise_sampler, call_kwargs)
    with TURNS.take(shared_parts(pipe, method.decoder)), apart(pipe) as twin:
        request = checked_request(twin, prompt, call_kwargs)
        call, known = call_description(twin, method, request, noise_sampler, reward_prompt), None
        if resume_from is not None:
            known = known_run(resume_from, save_noise_to, call)
        if known is not None and known.complete:
            if save_noise_to is not None and Path(save_noise_to).absolute() != Path(resume_from or "").absolute():
                known.save(Path(save_noise_to))
            return known
        if known is not None and request.get("generator") is None and request.get("latents") is None:
            request |= first_generator(known, execution_device(twin))
        run = NoiseRun(
            twin,
            method,
            request,
            callbacks,
            noise_sampler,
            reward_prompt,
            save_noise_to,
            render=False,
            known=known,
            call=call,
        )
        try:
            with run.running(twin), torch.no_grad():
                stock_call(type(pipe))(twin, **request)
        except NoiseFound as found:
            if found.run is not run:
                raise
        return run.result_of(twin)


def checked_request(pipe, prompt: Any, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, after they were checked."""
    check_takes_latents(pipe)
    request = bind_request(pipe, (), {"prompt": prompt, **call_kwargs})
    check_request(pipe, request)
    return request


def optimize_entries(
    pipe,
    entries: Sequence[PromptEntry],
    method: NoiseOptimizer,
    callbacks: Sequence[NoiseCallback],
    noise_sampler: NoiseSamplerSpec | None,
    call_kwargs: dict[str, Any],
) -> list[NoiseResult]:
    """Optimize each prompt of a folder by itself, after its files were found to be of the same calls."""
    for entry in entries:
        request = checked_request(pipe, entry.prompt, call_kwargs | entry.arguments)
        known_run(entry.file, entry.file, call_description(pipe, method, request, noise_sampler, entry.reward_prompt))
    bar, results = FolderBar(pipe, len(entries), method.evaluations or 100), []
    own: dict[str, Any] = {"callbacks": [bar, *callbacks], "noise_sampler": noise_sampler}
    try:
        for entry in entries:
            files = {"save_noise_to": entry.file, "resume_from": entry.file, "reward_prompt": entry.reward_prompt}
            result = optimize_noise(pipe, entry.prompt, method, **own, **files, **call_kwargs, **entry.arguments)
            results.append(result.without_images())
            bar.next_run()
    except BaseException as error:
        vars(error)["noise_results"] = results
        raise
    finally:
        bar.close()
    return results


def check_not_beside_folder(**arguments: Any) -> None:
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"Expected `folder` or `{given[0]}`, but got both. A folder has a file for each prompt.")
