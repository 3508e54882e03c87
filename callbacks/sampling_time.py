"""Where a sampler is before a model call: how far in training time, and how much of its sample is noise."""

import math
from typing import Any


def position_of_call(pipeline: Any, timestep: Any) -> int:
    """Where `scheduler.timesteps` has the first step of a call, which is at `timestep`.

    It is 0 unless the call leaves out the first steps, as image-to-image does; then it goes on to the last of them.
    """
    timesteps = pipeline.scheduler.timesteps
    return 0 if timesteps[0] == timestep else len(timesteps) - pipeline.num_timesteps


def is_flow(scheduler: Any) -> bool:
    """Whether a sample is (1 - σ)·x0 + σ·ε: schedulers of flow matching scale no initial noise."""
    return not hasattr(scheduler, "init_noise_sigma") or bool(scheduler.config.get("use_flow_sigmas"))


def require_training_times(scheduler: Any) -> None:
    """Raise `TypeError` for a scheduler whose timesteps do not count the steps of a training."""
    known = is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")
    if not known or scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise unknown_scheduler("timesteps count training steps", scheduler)


def unknown_scheduler(what: str, scheduler: Any) -> TypeError:
    return TypeError(
        f"Expected a scheduler whose {what}, but got {type(scheduler).__name__}. Give the pipeline another one, such "
        "as `DDIMScheduler.from_config(pipe.scheduler.config)`, or `FlowMatchEulerDiscreteScheduler` for flow matching."
    )


def training_time(scheduler: Any, index: int) -> float:
    """The time of a model call in [0, 1]: 1 is pure noise. `index` counts `scheduler.timesteps`."""
    return min(float(scheduler.timesteps[index]) / scheduler.config["num_train_timesteps"], 1.0)


def signal_and_noise(scheduler: Any, index: int) -> tuple[float, float]:
    """(a, b) of the sample a·x0 + b·ε that model call `index` gets; of the result if `index` is one past the last.

    Flow: (1 - σ, σ). Variance exploding: (1, σ). Variance preserving: (√ᾱ, √(1 - ᾱ)), and solvers that list
    σ = √(1 - ᾱ)/√ᾱ scale their sample back to it.

    Raises:
        TypeError: For a scheduler whose noise levels are in no table that is known here.
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
    """σ = b/a of `signal_and_noise`, which is comparable between schedulers: from infinity, for pure noise, to 0."""
    signal, noise = signal_and_noise(scheduler, index)
    return noise / signal if signal > 0 else math.inf
