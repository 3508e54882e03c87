"""DiversityBoost: a random change of the composition of the first x0 estimate."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ...checked_fields import checked
from ...schedulers.noise_samplers import NoiseSamplerSpec
from ...schedulers.x0_prediction import predict_x0, prediction_channels, space_of, spread_over_images
from ..sampling.first_call import count_timesteps
from ..sampling.latent_space import LatentSpace
from ..sampling.module_state import DENOISERS, refuse_replaced_step
from .steered_call import SteeredCall, SteeredRun

MODES = 4  # of the field, in each direction
LEAST = 0.1  # of the factor
PATCH = 2  # of denoisers that name none


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiversityBoost(SteeredCall):
    """Pushes the composition of the first x0 estimate at random, as ComfyUI's node of that name does.

    The x0 estimate of the first model call `(C, H, W)`, in the units of the VAE (scaled), is filtered by frequency, and
    multiplied with a random smooth field:

        x0 ← F⁻¹[s(r)·F[x0]]·clip(1 + strength·field, 0.1, 1 + clamp)
        s(r) = 1 − attenuation + (attenuation + boost/2)·(1 + r)^(−transition) for r >= 1, 1 below, but `mean` for r = 0

    r is the frequency in cycles per picture over the denoiser's patch size. The field has 4 × 4 modes of the DCT-II,
    without the constant one, with Gaussian coefficients that fall with the root of the mode number ("pink"), and a
    standard deviation of 1. The scheduler gets the model output that has this estimate, so that any scheduler with an
    x0 estimate works; the following steps see the changed latents and fill in what the filter took. It takes no time.

    The formula is that of version 3 of the node (https://github.com/facok/ComfyUI-DiversityBoost) in its schedule
    "flat".

    Args:
        strength: Of the field; 0 only filters.
        clamp: How far the factor may be above 1.
        attenuation: Of high frequencies, in [0, 1]. In a call of one step there is no step to bring them back, so that
            it has to be 0.
        boost: Of low frequencies, in [0, 1].
        mean: The factor of the mean of each channel, in [0, 1].
        transition: How fast the factor of the filter falls.
        generator: See `SteeredCall`.

    Raises:
        ValueError: For a value outside its range, or a single denoising step with `attenuation` above 0.
        TypeError: For a scheduler without an x0 estimate.
    """

    strength: float = checked(2.0, "[0, inf)")
    clamp: float = checked(0.5, "(0, inf)")
    attenuation: float = checked(1.0, "[0, 1]")
    boost: float = checked(0.3, "[0, 1]")
    mean: float = checked(0.0, "[0, 1]")
    transition: float = checked(2.0, "(0, inf)")

    def run(self, pipe, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> "DiversityBoostRun":
        return DiversityBoostRun(pipe, self, request, noise_sampler)

    def pushed(self, x0: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
        """Return the estimate `(B, ..., H, W)` with another composition, in float32.

        Args:
            x0: In the units of the VAE, times a number.
            patch: Of the denoiser.
        """
        height, width = x0.shape[-2:]
        factors = self.filter(height, width, patch).to(x0.device)
        filtered = torch.fft.irfft2(torch.fft.rfft2(x0.float()) * factors, s=(height, width))
        coefficients = (draw(torch.randn, MODES, MODES) for draw in self.draws(len(x0)))
        fields = torch.stack([smooth_field(each, height, width) for each in coefficients])
        factor = (1 + self.strength * fields).clamp(LEAST, 1 + self.clamp)
        return filtered * factor.view(len(x0), *[1] * (x0.ndim - 3), height, width).to(x0.device)

    def filter(self, height: int, width: int, patch: int) -> torch.Tensor:
        """Return s for the entries of `torch.fft.rfft2`, `(H, W // 2 + 1)`."""
        rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
        r = torch.hypot(rows[:, None], columns[None, :]) / patch
        factors = 1 - self.attenuation + (self.attenuation + self.boost / 2) * (1 + r) ** -self.transition
        factors[r < 1] = 1.0
        factors[0, 0] = self.mean
        return factors


class DiversityBoostRun(SteeredRun):
    """One call with a boost."""

    def __init__(
        self, pipe, settings: DiversityBoost, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None
    ) -> None:
        super().__init__(pipe, request, noise_sampler)
        self.settings = settings
        refuse_replaced_step(pipe)
        space_of(pipe.scheduler)
        if request.get("num_inference_steps") == 1:
            self.refuse_single_step()

    def refuse_single_step(self) -> None:
        if self.settings.attenuation:
            raise ValueError(
                "Expected at least 2 denoising steps for DiversityBoost, which blurs the first estimate, but got 1. "
                "Pass `attenuation=0.0`, or a larger `num_inference_steps`."
            )

    def prepared(self, pipe, space: LatentSpace, latents: Any) -> Any:
        """Let the first step be changed."""
        step = pipe.scheduler.step
        vars(pipe.scheduler)["step"] = functools.wraps(step)(functools.partial(self.first_step, pipe, space, step))
        return latents

    def first_step(
        self, pipe, space: LatentSpace, step: Callable[..., Any], model_output, timestep, sample, *args, **kwargs
    ):
        """Take the first step of the scheduler with the model output of the changed estimate."""
        vars(pipe.scheduler).pop("step")
        if count_timesteps(pipe) < 2:
            self.refuse_single_step()
        scheduler = pipe.scheduler
        x0 = predict_x0(scheduler, model_output, timestep, sample)
        _, out = space_of(scheduler).coefficients(scheduler, timestep)
        prediction = prediction_channels(scheduler, model_output, sample)
        change = self.change(pipe, space, x0) / spread_over_images(out, x0)
        moved = (prediction.to(change) + change).to(model_output.dtype)
        return step(torch.cat([moved, model_output[:, prediction.shape[1] :]], 1), timestep, sample, *args, **kwargs)

    def change(self, pipe, space: LatentSpace, x0: torch.Tensor) -> torch.Tensor:
        """Return the change of the x0 estimate, in the layout of the denoiser."""
        spatial = space.unpack(pipe, x0)
        raw = spatial + offset_of(pipe, spatial)
        return space.pack(pipe, self.settings.pushed(raw, patch_of(pipe)) - raw).to(x0)


def smooth_field(coefficients: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return a field `(H, W)` of standard deviation 1 from coefficients `(M, M)` of the DCT-II, made pink."""
    modes = torch.arange(len(coefficients), dtype=torch.float32)
    number = torch.hypot(modes[:, None], modes[None, :])
    pink = torch.where(number > 0, coefficients.cpu() * number.clamp(min=1) ** -0.5, 0.0)
    field = waves(height, len(modes)) @ pink @ waves(width, len(modes)).T
    return field / field.std().clamp(min=1e-8)


def waves(length: int, count: int) -> torch.Tensor:
    """Return the first modes of the orthonormal DCT-II, `(length, count)`."""
    places, modes = torch.arange(length, dtype=torch.float32) + 0.5, torch.arange(count, dtype=torch.float32)
    found = torch.cos(math.pi * places[:, None] * modes / length) * math.sqrt(2 / length)
    found[:, 0] /= math.sqrt(2)
    return found


def offset_of(pipe, latents: torch.Tensor) -> torch.Tensor | float:
    """Return what added to latents makes them proportional to those of the VAE, which may have a mean."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    if means := config.get("latents_mean"):
        shift, scale = (torch.tensor(config[name]).to(latents) for name in ("latents_mean", "latents_std"))
        return (shift / scale).view(-1, 1, 1) if len(means) == latents.shape[-3] else 0.0
    return (config.get("shift_factor") or 0.0) * config.get("scaling_factor", 1.0)


def patch_of(pipe) -> int:
    """Return the patch size of the denoiser."""
    denoiser = next((getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None), None)
    patch = getattr(denoiser, "config", {}).get("patch_size")
    return patch if isinstance(patch, int) and patch > 1 else PATCH
