"""One pipeline call whose initial noise is to be found."""

import copy
import dataclasses
import functools
from typing import Any

import torch

from .sampling.sampler import PipelineSampler


@dataclasses.dataclass(eq=False)
class NoiseProblem:
    """One pipeline call whose initial noise is to be found.

    Attributes:
        pipe: The pipeline.
        sampler: The call as a function of its noise.
        prompts: `B` prompts of the call.
        reward_prompts: `B` prompts that the rewards are asked about.
        groups: `B` integers, equal where images share their prompt.
        request: The arguments of the call, for the provenance.
        call: The description of the call, which a result is compared with before the run is continued.
        noise: `(B, C, H, W)`, the base noise, float32 or better.
        space: The conversion between noise and latents.
        dtype: The dtype in which the pipeline draws its noise.
    """

    pipe: Any
    sampler: PipelineSampler
    prompts: list[str]
    reward_prompts: list[str]
    groups: list[int]
    request: dict[str, Any]
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        noise = self.sampler.base_noise
        self.noise = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
        self.space, self.dtype = self.sampler.space, noise.dtype

    @property
    def is_single_step(self) -> bool:
        """Return whether the call names a single denoising step."""
        listed = [self.request[name] for name in ("timesteps", "sigmas") if self.request.get(name) is not None]
        return len(listed[0]) == 1 if listed else self.request.get("num_inference_steps") == 1

    @property
    def is_white(self) -> bool:
        """Return whether the noise is drawn as white Gaussian noise."""
        return self.space.noise_sampler is None or getattr(self.space.noise_sampler, "name", None) == "white"

    @functools.cached_property
    def seeds(self) -> list[int]:
        """One seed per image, a function of the bits of its base noise: independent of the rest of the batch."""
        return [seed_from(noise) for noise in self.noise]

    def beginning_at(self, noise: torch.Tensor, number: int) -> "NoiseProblem":
        """Return the problem with another noise to begin from, `(B, C, H, W)`, and random streams by a number."""
        found = copy.copy(self)
        vars(found).update(noise=noise, seeds=[seed_from(each) + number for each in noise])
        return found


class CandidateNoise:
    """A stream of fresh noise for a problem, drawn by its noise sampler.

    Each sample has a random stream of its own, seeded from its base noise. So the candidates of a sample do not depend
    on the rest of the batch, and never repeat the draws of the pipeline. (A noise sampler that couples the samples of a
    batch couples their candidates as well.)
    """

    def __init__(self, problem: NoiseProblem) -> None:
        self.like, self.draw_noise = problem.noise, problem.space.further_draw(problem.noise)
        self.streams = [torch.Generator().manual_seed(seed) for seed in problem.seeds]

    def draw(self) -> torch.Tensor:
        """Draw noise `(B, C, H, W)` of unit variance: standard Gaussian unless the call has a noise sampler."""
        return self.draw_noise(tuple(self.like.shape), self.streams, self.like.device, self.like.dtype)

    def uniform(self) -> torch.Tensor:
        """Draw `(B,)` uniform numbers in [0, 1), float64."""
        draws = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self.streams]
        return torch.stack(draws).to(self.like.device)


def seed_from(noise: torch.Tensor) -> int:
    """Hash the values of a noise to a 62-bit seed."""
    bits = noise.detach().flatten().cpu().to(torch.float32).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1).mul(0x9E3779B97F4A7C15 - 2**64)  # odd multiples spread over 64 bits
    return int((bits * weights).sum().item()) & (2**62 - 1)
