"""What the Noise Diffusion pipelines share: a call that takes a scorer."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..method import NoiseOptimizer
from ..registry import call_settings
from ..reward_mixin import RewardMixin
from .method import NoiseDiffusion


class NoiseDiffusionMixin(RewardMixin):
    """Adds a scorer and plain-value settings of Noise Diffusion to the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        rewards: Any = None,
        optimization_steps: int | None = None,
        selection: Literal["pool", "exact", "random"] | None = None,
        noise_diffusion_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call; with `rewards` the initial noise is first chosen by Noise Diffusion.

        Args:
            rewards: The scorer, in [0, 1]: `"vqascore"`, the Hub id or folder of a vision-language model, or any
                callable `(images, prompts) -> (B,)`. Other rewards need `noise_diffusion_kwargs={"score_range": (low,
                high)}`. `None` leaves the pipeline bit-identical to the stock class. What is given by name is loaded
                once per pipeline.
            optimization_steps: Images that are drawn and scored, 51 by default: the plain one and 50 rounds.
            selection: "pool", the default and the paper's, "exact" or "random".
            noise_diffusion_kwargs: More settings of `NoiseDiffusion`, by name: `{"threshold": 0.95}`.
            noise_optimizer: Another method instead of Noise Diffusion.
            noise_sampler: What the initial noise is drawn from: `"white"`, as in the stock pipeline, `"pink"`,
                `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape, generator, device,
                dtype)`. Works without a method too; not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step: functions of the state, or objects with
                `on_step_end(state)`; return `False` to stop.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call.
            args, kwargs: Those of the stock pipeline.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute.

        Raises:
            ValueError: For settings that cannot work, before any model runs.
        """
        named = {"steps": optimization_steps, "selection": selection}
        settings = call_settings(named, noise_diffusion_kwargs, "noise_diffusion_kwargs")
        return super().__call__(
            *args,
            noise_optimizer=self.method_on(NoiseDiffusion, rewards, settings, noise_optimizer),
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )
