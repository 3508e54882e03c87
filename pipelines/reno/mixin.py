"""What the ReNO pipelines share: a call that takes rewards by name."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..method import NoiseOptimizer
from ..registry import call_settings
from ..reward_mixin import RewardMixin
from .method import ReNO


class ReNOMixin(RewardMixin):
    """Adds `rewards=` and plain-value settings of ReNO to the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        rewards: Any = None,
        optimization_steps: int | None = None,
        mode: Literal["default", "parity"] | None = None,
        reno_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call; with `rewards` the initial noise is first optimised by ReNO.

        Args:
            rewards: A name, Hub id or folder (`"clipscore"`), a callable `(images, prompts) -> (B,)`, a dict of these
                to weights (`{"clipscore": 1.0, "red": 0.1}`), a list of (reward, weight), or `"reno"` for the rewards
                and weights of the paper. `None` leaves the pipeline bit-identical to the stock class. Rewards given by
                name are loaded once per pipeline.
            optimization_steps: Evaluations of ReNO, 50 by default.
            mode: "default", or "parity" for the released loop step by step.
            reno_kwargs: More settings of `ReNO`, by name: `{"learning_rate": 10.0}`.
            noise_optimizer: Another method instead of ReNO.
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
        settings = call_settings({"steps": optimization_steps, "mode": mode}, reno_kwargs, "reno_kwargs")
        noise_optimizer = self.method_on(ReNO, rewards, settings, noise_optimizer)
        return super().__call__(
            *args,
            noise_optimizer=noise_optimizer,
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )
