"""Time and noise level of a model call, for the schedulers of diffusers."""

import math
from typing import Any


def position_of_call(pipeline: Any, timestep: Any) -> int:
    """Return the index in `scheduler.timesteps` of the first step of a pipeline call, which is at `timestep`.

    It is 0 unless the call skips the first steps, as image-to-image does.
    """
    timesteps = pipeline.scheduler.timesteps
    return 0 if timesteps[0] == timestep else len(timesteps) - pipeline.num_timesteps


def is_flow(scheduler: Any) -> bool:
    """Return whether a sample is (1 - σ)·x0 + σ·ε. Schedulers of flow matching have no `init_noise_sigma`."""
    return not hasattr(scheduler, "init_noise_sigma") or bool(scheduler.config.get("use_flow_sigmas"))


def require_training_times(scheduler: Any) -> None:
    """Raise `TypeError` for a scheduler whose timesteps do not count training steps."""
    known = is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")
    if not known or scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise unknown_scheduler("timesteps count training steps", scheduler)


def unknown_scheduler(what: str, scheduler: Any) -> TypeError:
    return TypeError(
        f"Expected a scheduler whose {what}, but got {type(scheduler).__name__}. Give the pipeline another one, such "
        "as `DDIMScheduler.from_config(pipe.scheduler.config)`, or `FlowMatchEulerDiscreteScheduler` for flow matching."
    )


def training_time(scheduler: Any, index: int) -> float:
    """Return the time of a model call in [0, 1], where 1 is pure noise; `index` is into `scheduler.timesteps`."""
    return min(float(scheduler.timesteps[index]) / scheduler.config["num_train_timesteps"], 1.0)


def signal_and_noise(scheduler: Any, index: int) -> tuple[float, float]:
    """Return (a, b) of the sample a·x0 + b·ε of model call `index`, or of the result if `index` is one past the last.

    Flow: (1 - σ, σ). Variance exploding: (1, σ). Variance preserving: (√ᾱ, √(1 - ᾱ)), also for solvers that list
    σ = √(1 - ᾱ)/√ᾱ.

    Raises:
        TypeError: For a scheduler with neither `sigmas` nor `alphas_cumprod`.
    """
    if hasattr(scheduler, "sigmas"):
        sigma = float(scheduler.sigmas[index])
        if is_flow(scheduler):
            return 1 - sigma, sigma
        signal = 1.0 if scheduler.init_noise_sigma != 1 else (1 + sigma**2) ** -0.5
        return signal, sigma * signal
    if not hasattr(scheduler, "alphas_cumprod"):
        raise unknown_scheduler("noise levels are those of `sigmas` or `alphas_cumprod`", scheduler)
    ended = index == len(scheduler.timesteps)
    final = getattr(scheduler, "final_alpha_cumprod", 1.0)
    alpha_bar = float(final if ended else scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def noise_ratio(scheduler: Any, index: int) -> float:
    """Return σ = b/a of `signal_and_noise`, from infinity for pure noise to 0; it is comparable across schedulers."""
    signal, noise = signal_and_noise(scheduler, index)
    return noise / signal if signal > 0 else math.inf
