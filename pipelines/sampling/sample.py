"""Samples of the model that objectives evaluate."""

import functools

import torch

from .sampler import Gradient, PipelineSampler


class Sample:
    """Sample that an objective evaluates; `images` and `x0` are computed on first access and cached.

    Attributes:
        noise: `(B, C, H, W)`, the initial noise.
        prompts: `B` prompts.
        groups: `B` integers, equal for images of the same prompt.
        seeds: `B` integers that differ between steps and images, for stochastic objectives.
        images: `(B, 3, H, W)` in [0, 1]: the output of the whole chain, or of one model call for a preview; of videos
            `(B, F, 3, H, W)`, the frames that rewards see.
        x0: `(B, C, H, W)`, the estimate of the clean latents after one model call.
        chunk_size: At most this many images have their graphs in memory at a time, `None` for all. Objectives with
            models of their own respect it.
    """

    def __init__(
        self,
        sampler: PipelineSampler,
        noise: torch.Tensor,
        prompts: list[str],
        groups: list[int],
        seeds: list[int],
        gradient: Gradient,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.sampler, self.noise, self.prompts = sampler, noise, prompts
        self.groups, self.seeds = groups, seeds
        self.gradient: Gradient = gradient
        self.preview, self.chunk_size = preview, chunk_size

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return self.sampler.images(self.noise, self.gradient, self.preview, self.chunk_size)

    @functools.cached_property
    def x0(self) -> torch.Tensor:
        return self.sampler.x0(self.noise, self.gradient, self.chunk_size)

    @property
    def generated_images(self) -> torch.Tensor | None:
        """The images if the objective has accessed them, without their graph."""
        images = vars(self).get("images")
        return None if images is None else images.detach()
