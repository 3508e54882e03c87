"""Particle guidance: repulsion between the images of a prompt during sampling."""

import math
from typing import Any

import torch

from .denoising_callback import DenoisingCallback
from .sampling_time import noise_ratio, signal_and_noise


class ParticleGuidance(DenoisingCallback):
    """Make the latents of the images of a prompt repel each other, as particles with a fixed potential.

    https://arxiv.org/abs/2310.13102, on latents. In each step whose noise level σ (noise over signal) is at least
    `min_sigma`, the predicted noise ε becomes

        ε - coefficient·σ·force_i,   force_i = Σ_{j≠i} 2·k_ij·(a_i - a_j)/h_i,   k_ij = exp(-‖a_i - a_j‖²/h_i)
        h_i = median_{j≠i}(‖a_i - a_j‖)²/ln(n - 1)

    for the n latents a = x_t, scaled to the unit variance of variance preserving samplers. The force is the gradient of
    -Σ_j k_ij with h fixed. For n = 2, where the published bandwidth gives no force, ln(n - 1) is replaced by ln 2.

    A callback cannot change ε, but it can add the effect of the change to the sample after the step: with x = a·x0 +
    b·ε before and a'·x0 + b'·ε after, this is (a'·b/a - b')·coefficient·σ·force. The result is exactly the paper's rule
    for deterministic one-step samplers (DDIM, Euler, also for flow matching) and an approximation for others. There is
    no force in the first step, because a callback runs after a step and never sees the latents before the first.

    Args:
        coefficient: Strength, at least 0; 0 disables the callback. The published 30 is for Stable Diffusion 1.5.
        min_sigma: The lowest noise level with a force, at least 0.
        images_per_prompt: The number of consecutive images with the same prompt. By default images are grouped by equal
            prompt embeddings; then this callback must come before callbacks that change embeddings.

    Raises:
        ValueError: For arguments outside their ranges; at the first step, if no two images have the same prompt, for a
            single denoising step, or for a scheduler with more than one model call per step.
        TypeError: At the first step, for a scheduler whose noise levels are unknown.
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
        """Return, for each prompt with several images, the row indices of its latents."""
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
        conditional = embeddings[-len(latents) :].flatten(1)  # unconditional embeddings come first
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
        """Return the factor of the force in the sample of call `index`."""
        sigma = noise_ratio(scheduler, index - 1)
        if sigma < self.min_sigma:
            return 0.0
        signal, noise = signal_and_noise(scheduler, index)
        return self.coefficient * sigma * (signal * sigma - noise)

    def forces(self, scheduler: Any, index: int) -> torch.Tensor:
        """Return float32 forces in the shape of `self.sample`, the latents of call `index`."""
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
    """Return force_i of `ParticleGuidance` on each of n >= 2 particles `(n, D)`; 0 if the median distance is 0."""
    count = len(particles)
    distances = torch.cdist(particles, particles, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(count, dtype=torch.bool, device=particles.device)
    median = distances.masked_fill(itself, torch.nan).nanmedian(dim=1, keepdim=True).values
    h = median**2 / math.log(max(count - 1, 2))
    weights = torch.where((h > 0) & ~itself, 2 * (-(distances**2) / h).exp() / h, 0.0)
    return weights.sum(1, keepdim=True) * particles - weights @ particles
