"""Classifier-free guidance in an interval of noise levels."""

import math
from typing import Any

from ..private_names import guidance_scale, set_guidance_scale
from .denoising_callback import DenoisingCallback
from .sampling_time import noise_ratio


class IntervalGuidance(DenoisingCallback):
    """Apply guidance only at noise levels low < σ <= high, and turn it off elsewhere.

    https://arxiv.org/abs/2404.07724. σ is the ratio of noise to signal: √(1 - ᾱ)/√ᾱ, or σ/(1 - σ) in flow matching. The
    defaults are those of SDXL: training timesteps 73 to 812 of Stable Diffusion's betas, flow times 0.219 to 0.844.

    To turn guidance off, the scale is set to the next number above 1 (above 0 in pipelines that apply guidance from
    there), which gives the conditional prediction up to rounding. The pipeline still computes its unconditional
    prediction, because a callback cannot remove those rows from every pipeline (ControlNets, IP-Adapters, masks). So
    this saves no time, but works in all pipelines that read their guidance scale at each step (those with
    `do_classifier_free_guidance`: SD, SDXL, SD3, Sana, Lumina 2, Z-Image, ...). A callback runs after a step, so the
    first model call is always guided.

    After the last step the pipeline's scale is restored. After an exception it stays off, but each call sets its own.

    Args:
        low: Guidance is off at this σ and below, at least 0.
        high: Guidance is off above this σ; infinity for no upper limit.

    Raises:
        ValueError: For an empty interval; at the first step, for a call without guidance or with a single step.
        TypeError: In `check` and at the first step, for a pipeline that reads its guidance scale once per call, such as
            Flux and Qwen-Image; at the first step, for a scheduler whose noise levels are unknown.
    """

    def __init__(self, *, low: float = 0.28, high: float = 5.42) -> None:
        if not 0 <= low < high:
            raise ValueError(f"Expected 0 <= low < high, but got {low} and {high}.")
        super().__init__(["latents"])
        self.low, self.high = low, high

    def check(self, pipeline: Any) -> None:
        super().check(pipeline)
        if not hasattr(type(pipeline), "do_classifier_free_guidance"):
            raise TypeError(
                f"Expected a pipeline that reads its guidance scale at each step, but {type(pipeline).__name__} reads "
                "it once per call. Use a constant scale there."
            )

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        if not pipeline.do_classifier_free_guidance:
            raise ValueError(
                f"Expected a call with guidance, but got guidance_scale={guidance_scale(pipeline)}, which disables it, "
                f"or a guidance-distilled {type(pipeline).__name__}. Pass a larger `guidance_scale`."
            )
        self.scale, self.guided, self.off = guidance_scale(pipeline), True, scale_without_effect(pipeline)

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        if index < len(pipeline.scheduler.timesteps):
            self.switch(pipeline, self.low < noise_ratio(pipeline.scheduler, index) <= self.high)

    def on_call_end(self, pipeline: Any) -> None:
        self.switch(pipeline, True)

    def switch(self, pipeline: Any, guided: bool) -> None:
        """Set the scale only when it changes, because other callbacks may set it too.

        One that ended guidance for good, as diffusers' `SDCFGCutoffCallback` does, took its embeddings away too.
        """
        if guided != self.guided and pipeline.do_classifier_free_guidance:
            set_guidance_scale(pipeline, self.scale if guided else self.off)
            self.guided = guided


def scale_without_effect(pipeline: Any) -> float:
    """Return the smallest scale at which the pipeline still applies guidance, without an effect on the prediction.

    Most pipelines apply guidance above a scale of 1, as in equation 2 of Imagen; others apply it above 0.
    """
    scale = guidance_scale(pipeline)
    set_guidance_scale(pipeline, 1.0)
    neutral = 0.0 if pipeline.do_classifier_free_guidance else 1.0
    set_guidance_scale(pipeline, scale)
    return math.nextafter(neutral, math.inf)
