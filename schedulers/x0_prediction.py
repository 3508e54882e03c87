"""Tweedie estimate x0 of the clean latents from one model output, for every image scheduler of diffusers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..private_names import alpha_cumprod, step_index, threshold_sample

AffineCoefficients = tuple[torch.Tensor, torch.Tensor]


def predict_x0(
    scheduler: Any, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
) -> torch.Tensor:
    """Return the x0 estimate of one model call, differentiable with respect to `sample` and `model_output`.

    It is affine in both, x0 = skip·sample + out·model_output. The two coefficients follow from the noise level
    x = a·x0 + b·ε of the call and from the prediction type. With σ and ᾱ from the scheduler's tables, the level is

    * variance preserving (DDIM, DDPM, LCM, TCD, PNDM, UnCLIP, Würstchen, CogVideoX): a = √ᾱ, b = √(1−ᾱ), by timestep;
    * sigma space (Euler, Heun, KDPM2, LMS, DPMSolverSDE): a = 1, b = σ;
    * multistep solvers (DPMSolver, UniPC, DEIS, SASolver): a = 1/√(1+σ²), b = σ·a, or a = 1−σ, b = σ with flow sigmas;
    * flow matching and flow maps: a = 1−σ, b = σ; TrigFlow (SCM): a = cos t, b = sin t; IPNDM: its own tables;
    * EDM and consistency models: the coefficients are c_skip and c_out of the scheduler's preconditioning.

    See Karras et al. (https://arxiv.org/abs/2206.00364), table 1, for the preconditioning, Salimans & Ho
    (https://arxiv.org/abs/2202.00512), appendix D, for v-prediction, Lu & Song (https://arxiv.org/abs/2410.11081),
    section 3, for TrigFlow, and Boffi et al. (https://arxiv.org/abs/2406.07507) for flow maps, whose estimate is the
    map itself if the model was asked for the mean velocity to time 0.

    The value is the x0 that the scheduler itself uses: if its `step` clips x0 (`clip_sample`) or thresholds it
    (`thresholding`), so does this function. The gradient is that of the unclipped estimate (straight-through), because
    a hard clip has no gradient exactly where x0 is too large. LCM's `denoised` is this x0 after its boundary scaling,
    in which the sample has a weight below 1e-5 from timestep 16 on; TCD's output is noised again. With `s_churn > 0`
    Euler perturbs the sample inside `step`, which is not taken into account.

    The scheduler is unchanged except for its step index: if it is unset, the scheduler sets it as its first `step`
    would, from `begin_index` or `timestep`.

    Args:
        scheduler: The scheduler in use, after `set_timesteps`, of a supported class or a subclass of one.
        model_output: `(B, C, ...)`, after guidance, as passed to `scheduler.step`; with a learned variance
            `(B, 2C, ...)`, whose first C channels are the prediction.
        timestep: The timestep of this call: a number, or a tensor with one or `(B,)` entries.
        sample: `(B, C, ...)`, the noisy latents of this call, as passed to `scheduler.step`, not scaled by
            `scale_model_input`.

    Returns:
        `(B, C, ...)`, the estimate of the clean latents, in float32, or in float64 if `sample` is.

    Raises:
        TypeError: If the scheduler has no x0 estimate or is unknown.
        ValueError: If the scheduler's `prediction_type` is incompatible with its noise level, the sample has no signal
            (ε-prediction at zero terminal SNR), or the shapes of `model_output` and `sample` differ.
    """
    space = space_of(scheduler)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, output = sample.to(dtype), prediction_channels(scheduler, model_output, sample).to(dtype)
    skip, out = (spread_over_images(coefficient, sample) for coefficient in space.coefficients(scheduler, timestep))
    x0 = skip * sample + out * output
    if space.bound is None:
        return x0
    return space.bound(scheduler, x0.detach()) + (x0 - x0.detach())  # adds exactly 0


def prediction_channels(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Remove the channels of a learned variance, and check that the rest has the shape of `sample`."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if learned and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        raise ValueError(
            f"Expected a model output of the shape {tuple(sample.shape)} of the sample, but got "
            f"{tuple(model_output.shape)}. If the rest is a learned variance, pass the prediction only, or use "
            f'`{type(scheduler).__name__}.from_config(scheduler.config, variance_type="learned_range")`.'
        )
    return model_output


def spread_over_images(coefficient: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Reshape and cast `coefficient`, one number or `(B,)`, to multiply `sample` image by image."""
    return coefficient.to(sample).reshape(-1, *[1] * (sample.ndim - 1))


def exact(entry: torch.Tensor | float) -> torch.Tensor:
    """Convert an entry of a scheduler's table to float64 on the CPU, because not every device has float64."""
    return torch.as_tensor(entry).detach().cpu().double()


def affine_in_prediction(
    scheduler: Any, prediction: str, signal: torch.Tensor, noise: torch.Tensor, flow: bool = False
) -> AffineCoefficients:
    """Return (skip, out) of x0 = skip·sample + out·model_output for a model that predicts `prediction`.

    v is defined on the unit circle, so other levels are first scaled to it: with r² = signal² + noise²,
    x/r = cos φ·x0 + sin φ·ε and v = cos φ·ε − sin φ·x0. A flow velocity is ε − x0, on the line signal + noise = 1.
    """
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "epsilon":
        require_signal(scheduler, signal)
        return 1 / signal, -noise / signal
    if prediction == "flow_prediction" and flow:
        return torch.ones_like(noise), -noise
    if prediction == "v_prediction" and not flow:
        squared = signal**2 + noise**2
        return signal / squared, -noise / squared.sqrt()
    raise unknown_prediction(scheduler, ("epsilon", "sample", "flow_prediction" if flow else "v_prediction"))


def require_signal(scheduler: Any, signal: torch.Tensor) -> None:
    """Raise `ValueError` for a sample of pure noise, from which ε does not determine x0."""
    if (signal == 0).any():
        raise ValueError(
            f'Expected some signal in the sample of {type(scheduler).__name__} with `prediction_type="epsilon"`, but '
            'got a timestep with zero SNR. Pass `rescale_betas_zero_snr=False`, `timestep_spacing="leading"`, or use a '
            "model with v-prediction."
        )


def unknown_prediction(scheduler: Any, known: tuple[str, ...]) -> ValueError:
    """Return the error for a `prediction_type` that is undefined in the sample space of `scheduler`."""
    name = type(scheduler).__name__
    return ValueError(
        f"Expected `prediction_type` of {name} to be one of {', '.join(known)}, but got "
        f"{scheduler.config.get('prediction_type')!r}. Pass that of the model's training: "
        f"`{name}.from_config(scheduler.config, prediction_type=...)`; if the scheduler has `use_flow_sigmas`, "
        "flow_prediction requires True and v_prediction False."
    )


def configured_prediction(scheduler: Any) -> str:
    """Return the prediction type of the config; Euler also accepts an older name of "sample"."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    return "sample" if prediction == "original_sample" else prediction


def from_alphas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of variance preserving schedulers, with ᾱ looked up by timestep."""
    steps = torch.as_tensor(timestep).to(scheduler.alphas_cumprod.device, torch.long)
    alpha_bar = exact(scheduler.alphas_cumprod[steps])
    return affine_in_prediction(scheduler, configured_prediction(scheduler), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_cosine_time(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of Würstchen and Stable Cascade: ε-prediction, ᾱ a function of the timestep in [0, 1]."""
    time = torch.as_tensor(timestep)
    alpha_bar = exact(alpha_cumprod(scheduler, time))
    return affine_in_prediction(scheduler, "epsilon", alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_sigma(scheduler: Any, sigma: torch.Tensor) -> AffineCoefficients:
    """Return (skip, out) of a variance exploding scheduler, x = x0 + σ·ε, at a given σ."""
    sigma = exact(sigma)
    return affine_in_prediction(scheduler, configured_prediction(scheduler), torch.ones_like(sigma), sigma)


def from_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of variance exploding schedulers, with σ looked up by step.

    Schedulers that also call the model at the end of a step have that σ twice in their table.
    """
    return from_sigma(scheduler, scheduler.sigmas[step_index(scheduler, timestep)])


def from_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of KDPM2, which makes every second call at a σ between two steps."""
    index = step_index(scheduler, timestep)
    table = scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol
    return from_sigma(scheduler, table[index])


def from_ancestral_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of ancestral KDPM2, which stores the σ between two steps at the index of the first."""
    index = step_index(scheduler, timestep)
    first_order = scheduler.state_in_first_order
    return from_sigma(scheduler, scheduler.sigmas[index] if first_order else scheduler.sigmas_interpol[index - 1])


def from_midpoint_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of DPMSolverSDE, which stores the σ between two steps in an attribute."""
    sigma = scheduler.sigmas[step_index(scheduler, timestep)]
    return from_sigma(scheduler, sigma if scheduler.state_in_first_order else scheduler.mid_point_sigma)


def from_solver_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of multistep solvers, x = a·x0 + b·ε, whose σ is b/a, or b with flow sigmas."""
    sigma = exact(scheduler.sigmas[step_index(scheduler, timestep)])
    flow = bool(scheduler.config.get("use_flow_sigmas"))
    signal = 1 - sigma if flow else (1 + sigma**2).rsqrt()
    noise = sigma if flow else sigma * signal
    return affine_in_prediction(scheduler, configured_prediction(scheduler), signal, noise, flow)


def from_flow_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of flow matching, x0 = x − σ·v.

    With `invert_sigmas`, σ is the weight of x0 instead of the noise, and v points toward x0.
    """
    sigma = exact(scheduler.sigmas[step_index(scheduler, timestep)])
    return torch.ones_like(sigma), 1 - sigma if scheduler.config.get("invert_sigmas") else -sigma


def from_flow_map(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of flow maps, x0 = x − σ·u with u the mean velocity from the time of the call to another.

    This is the map itself if that other time is 0, else the end of the straight line along u. Timesteps need not be
    those of the scheduler.
    """

    def level(time: torch.Tensor) -> torch.Tensor:
        index = scheduler.index_for_timestep(time)
        return exact(time / scheduler.config["num_train_timesteps"] if index is None else scheduler.sigmas[index])

    sigma = torch.stack([level(time) for time in torch.as_tensor(timestep).flatten()])
    return torch.ones_like(sigma), -sigma


def from_angle(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of TrigFlow (Sana-Sprint).

    The timestep is an angle, and the model output a velocity on the circle of radius `sigma_data`.
    """
    if scheduler.config.get("prediction_type") != "trigflow":
        raise unknown_prediction(scheduler, ("trigflow",))
    angle = exact(scheduler.timesteps[step_index(scheduler, timestep)])
    return angle.cos(), -angle.sin()


def from_own_tables(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of IPNDM: v-prediction; its `alphas` weight x0 and its `betas` the noise."""
    index = step_index(scheduler, timestep)
    return exact(scheduler.alphas[index]), -exact(scheduler.betas[index])


def from_edm(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of EDM, where `prediction_type` determines only the sign of `out`."""
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if configured_prediction(scheduler) not in signs:
        raise unknown_prediction(scheduler, tuple(signs))
    sigma = exact(scheduler.sigmas[step_index(scheduler, timestep)])
    data = scheduler.config["sigma_data"]
    total = sigma**2 + data**2
    return data**2 / total, signs[configured_prediction(scheduler)] * sigma * data / total.sqrt()


def from_consistency(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Return (skip, out) of consistency models: those of EDM, but x0 = x at the smallest σ."""
    sigma = exact(scheduler.sigmas[step_index(scheduler, timestep)])
    return scheduler.get_scalings_for_boundary_condition(sigma)


def clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Apply `clip_sample`, to a fixed range."""
    limit = scheduler.config.get("clip_sample_range", 1.0)
    return x0.clamp(-limit, limit) if scheduler.config.get("clip_sample") else x0


def thresholded(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Apply `thresholding`, to a percentile of each image (https://arxiv.org/abs/2205.11487, section 2.3)."""
    return threshold_sample(scheduler, x0) if scheduler.config.get("thresholding") else x0


def thresholded_or_clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Apply `thresholding` if it is on, else `clip_sample`."""
    return thresholded(scheduler, x0) if scheduler.config.get("thresholding") else clipped(scheduler, x0)


def thresholded_if_x0(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Apply `thresholding` only if the solver works in x0, as UniPC does."""
    return thresholded(scheduler, x0) if scheduler.predict_x0 else x0


def clipped_to_images(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Apply `clip_denoised` of consistency models, which have no latents."""
    return x0.clamp(-1, 1) if scheduler.config.get("clip_denoised") else x0


class SampleSpace(NamedTuple):
    """Conventions of a scheduler for its sample and the model output.

    Attributes:
        coefficients: `(scheduler, timestep) -> (skip, out)` of x0 = skip·sample + out·model_output.
        bound: `(scheduler, x0) -> x0`, the clipping or thresholding in `step`. None if the class has none, whatever its
            config says: `from_config` keeps settings of another scheduler class that this one does not read.
    """

    coefficients: Callable[[Any, Any], AffineCoefficients]
    bound: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


SAMPLE_SPACES = {
    "DDIMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDIMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "LCMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "UnCLIPScheduler": SampleSpace(from_alphas, clipped),
    "PNDMScheduler": SampleSpace(from_alphas),
    "TCDScheduler": SampleSpace(from_alphas),
    "CogVideoXDDIMScheduler": SampleSpace(from_alphas),
    "CogVideoXDPMScheduler": SampleSpace(from_alphas),
    "DDPMWuerstchenScheduler": SampleSpace(from_cosine_time),
    "EulerDiscreteScheduler": SampleSpace(from_sigmas),
    "EulerAncestralDiscreteScheduler": SampleSpace(from_sigmas),
    "HeunDiscreteScheduler": SampleSpace(from_sigmas, clipped),
    "LMSDiscreteScheduler": SampleSpace(from_sigmas),
    "KDPM2DiscreteScheduler": SampleSpace(from_interpolated_sigmas),
    "KDPM2AncestralDiscreteScheduler": SampleSpace(from_ancestral_interpolated_sigmas),
    "DPMSolverSDEScheduler": SampleSpace(from_midpoint_sigmas),
    "DPMSolverMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DPMSolverSinglestepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DEISMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "SASolverScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "UniPCMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded_if_x0),
    "FlowMatchEulerDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchHeunDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchLCMScheduler": SampleSpace(from_flow_sigmas),
    "FlowMapEulerDiscreteScheduler": SampleSpace(from_flow_map),
    "SCMScheduler": SampleSpace(from_angle),
    "IPNDMScheduler": SampleSpace(from_own_tables),
    "EDMEulerScheduler": SampleSpace(from_edm),
    "EDMDPMSolverMultistepScheduler": SampleSpace(from_edm, thresholded),
    "CosineDPMSolverMultistepScheduler": SampleSpace(from_edm),
    "CMStochasticIterativeScheduler": SampleSpace(from_consistency, clipped_to_images),
}

WITHOUT_ESTIMATE = {
    "AmusedScheduler": "samples discrete tokens",
    "BlockRefinementScheduler": "samples discrete tokens",
    "DiscreteDDIMScheduler": "samples discrete tokens",
    "EntropyBoundScheduler": "samples discrete tokens",
    "VQDiffusionScheduler": "samples discrete tokens",
    "DDIMInverseScheduler": "runs from an image to its noise",
    "DPMSolverMultistepInverseScheduler": "runs from an image to its noise",
    "HeliosScheduler": "is made for video",
    "HeliosDMDScheduler": "is made for video",
    "LTXEulerAncestralRFScheduler": "is made for video",
    "MiniMaxH3Scheduler": "is made for video",
    "RFD4ProteinaScheduler": "is made for proteins",
    "PiflowScheduler": "takes a policy over many times from its model",
    "ScoreSdeVeScheduler": "takes a score from its model",
    "ScoreSdeVpScheduler": "takes a score from its model",
    "KarrasVeScheduler": "takes two noise levels for a step",
    "RePaintScheduler": "takes a known image and a mask for a step",
    "ConsistencyDecoderScheduler": "decodes latents",
}


def space_of(scheduler: Any) -> SampleSpace:
    """Return the sample space of a scheduler by class name, because the Hub may hold a copy of the class."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    known = next((name for name in names if name in SAMPLE_SPACES or name in WITHOUT_ESTIMATE), None)
    if known in SAMPLE_SPACES:
        return SAMPLE_SPACES[known]
    raise TypeError(
        f"Expected an image scheduler of diffusers whose x0 estimate is known, but got {names[0]}, which "
        f"{WITHOUT_ESTIMATE.get(known or '', 'is not one of them')}. Give the pipeline another one, such as "
        "`DDIMScheduler.from_config(pipe.scheduler.config)`, or `FlowMatchEulerDiscreteScheduler` for flow matching."
    )
