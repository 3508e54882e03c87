"""The arguments of the Never Too Late pipelines, and their `grow_set`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ...private_names import execution_device
from ...rewards.features.auto_features import AutoFeatures
from ...rewards.sets.set_reward import find_set_reward
from ...rewards.sets.set_reward_sum import SetRewardSum, check_set_reward_entry, set_reward_entries
from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..method_mixin import MethodMixin, merged_settings
from .image_set import Seeds, grow_set, sequential_settings
from .method import NeverTooLate, weighted_rewards
from .quality_guard import QualityGuard, as_guards, shares_reward


class NeverTooLateMixin(
    MethodMixin,
    method=NeverTooLate,
    arguments=("diversity", "rewards", "guard", "steps", "learning_rate"),
    target="diversity",
):
    """Optimizes the noises of each prompt's images as a set in the call of a stock pipeline.

    Pass `num_images_per_prompt`: a prompt needs at least two images.

    Args:
        diversity: Set rewards with their weights: `"dpp"`, `{"dpp": 150.0}`, or with other features than their own
            `{"dpp": ("clip", 150.0)}`. `None` leaves the pipeline bit-identical to the stock class. Features given by
            name are loaded once per pipeline.
        rewards: Rewards that keep each image good: `{"hpsv2.1": 3.0}`, or any callable `(images, prompts) -> (B,)`.
        guard: A floor under each image: `{"hpsv2.1": 0.05}` allows that drop from the baseline, `{"sharpness":
            {"keep": 0.8}}` keeps four fifths of it.
        steps: Sets that are sampled and scored, 50 by default.
        learning_rate: The learning rate, 6 by default.
    """

    def grow_set(
        self,
        prompt: str,
        count: int,
        *,
        diversity: Any = None,
        rewards: Any = None,
        guard: Any = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        method_kwargs: Mapping[str, Any] | None = None,
        render: Mapping[str, Any] | None = None,
        generator: Seeds = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        folder: str | Path | None = None,
        callbacks: Any = None,
        **kwargs,
    ) -> ImagePipelineOutput:
        """Grow a set of images of any size: each new one is optimized to differ from all before it. See `grow_set`.

        Args:
            prompt: One prompt.
            count: The number of images in all. The first is the baseline.
            diversity: As in a call. By default `{"dpp": 15.0}`, and then an image is finished at a value of 0.98 unless
                `method_kwargs` say otherwise.
            rewards, guard, method_kwargs: As in a call. The paper: `rewards={"hpsv2.1": 1.0}`.
            steps: Evaluations for each image, 25 by default.
            learning_rate: The learning rate, 3 by default.
            render: Arguments of the call that differ when an image is generated for the set:
                `{"num_inference_steps": 4}`.
            generator: A seed s, from which image k gets s + k, or one seed for each image.
            noise_sampler: As in a call, `"white"` or `"pink"`.
            folder: The folder to which each image is written; a set that is there already is continued up to `count`.
            callbacks: Callbacks per optimization step of each image.
            kwargs: The arguments of the stock pipeline, without `num_images_per_prompt` and `latents`.

        Returns:
            An output with PIL `images` and an `image_set` attribute: the noises, the values, `save(folder)`.

        Raises:
            ValueError: For settings that cannot work, and a folder that is broken or belongs to another set.
        """
        named = {"steps": steps, "learning_rate": learning_rate, "rewards": rewards, "guard": guard}
        named = {name: value for name, value in named.items() if value is not None}
        settings = {**sequential_settings(diversity is None), **merged_settings(named, method_kwargs)}
        if diversity is not None:
            settings["diversity"] = diversity
        method = NeverTooLate(**self.loaded(settings))
        own = {"render": render, "generator": generator, "noise_sampler": noise_sampler, "folder": folder}
        found = grow_set(self, prompt, count, method, callbacks=callbacks, **own, **kwargs)
        output = ImagePipelineOutput(images=list(found.pictures))
        vars(output)["image_set"] = found
        return output

    def loaded(self, settings: dict[str, Any]) -> dict[str, Any]:
        guards, device = as_guards(settings.get("guard")), settings.get("reward_device")
        rewards = weighted_rewards(settings.get("rewards"), guards)
        entries = set_reward_entries(settings["diversity"])
        for entry in entries:
            check_set_reward_entry(*entry)
        rewards = None if rewards is None else self.load_rewards(rewards, device)
        guard = [self.load_guard(each, rewards, device) for each in guards] or None
        return {**settings, "rewards": rewards, "guard": guard, "diversity": self.load_diversity(entries, device)}

    def load_guard(self, guard: QualityGuard, rewards: Any, device: Any) -> QualityGuard:
        """Return the guard with its reward loaded, unless it is an optimized one, loaded already."""
        if not isinstance(guard.reward, str) or shares_reward(guard, getattr(rewards, "names", ())):
            return guard
        (reward,) = self.load_rewards(guard.reward, device).rewards
        return dataclasses.replace(guard, reward=reward)

    def load_diversity(self, entries: list[tuple[Any, Any, Any]], device: Any) -> SetRewardSum:
        """Return a `SetRewardSum` on a device, by default the pipeline's."""
        parts = [(reward, self.load_features(reward, each, device), weight) for reward, each, weight in entries]
        return SetRewardSum(parts)

    def load_features(self, reward: Any, features: Any, device: Any) -> Any:
        """Return the features of a set reward, loaded at the first use of their name and stored with the pipeline."""
        if not isinstance(reward, str):
            return features
        name = features or find_set_reward(reward).default_features
        if not isinstance(name, str | os.PathLike):
            return name
        name = os.fspath(name)
        stored = self.stored_on(device, "_loaded_features")
        if name not in stored:
            device = device or execution_device(self)
            stored[name] = AutoFeatures.from_pretrained(name, device=device)
        return stored[name]
