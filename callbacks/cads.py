"""CADS: a condition that is noise at first."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from .denoising_callback import DenoisingCallback
from .sampling_time import require_training_times, training_time


class CADS(DenoisingCallback):
    """Anneal the prompt's embeddings from noise to what they are, so that images of a prompt differ more.

    Condition-annealed sampling, https://arxiv.org/abs/2310.17347: at the time t of a model call, 1 at pure noise and 0
    at the end (the timestep over `num_train_timesteps`), the condition y becomes

        ŷ = √γ·y + s·√(1 - γ)·n,   γ = 1 for t <= τ1, 0 for t >= τ2, linear between;   n ~ N(0, I) anew in each step
        ŷ ← ψ·ŷᵣ + (1 - ψ)·ŷ,   ŷᵣ = (ŷ - mean ŷ) / std ŷ · std y + mean y

    A callback runs after a step: the first model call has y itself, and annealing begins with the second. With few
    steps little is left of it; with one it is refused. Where the pipeline keeps unconditional embeddings in the same
    tensor (SD, SDXL, SD3, Sana, with guidance) they are annealed too, as common implementations do; those that are
    all 0, as SDXL's of no prompt, have no deviation and stay 0 with ψ = 1.

    Args:
        tau1: τ1 in [0, 1), the time from which on the condition is y.
        tau2: τ2 in (τ1, 1], the time until which it is nothing but noise.
        noise_scale: s, at least 0; 0 switches the callback off. Above 0.3 images stop to follow the prompt.
        mixing: ψ in [0, 1], how much of ŷ is rescaled.
        conditions: Names of the tensors that are annealed, out of `pipe._callback_tensor_inputs`. The pooled embedding
            is "add_text_embeds" in SDXL and "pooled_prompt_embeds" in SD3; Flux does not give it.
        statistics: Over what mean and std go: "image", each embedding by itself, so that an image does not depend on
            what else is in its batch; or "batch", the whole tensor, as the paper's code does.
        generator: Where n is drawn from: one, or a list with one for each image; `None` for torch's own. It is at its
            next numbers in the next call, as that of a pipeline.

    Raises:
        ValueError: Settings out of their ranges; at the first step, a single denoising step or a list of generators
            that does not fit the batch.
        TypeError: At the first step, a condition that is no tensor (Z-Image has lists of them), or a scheduler whose
            timesteps do not count training steps.
    """

    def __init__(
        self,
        *,
        tau1: float = 0.6,
        tau2: float = 0.9,
        noise_scale: float = 0.25,
        mixing: float = 1.0,
        conditions: Sequence[str] = ("prompt_embeds",),
        statistics: Literal["image", "batch"] = "image",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> None:
        if not 0 <= tau1 < tau2 <= 1:
            raise ValueError(f"Expected 0 <= tau1 < tau2 <= 1, but got {tau1} and {tau2}.")
        if noise_scale < 0 or not 0 <= mixing <= 1:
            raise ValueError(f"Expected noise_scale >= 0 and mixing in [0, 1], but got {noise_scale} and {mixing}.")
        if isinstance(conditions, str) or not conditions:
            raise ValueError(f'Expected names of tensors such as ("prompt_embeds",), but got {conditions!r}.')
        if statistics not in ("image", "batch"):
            raise ValueError(f'Expected statistics "image" or "batch", but got {statistics!r}.')
        super().__init__(conditions)
        self.tau1, self.tau2, self.noise_scale, self.mixing = tau1, tau2, noise_scale, mixing
        self.statistics, self.generator = statistics, generator
        self.conditions: dict[str, torch.Tensor] = {}

    def gamma(self, t: float) -> float:
        """γ(t) in [0, 1], how much of the condition's variance is left at time t."""
        return min(max((self.tau2 - t) / (self.tau2 - self.tau1), 0.0), 1.0)

    def anneal(self, y: torch.Tensor, gamma: float) -> torch.Tensor:
        """ŷ of a condition `(B, ...)` in its shape and dtype; y itself where γ is 1 or s is 0."""
        if gamma == 1 or self.noise_scale == 0:
            return y
        exact, dims = y.float(), list(range(1, y.ndim)) if self.statistics == "image" else list(range(y.ndim))
        annealed = gamma**0.5 * exact + self.noise_scale * (1 - gamma) ** 0.5 * self.noise(y)
        standard = (annealed - annealed.mean(dims, keepdim=True)) / annealed.std(dims, keepdim=True)
        rescaled = standard * exact.std(dims, keepdim=True) + exact.mean(dims, keepdim=True)
        return (self.mixing * rescaled + (1 - self.mixing) * annealed).to(y.dtype)

    def noise(self, y: torch.Tensor) -> torch.Tensor:
        """n in the shape of `y`, float32; a list of generators draws the rows of each image in turn."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return randn_tensor(y.shape, self.generator, y.device, torch.float32)
        streams = [*self.generator] * (len(y) // len(self.generator))
        return randn_tensor(y.shape, streams, y.device, torch.float32)

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        require_training_times(pipeline.scheduler)
        self.conditions = {name: callback_kwargs[name] for name in self.tensor_inputs}
        for name, y in self.conditions.items():
            if not isinstance(y, torch.Tensor):
                raise TypeError(
                    f"Expected {name} of {type(pipeline).__name__} as one tensor, but got {type(y).__name__}. CADS "
                    "cannot anneal it; optimise the initial noise instead, with `optimize_noise`."
                )
            self.require_fitting_generators(len(y))

    def require_fitting_generators(self, rows: int) -> None:
        if isinstance(self.generator, Sequence) and (not self.generator or rows % len(self.generator)):
            raise ValueError(
                f"Expected one generator, or one for each image, but got {len(self.generator)} for {rows} embeddings. "
                "Pass as many as images are drawn."
            )

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        if index < len(pipeline.scheduler.timesteps):
            gamma = self.gamma(training_time(pipeline.scheduler, index))
            callback_kwargs.update({name: self.anneal(y, gamma) for name, y in self.conditions.items()})

    def on_call_end(self, pipeline: Any) -> None:
        self.conditions = {}
