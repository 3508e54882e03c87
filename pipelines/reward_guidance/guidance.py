"""Reward guidance: the gradient of rewards steers the denoising steps."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...callbacks.sampling_time import noise_ratio
from ...checked_fields import check_fields, checked
from ...rewards.contract.reward_sum import RewardsLike
from ...schedulers.noise_samplers import NoiseSamplerSpec
from ...schedulers.x0_prediction import predict_x0, prediction_channels, space_of
from ..hook import NoiseRun
from ..method import RewardOptimizer
from ..modular import as_standard
from ..noise_math import per_image, per_sample_norm, unit
from ..objective import RewardObjective
from ..problem import CandidateNoise, NoiseProblem
from ..request import bind_request, check_argument_names, check_pipeline, check_pipeline_class, check_request
from ..sampling.apart import apart
from ..sampling.first_call import count_timesteps, refuse_writes, stock_call
from ..sampling.latent_space import first_of
from ..sampling.module_state import frozen_modules, refuse_replaced_step, refuse_unsuited, shared_parts
from ..sampling.sample import Sample
from ..sampling.sampler import Clamp
from ..sampling.turns import TURNS

TAIL = 0.2  # noise over signal at which the tail begins


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardGuidance:
    """Steers the denoising steps of any stock pipeline by the gradient of rewards of their x0 estimates.

    "FMRG", https://arxiv.org/abs/2604.27147. In each guided step the x0 estimate of the model output m at the latents x
    is decoded by the pipeline's own code and scored: r. Then the step is taken with

        m − strength·‖m‖·g/‖g‖,   g = ∂r/∂x through the denoiser (`gradient="full"`, the paper's J)
                                  g = ∂r/∂x0 with m held constant (`gradient="frozen"`, the paper's E)

    in place of m, with norms per image, where m is ε, v or a flow velocity. (Where m is x0 itself, or x0 grows with m
    for another reason, the sign is +.) The last steps, the tail, are not guided, so that the model can correct what
    pleases the rewards alone. The scheduler gets the changed output. So any scheduler with an x0 estimate works, also
    one that adds noise or remembers outputs, and the rest of the call stays as it was: guidance of the model,
    callbacks, LoRA. Unlike a callback, it acts in the first step too.

    The initial noise can be chosen first ("warm-up"): `particles` noises, that of the call and fresh ones, are scored
    by the x0 estimate of one model call each, and each image gets the noise with the highest reward. This helps where
    that estimate is a sharp image, as with models for one step or flow maps.

    A guided step costs decoder and rewards with their backward pass, and with "full" that of the denoiser, whose memory
    `pipe.transformer.enable_gradient_checkpointing()` (or `pipe.unet`) reduces.

    Args:
        rewards: A reward or rewards as `RewardSum` takes them: a name, a callable, a dict of these to weights, or a
            list of (reward, weight).
        strength: The length of the change of m, relative to m; 0 disables the guidance. Too much of it lowers the
            reward in the end, because the tail cannot correct it. "full" takes less of it than "frozen".
        gradient: "full" or "frozen", as above.
        guided_steps: The number of guided steps, from the first on; the last of a call is never guided. `None` guides
            the first, and each other one that leaves noise of at least a fifth of the signal.
        particles: The number of initial noises to choose from; 1 for that of the call.
        reward_device: The device on which rewards given by name are loaded; `None` is the pipeline's device.
    """

    rewards: RewardsLike
    strength: float = checked(0.2, "[0, inf)")
    gradient: Literal["full", "frozen"] = "frozen"
    guided_steps: int | None = checked(None, "[1, inf)")
    particles: int = checked(1, "[1, inf)")
    reward_device: str | torch.device | None = None

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot work."""
        check_fields(self)
        self.choice.check()

    @property
    def choice(self) -> "ParticleChoice":
        """The method that chooses the initial noise."""
        return ParticleChoice(rewards=self.rewards, steps=self.particles, reward_device=self.reward_device)

    def generate(
        self,
        pipe,
        prompt: str | list[str] | None,
        *,
        noise_sampler: NoiseSamplerSpec | None = None,
        reward_prompt: str | Sequence[str] | None = None,
        **call_kwargs,
    ) -> Any:
        """Run `pipe(prompt, ...)` with guidance. The pipeline stays unmodified.

        Args:
            pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise.
            prompt: As in the pipeline's call.
            noise_sampler: The distribution of the initial noise, as in `optimize_noise`.
            reward_prompt: The prompt that rewards are asked about instead: one, or one for each image.
            call_kwargs: The other arguments of `pipe(prompt, ...)`.

        Returns:
            The output of the stock pipeline; for a modular one a tuple with its images.

        Raises:
            ValueError: For settings or a pipeline state that cannot work, before any model runs; for a single denoising
                step, or a gradient that is not finite.
            TypeError: For an argument that the pipeline does not take, or a scheduler without an x0 estimate.
        """
        check_pipeline(pipe)
        pipe = as_standard(pipe)
        check_pipeline_class(type(pipe))
        check_argument_names(pipe, call_kwargs, ("noise_sampler", "reward_prompt"), self)
        self.check()
        with TURNS.take(shared_parts(pipe)), apart(pipe) as twin:
            request = bind_request(twin, (), {"prompt": prompt, **call_kwargs})
            check_request(twin, request)
            run = GuidedRun(twin, self, request, noise_sampler=noise_sampler, reward_prompt=reward_prompt)
            with run.running(twin), torch.no_grad():
                return stock_call(type(pipe))(twin, **run.stock_request())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleChoice(RewardOptimizer):
    """Returns the noise, out of `steps` independent ones, whose x0 estimate has the highest reward."""

    preview: bool = True

    @property
    def clamp(self) -> Clamp:
        return "straight_through"

    def objective(self, pipe) -> "ParticleRewards":
        return ParticleRewards(self.load_rewards(pipe, self.rewards), self.steps)

    def start(self, problem: NoiseProblem) -> CandidateNoise:
        return CandidateNoise(problem)

    def step(self, run: NoiseState, gradient: None, state: CandidateNoise) -> torch.Tensor:
        return state.draw()


class ParticleRewards(RewardObjective):
    """The negative reward, or 0 without an evaluation if there is nothing to choose."""

    def __init__(self, rewards: Any, particles: int) -> None:
        super().__init__(rewards)
        self.particles = particles

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.particles == 1:
            return torch.zeros(len(sample.noise), device=sample.noise.device), {}
        return super().evaluate(sample)


class GuidedRun(NoiseRun):
    """One pipeline call under guidance, after its initial noise was chosen."""

    def __init__(self, pipe, guidance: RewardGuidance, request: dict[str, Any], **kwargs: Any) -> None:
        self.guidance = guidance
        self.gradient = guidance.gradient if guidance.strength else None
        refuse_unsuited(pipe, self.gradient)
        refuse_replaced_step(pipe)
        if self.gradient == "full":
            refuse_writes(type(pipe))
        space_of(pipe.scheduler)
        if request.get("num_inference_steps") == 1:
            raise single_step()
        self.rewards = guidance.choice.load_rewards(pipe, guidance.rewards)
        super().__init__(pipe, guidance.choice, request, **kwargs)
        if self.gradient is not None:
            self.rewards.check_differentiable()
            if self.size:
                self.objective.try_out(self.reward_prompts[0], *self.size, gradient=True)

    def frozen_modules(self, pipe):
        return frozen_modules(pipe, self.gradient, self.decoder, self.size)

    def prepare_latents(self, pipe, *args, **kwargs):
        """Choose the initial noise, and let the steps that follow be guided."""
        prepared = super().prepare_latents(pipe, *args, **kwargs)
        if self.gradient is not None:
            vars(pipe.scheduler)["step"] = self.guided(pipe, pipe.scheduler.step, prepared)
            self.record(first_of(prepared))
        return prepared

    def record(self, latents: torch.Tensor) -> None:
        """Let the next model call at these latents have a graph, if the gradient passes it.

        The `torch.no_grad` around the stock call turns recording off at the end, whatever ends the call.
        """
        if self.gradient == "full":
            torch.set_grad_enabled(True)
            self.recorded = latents.requires_grad_()

    def stock_request(self) -> dict[str, Any]:
        """Return the request of the stock call, whose callbacks see tensors without a graph."""
        request = dict(self.request)
        if self.gradient == "full" and (callback := request.get("callback_on_step_end")) is not None:
            request["callback_on_step_end"] = functools.partial(self.call_back, callback)
            if hasattr(callback, "tensor_inputs"):  # diffusers reads them from callbacks of its own classes
                request["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        if self.gradient == "full" and (callback := request.get("callback")) is not None:  # PixArt has no other
            request["callback"] = functools.partial(watched, callback)
        return request

    def call_back(self, callback: Callable[..., Any], pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        """Call the user's callback as a plain call does, and record the latents that it returns, if that was on."""
        recording = torch.is_grad_enabled()
        plain = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in tensors.items()}
        with torch.no_grad():
            returned = callback(pipe, step, timestep, plain)
        if not recording:
            return returned
        if getattr(pipe, "interrupt", False):  # no model call follows
            torch.set_grad_enabled(False)
            self.recorded.requires_grad_(False)
        elif isinstance(returned, dict) and isinstance(returned.get("latents"), torch.Tensor):
            latents = returned["latents"].detach()
            returned["latents"] = latents.clone() if latents.is_inference() else latents
            self.record(returned["latents"])
        return returned

    def guided(self, pipe, step: Callable[..., Any], prepared: Any) -> Callable[..., Any]:
        """Return the `step` of the scheduler with guidance in the first steps."""
        calls = itertools.count(1)

        @functools.wraps(step)
        def guided_step(model_output, timestep, sample, *args, **kwargs):
            call = next(calls)
            if count_timesteps(pipe) < 2:
                raise single_step()
            if self.is_guided(pipe, call):
                model_output = self.steered(pipe, model_output, timestep, sample, prepared)
            torch.set_grad_enabled(False)
            returned = step(model_output, timestep, sample.detach(), *args, **kwargs)
            if self.is_guided(pipe, call + 1):
                self.record(returned[0])
            return returned

        return guided_step

    def is_guided(self, pipe, call: int) -> bool:
        """Return whether a step, counted from 1, is guided: the first always, the last never."""
        most, count = count_timesteps(pipe), self.guidance.guided_steps
        if call >= most or (count is not None and call > count):
            return False
        if call == 1 or count is not None:
            return True
        following = len(pipe.scheduler.timesteps) - most + call
        with contextlib.suppress(TypeError):  # of schedulers whose noise levels are unknown
            return noise_ratio(pipe.scheduler, following) >= TAIL
        return True

    def steered(
        self, pipe, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, prepared: Any
    ) -> torch.Tensor:
        """Return the model output, moved so that the reward of its x0 estimate grows."""
        scheduler, variable = pipe.scheduler, sample
        with torch.enable_grad():
            x0 = predict_x0(scheduler, model_output, timestep, sample)
            if self.gradient == "frozen":
                variable = x0 = x0.detach().requires_grad_()
            images = self.sampler.decoded(x0.to(model_output.dtype), prepared)
            reward = self.rewards(images, self.reward_prompts).total
            (gradient,) = torch.autograd.grad(reward.sum(), variable)
        if not gradient.isfinite().all():
            raise ValueError(
                "Expected a finite gradient of the rewards, but got NaN or infinity. Look for a division by zero in a "
                "reward, or use bfloat16 if the pipeline is in float16."
            )
        model_output = model_output.detach()
        prediction = prediction_channels(scheduler, model_output, sample)
        _, out = space_of(scheduler).coefficients(scheduler, timestep)
        length = self.guidance.strength * per_sample_norm(prediction) * float(out.sign().reshape(-1)[0])
        moved = prediction + per_image(length, gradient) * unit(gradient.float())
        rest = model_output[:, prediction.shape[1] :]
        return torch.cat([moved.to(model_output.dtype), rest], dim=1)


@torch.no_grad()
def watched(callback: Callable[..., None], step: int, timestep: Any, latents: torch.Tensor) -> None:
    """Call a callback of the older kind, which returns nothing, as a plain call does."""
    callback(step, timestep, latents.detach())


def single_step() -> ValueError:
    return ValueError(
        "Expected at least 2 denoising steps for RewardGuidance, whose last step is not guided, but got 1. Pass a "
        "larger `num_inference_steps`, for image-to-image also a larger `strength`, or optimize the initial noise "
        "instead, with `optimize_noise`."
    )
