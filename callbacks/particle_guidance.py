"""Particle guidance: images of a prompt that push each other away while they are drawn."""

import math
from typing import Any

import torch

from .denoising_callback import DenoisingCallback
from .sampling_time import noise_ratio, signal_and_noise


class ParticleGuidance(DenoisingCallback):
    """Let the latents of the images of a prompt repel each other, as particles with a fixed potential.

    https://arxiv.org/abs/2310.13102, on latents. In step t, where its noise level σ (noise over signal) is at least
    `min_sigma`, the predicted noise ε becomes

        ε - coefficient·σ·force_i,   force_i = Σ_{j≠i} 2·k_ij·(a_i - a_j)/h_i,   k_ij = exp(-‖a_i - a_j‖²/h_i)
        h_i = median_{j≠i}(‖a_i - a_j‖)²/ln(n - 1)

    for the n latents a = x_t, scaled to the unit variance of variance preserving samplers. The force is the gradient of
    -Σ_j k_ij with h fixed. For n = 2, where the published bandwidth gives no force at all, ln 2 stands for ln(n - 1).

    A callback sees no ε, but what the change of ε does to the sample after the step is known: with x = a·x0 + b·ε
    before and a'·x0 + b'·ε after, it adds (a'·b/a - b')·coefficient·σ·force. That is the paper's rule itself for
    samplers without memory or noise of their own (DDIM, Euler, also of flow matching) and close to it for others. The
    first step is without force: a callback runs after a step, and never sees the latents before the first.

    Args:
        coefficient: Strength, at least 0; 0 switches the callback off. The published 30 is for Stable Diffusion 1.5.
        min_sigma: The least noise level that has a force, at least 0.
        images_per_prompt: How many images in a row have the same prompt. By default the prompt embeddings tell which
            images belong together; in a list of callbacks this one then comes before those that change embeddings.

    Raises:
        ValueError: Settings out of their ranges; at the first step, no two images of a prompt, a single denoising step,
            or a scheduler that calls its model more than once in a step.
        TypeError: At the first step, a scheduler whose noise levels are not known.
    """

    def __init__(
        self, *, coefficient: float = 30.0, min_sigma: float = 1.0, images_per_prompt: int | None = None
    ) -> None:
        if coefficient < 0 or min_sigma < 0:
            raise ValueError(f"Expected coefficient and min_sigma of at least 0, but got {coefficient}, {min_sigma}.")
        if images_per_prompt is not None and images_per_prompt < 2:
            raise ValueError(f"Expected at least 2 images per prompt, but got {images_per_prompt}.")
        super().__init__(["latents"] if images_per_prompt else ["latents", "prompt_embeds"])
        self.coefficient, self.min_sigma, self.images_per_prompt = coefficient, min_sigma, images_per_prompt
        self.groups: list[torch.Tensor] = []
        self.sample: torch.Tensor | None = None

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        if getattr(pipeline.scheduler, "order", 1) != 1:
            raise ValueError(
                f"Expected a scheduler with one model call per step, but got {type(pipeline.scheduler).__name__}. Give "
                "the pipeline a first-order one, such as `EulerDiscreteScheduler`."
            )
        self.sample, self.groups = None, self.find_groups(pipeline, callback_kwargs)
        if not self.groups:
            raise ValueError(
                f"Expected at least 2 images of a prompt, but got {len(callback_kwargs['latents'])} of as many "
                "prompts. Pass `num_images_per_prompt=2` or more, or `images_per_prompt` if their embeddings differ."
            )

    def find_groups(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The rows of the latents that have the same prompt, where there are several."""
        latents = callback_kwargs["latents"]
        if self.images_per_prompt is not None:
            if len(latents) % self.images_per_prompt:
                raise ValueError(
                    f"Expected {self.images_per_prompt} images of each prompt, but got {len(latents)} in all. Pass "
                    "`images_per_prompt` as the pipeline's `num_images_per_prompt`."
                )
            return list(torch.arange(len(latents), device=latents.device).split(self.images_per_prompt))
        if not isinstance(embeddings := callback_kwargs["prompt_embeds"], torch.Tensor):
            raise TypeError(
                f"Expected prompt_embeds of {type(pipeline).__name__} as one tensor, but got "
                f"{type(embeddings).__name__}. Pass `images_per_prompt` to ParticleGuidance."
            )
        conditional = embeddings[-len(latents) :].flatten(1)  # the unconditional ones come before
        labels = torch.unique(conditional, dim=0, return_inverse=True)[1]
        groups = [(labels == label).nonzero().flatten() for label in labels.unique()]
        return [rows for rows in groups if len(rows) > 1]

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        if self.sample is not None and self.coefficient > 0:
            factor = self.displacement(pipeline.scheduler, index)
            if factor > 0:
                latents = callback_kwargs["latents"]
                moved = latents.float() + factor * self.forces(pipeline.scheduler, index - 1)
                callback_kwargs["latents"] = moved.to(latents.dtype)
        self.sample = callback_kwargs["latents"]

    def displacement(self, scheduler: Any, index: int) -> float:
        """What a force is multiplied with to be added to the sample of call `index`, after the step to it."""
        sigma = noise_ratio(scheduler, index - 1)
        if sigma < self.min_sigma:
            return 0.0
        signal, noise = signal_and_noise(scheduler, index)
        return self.coefficient * sigma * (signal * sigma - noise)

    def forces(self, scheduler: Any, index: int) -> torch.Tensor:
        """float32, in the shape of the latents of call `index`, which are in `sample`."""
        assert self.sample is not None
        size = math.hypot(*signal_and_noise(scheduler, index))
        particles = self.sample.float().flatten(1) / size
        found = torch.zeros_like(particles)
        for rows in self.groups:
            found[rows] = repulsion(particles[rows])
        return found.view(self.sample.shape)

    def on_call_end(self, pipeline: Any) -> None:
        self.sample, self.groups = None, []


def repulsion(particles: torch.Tensor) -> torch.Tensor:
    """force_i of `ParticleGuidance` on each of n >= 2 particles `(n, D)`; 0 where the median distance is."""
    count = len(particles)
    distances = torch.cdist(particles, particles, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(count, dtype=torch.bool, device=particles.device)
    median = distances.masked_fill(itself, torch.nan).nanmedian(dim=1, keepdim=True).values
    h = median**2 / math.log(max(count - 1, 2))
    weights = torch.where((h > 0) & ~itself, 2 * (-(distances**2) / h).exp() / h, 0.0)
    return weights.sum(1, keepdim=True) * particles - weights @ particles
