"""CNO: contrastive noise optimisation for batches of images that differ."""

import dataclasses
import math
from collections import Counter
from typing import Any, ClassVar, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ..memory.checkpointing import Checkpointing
from ..method import NoiseOptimizer
from ..noise_math import per_image
from ..problem import NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Gradient
from .contrastive_loss import ContrastiveLoss, ContrastiveObjective


@register_noise_optimizer("cno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CNO(NoiseOptimizer):
    """Moves the noises of one prompt so that the images they lead to differ; a few model calls before the sampling.

    "Diverse Text-to-Image Generation via Contrastive Noise Optimization", Kim, Um and Ye, ICLR 2026,
    https://arxiv.org/abs/2510.03813.

    Each step asks the denoiser once, guided as in the sampling, for the x0 estimate (Tweedie) of each noise at the
    sampler's first timestep, and takes one step of Adam on the contrastive loss: away from the other images of the same
    prompt, towards the own first estimate. Images of different prompts in one call do not see each other. The last
    noise is returned.

    The defaults are the paper's. Its released code is `CNO(stop_gradient=False, gamma=1.0)`.

    Args:
        steps: Updates, and calls of the denoiser.
        window_size: The estimates are compared on a grid pooled to so many cells down and across, at most the latent's.
        tau: τ, the temperature, above 0.
        gamma: γ scales the temperature of the attraction, above 0: smaller attracts more. "auto" is
            `1 / (τ·ln(B − 1) + 1)` for B images of a prompt.
        learning_rate: Of Adam, above 0: about the most that an entry of the noise moves in a step.
        stop_gradient: Hold the output of the denoiser constant: no backward pass through it, and no more memory than
            sampling takes. `False` back-propagates through it.
        attraction: Pull each estimate towards where it was; `False` for more diversity at the cost of quality.
        repulsion: Push the estimates apart.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
    """

    steps: int = 3
    window_size: int = 16
    tau: float = 0.1
    gamma: float | Literal["auto"] = "auto"
    learning_rate: float = 1e-2
    stop_gradient: bool = True
    attraction: bool = True
    repulsion: bool = True
    checkpointing: Checkpointing = "auto"
    preview: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]
    returns: ClassVar[Literal["best", "last"]] = "last"

    @property
    def gradient(self) -> Gradient:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "frozen" if self.stop_gradient else "full"

    def check(self) -> None:
        super().check()
        if not (isinstance(self.window_size, int) and self.window_size >= 1):
            raise ValueError(f"Expected `window_size` to be an integer of 1 or more, but got {self.window_size!r}.")
        if self.gamma != "auto" and not positive(self.gamma):
            raise ValueError(f'Expected `gamma` to be "auto" or a number above 0, but got {self.gamma!r}.')
        for name in ("tau", "learning_rate"):
            if not positive(getattr(self, name)):
                raise ValueError(f"Expected `{name}` to be a number above 0, but got {getattr(self, name)!r}.")
        if not (self.attraction or self.repulsion):
            raise ValueError("Expected `attraction` or `repulsion`, but got neither: there is nothing to optimise.")

    def objective(self, pipe) -> ContrastiveObjective:
        if self.stop_gradient and pipe.scheduler.config.get("prediction_type") == "sample":
            raise ValueError(
                "Expected a denoiser that predicts noise or velocity, but this one predicts x0 itself, which does not "
                "depend on the noise once its output is held constant. Use `stop_gradient=False`."
            )
        loss = ContrastiveLoss(tau=self.tau, gamma=self.gamma, attraction=self.attraction, repulsion=self.repulsion)
        return ContrastiveObjective(loss, self.window_size)

    def start(self, problem: NoiseProblem) -> dict[str, Any]:
        noise = torch.nn.Parameter(problem.noise.clone())
        sizes = Counter(problem.groups)
        shares = torch.tensor([1 / sizes[group] for group in problem.groups]).to(noise)
        return {"noise": noise, "optimizer": torch.optim.Adam([noise], self.learning_rate), "shares": shares}

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: dict[str, Any]) -> torch.Tensor:
        if self.repulsion and not gradient.any():
            raise ValueError(
                "Expected x0 estimates that depend on the noise, but their gradient is zero: with zero terminal SNR, "
                f"as {type(state.pipeline.scheduler).__name__} has here, the first estimate is the output of the "
                "denoiser alone. Use `stop_gradient=False`."
            )
        memory["noise"].data = state.noise.clone()
        memory["noise"].grad = gradient * per_image(memory["shares"], gradient)  # the loss of a set is the mean
        memory["optimizer"].step()
        return memory["noise"].detach().clone()


def positive(value: Any) -> bool:
    """Whether a setting is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
