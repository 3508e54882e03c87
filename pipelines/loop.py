"""The loop that every method shares: evaluate, keep the best, tell the callbacks, move the noise."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..callbacks.early_stopping import TimeBudget
from ..callbacks.noise_callback import CallbackSpec, NoiseCallback, as_callbacks
from ..callbacks.noise_state import Best, NoiseState
from ..callbacks.progress import ProgressBar
from ..private_names import version_of
from ..rewards.contract.reward import NonFiniteReward
from .memory.graph_size import SavedBytes, fitting_chunk_size, free_memory
from .memory.tiny_decoder import FULL_DECODER
from .method import NoiseOptimizer
from .noise_math import per_image, per_sample_norm
from .objective import Objective
from .problem import NoiseProblem
from .results.frequency_bands import band_energies
from .results.noise_file import NoiseFile
from .results.noise_result import NoiseResult, Progress
from .results.pipeline_description import portable
from .results.provenance import provenance_of
from .results.resume import (
    NotStorable,
    continued_parts,
    continuing,
    kept_attributes,
    progress_of,
    set_attributes,
    step_reached,
    unfit,
)
from .sampling.module_state import refuse_backward_error, refuse_lost_gradient
from .sampling.sample import Sample
from .sampling.sampler import Gradient, PipelineSampler
from .stages import StagedMethod


def optimize(
    method: NoiseOptimizer,
    problem: NoiseProblem,
    objective: Objective,
    callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
    noise_file: NoiseFile | None = None,
    known: NoiseResult | None = None,
) -> NoiseResult:
    """Run a method on a problem.

    Args:
        method: The method.
        problem: The call whose noise is to be found.
        objective: The objective that the method returned for the pipeline.
        callbacks: Callbacks per optimization step.
        noise_file: The file that holds the best noise from the first step on, and the result at the end.
        known: The result of an interrupted run of the same call, to be continued.

    Returns:
        The result. An exception carries what was found before it as its `noise_result`.
    """
    run = NoiseState(problem.pipe, problem.reward_prompts, method.evaluations or 1, problem.noise)
    own = [*objective.callbacks, *as_callbacks(callbacks)]
    bars = [] if any(isinstance(callback, ProgressBar) for callback in own) else [ProgressBar()]
    budget = [] if method.seconds is None else [TimeBudget(method.seconds, min(2, method.closing))]
    loop = OptimizationLoop(method, problem, objective, run, [*bars, *own, *budget], noise_file)
    try:
        try:
            loop.run_all(known)
        finally:
            loop.end()
        return loop.saved_result()
    except BaseException as error:
        loop.rescue(error)
        raise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepRow:
    """The record of a step: `(B,)` losses and norms, `(B, 3)` energies by band, and `(B,)` for each score."""

    loss: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    scores: dict[str, torch.Tensor]


class OptimizationLoop:
    """One run of a method. See `optimize`."""

    def __init__(
        self,
        method: NoiseOptimizer,
        problem: NoiseProblem,
        objective: Objective,
        run: NoiseState,
        callbacks: Sequence[NoiseCallback],
        noise_file: NoiseFile | None = None,
    ) -> None:
        self.method, self.problem, self.objective = method, problem, objective
        self.moving = StagedMethod(method, problem) if method.searched(problem) else method
        self.run, self.callbacks, self.noise_file = run, callbacks, noise_file
        self.rows: list[StepRow] = []
        self.initial_images: torch.Tensor | None = None
        self.full_decoder_images: dict[str, torch.Tensor] = {}
        self.total: torch.Tensor | None = None
        self.leaf = self.evaluated = problem.noise
        self.progress: Progress | None = None
        self.complete = self.has_gradient = False

    def run_all(self, known: NoiseResult | None = None) -> None:
        self.start(0 if known is None else step_reached(known))
        if known is not None:
            self.take_up(known)
        self.mark()
        for step in itertools.count(len(self.rows)):
            if self.run.stopped or (self.method.evaluations is not None and step >= self.method.evaluations):
                break
            self.evaluate(step)
            if self.run.stopped or not self.moves_after(step):
                break
            self.move()
            self.mark()
        self.finish()
        self.decode_fully()
        self.complete = True

    def start(self, step: int = 0) -> None:
        """Prepare the method and the callbacks for a run from this step on."""
        self.chunk_size = chunk_size_of(self.method, self.problem)
        self.state = self.moving.start(self.problem)
        self.run.step = step - 1
        for callback in self.callbacks:
            if hasattr(callback, "on_run_start"):
                callback.on_run_start(self.run)

    def parts(self) -> dict[str, Any]:
        """Return all that a run needs to go on from where it is, between two steps."""
        run, best = self.run, self.run.best
        return {
            "step": len(self.rows),
            "noise": run.noise,
            "active": run.active,
            "stopped": run.stopped,
            "best": {"loss": best.loss, "step": best.step, "noise": best.noise},
            "images": best.images is not None,
            "state": self.state,
            "objective": kept_attributes(self.objective),
            "callbacks": {name: kept_attributes(each) for name, each in continuing(self.callbacks).items()},
            "streams": self.problem.sampler.start.own.generator(),
        }

    def mark(self) -> None:
        """Remember where the run is, so that it can be continued from here, if there is a file to continue from."""
        if self.noise_file is None:
            return
        try:
            self.progress = progress_of(self.parts(), self.run.reports)
        except NotStorable:
            self.progress = None

    def take_up(self, known: NoiseResult) -> None:
        """Go on from where an interrupted run was."""
        try:
            begun = self.parts()
        except NotStorable as reason:
            raise unfit(str(reason)) from None
        run, parts = self.run, continued_parts(begun, known, self.problem.noise)
        assert known.band_changes is not None  # or `continued_parts` had refused it
        for step in range(parts["step"]):
            loss, norm, bands = (
                values[step].to(run.noise.device) for values in (known.losses, known.norms, known.band_changes)
            )
            scores = {name: values[step].to(run.noise.device) for name, values in known.scores.items()}
            self.rows.append(StepRow(loss=loss, norm=norm, bands=bands, scores=scores))
        self.has_gradient = True  # the interrupted run has checked it
        run.noise, run.active, run.stopped = parts["noise"], parts["active"], parts["stopped"]
        run.reports, run.started = parts["reports"], run.started - parts["seconds"]
        run.best = Best(**parts["best"], evaluations=len(self.rows))
        self.state = parts["state"]
        set_attributes(self.objective, parts["objective"])
        for name, callback in continuing(self.callbacks).items():
            set_attributes(callback, parts["callbacks"][name])
        if parts["images"]:
            self.initial_images, best = self.drawn(self.problem.noise), self.drawn(run.best.noise)
            run.best = dataclasses.replace(run.best, images=best)

    @torch.no_grad()
    def drawn(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the images of a noise that was evaluated before."""
        return self.sample_of(self.problem.sampler, noise, 0).images

    def end(self) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "on_run_end"):
                callback.on_run_end(self.run)

    def moves_after(self, step: int) -> bool:
        """Return whether the noise moves after this step."""
        return self.method.returns == "last" or step + 1 != self.method.evaluations

    def evaluate(self, step: int) -> None:
        """Score the current noise, update the best, and call the callbacks."""
        run, method = self.run, self.method
        gradient, preview = self.moving.needs(step, self.state)
        gradient = gradient if self.moves_after(step) else None
        self.leaf = run.noise.detach().requires_grad_(gradient is not None)
        sample = self.sample_of(self.problem.sampler, self.leaf, step, gradient, preview)
        try:
            with torch.set_grad_enabled(gradient is not None):
                loss, scores = self.objective.evaluate(sample)
                self.check_loss(loss, gradient, step)
                self.total = loss + method.regularizer(self.leaf)
        except NonFiniteReward as error:
            if step == 0:
                raise
            self.give_up(str(error))
            return
        run.step, run.images, run.scores = step, sample.generated_images, scores
        self.evaluated = run.noise
        run.loss = loss.detach().where(run.active, torch.nan)
        self.record(self.moving.inspect(run, self.objective, self.state))
        if method.seconds is not None:
            run.steps = math.ceil(len(self.rows) * max(1, method.seconds / max(run.elapsed, 1e-9)))
        try:
            for callback in self.callbacks:
                self.call_back(callback)
        except NonFiniteReward as error:  # of a held-out reward
            if step == 0:
                raise
            self.give_up(str(error))
        if self.noise_file is not None:
            self.noise_file.keep(self.result)

    def call_back(self, callback: NoiseCallback) -> None:
        """Call a callback after a step.

        Raises:
            ValueError: For one that writes into the noise or the images.
        """
        run = self.run
        kept = [each for each in (run.noise, run.images, run.best.noise, run.best.images) if each is not None]
        versions = list(map(version_of, kept))
        if asks_to_stop(callback.on_step_end(run)):
            run.stop()
        if list(map(version_of, kept)) != versions:
            raise ValueError(
                f"Expected a callback that leaves noise and images as they are, but {callback_name(callback)} "
                "wrote into them. Change a copy: `state.noise.clone()`."
            )

    def sample_of(
        self,
        sampler: PipelineSampler,
        noise: torch.Tensor,
        step: int,
        gradient: Gradient = None,
        preview: bool | None = None,
    ) -> Sample:
        """Return the sample that the objective evaluates."""
        seeds = [seed + step for seed in self.problem.seeds]
        groups, prompts = self.problem.groups, self.run.prompts
        preview = self.method.previews if preview is None else preview
        return Sample(sampler, noise, prompts, groups, seeds, gradient, preview, self.chunk_size)

    def check_loss(self, loss: torch.Tensor, gradient: Gradient, step: int) -> None:
        batch = len(self.run.noise)
        if not isinstance(loss, torch.Tensor) or loss.shape != (batch,):
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"Expected the objective to return a tensor of shape ({batch},), but got {got}.")
        if gradient is not None and not loss.requires_grad:
            raise ValueError(
                "Expected a loss that depends differentiably on the noise, but it carries no gradient. Remove "
                "`.detach()`, `.item()` and numpy from the objective, or use a method without gradients, such as "
                "`BestOfN`."
            )
        if step == 0 and not loss.detach().isfinite().all():
            raise NonFiniteReward(f"Expected a finite loss for the baseline, but got {loss.tolist()}.")

    def record(self, eligible: torch.Tensor | None = None) -> None:
        """Record this step, and update the best of the samples that are `eligible`, a `(B,)` bool mask."""
        run, best = self.run, self.run.best
        if self.rows and self.rows[0].scores.keys() != run.scores.keys():
            raise ValueError(
                f"Expected the scores {list(self.rows[0].scores)} at each step, but got {list(run.scores)} at step "
                f"{run.step}. An objective returns the same scores each time."
            )
        norm = per_sample_norm(run.noise) / math.sqrt(run.noise[0].numel())
        bands = band_energies(run.noise - self.problem.noise).where(run.active[:, None], torch.nan)
        self.rows.append(StepRow(loss=run.loss, norm=norm, bands=bands, scores=run.scores))
        better = run.loss < best.loss  # false for NaN
        if run.step == 0:
            self.initial_images = run.images
            best = dataclasses.replace(best, images=run.images)
        elif eligible is not None:
            better = better & eligible
        images = best.images
        if run.images is not None and images is not None:
            images = torch.where(per_image(better, images), run.images, images)
        run.best = Best(
            loss=torch.where(better, run.loss, best.loss),
            step=torch.where(better, run.step, best.step),
            noise=torch.where(per_image(better, run.noise), run.noise, best.noise),
            images=images,
            evaluations=len(self.rows),
        )

    def move(self) -> None:
        """Take the gradient if the method needs one, and make the step of the method."""
        run, gradient = self.run, None
        if self.leaf.requires_grad:
            gradient = self.differentiate()
            finite = gradient.flatten(1).isfinite().all(1)
            gradient = gradient.nan_to_num(0, 0, 0) * per_image(finite, gradient)
            self.stop_samples(run.active & ~finite)
        self.total = None
        moved = self.moving.step(run, gradient, self.state).detach()
        run.noise = torch.where(per_image(run.active, moved), moved, run.noise)

    def differentiate(self) -> torch.Tensor:
        """Return the gradient of loss and regularizer, `(B, C, H, W)`.

        Raises:
            ValueError: For a gradient that torch cannot compute, or that compiled modules lose, with the remedy.
        """
        assert self.total is not None
        try:
            (gradient,) = torch.autograd.grad(self.total.sum(), self.leaf)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            refuse_backward_error(self.problem.pipe, error)
            raise
        if not self.has_gradient and not gradient.any():
            refuse_lost_gradient(self.problem.pipe, self.method.gradient_mode)
        self.has_gradient = True
        return gradient

    def finish(self) -> None:
        """Evaluate the last noises of the method, for all samples; callbacks cannot stop them."""
        for noise in self.moving.finish(self.run, self.objective, self.state):
            self.run.noise, self.run.active = noise.detach(), torch.ones_like(self.run.active)
            self.run.steps = max(self.run.steps, len(self.rows) + 1)
            self.evaluate(len(self.rows))

    @torch.no_grad()
    def decode_fully(self) -> None:
        """Decode and score the baseline and the result of a run with a tiny decoder by the pipeline's own decoder."""
        if self.problem.sampler.decoder is None or self.initial_images is None:
            return
        sampler, report = self.problem.sampler.with_own_decoder(), {}
        for name, noise in (("initial", self.problem.noise), ("best", self.returned())):
            sample = self.sample_of(sampler, noise.detach(), 0)
            loss, scores = self.objective.evaluate(sample)
            self.full_decoder_images[name] = sample.images
            report[f"{name}_scores"] = {name: values.tolist() for name, values in scores.items()}
            report[f"{name}_loss"] = loss.tolist()
        self.run.reports[FULL_DECODER] = report

    def returned(self) -> torch.Tensor:
        """Return the noise of the result, `(B, C, H, W)`."""
        return self.run.noise if self.method.returns == "last" else self.run.best.noise

    def stop_samples(self, broken: torch.Tensor) -> None:
        """Stop the samples whose gradient is not finite."""
        if broken.any():
            self.run.stop("non-finite gradient", broken)
            warnings.warn(
                f"The gradient of sample {broken.nonzero().flatten().tolist()} is not finite after step "
                f"{self.run.step}: it keeps its best noise so far.",
                stacklevel=2,
            )

    def give_up(self, why: str) -> None:
        """End the run with the best so far."""
        self.run.stop("non-finite reward")
        warnings.warn(f"The run stops after step {self.run.step} and keeps the best so far: {why}", stacklevel=2)

    def saved_result(self) -> NoiseResult:
        """Return the final result, after it was written to the noise file, if there is one."""
        result = self.result()
        if self.noise_file is not None:
            result.save(self.noise_file.path)
        return result

    def rescue(self, error: BaseException) -> None:
        """Attach what was found so far to an exception, and write it to the noise file."""
        if not self.run.best.evaluations:
            return
        result = self.result()
        if not self.complete:
            result.provenance["stopped"] = self.run.stopped or type(error).__name__
        vars(error)["noise_result"] = result
        if self.noise_file is not None:
            self.noise_file.write_if_possible(result)

    def result(self) -> NoiseResult:
        """Return the result so far."""
        problem, run, best = self.problem, self.run, self.run.best
        rows, last, noise = self.rows[: best.evaluations], self.method.returns == "last", self.returned()
        last_images = run.images if run.noise is self.evaluated else None
        latents = problem.sampler.to_latents(noise.to(problem.dtype))
        return NoiseResult(
            noise=noise.detach(),
            latents=latents.detach(),
            scores={name: torch.stack([row.scores[name] for row in rows]) for name in rows[0].scores},
            losses=torch.stack([row.loss for row in rows]),
            norms=torch.stack([row.norm for row in rows]),
            best_step=torch.full_like(best.step, best.evaluations - 1) if last else best.step,
            provenance={
                "method": type(self.method).__name__,
                "settings": portable(self.method.settings()),
                **provenance_of(problem, self.objective, run),
                "steps": best.evaluations,
                "complete": self.complete,
                "call": problem.call,
            },
            generator_states=problem.sampler.states_for_redraw(),
            reports=dict(run.reports),
            initial_noise=problem.noise.detach(),
            band_changes=torch.stack([row.bands for row in rows]),
            images=self.full_decoder_images.get("best", last_images if last else best.images),
            initial_images=self.full_decoder_images.get("initial", self.initial_images),
            progress=None if self.complete else self.progress,
        )


