"""Noise Diffusion: Gaussian noise chosen by a vision-language model."""

import dataclasses
import math
import warnings
from typing import Any, Literal

import torch

from ...callbacks.noise_state import NoiseState
from ...checked_fields import checked
from ...rewards.contract.reward import NonDifferentiableReward
from ...rewards.vlm.vlm_inputs import VLM_FAMILIES
from ..method import GradientOptimizer
from ..noise_math import displacement, per_image
from ..problem import CandidateNoise, NoiseProblem
from ..registry import register_method
from ..sampling.sampler import Gradient
from ..white_noise import WhiteNoiseProjection
from .candidate_choice import best_of_pool, guided_gaussian
from .trust_region import TrustRegion
from .unit_score import UnitScore, check_score_range

MOST_CANDIDATES = 100_000


@register_method("noise_diffusion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseDiffusion(GradientOptimizer):
    """Mixes into the noise, round by round, the fresh Gaussian noise with the largest predicted rise of the score.

    "Noise Diffusion for Enhancing Semantic Faithfulness in Text-to-Image Synthesis", Miao et al., CVPR 2025,
    https://arxiv.org/abs/2411.16503.

    Each round samples the image by the whole chain without a graph through the denoiser, scores it by s in [0, 1], and
    sets `z ← √(1−γ)·z + √γ·σ*` with γ = 1 − √s: a low score moves far, a high one hardly. σ* is the one of N Gaussian
    candidates with the largest ⟨∇s, v⟩ / ‖v‖², where v is the change of z. The model outputs are held constant for ∇s,
    so the chain is a multiple of the identity, and only decoder and scorer are differentiated. The noise of the best
    image is returned.

    A mixture of independent Gaussian noises is Gaussian: so is the noise after any number of rounds with random
    candidates. One chosen by a gradient is shifted along it, by 2.25 standard deviations for N = 50, which the next
    rounds, of other gradients, wash out. With `trust_region` γ is at most a radius, and a step without gain is taken
    back. Noise that is kept for its score is conditioned on it, as with best-of-N, and no longer Gaussian along what
    the score depends on; all else is. After 50 rounds by the true gradient of a score of 64 directions of 1024, the
    root mean square along these is 1.20, along the others 1.00, and the norm 1.6% larger: .7 standard errors of a
    single noise.

    The paper's judge is CLIP-FlanT5-XXL, and its images have 512 px and T = 50 sampling steps: `rewards=
    "zhiqiulin/clip-flant5-xxl"` and `pipe(..., height=512, width=512, num_inference_steps=50)`. The default judge here,
    Qwen2-VL-2B, is a sixth of that size, and size and T are those of the call. Scores of different judges are not
    comparable.

    The released code passes pixels in [-1, 1] to a scorer of [0, 1], and loses the noise of the best image: neither is
    reproduced.

    Args:
        rewards: The scorer: rewards as `RewardSum` takes them, with a total in [0, 1], such as the P("yes") of
            "vqascore" or a loaded `VQAScorer`. Other rewards need `score_range`.
        steps: Evaluations, the baseline included: M + 1. The paper: M = 50.
        candidates: N. The paper: 50. Any number, not only an integer, for `selection="exact"`.
        selection: "pool" draws N candidates and takes the best by the rule above; "exact" draws once from the
            distribution of the one with the largest ⟨∇s, σ⟩; "random" takes the first candidate, needs no gradient,
            and accepts black boxes.
        geometry: "white" projects the gradient on white noise before it chooses, so that all frequencies of the noise
            count alike. `None` is the gradient itself, as in the paper.
        accept: "always" goes on from the new noise, as in the paper; "better" from the best so far.
        trust_region: Limit γ to a radius, per image, within which the gradient tells the gain: the first radius, in
            (0, 1]. 1 begins with the paper's γ. See `TrustRegion`. A step without gain is taken back, as with
            `accept="better"`, and drawn anew by the gradient at the best noise. `None` has γ = 1 − √s, as in the paper.
        threshold: Stop an image whose score is at least this.
        patience: Stop an image after this many rounds without a better score.
        score_range: (low, high): s is the position of the total between the two, clamped to [0, 1].
        gradient: "frozen" holds the outputs of the denoiser constant; "full" differentiates the whole chain. With a
            single denoising step "frozen" warns: there it tells little about the score.
    """

    rewards: Any = "vqascore"
    steps: int = checked(51, "[1, inf)")
    candidates: float = checked(50, "[1, inf)")
    selection: Literal["pool", "exact", "random"] = "pool"
    geometry: Literal["white"] | None = None
    accept: Literal["always", "better"] = "always"
    trust_region: float | None = checked(None, "(0, 1]")
    threshold: float | None = checked(None, "[0, 1]")
    patience: int | None = checked(None, "[1, inf)")
    score_range: tuple[float, float] | None = None
    gradient: Literal["full", "frozen"] = "frozen"

    @property
    def gradient_mode(self) -> Gradient:
        return None if self.selection == "random" else self.gradient

    def check(self) -> None:
        super().check()
        if self.score_range is not None:
            check_score_range(self.score_range)
        if self.selection != "exact" and not isinstance(self.candidates, int):
            raise ValueError(
                f'Expected `candidates` to be an integer unless `selection="exact"`, but got {self.candidates!r}.'
            )
        if self.selection == "pool" and self.candidates > MOST_CANDIDATES:
            raise ValueError(
                f"Expected at most {MOST_CANDIDATES} `candidates`, each of which is drawn, but got {self.candidates}. "
                'Use `selection="exact"`, which draws once for any number.'
            )

    def objective(self, pipe) -> UnitScore:
        rewards = self.load_rewards(pipe, self.rewards)
        if self.gradient_mode is not None and (names := rewards.without_gradient()):
            raise NonDifferentiableReward(
                f"Expected a scorer with a gradient, but {names} have none. `VQAScorer` has one for vision-language "
                f'models of the types {", ".join(sorted(VLM_FAMILIES))}. For a black box use `selection="random"`.'
            )
        return UnitScore(rewards, self.score_range)

    def start(self, problem: NoiseProblem) -> "NoiseDiffusionState":
        if self.gradient_mode == "frozen" and problem.is_single_step:
            warnings.warn(
                "A single denoising step draws these images, and the gradient that holds its output constant tells "
                'little about their score, nothing if that is about content. Pass `gradient="full"`, or use `ReNO`.',
                stacklevel=2,
            )
        return NoiseDiffusionState(CandidateNoise(problem), self.trust_region, self.gradient_mode != "frozen")

    def inspect(self, run: NoiseState, objective: Any, state: "NoiseDiffusionState") -> None:
        """Stop the images that have reached the threshold or run out of patience."""
        state.count_waiting(run.loss)
        if self.threshold is not None:
            low, high = self.score_range or (0.0, 1.0)
            run.stop("threshold", state.lowest <= -(low + self.threshold * (high - low)))
        if self.patience is not None:
            run.stop("patience", state.waited >= self.patience)

    def step(self, run: NoiseState, gradient: torch.Tensor | None, state: "NoiseDiffusionState") -> torch.Tensor:
        if state.trust is not None:
            state.trust.learn(state.loss - run.loss)
        state.move_to(run, gradient, self.accept == "always" and state.trust is None)
        noise, ascent = state.noise, -state.gradient
        if self.geometry == "white":
            ascent = WhiteNoiseProjection()(ascent)
        gamma = 1 - UnitScore.score_of(-state.loss, self.score_range).sqrt()
        if state.trust is not None:
            gamma = torch.minimum(gamma, state.trust.radius)
        if self.selection == "pool":
            sigma = best_of_pool(noise, ascent, gamma, state.fresh, int(self.candidates))
        elif self.selection == "exact":
            sigma = guided_gaussian(ascent, state.fresh, self.candidates)
        else:
            sigma = state.fresh.draw()
        v = displacement(noise, sigma, gamma)
        if state.trust is not None:
            state.trust.expect(gamma, -(state.gradient * v).flatten(1).sum(1))
        return noise + v


class NoiseDiffusionState:
    """The noise from which each image goes on, with its loss and gradient.

    Attributes:
        fresh: The source of candidates.
        noise, gradient: `(B, C, H, W)`; the gradient is zero for a method without.
        loss: `(B,)`.
        lowest, waited: `(B,)`, the lowest loss so far and the number of rounds since then.
        trust: The limits of γ, if it has some.
    """

    def __init__(self, fresh: CandidateNoise, radius: float | None = None, true: bool = True) -> None:
        self.fresh = fresh
        self.noise, self.gradient = fresh.like, torch.zeros_like(fresh.like)
        self.loss = self.lowest = torch.full((len(fresh.like),), math.inf, device=fresh.like.device)
        self.waited = torch.zeros_like(self.loss, dtype=torch.long)
        self.trust = None if radius is None else TrustRegion(self.loss, radius, true)

    def count_waiting(self, loss: torch.Tensor) -> None:
        """Update the lowest loss and the number of rounds without a lower one."""
        better = loss < self.lowest
        self.lowest = torch.where(better, loss, self.lowest)
        self.waited = torch.where(better, 0, self.waited + 1)

    def move_to(self, run: NoiseState, gradient: torch.Tensor | None, always: bool) -> None:
        """Take the evaluated noise as the one to go on from: always, or where it is better."""
        here = torch.zeros_like(run.noise) if gradient is None else gradient
        better = (run.loss < self.loss) | always
        self.noise = torch.where(per_image(better, here), run.noise, self.noise)
        self.gradient = torch.where(per_image(better, here), here, self.gradient)
        self.loss = torch.where(better, run.loss, self.loss)
