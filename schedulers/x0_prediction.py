"""The clean latents (Tweedie estimate x0) that one model output implies, for any diffusers scheduler."""

import torch

MULTISTEP_X0 = ("dpmsolver++", "sde-dpmsolver++")


def predict_x0(
    scheduler, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
) -> torch.Tensor:
    """The x0 estimate of one model call, differentiable in `sample` and in `model_output`.

    Which formula holds follows from the space that the scheduler works in: flow matching x0 = x − σ·v; sigma space
    (Euler, Heun) x0 = x − σ·ε; variance preserving (DDIM, DDPM, LCM, TCD, PNDM) x0 = (x − √(1−ᾱ)·ε) / √ᾱ; multistep
    solvers convert by themselves. See Karras et al. (https://arxiv.org/abs/2206.00364), table 1, and Salimans & Ho
    (https://arxiv.org/abs/2202.00512), appendix D, for v-prediction.

    Args:
        scheduler: The scheduler in use, after `set_timesteps`.
        model_output: `(B, ...)`, already guided, as handed to `scheduler.step`.
        timestep: The timestep of this call.
        sample: `(B, ...)`, the noisy latents of this call, as handed to `scheduler.step`.

    Returns:
        `(B, ...)`, the estimate of the clean latents.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    if name.startswith("FlowMatch") or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        return sample - scheduler.sigmas[scheduler.step_index].to(sample) * model_output
    if config.get("algorithm_type") in MULTISTEP_X0 or name.startswith("UniPC"):
        return scheduler.convert_model_output(model_output, sample=sample)
    if kind == "sample":
        return model_output
    if name.startswith(("Euler", "Heun")):
        return x0_from_sigma(scheduler.sigmas[scheduler.step_index].to(sample), kind, model_output, sample)
    alpha_bar = scheduler.alphas_cumprod.to(sample.device)[int(timestep)].to(sample)
    if kind == "v_prediction":
        return alpha_bar.sqrt() * sample - (1 - alpha_bar).sqrt() * model_output
    return (sample - (1 - alpha_bar).sqrt() * model_output) / alpha_bar.sqrt()


def x0_from_sigma(sigma: torch.Tensor, kind: str, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """x0 in sigma space, x = x0 + σ·ε, for `kind` "epsilon" or "v_prediction"."""
    if kind == "v_prediction":
        return sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1).sqrt()
    return sample - sigma * model_output
