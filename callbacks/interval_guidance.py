"""Guidance in an interval of noise levels."""

import math
from typing import Any

from .denoising_callback import DenoisingCallback
from .sampling_time import noise_ratio


class IntervalGuidance(DenoisingCallback):
    """Guide only where it helps: the scale is that of the call for noise levels low < σ <= high, and off elsewhere.

    https://arxiv.org/abs/2404.07724. σ is the ratio of noise to signal, whatever the scheduler lists: √(1 - ᾱ)/√ᾱ, or
    σ/(1 - σ) of flow matching. The defaults are those of SDXL: training timesteps 73 to 812 of Stable Diffusion's
    betas, flow times 0.219 to 0.844.

    Off means that the result of guidance is the conditional prediction, but for rounding: the scale is the next number
    above 1. The pipeline still makes its unconditional call, whose rows no callback could take out of every pipeline
    (ControlNets, IP-Adapters, masks); so this works in all whose guidance is read anew at each step (those with
    `do_classifier_free_guidance`: SD, SDXL, SD3, Sana, Lumina 2, Z-Image ...) and saves no time. A callback runs after
    a step: the first model call is guided, whatever its σ.

    After the last step the pipeline's scale is as the call set it. A call that ends in an exception leaves it off, and
    every call sets its own as it begins.

    Args:
        low: Guidance is off at this σ and below, at least 0.
        high: Guidance is off above this σ; infinity for no upper end.

    Raises:
        ValueError: An empty interval; at the first step, a call without guidance or with a single step.
        TypeError: At the first step, and by `check`, a pipeline that fixes its guidance for the whole call, as Flux and
            Qwen-Image do; at the first step, a scheduler whose noise levels are not known.
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
                f"Expected a pipeline that reads its guidance scale at each step, but {type(pipeline).__name__} does "
                "it once in a call. Draw with a constant scale there."
            )

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        if not pipeline.do_classifier_free_guidance:
            raise ValueError(
                f"Expected a call with guidance, but got guidance_scale={pipeline._guidance_scale}, which is none, or "
                f"a {type(pipeline).__name__} distilled from guidance. Pass a larger `guidance_scale`."
            )
        self.scale, self.guided, self.off = pipeline._guidance_scale, True, scale_without_effect(pipeline)

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        if index < len(pipeline.scheduler.timesteps):
            self.switch(pipeline, self.low < noise_ratio(pipeline.scheduler, index) <= self.high)

    def on_call_end(self, pipeline: Any) -> None:
        self.switch(pipeline, True)

    def switch(self, pipeline: Any, guided: bool) -> None:
        """Write the scale only where it changes: other callbacks may set it too."""
        if guided != self.guided:
            pipeline._guidance_scale = self.scale if guided else self.off
            self.guided = guided


def scale_without_effect(pipeline: Any) -> float:
    """The smallest scale that leaves the conditional prediction as it is while the pipeline thinks it is guided.

    Most pipelines are guided above 1, as in equation 2 of Imagen; those that are at 1 too count from 0.
    """
    scale = pipeline._guidance_scale
    pipeline._guidance_scale = 1.0
    counts_from = 0.0 if pipeline.do_classifier_free_guidance else 1.0
    pipeline._guidance_scale = scale
    return math.nextafter(counts_from, math.inf)
