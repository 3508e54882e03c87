"""One pipeline call whose noise is to be found."""

import dataclasses
import functools
from typing import Any

import torch

from .sampling.latent_space import LatentSpace
from .sampling.sampler import PipelineSampler


@dataclasses.dataclass(eq=False)
class NoiseProblem:
    """One pipeline call whose noise is to be found.

    Attributes:
        pipe: The pipeline.
        sampler: Noise to images.
        space: Noise to latents.
        noise: `(B, C, H, W)`, the base noise, float32 or better.
        prompts: `B` prompts for the rewards.
        groups: `B` integers, equal where images share their prompt.
        dtype: What the pipeline draws its noise in.
        request: The arguments of the call, for the provenance.
    """

    pipe: Any
    sampler: PipelineSampler
    space: LatentSpace
    noise: torch.Tensor
    prompts: list[str]
    groups: list[int]
    dtype: torch.dtype
    request: dict[str, Any]

    @functools.cached_property
    def seeds(self) -> list[int]:
        """One for each image, from the bits of its base noise: none depends on the rest of the batch."""
        return [seed_from(noise) for noise in self.noise]


class CandidateNoise:
    """Fresh noises of a problem, by its noise sampler: for the same seeds the same, whatever batch they are drawn in.

    (A sampler that couples the samples of a batch couples these as well.)

    The streams are seeded from the base noise of each sample, so that they neither repeat the pipeline's own draws nor
    depend on the other samples of the batch.
    """

    def __init__(self, problem: NoiseProblem) -> None:
        self.like, self.draw_noise = problem.noise, problem.space.draw_noise
        self.streams = [torch.Generator().manual_seed(seed) for seed in problem.seeds]

    def draw(self) -> torch.Tensor:
        """`(B, C, H, W)`, unit variance; standard Gaussian unless the problem has a noise sampler."""
        return self.draw_noise(tuple(self.like.shape), self.streams, self.like.device, self.like.dtype)

    def uniform(self) -> torch.Tensor:
        """`(B,)` uniform in [0, 1), float64."""
        draws = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self.streams]
        return torch.stack(draws).to(self.like.device)


def seed_from(noise: torch.Tensor) -> int:
    """A 62-bit seed that is a function of the values of a noise."""
    bits = noise.detach().flatten().cpu().to(torch.float32).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1).mul(0x9E3779B97F4A7C15 - 2**64)  # odd multiples spread over 64 bits
    return int((bits * weights).sum().item()) & (2**62 - 1)
