"""Variations of a noise: as near to it as one wants, and as Gaussian."""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..checked_fields import check_fields, checked
from .noise_samplers import NoiseSampler, check_spatial, register_noise_sampler

CUT = 1 / 3  # of the largest radial frequency: what lies below is the layout, what lies above the detail


@register_noise_sampler("vary")
@dataclasses.dataclass(frozen=True, eq=False)
class Vary(NoiseSampler):
    """Noises near a given one: each is rotated toward fresh noise, `z = cos θ·z₀ + sin θ·ε` with `θ = strength·π/2`.

    The rotation keeps mean, variance and spectrum of Gaussian noise at every strength; 0 gives z₀ bit by bit, 1 fresh
    noise but for what is kept. A batch is a set of different variations:

        pipe(prompt, noise_sampler=Vary(0.2, result), num_images_per_prompt=8)      # of a found noise
        pipe(prompt, noise_sampler=Vary(0.2, seed=7), generator=generator)          # of the noise of a seed
        optimize_noise(pipe, prompt, BestOfN(rewards="hpsv2.1"), noise_sampler=Vary(0.2, result))   # the best of them

    Args:
        strength: From 0, no change, to 1, another image.
        noise: z₀: `(1, C, H, W)`, or one for each image, or a `NoiseResult` that has it. Without, the noise that the
            call draws, in a pipeline that of the first image of each prompt.
        seed: The seed of the variation of the first image, then one more for each; 0 or more. Without, the noise that
            the call draws names the variation.
        keep: What stays the same at any strength: the "layout", the frequencies of the noise up to a third of the
            largest, or the "detail", those above. `None` changes all.
        interpolation: "rotation", or "a1111" for the variation seed of AUTOMATIC1111's web UI, which interpolates on
            a sphere in each column of the noise: the same images from the same z₀, if ε is drawn on the CPU there.

    A method that draws more noises, as `BestOfN` does, draws variations of `noise`, or without it of what the call
    drew.

    Raises:
        ValueError: For settings outside their ranges, and a noise that does not fit the call.
    """

    strength: float = checked(0.2, "[0, 1]")
    noise: Any = None
    _: dataclasses.KW_ONLY
    seed: int | None = checked(None, "[0, 4611686018427387904)")  # 2⁶²: images count up from it
    keep: Literal["layout", "detail"] | None = None
    interpolation: Literal["rotation", "a1111"] = "rotation"
    groups: tuple[int, ...] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        check_fields(self)
        given = getattr(self.noise, "noise", self.noise)
        if given is not None and not isinstance(given, torch.Tensor):
            raise TypeError(
                f"Expected `noise` as a tensor or a `NoiseResult`, but got {type(given).__name__}. Load a file with "
                "`NoiseResult.load(path)`."
            )
        if given is None and self.seed is None:
            raise ValueError("Expected `noise` or `seed`, but got neither. Pass `Vary(0.2, seed=1)`, say.")
        if self.keep is not None and self.interpolation == "a1111":
            raise ValueError('Expected `keep` or `interpolation="a1111"`, but got both. Omit one.')
        object.__setattr__(self, "noise", given)

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map the white noise of a call `(B, C, H, W)` to variations of the same shape and dtype."""
        check_spatial(white.shape)
        base = self.base(white)
        if self.strength == 0:
            return base
        exact = base.to(torch.promote_types(white.dtype, torch.float32))
        fresh = self.fresh(white, exact).to(exact)
        mix = spherical if self.interpolation == "a1111" else self.rotated
        return mix(exact, fresh, self.strength).to(white.dtype)

    def fresh(self, white: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return ε for each image, `(B, C, H, W)`.

        Its stream is named by z₀ too: z₀ may come from the same seed, and the rotation needs noise independent of it.
        """
        names = white if self.seed is None else range(self.seed, self.seed + len(white))
        if self.interpolation == "rotation":
            streams = [stream_of(name, row) for name, row in zip(names, base, strict=True)]
        elif self.seed is None:
            return white
        else:
            streams = [torch.Generator().manual_seed(seed) for seed in names]
        return torch.stack([torch.randn(white.shape[1:], generator=stream) for stream in streams])

    def base(self, white: torch.Tensor) -> torch.Tensor:
        """Return z₀ for each image, `(B, C, H, W)`."""
        if self.noise is None:
            groups = list(self.groups or [0] * len(white))
            return white[[groups.index(group) for group in groups]]
        self.check_count(len(white))
        if self.noise.shape[1:] != white.shape[1:]:
            raise ValueError(
                f"Expected `noise` of shape {tuple(white.shape)}, but got {tuple(self.noise.shape)}. Call the pipeline "
                "with the height and width that the noise was drawn for."
            )
        return self.noise.to(white).expand_as(white).clone()

    def rotated(self, base: torch.Tensor, fresh: torch.Tensor, strength: float) -> torch.Tensor:
        """Rotate noises toward others, in all frequencies or in those that `keep` leaves."""
        angle = strength * math.pi / 2
        change = (math.cos(angle) - 1) * base + math.sin(angle) * fresh
        if self.keep is not None:
            size = base.shape[-2:]
            moves = frequencies(*size) > CUT if self.keep == "layout" else frequencies(*size) <= CUT
            change = torch.fft.irfft2(torch.fft.rfft2(change) * moves.to(change), s=size)
        return base + change

    def within(self, groups: Sequence[int]) -> "Vary":
        if self.noise is not None:
            self.check_count(len(groups))
        found = copy.copy(self)
        object.__setattr__(found, "groups", tuple(groups))
        return found

    def further(self, drawn: torch.Tensor | None) -> "Vary":
        return dataclasses.replace(self, noise=drawn if self.noise is None else self.noise, seed=None)

    def check_count(self, count: int) -> None:
        if len(self.noise) not in (1, count):
            raise ValueError(
                f"Expected `noise` of 1 or {count} images, as the call has, but got {len(self.noise)}. Select one: "
                "`noise[:1]`."
            )

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values. A given noise is only identified, by its shape and a hash."""
        given = None
        if self.noise is not None:
            numbers = self.noise.detach().float().cpu().numpy().tobytes()
            given = {"shape": list(self.noise.shape), "sha256": hashlib.sha256(numbers).hexdigest()}
        settings = {**super().describe(), "noise": given}
        del settings["groups"]
        return settings


def stream_of(name: int | torch.Tensor, base: torch.Tensor) -> torch.Generator:
    """Return a random stream for a seed, or the noise that a call drew, and the noise z₀ that is varied."""
    drawn = name.detach().float().cpu().numpy().tobytes() if isinstance(name, torch.Tensor) else str(name).encode()
    digest = hashlib.sha256(drawn + base.detach().float().cpu().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def frequencies(height: int, width: int) -> torch.Tensor:
    """Return the radial frequency of each entry of `rfft2`, `(H, W // 2 + 1)`, as a share of the largest."""
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    radius = torch.hypot(rows[:, None], columns)
    return radius / radius.max()


def spherical(low: torch.Tensor, high: torch.Tensor, strength: float) -> torch.Tensor:
    """Interpolate as AUTOMATIC1111's web UI does: for each noise of a batch, on a sphere in each column.

    Where two noises are nearly the same, its straight line runs the other way; it is followed in this too.
    """
    mixed = []
    for one, other in zip(low, high, strict=True):
        units = (each / each.norm(dim=-2, keepdim=True) for each in (one, other))
        cosine = torch.mul(*units).sum(-2, keepdim=True)
        if cosine.mean() > 0.9995:
            mixed.append(one * strength + other * (1 - strength))
            continue
        angle = cosine.acos()
        ours, theirs = (((share * angle).sin() / angle.sin()) for share in (1 - strength, strength))
        mixed.append(ours * one + theirs * other)
    return torch.stack(mixed)
