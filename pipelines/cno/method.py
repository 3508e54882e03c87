"""CNO: contrastive noise optimization for diverse batches."""

import dataclasses
from collections import Counter
from typing import Any, ClassVar, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ..method import NoiseOptimizer
from ..noise_math import per_image
from ..problem import NoiseProblem
from ..registry import register_method
from .contrastive_loss import ContrastiveLoss, ContrastiveObjective


@dataclasses.dataclass
class CNOState:
    """The parameter that Adam moves, the optimizer, and `(B,)` one over the number of images of each set."""

    noise: torch.nn.Parameter
    adam: torch.optim.Adam
    shares: torch.Tensor


@register_method("cno")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CNO(NoiseOptimizer):
    """Moves the noises of one prompt so that their images differ, with a few model calls before the sampling.

    "Diverse Text-to-Image Generation via Contrastive Noise Optimization", Kim, Um and Ye, ICLR 2026,
    https://arxiv.org/abs/2510.03813.

    Each step calls the denoiser once, guided as in the sampling, for the x0 estimate (Tweedie) of each noise at the
    first timestep, and makes one step of Adam on the contrastive loss: away from the other images of the same prompt,
    towards the first estimate of its own. Images of different prompts do not interact. The last noise is returned.

    The defaults are the paper's, but for one term that its formula leaves open: as in the released code, the
    denominator has the attraction in place of the cosine of an image with itself. The released code is
    `CNO(gradient="full", gamma=1.0)`, for SDXL with `negative_prompt=""` in the call: it encodes the empty prompt for
    the guidance, where diffusers takes zeros.

    Args:
        steps: Evaluations, each one call of the denoiser followed by an update.
        window_size: The number of cells down and across of the grid to which estimates are pooled, at most the
            latent's.
        tau: τ, the temperature.
        gamma: γ, which scales the temperature of the attraction: smaller attracts more. "auto" is
            `1 / (τ·ln(B − 1) + 1)` for B images of a prompt.
        learning_rate: The learning rate of Adam: roughly the most that an entry of the noise moves in a step.
        gradient: "frozen" holds the output of the denoiser constant: no backward pass through it, and no more memory
            than sampling. "full" differentiates the denoiser.
        attraction: Pull each estimate towards its first value; `False` for more diversity and less quality.
        repulsion: Push the estimates of a prompt apart.
    """

    steps: int = checked(3, "[1, inf)")
    window_size: int = checked(16, "[1, inf)")
    tau: float = checked(0.1, "(0, inf)")
    gamma: float | Literal["auto"] = checked("auto", "(0, inf)")
    learning_rate: float = checked(1e-2, "(0, inf)")
    gradient: Literal["full", "frozen"] = "frozen"
    attraction: bool = True
    repulsion: bool = True
    returns: ClassVar[Literal["best", "last"]] = "last"

    @property
    def previews(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        if not (self.attraction or self.repulsion):
            raise ValueError("Expected `attraction` or `repulsion`, but got neither: there is nothing to optimize.")

    def objective(self, pipe) -> ContrastiveObjective:
        if self.gradient == "frozen" and pipe.scheduler.config.get("prediction_type") == "sample":
            raise ValueError(
                "Expected a denoiser that predicts noise or velocity, but this one predicts x0 itself, which does not "
                'depend on the noise once its output is held constant. Use `gradient="full"`.'
            )
        loss = ContrastiveLoss(tau=self.tau, gamma=self.gamma, attraction=self.attraction, repulsion=self.repulsion)
        return ContrastiveObjective(loss, self.window_size)

    def start(self, problem: NoiseProblem) -> CNOState:
        noise = torch.nn.Parameter(problem.noise.clone())
        sizes = Counter(problem.groups)
        shares = torch.tensor([1 / sizes[group] for group in problem.groups]).to(noise)
        return CNOState(noise, torch.optim.Adam([noise], self.learning_rate), shares)

    def step(self, run: NoiseState, gradient: torch.Tensor, state: Any) -> torch.Tensor:
        if self.repulsion and not gradient.any():
            raise ValueError(
                "Expected x0 estimates that depend on the noise, but their gradient is zero: with zero terminal SNR, "
                f"as {type(run.pipeline.scheduler).__name__} has here, the first estimate is the output of the "
                'denoiser alone. Use `gradient="full"`.'
            )
        state.noise.data = run.noise.clone()
        state.noise.grad = gradient * per_image(state.shares, gradient)  # the loss of a set is the mean over its images
        state.adam.step()
        return state.noise.detach().clone()
