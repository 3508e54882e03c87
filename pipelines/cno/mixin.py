"""What the CNO pipelines share: a call whose images differ."""

import os
from collections.abc import Mapping
from typing import Any

from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..hook import NoiseOptimizationMixin
from ..method import NoiseOptimizer
from ..registry import call_settings
from .method import CNO


class CNOMixin(NoiseOptimizationMixin):
    """Optimises the noises of each prompt's images for diversity in the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        optimization_steps: int | None = None,
        gamma: float | str | None = None,
        stop_gradient: bool | None = None,
        cno_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call on noises that CNO moved apart: at least two images of each prompt.

        Args:
            optimization_steps: Updates of CNO, each one more call of the denoiser for each image; 3 by default. 0
                leaves the pipeline bit-identical to the stock class.
            gamma: Scales the temperature of the attraction, a number above 0 (smaller attracts more) or "auto", the
                default: the paper's closed form for the number of images.
            stop_gradient: `True`, the default, as in the paper; `False` back-propagates through the denoiser as the
                released code does.
            cno_kwargs: More settings of `CNO`, by name: `{"window_size": 8}`.
            noise_optimizer: Another method instead of CNO.
            noise_sampler: What the initial noise is drawn from: `"white"`, as in the stock pipeline, `"pink"`,
                `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape, generator, device,
                dtype)`. Works without a method too; not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step: functions of the state, or objects with
                `on_step_end(state)`; return `False` to stop.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call.
            args, kwargs: Those of the stock pipeline; pass `num_images_per_prompt`.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute.

        Raises:
            ValueError: For settings that cannot work, and for a prompt with one image, before any model runs.
        """
        named = {"steps": optimization_steps, "gamma": gamma, "stop_gradient": stop_gradient}
        settings = call_settings(named, cno_kwargs, "cno_kwargs")
        if noise_optimizer is not None and settings:
            raise ValueError(
                f"Expected `noise_optimizer` or settings of CNO, but got both: {sorted(settings)}. Give them to the "
                "method."
            )
        if noise_optimizer is None and settings.get("steps") != 0:
            noise_optimizer = CNO(**settings)
        return super().__call__(
            *args,
            noise_optimizer=noise_optimizer,
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )
