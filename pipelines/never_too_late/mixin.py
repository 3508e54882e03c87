"""The arguments of the Never Too Late pipelines, and their `grow_set`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..method_mixin import MethodMixin, merged_settings
from .image_set import Seeds, grow_set
from .method import NeverTooLate


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
        named = {"diversity": diversity, "steps": steps, "learning_rate": learning_rate}
        named |= {"rewards": rewards, "guard": guard}
        given = merged_settings({name: value for name, value in named.items() if value is not None}, method_kwargs)
        own = {"render": render, "generator": generator, "noise_sampler": noise_sampler, "folder": folder}
        found = grow_set(self, prompt, count, method_kwargs=given, callbacks=callbacks, **own, **kwargs)
        output = ImagePipelineOutput(images=list(found.pictures))
        vars(output)["image_set"] = found
        return output
