"""Noise Diffusion: noise chosen by a vision-language model, Gaussian throughout."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...callbacks.early_stopping import EarlyStopping, LossThreshold
from ...callbacks.noise_callback import NoiseCallback
from ...callbacks.noise_state import NoiseState
from ...rewards.contract.reward import NonDifferentiableReward
from ...rewards.contract.reward_sum import RewardSum
from ...rewards.vlm.vlm_inputs import VLM_FAMILIES
from ..memory.checkpointing import Checkpointing
from ..method import NoiseOptimizer
from ..noise_math import per_image
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_noise_optimizer
from ..sampling.sampler import Gradient
from .candidate_choice import best_of_pool, displacement, guided_gaussian
from .unit_score import UnitScore


@register_noise_optimizer("noise_diffusion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseDiffusion(NoiseOptimizer):
    """Mixes into the noise, round by round, the fresh Gaussian noise that leads up the score the most.

    "Noise Diffusion for Enhancing Semantic Faithfulness in Text-to-Image Synthesis", Miao et al., CVPR 2025,
    https://arxiv.org/abs/2411.16503.

    Each round draws the image by the whole sampler without a graph through the denoiser, scores it by s in [0, 1], and
    sets `z ← √(1−γ)·z + √γ·σ*` with γ = 1 − √s: a low score moves far, a high one hardly. σ* is the one of N Gaussian
    candidates with the largest ⟨∇s, v⟩ / ‖v‖², v the way that z goes. The model's outputs are held constant for ∇s,
    which makes the chain a multiple of the identity: only decoder and scorer are passed backwards. The noise of the
    best image is returned.

    The released code gives pixels in [-1, 1] to a scorer of [0, 1], and forgets the noise of the best image: neither is
    followed.

    Args:
        rewards: The scorer: what `RewardSum` takes, with a total in [0, 1], such as the P("yes") of "vqascore" or a
            loaded `VQAScorer`. Other rewards need `score_range`.
        steps: Evaluations, the plain result included: M + 1. The paper: M = 50.
        candidates: N, at least 1. The paper: 50.
        selection: "pool" draws N candidates and takes the best by the rule above; "exact" draws from the law of the one
            with the largest ⟨∇s, σ⟩ at the price of one, so `candidates` may be any number; "random" takes the first,
            needs no gradient, and takes black boxes.
        accept: "always" goes on from the new noise, as in the paper; "better" from the best so far.
        threshold: Stop an image at a score of at least this, in [0, 1].
        patience: Stop an image after so many rounds without a better score.
        score_range: (low, high): s is the total's place between the two, clamped to [0, 1].
        stop_gradient: Hold the outputs of the denoiser constant; `False` back-propagates through the whole chain.
        reward_prompt: Ask the scorer about this instead of the pipeline's prompt: one, or one for each image.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where a scorer that is given by name is loaded, by default where the pipeline is.
    """

    rewards: Any = "vqascore"
    steps: int = 51
    candidates: float = 50
    selection: Literal["pool", "exact", "random"] = "pool"
    accept: Literal["always", "better"] = "always"
    threshold: float | None = None
    patience: int | None = None
    score_range: tuple[float, float] | None = None
    stop_gradient: bool = True
    reward_prompt: str | Sequence[str] | None = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None

    @property
    def gradient(self) -> Gradient:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.selection == "random":
            return None
        return "frozen" if self.stop_gradient else "full"

    def check(self) -> None:
        super().check()
        choices = {"selection": ("pool", "exact", "random"), "accept": ("always", "better")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {getattr(self, name)!r}.")
        whole = isinstance(self.candidates, int) or self.selection == "exact"
        if not (whole and self.candidates >= 1 and math.isfinite(self.candidates)):
            raise ValueError(
                "Expected `candidates` to be an integer of 1 or more, or any number of 1 or more for "
                f'`selection="exact"`, but got {self.candidates!r}.'
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"Expected `threshold` to be a score in [0, 1], but got {self.threshold!r}.")
        if self.patience is not None and not (isinstance(self.patience, int) and self.patience >= 1):
            raise ValueError(f"Expected `patience` to be an integer of 1 or more, but got {self.patience!r}.")

    def objective(self, pipe) -> UnitScore:
        rewards = RewardSum(self.rewards, device=self.device_of_rewards(pipe))
        if self.selection != "random" and (names := rewards.without_gradient()):
            raise NonDifferentiableReward(
                f"Expected a scorer with a gradient, but {names} have none. `VQAScorer` has one for vision-language "
                f'models of the types {", ".join(sorted(VLM_FAMILIES))}. For a black box use `selection="random"`.'
            )
        return UnitScore(rewards, self.reward_prompt, self.score_range)

    def watchers(self) -> list[NoiseCallback]:
        found: list[NoiseCallback] = []
        if self.threshold is not None:
            low, high = self.score_range or (0.0, 1.0)
            found.append(LossThreshold(-(low + self.threshold * (high - low))))
        return found if self.patience is None else [*found, EarlyStopping(self.patience)]

    def start(self, problem: NoiseProblem) -> "Standing":
        return Standing(CandidateNoise(problem))

    def step(self, state: NoiseState, gradient: torch.Tensor | None, memory: "Standing") -> torch.Tensor:
        memory.take(state, gradient, self.accept == "always")
        noise, ascent = memory.noise, -memory.gradient
        gamma = 1 - UnitScore.place(-memory.loss, self.score_range).sqrt()
        if self.selection == "pool":
            sigma = best_of_pool(noise, ascent, gamma, memory.fresh, int(self.candidates))
        elif self.selection == "exact":
            sigma = guided_gaussian(ascent, memory.fresh, self.candidates)
        else:
            sigma = memory.fresh.draw()
        return noise + displacement(noise, sigma, gamma)


class Standing:
    """Where each image goes on from: a noise with its loss and gradient.

    Attributes:
        fresh: Where candidates come from.
        noise, gradient: `(B, C, H, W)`; the gradient is zero for a method without.
        loss: `(B,)`.
    """

    def __init__(self, fresh: CandidateNoise) -> None:
        self.fresh = fresh
        self.noise, self.gradient = fresh.like, torch.zeros_like(fresh.like)
        self.loss = torch.full((len(fresh.like),), torch.inf, device=fresh.like.device)

    def take(self, state: NoiseState, gradient: torch.Tensor | None, always: bool) -> None:
        """Go on from the noise that was evaluated: always, or where it is better."""
        assert state.loss is not None
        here = torch.zeros_like(state.noise) if gradient is None else gradient
        better = (state.loss < self.loss) | always
        self.noise = torch.where(per_image(better, here), state.noise, self.noise)
        self.gradient = torch.where(per_image(better, here), here, self.gradient)
        self.loss = torch.where(better, state.loss, self.loss)
