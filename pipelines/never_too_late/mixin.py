"""What the Never Too Late pipelines share: a call whose images form a set that differs."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ...rewards.features.auto_features import AutoFeatures
from ...rewards.sets.set_reward import find_set_reward
from ...rewards.sets.set_reward_sum import SetRewardSum, check_set_reward_entry, set_reward_entries
from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..method import NoiseOptimizer
from ..registry import call_settings
from ..reward_mixin import RewardMixin
from .image_set import Seeds, grow_set, sequential_settings
from .method import NeverTooLate, optimised_rewards
from .quality_guard import QualityGuard, as_guards, shares_reward


class NeverTooLateMixin(RewardMixin):
    """Adds what a set is optimised for and plain-value settings of Never Too Late to the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        diversity: Any = None,
        rewards: Any = None,
        guard: Any = None,
        optimization_steps: int | None = None,
        learning_rate: float | None = None,
        never_too_late_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call; with `diversity` the noises of each prompt's images are first optimised as a set.

        Args:
            diversity: Set rewards with their weights: `"dpp"`, `{"dpp": 150.0}`, or on other features than their own
                `{"dpp": ("clip", 150.0)}`. `None` leaves the pipeline bit-identical to the stock class. Features that
                are given by name are loaded once per pipeline.
            rewards: What keeps each image good: `{"hpsv2.1": 3.0}`, or any callable `(images, prompts) -> (B,)`.
            guard: A floor under each image: `{"hpsv2.1": 0.05}` allows that drop from the plain image, `{"sharpness":
                {"keep": 0.8}}` keeps four fifths of it.
            optimization_steps: Sets that are drawn and scored, 50 by default.
            learning_rate: 6 by default.
            never_too_late_kwargs: More settings of `NeverTooLate`, by name: `{"stop_at": 0.98}`.
            noise_optimizer: Another method instead of Never Too Late.
            noise_sampler: What the initial noise is drawn from: `"white"`, as in the stock pipeline, `"pink"`, which
                the paper adds, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)`. Works without a method too; not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step: functions of the state, or objects with
                `on_step_end(state)`; return `False` to stop.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call.
            args, kwargs: Those of the stock pipeline; pass `num_images_per_prompt`.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute.

        Raises:
            ValueError: For settings that cannot work, and for a prompt with one image, before any model runs.
        """
        named = {"diversity": diversity, "rewards": rewards, "guard": guard}
        named |= {"steps": optimization_steps, "learning_rate": learning_rate}
        settings = call_settings(named, never_too_late_kwargs, "never_too_late_kwargs")
        diversity = settings.pop("diversity", None)
        if diversity is None and settings:
            raise ValueError(
                f"Expected `diversity` beside {sorted(settings)}, but got none: there is nothing to optimise. Pass "
                '`diversity={"dpp": 150.0}`, say.'
            )
        if diversity is not None and noise_optimizer is not None:
            raise ValueError("Expected `diversity` or `noise_optimizer`, but got both. Give it to the method.")
        if diversity is not None:
            noise_optimizer = self.never_too_late(diversity, settings)
        return super().__call__(
            *args,
            noise_optimizer=noise_optimizer,
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )

    def grow_set(
        self,
        prompt: str,
        count: int,
        *,
        diversity: Any = None,
        rewards: Any = None,
        guard: Any = None,
        optimization_steps: int | None = None,
        learning_rate: float | None = None,
        never_too_late_kwargs: Mapping[str, Any] | None = None,
        render: Mapping[str, Any] | None = None,
        generator: Seeds = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        folder: str | Path | None = None,
        callback_on_optimization_step_end: Any = None,
        **kwargs,
    ) -> ImagePipelineOutput:
        """Grow a set of images of any size: each new one is optimised to differ from all before it. See `grow_set`.

        Args:
            prompt: One.
            count: Images in all. The first is the plain one.
            diversity: As in a call; `{"dpp": 15.0}` by default, and then an image is done at a value of 0.98 unless
                `never_too_late_kwargs` say otherwise.
            rewards, guard, never_too_late_kwargs: As in a call. The paper: `rewards={"hpsv2.1": 1.0}`.
            optimization_steps: For each image, 25 by default.
            learning_rate: 3 by default.
            render: Arguments that differ where an image is drawn for the set: `{"num_inference_steps": 4}`.
            generator: A seed s, from which image k gets s + k, or one for each image.
            noise_sampler: As in a call, `"white"` or `"pink"`.
            folder: Where each image is written; a set that is there already is continued up to `count`.
            callback_on_optimization_step_end: Callbacks per optimisation step of each image.
            kwargs: Those of the stock pipeline, without `num_images_per_prompt` and `latents`.

        Returns:
            An output with `images`, PIL, and an `image_set` attribute: the noises, the values, `save(folder)`.

        Raises:
            ValueError: For settings that cannot work, and a folder that is broken or of another set.
        """
        named = {"steps": optimization_steps, "learning_rate": learning_rate, "rewards": rewards, "guard": guard}
        settings = call_settings(named, never_too_late_kwargs, "never_too_late_kwargs")
        settings = {**sequential_settings(diversity is None), **settings}
        default = settings.pop("diversity", None)
        method = self.never_too_late(default if diversity is None else diversity, settings)
        own = {"render": render, "generator": generator, "noise_sampler": noise_sampler, "folder": folder}
        found = grow_set(self, prompt, count, method, callbacks=callback_on_optimization_step_end, **own, **kwargs)
        output = ImagePipelineOutput(images=list(found.pictures))
        vars(output)["image_set"] = found
        return output

    def never_too_late(self, diversity: Any, settings: dict[str, Any]) -> NeverTooLate:
        """The method, with everything that has a name loaded at its first use and kept."""
        guards = as_guards(settings.get("guard"))
        rewards = optimised_rewards(settings.get("rewards"), guards)
        entries = set_reward_entries(diversity)
        for entry in entries:
            check_set_reward_entry(*entry)
        device = settings.get("reward_device")
        rewards = None if rewards is None else self.load_rewards(rewards, device)
        guard = [self.load_guard(each, rewards, device) for each in guards] or None
        loaded = {"rewards": rewards, "guard": guard, "diversity": self.load_diversity(entries, device)}
        return NeverTooLate(**{**settings, **loaded})

    def load_guard(self, guard: QualityGuard, rewards: Any, device: Any) -> QualityGuard:
        """The guard with its reward loaded, unless it means one that is optimised."""
        if not isinstance(guard.reward, str) or shares_reward(guard, getattr(rewards, "names", ())):
            return guard
        (reward,) = self.load_rewards(guard.reward, device).rewards
        return dataclasses.replace(guard, reward=reward)

    def load_diversity(self, entries: list[tuple[Any, Any, Any]], device: Any) -> SetRewardSum:
        """A `SetRewardSum` on a device, by default the pipeline's."""
        parts = [(reward, self.load_features(reward, each, device), weight) for reward, each, weight in entries]
        return SetRewardSum(parts)

    def load_features(self, reward: Any, features: Any, device: Any) -> Any:
        """The features of a set reward: those of a name from the pipeline's own, any other as they are."""
        if not isinstance(reward, str):
            return features
        name = features or find_set_reward(reward).default_features
        if not isinstance(name, str | os.PathLike):
            return name
        name = os.fspath(name)
        kept = self.kept_on(device, "_loaded_features")
        if name not in kept:
            device = device or self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
            kept[name] = AutoFeatures.from_pretrained(name, device=device)
        return kept[name]
