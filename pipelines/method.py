"""The loop that every method shares: evaluate, keep the best, tell the callbacks, move the noise."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch

from ..callbacks.noise_callback import CallbackSpec, NoiseCallback, as_callbacks
from ..callbacks.noise_state import NoiseState
from ..callbacks.progress import ProgressBar
from ..rewards.contract.reward import NonFiniteReward, check_reward_device
from .memory.checkpointing import Checkpointing, check_checkpointing
from .memory.graph_size import ChunkSetting, SavedBytes, check_chunk_size, fitting_chunk_size, free_memory
from .memory.tiny_decoder import FULL_DECODER
from .noise_math import per_image, per_sample_norm
from .objective import Objective
from .problem import NoiseProblem
from .results.frequency_bands import band_energies
from .results.noise_file import NoiseFile
from .results.noise_result import NoiseResult
from .results.provenance import provenance_of
from .sampling.internals import execution_device
from .sampling.sample import Sample
from .sampling.sampler import Clamp, Gradient, PipelineSampler


class NoiseOptimizer:
    """A method: what it looks at, how it moves the noise, what it returns. `run` owns the loop.

    Subclasses are frozen, keyword-only dataclasses whose fields are the method's settings.

    Attributes:
        steps: Evaluations, the plain result included: the noise is moved `steps − 1` times, or after each of them by a
            method that returns the last.
        gradient: "full", "frozen" or `None`; see `PipelineSampler.images`.
        preview: Look at the x0 estimate of one model call instead of the whole chain.
        clamp: "straight_through" or "hard"; see `PipelineSampler`.
        chunk_size: How many images are in memory with their graphs at a time: the gradient is the same, for one more
            forward pass. "auto" for as many as fit, by what the graph of one image holds; `None` for all.
        checkpointing: What of denoiser and decoder is computed again in the backward pass instead of kept: the same
            images and gradients in less memory. "none": nothing. "blocks": each block, for one more forward pass.
            "steps": each call of the denoiser, and in it each block, for two more; the memory hardly grows with the
            number of denoising steps. "auto": the first of these whose graph takes at most half of the free memory,
            counted while the first one is built. Beside a `chunk_size` that is a number, it is the graph of a chunk
            that has to fit; beside `chunk_size="auto"` images are drawn a few at a time only where "steps" is not
            enough for all.
        decoder: A tiny autoencoder that decodes in the place of the pipeline's own while the noise is optimised, an
            approximation for less time and memory: a Hub id such as "madebyollin/taesdxl", a folder, or a loaded
            module. The images of the result are drawn with the pipeline's own; see `NoiseResult`. `None` for that
            throughout.
        reward_device: Where rewards that are given by name are loaded, such as "cuda:1"; `None` for the pipeline's
            device. Those that are loaded already stay where they are.
        returns: "best", the noise of the lowest loss, or "last", the noise after the last move, which is not evaluated.
        final_steps: How many evaluations `finish` asks for after these steps.
    """

    steps: int
    gradient: Gradient = "full"
    preview: bool = False
    clamp: Clamp = "straight_through"
    chunk_size: ChunkSetting = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None
    returns: ClassVar[Literal["best", "last"]] = "best"
    final_steps: int = 0

    def objective(self, pipe) -> Objective:
        """What is minimised. Called once, before any model runs: the place to refuse bad settings."""
        raise NotImplementedError(f"{type(self).__name__} must define `objective(pipe)`.")

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        """`(B,)` penalty that steers the noise but does not count when the best is chosen."""
        return 0.0

    def start(self, problem: NoiseProblem) -> Any:
        """What the method remembers from step to step, such as momentum."""
        return None

    def step(self, state: NoiseState, gradient: Any, memory: Any) -> torch.Tensor:
        """The method: the next noise `(B, C, H, W)`.

        `state` holds what was evaluated: `state.noise`, its `state.loss`, the best so far; `gradient` `(B, C, H, W)` is
        that of the loss with respect to the noise, `None` for a method without; `memory` is what `start` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `step(state, gradient, memory)`.")

    def inspect(self, state: NoiseState, objective: Objective, memory: Any) -> torch.Tensor | None:
        """Look at what was evaluated, before the best is chosen and callbacks see it.

        Returns:
            `(B,)` bool, the samples for which this step may be the best; `None` is all. The first step counts in any
            case. Samples may be stopped: `state.stop(reason, samples)`.
        """
        return None

    def finish(self, state: NoiseState, objective: Objective, memory: Any) -> Iterable[torch.Tensor]:
        """Noises `(B, C, H, W)` to evaluate at the end, one after the other, also of a run that was stopped.

        For methods that choose among all that was seen; asked for the next when the last has been evaluated.
        """
        return ()

    def watchers(self) -> list[NoiseCallback]:
        """Callbacks that belong to the method, such as one that stops it; they see each step before the user's."""
        return []

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot work."""
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Expected `steps` to be an integer of 1 or more, but got {self.steps!r}.")
        choices = {"gradient": ("full", "frozen", None), "clamp": ("straight_through", "hard")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {getattr(self, name)!r}.")
        check_chunk_size(self.chunk_size)
        check_checkpointing(self.checkpointing)
        check_reward_device(self.reward_device)

    def device_of_rewards(self, pipe) -> torch.device:
        """Where rewards that are given by name are loaded."""
        return torch.device(self.reward_device or execution_device(pipe))

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for the provenance."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | None)}

    def run(
        self,
        problem: NoiseProblem,
        objective: Objective,
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
        noise_file: NoiseFile | None = None,
    ) -> NoiseResult:
        """Optimise. An exception on the way carries what was found so far as its `noise_result`.

        The file, if one is given, holds the best noise so far from the first step on, and the result at the end.
        """
        state = NoiseState(problem.pipe, problem.prompts, self.steps + self.final_steps, problem.noise)
        every = [ProgressBar(), *self.watchers(), *as_callbacks(callbacks)]
        loop = OptimizationLoop(self, problem, objective, state, every, noise_file)
        try:
            try:
                loop.run()
            finally:
                loop.end()
            return loop.saved_result()
        except BaseException as error:
            loop.rescue(error)
            raise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepRow:
    """What is kept of a step: `(B,)` losses and norms, `(B, 3)` energies by band, and a `(B,)` for each score."""

    loss: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    scores: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BestSoFar:
    """The best after so many steps. Replaced as a whole: Ctrl-C finds all that a step brought, or nothing of it."""

    steps: int
    noise: torch.Tensor
    step: torch.Tensor
    images: torch.Tensor | None


class OptimizationLoop:
    """One run of a method: its current noise, its best, its history. See `NoiseOptimizer.run`."""

    def __init__(
        self,
        method: NoiseOptimizer,
        problem: NoiseProblem,
        objective: Objective,
        state: NoiseState,
        callbacks: Sequence[NoiseCallback],
        noise_file: NoiseFile | None = None,
    ) -> None:
        self.method, self.problem, self.objective = method, problem, objective
        self.state, self.callbacks, self.noise_file = state, callbacks, noise_file
        self.rows: list[StepRow] = []
        self.best: BestSoFar | None = None
        self.initial_images: torch.Tensor | None = None
        self.redrawn: dict[str, torch.Tensor] = {}
        self.total: torch.Tensor | None = None
        self.leaf = self.evaluated = problem.noise

    def run(self) -> None:
        self.start()
        for step in range(self.method.steps):
            self.evaluate(step)
            if self.state.stopped or not self.moves_after(step):
                break
            self.move()
            if self.state.stopped:
                break
        self.finish()
        self.redraw()

    def start(self) -> None:
        self.chunk_size = chunk_size_of(self.method, self.problem)
        self.memory = self.method.start(self.problem)
        for callback in self.callbacks:
            if hasattr(callback, "on_run_start"):
                callback.on_run_start(self.state)

    def end(self) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "on_run_end"):
                callback.on_run_end(self.state)

    def moves_after(self, step: int) -> bool:
        """Whether the noise is moved after this step: a best noise has been evaluated, a last one need not be."""
        return self.method.returns == "last" or step < self.method.steps - 1

    def evaluate(self, step: int) -> None:
        """Score the current noise, keep it where it is the best, and ask the callbacks."""
        state, method = self.state, self.method
        gradient = method.gradient if self.moves_after(step) else None
        self.leaf = state.noise.detach().requires_grad_(gradient is not None)
        sample = self.sample_of(self.problem.sampler, self.leaf, step, gradient, method.preview)
        try:
            with torch.set_grad_enabled(gradient is not None):
                loss, scores = self.objective.evaluate(sample)
                self.check_loss(loss, gradient, step)
                self.total = loss + method.regularizer(self.leaf)
        except NonFiniteReward as error:
            if step == 0:
                raise
            return self.give_up(str(error))
        state.step, state.images, state.scores = step, sample.drawn_images, scores
        self.evaluated = state.noise
        state.loss = loss.detach().where(state.active, torch.nan)
        self.record(method.inspect(state, self.objective, self.memory))
        for callback in self.callbacks:
            if callback.on_step_end(state) is False:
                state.stop()
        if self.noise_file is not None:
            self.noise_file.keep(self.result)

    def sample_of(
        self, sampler: PipelineSampler, noise: torch.Tensor, step: int, gradient: Gradient, preview: bool
    ) -> Sample:
        """What the objective looks at in a step."""
        seeds = [seed + step for seed in self.problem.seeds]
        groups, prompts = self.problem.groups, self.state.prompts
        return Sample(sampler, noise, prompts, groups, seeds, gradient, preview, self.chunk_size)

    def check_loss(self, loss: torch.Tensor, gradient: Gradient, step: int) -> None:
        batch = len(self.state.noise)
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
            raise NonFiniteReward(f"Expected a finite loss for the plain result, but got {loss.tolist()}.")

    def record(self, eligible: torch.Tensor | None = None) -> None:
        """Keep this step, as the best of the samples where it is, among those that are `eligible`, `(B,)` bool."""
        state = self.state
        assert state.loss is not None
        norm = per_sample_norm(state.noise) / math.sqrt(state.noise[0].numel())
        bands = band_energies(state.noise - self.problem.noise).where(state.active[:, None], torch.nan)
        self.rows.append(StepRow(loss=state.loss, norm=norm, bands=bands, scores=state.scores))
        if state.step == 0:
            self.initial_images = state.images
            state.best_loss = torch.full_like(state.loss, torch.inf)
            state.best_step = torch.zeros_like(state.loss, dtype=torch.long)
            state.best_noise, state.best_images = state.noise, state.images
        assert state.best_loss is not None and state.best_step is not None and state.best_noise is not None
        better = state.loss < state.best_loss  # strictly: of equals the first wins; false for NaN
        if eligible is not None and state.step > 0:
            better = better & eligible
        state.best_loss = torch.where(better, state.loss, state.best_loss)
        state.best_step = torch.where(better, state.step, state.best_step)
        state.best_noise = torch.where(per_image(better, state.noise), state.noise, state.best_noise)
        if state.images is not None and state.best_images is not None:
            state.best_images = torch.where(per_image(better, state.images), state.images, state.best_images)
        best = {"noise": state.best_noise, "step": state.best_step, "images": state.best_images}
        self.best = BestSoFar(steps=len(self.rows), **best)

    def move(self) -> None:
        """Take the gradient where the method wants one, and the method's step."""
        state, gradient = self.state, None
        if self.leaf.requires_grad:
            assert self.total is not None
            (gradient,) = torch.autograd.grad(self.total.sum(), self.leaf)
            finite = gradient.flatten(1).isfinite().all(1)
            gradient = gradient.nan_to_num(0, 0, 0) * per_image(finite, gradient)
            self.drop_samples(state.active & ~finite)
        self.total = None
        moved = self.method.step(state, gradient, self.memory).detach()
        state.noise = torch.where(per_image(state.active, moved), moved, state.noise)

    def finish(self) -> None:
        """Evaluate what the method still gives, of all samples: a callback may watch, but not keep it from being."""
        for noise in self.method.finish(self.state, self.objective, self.memory):
            self.state.noise, self.state.active = noise.detach(), torch.ones_like(self.state.active)
            self.evaluate(len(self.rows))

    @torch.no_grad()
    def redraw(self) -> None:
        """Where a tiny decoder stood in, draw the plain result and what is returned with the pipeline's own, and let
        the objective score them."""
        if self.problem.sampler.decoder is None or self.initial_images is None:
            return
        sampler, report = self.problem.sampler.with_own_decoder(), {}
        for name, noise in (("initial", self.problem.noise), ("best", self.returned())):
            sample = self.sample_of(sampler, noise.detach(), 0, None, self.method.preview)
            loss, scores = self.objective.evaluate(sample)
            self.redrawn[name] = sample.images
            report[f"{name}_scores"] = {name: values.tolist() for name, values in scores.items()}
            report[f"{name}_loss"] = loss.tolist()
        self.state.reports[FULL_DECODER] = report

    def returned(self) -> torch.Tensor:
        """The noise of the result `(B, C, H, W)`."""
        assert self.best is not None
        return self.state.noise if self.method.returns == "last" else self.best.noise

    def drop_samples(self, broken: torch.Tensor) -> None:
        """Stop the samples whose gradient is not finite; the others go on."""
        if broken.any():
            self.state.stop("non-finite gradient", broken)
            warnings.warn(
                f"The gradient of sample {broken.nonzero().flatten().tolist()} is not finite after step "
                f"{self.state.step}: it keeps its best noise so far.",
                stacklevel=2,
            )

    def give_up(self, why: str) -> None:
        """End the run with what it has."""
        self.state.stop("non-finite reward")
        warnings.warn(f"The run stops after step {self.state.step} and keeps the best so far: {why}", stacklevel=2)

    def saved_result(self) -> NoiseResult:
        """The result at the end, in its file if there is one."""
        result = self.result()
        if self.noise_file is not None:
            result.save(self.noise_file.path)
        return result

    def rescue(self, error: BaseException) -> None:
        """Give an exception what was found before it, and write that."""
        if self.best is None:
            return
        result = self.result()
        result.provenance["stopped"] = self.state.stopped or type(error).__name__
        vars(error)["noise_result"] = result
        if self.noise_file is not None:
            self.noise_file.write_if_possible(result)

    def result(self) -> NoiseResult:
        """What has been found up to now."""
        problem, state, best = self.problem, self.state, self.best
        assert best is not None
        rows, last, noise = self.rows[: best.steps], self.method.returns == "last", self.returned()
        last_images = state.images if state.noise is self.evaluated else None
        latents = problem.sampler.to_latents(problem.pipe, noise.to(problem.dtype))
        return NoiseResult(
            noise=noise.detach(),
            latents=latents.detach(),
            scores={name: torch.stack([row.scores[name] for row in rows]) for name in rows[0].scores},
            losses=torch.stack([row.loss for row in rows]),
            norms=torch.stack([row.norm for row in rows]),
            best_step=torch.full_like(best.step, best.steps - 1) if last else best.step,
            provenance={
                "method": type(self.method).__name__,
                "settings": self.method.settings(),
                **provenance_of(problem, self.objective, state),
                "steps": best.steps,
            },
            generator_states=problem.sampler.states_after_draw(),
            reports=dict(state.reports),
            initial_noise=problem.noise.detach(),
            band_changes=torch.stack([row.bands for row in rows]),
            images=self.redrawn.get("best", last_images if last else best.images),
            initial_images=self.redrawn.get("initial", self.initial_images),
        )


def chunk_size_of(method: NoiseOptimizer, problem: NoiseProblem) -> int | None:
    """How many images a method has in memory at a time; `None` for the whole batch.

    "auto" draws one image, and counts what its graph holds: with each checkpointing that may be taken, until the whole
    batch fits. Raises `ValueError` for a number, if the call cannot be taken apart.
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
    if method.gradient is None:
        return None
    size, checkpoints = None, problem.sampler.checkpoints
    checkpoints.settle()
    for policy in checkpoints.ladder:
        checkpoints.take(policy)
        with SavedBytes() as saved, torch.enable_grad():
            one.images(problem.noise[:1].detach().requires_grad_(), method.gradient, method.preview)
        size = fitting_chunk_size(batch, saved.peak, free_memory(problem.noise.device))
        if size is None:
            break
    return size
