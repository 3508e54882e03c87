"""CADS: annealing of the condition from noise to the prompt."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from .denoising_callback import DenoisingCallback
from .sampling_time import require_training_times, training_time


class CADS(DenoisingCallback):
    """Anneal the prompt embeddings from noise to their values, for more diverse images of a prompt.

    Condition-annealed diffusion sampling, https://arxiv.org/abs/2310.17347. Let t be the time of a model call, from 1
    for pure noise to 0 at the end (the timestep over `num_train_timesteps`). The condition y becomes

        ŷ = √γ·y + s·√(1 - γ)·n,   γ = 1 for t <= τ1, 0 for t >= τ2, linear between;   n ~ N(0, I) anew in each step
        ŷ ← ψ·ŷᵣ + (1 - ψ)·ŷ,   ŷᵣ = (ŷ - mean ŷ) / std ŷ · std y + mean y

    A callback runs after a step, so the first model call has y itself and annealing begins with the second. The effect
    is small for few steps, and a single step raises an error. Unconditional embeddings in the same tensor (SD, SDXL,
    SD3 and Sana, with guidance) are annealed too, as in common implementations; embeddings that are all 0, such as
    SDXL's for an empty prompt, have no deviation and stay 0 with ψ = 1.

    Beside other callbacks that change the condition, y is what they made of it. One that takes away the unconditional
    embeddings, as diffusers' `SDCFGCutoffCallback` does, takes them from y.

    Args:
        tau1: τ1 in [0, 1); the condition is y for t <= τ1.
        tau2: τ2 in (τ1, 1]; the condition is pure noise for t >= τ2.
        noise_scale: s, at least 0; 0 disables the callback. Above 0.3 images no longer follow the prompt.
        mixing: ψ in [0, 1], the fraction of the rescaled ŷ.
        conditions: Names of the tensors to anneal, out of `pipe._callback_tensor_inputs`. The pooled embedding is
            "add_text_embeds" in SDXL and "pooled_prompt_embeds" in SD3; Flux does not expose it.
        statistics: The scope of mean and std: "image" for each embedding, so that an image does not depend on the rest
            of its batch; or "batch" for the whole tensor, as in the paper's code.
        generator: The generator of n: one, a list with one per image, or `None` for torch's global one. Like that of a
            pipeline, it continues from call to call.

    Raises:
        ValueError: For arguments outside their ranges; at the first step, for a single denoising step or a list of
            generators that does not fit the batch.
        TypeError: At the first step, for a condition that is not a tensor (Z-Image has lists of tensors), or a
            scheduler whose timesteps do not count training steps.
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
        self.conditions: dict[str, torch.Tensor] = {}  # y
        self.annealed: dict[str, torch.Tensor] = {}  # ŷ of the step before

    def gamma(self, t: float) -> float:
        """Return γ(t) in [0, 1], the fraction of the condition's variance at time t."""
        return min(max((self.tau2 - t) / (self.tau2 - self.tau1), 0.0), 1.0)

    def anneal(self, y: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return ŷ for a condition `(B, ...)`, in its shape and dtype; y itself if γ is 1 or s is 0."""
        if gamma == 1 or self.noise_scale == 0:
            return y
        exact, dims = y.float(), list(range(1, y.ndim)) if self.statistics == "image" else list(range(y.ndim))
        annealed = gamma**0.5 * exact + self.noise_scale * (1 - gamma) ** 0.5 * self.noise(y)
        standard = (annealed - annealed.mean(dims, keepdim=True)) / annealed.std(dims, keepdim=True)
        rescaled = standard * exact.std(dims, keepdim=True) + exact.mean(dims, keepdim=True)
        return (self.mixing * rescaled + (1 - self.mixing) * annealed).to(y.dtype)

    def noise(self, y: torch.Tensor) -> torch.Tensor:
        """Sample n in the shape of `y`, float32, with the generator of each row if there is a list of them."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return randn_tensor(y.shape, self.generator, y.device, torch.float32)
        streams = [*self.generator] * (len(y) // len(self.generator))
        return randn_tensor(y.shape, streams, y.device, torch.float32)

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        require_training_times(pipeline.scheduler)
        self.conditions, self.annealed = {name: callback_kwargs[name] for name in self.tensor_inputs}, {}
        for name, y in self.conditions.items():
            if not isinstance(y, torch.Tensor):
                raise TypeError(
                    f"Expected {name} of {type(pipeline).__name__} as one tensor, but got {type(y).__name__}. CADS "
                    "cannot anneal it; optimize the initial noise instead, with `optimize_noise`."
                )
            self.require_fitting_generators(len(y))

    def require_fitting_generators(self, rows: int) -> None:
        if isinstance(self.generator, Sequence) and (not self.generator or rows % len(self.generator)):
            raise ValueError(
                f"Expected one generator, or one for each image, but got {len(self.generator)} for {rows} embeddings. "
                "Pass as many as there are images."
            )

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        if index >= len(pipeline.scheduler.timesteps):
            return
        gamma = self.gamma(training_time(pipeline.scheduler, index))
        for name in self.conditions:
            y = self.conditions[name] = self.clean(name, callback_kwargs[name])
            callback_kwargs[name] = self.annealed[name] = self.anneal(y, gamma)

    def clean(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """Return y of a condition that the pipeline, or a callback before this one, gives."""
        y, annealed = self.conditions[name], self.annealed.get(name)
        if annealed is None or len(given) > len(annealed):
            return given
        if torch.equal(given, annealed[-len(given) :]):  # what this callback gave, or the last rows of it
            return y[-len(given) :]
        return given

    def on_call_end(self, pipeline: Any) -> None:
        self.conditions, self.annealed = {}, {}