def asks_to_stop(returned: Any) -> bool:
    """Return whether a callback returned `False`, also that of numpy or torch."""
    value = returned.item() if getattr(returned, "ndim", None) == 0 else returned
    return value is False


def callback_name(callback: Any) -> str:
    function = getattr(callback, "function", callback)
    return getattr(function, "__name__", type(function).__name__)


def chunk_size_of(method: NoiseOptimizer, problem: NoiseProblem) -> int | None:
    """Return the number of images in memory at a time; `None` for the whole batch.

    "auto" samples one image and measures its graph under each checkpointing policy in turn, until the whole batch fits.

    Raises:
        ValueError: For a number, if the call cannot be split into chunks.
    """
    setting, batch = method.chunk_size, len(problem.noise)
    if setting is None or batch == 1:
        return None
    try:
        one = problem.sampler.chunk([0])
    except ValueError:
        if setting != "auto":
            raise
        return None
    if isinstance(setting, int):
        return setting if setting < batch else None
    if method.gradient_mode is None:
        return None
    size, checkpoints = None, problem.sampler.checkpoints
    checkpoints.settle()
    for policy in checkpoints.ladder:
        checkpoints.take(policy)
        with SavedBytes() as saved, torch.enable_grad():
            one.images(problem.noise[:1].detach().requires_grad_(), method.gradient_mode, method.previews)
        size = fitting_chunk_size(batch, saved.peak, free_memory(problem.noise.device))
        if size is None:
            break
    return size
