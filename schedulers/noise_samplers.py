"""Samplers of the initial noise: white, pink, blue, band-limited and negatively coupled Gaussian noise."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..checked_fields import check_fields, checked, refused_signature
from ..registry import Registry

Generators = torch.Generator | list[torch.Generator] | None
NoiseSamplerSpec = str | Mapping[str, Any] | Callable[..., torch.Tensor]

NOISE_SAMPLERS: Registry[type["NoiseSampler"]] = Registry("noise sampler")
SamplerT = TypeVar("SamplerT", bound="NoiseSampler")


class NoiseSampler:
    """Base class of samplers of initial noise: diffusers' white noise for the same generators, mapped by `color`.

    So every sampler advances a generator as white noise does. Any callable with the arguments of `__call__` is accepted
    as a noise sampler, too.
    """

    name: ClassVar[str | None] = None

    def __call__(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Sample spatial noise `(B, C, H, W)`, before any scaling or packing.

        Args:
            shape: The shape of the noise, `(B, C, H, W)`, `(B, 1, C, H, W)` or any other that ends in height and width.
            generator: One for the batch, or a list with one per sample, which makes each sample independent of the rest
                of the batch. CPU generators sample on the CPU, and the noise is moved to `device`.
            device: The device of the noise; by default that of the generator.
            dtype: The dtype in which noise is sampled; float32 by default.

        Raises:
            ValueError: For a list of generators whose length is not the batch size, and for a shape that is not
                spatial.
        """
        streams = generator if isinstance(generator, list) else [generator]
        if len(streams) not in (1, shape[0]):
            raise ValueError(f"Expected one generator, or one for each of {shape[0]} samples, but got {len(streams)}.")
        if device is None and streams[0] is not None:
            device = streams[0].device
        device = None if device is None else torch.device(device)
        return self.color(randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map white noise to this noise, of the same shape, dtype and device."""
        raise NotImplementedError(f"{type(self).__name__} must define `color(white)`.")

    def within(self, groups: Sequence[int]) -> "NoiseSampler":
        """Return this sampler for a batch in which samples of the same prompt have the same integer in `groups`."""
        return self

    def further(self, drawn: torch.Tensor | None) -> "NoiseSampler":
        """Return the sampler of more noises, such as candidates, for a call that has drawn `(B, ...)`, if known."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return name and settings as plain values, which `as_noise_sampler` accepts if the sampler is registered."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        plain_values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"name": self.name or type(self).__name__, **plain_values}


def register_noise_sampler(name: str) -> Callable[[type[SamplerT]], type[SamplerT]]:
    """Return a class decorator that registers a noise sampler under a name and sets `cls.name`."""

    def register(cls: type[SamplerT]) -> type[SamplerT]:
        NOISE_SAMPLERS.register(name)(cls)
        cls.name = name
        return cls

    return register


def list_noise_samplers() -> list[str]:
    """Return the registered names, which `noise_sampler=` accepts."""
    return NOISE_SAMPLERS.names()


def as_noise_sampler(sampler: NoiseSamplerSpec | None) -> Callable[..., torch.Tensor] | None:
    """Return a noise sampler, given itself, its name (`"pink"`) or a dict (`{"name": "pink", "alpha": 0.3}`).

    Raises:
        ValueError: For an unknown name, and for unknown or invalid settings.
        TypeError: For any other object.
    """
    if isinstance(sampler, str):
        return named_noise_sampler(sampler, {})
    if isinstance(sampler, Mapping):
        settings = dict(sampler)
        return named_noise_sampler(str(settings.pop("name", None)), settings)
    if sampler is None:
        return sampler
    if callable(sampler) and not isinstance(sampler, type):
        if parameters := refused_signature(sampler, 1, "generator", "device", "dtype"):
            raise TypeError(
                f"Expected a noise sampler `(shape, generator, device, dtype)`, but got one of {parameters}. "
                "Define it with these parameters."
            )
        return sampler
    raise TypeError(
        f"Expected a noise sampler such as `PinkNoise(0.2)`, one of the names {list_noise_samplers()} or a dict such "
        f'as {{"name": "pink", "alpha": 0.3}}, but got {sampler!r}.'
    )


def named_noise_sampler(name: str, settings: dict[str, Any]) -> "NoiseSampler":
    sampler = NOISE_SAMPLERS.find(name, ', or a dict such as {"name": "pink", "alpha": 0.3}')
    known = list(inspect.signature(sampler).parameters)
    if unknown := sorted(settings.keys() - set(known), key=str):
        raise ValueError(f"Expected settings of the noise sampler {name!r} out of {known}, but got {unknown}.")
    return sampler(**settings)


def describe_noise_sampler(sampler: Callable[..., torch.Tensor] | None) -> dict[str, Any] | None:
    """Return name and settings of a noise sampler as plain values; for any other callable, only its name."""
    if sampler is None:
        return None
    if hasattr(sampler, "describe"):
        return sampler.describe()  # pyright: ignore[reportFunctionMemberAccess]
    return {"name": getattr(sampler, "__qualname__", type(sampler).__qualname__)}


@register_noise_sampler("white")
@dataclasses.dataclass(frozen=True)
class WhiteNoise(NoiseSampler):
    """Standard Gaussian noise, bit-identical to that of a stock pipeline."""

    def color(self, white: torch.Tensor) -> torch.Tensor:
        return white


@register_noise_sampler("pink")
@dataclasses.dataclass(frozen=True)
class PinkNoise(NoiseSampler):
    """White noise with Fourier amplitudes scaled by (1 + f)^-α, by default standardized per channel and sample.

    It's Never Too Late, https://arxiv.org/abs/2601.00090, eq. 7: images of one prompt are more diverse from pink noise.
    f is the distance from frequency zero in index units, that is, in waves per side of the noise, not per pixel. The
    phases are those of the white noise of the same generators. Channels have mean 0 and unbiased variance 1, so their
    squared norm is H·W − 1, the expectation for white noise minus its mean.

    Args:
        alpha: α, any finite number. Above 0 emphasizes low frequencies (the paper uses 0.2 and observes patches above
            0.3); below 0 gives blue noise. 0 is white noise that is still standardized per channel; use `WhiteNoise`
            for the noise of the stock pipeline.
        reference_size: Side of the noise, in its own entries, at which f has the paper's units; above 0, or `None` for
            any size. With it, f counts waves per `reference_size` entries, f = reference_size · √((u/H)² + (v/W)²), so
            that α gives the same spectrum per entry at all sizes; without it, the effect grows with the size.
        band: (low, high) in the units of f, the frequencies to which the slope is limited.
        outside: The gain outside the band: "flat" continues the gain at its edges, "zero" removes other frequencies.
        standardize: `False` scales by the standard deviation of the distribution instead of that of each channel, and
            keeps the means, that is, f = 0, so that the noise is exactly Gaussian. The means are 1/(H·W)
            of the variance of white noise, and more of that of pink noise.
        time_dim: For videos, the dimension of the noise that is time: 2 for (B, C, F, H, W), as in Wan, LTX and
            HunyuanVideo, 1 for (B, F, C, H, W), as in CogVideoX. Space and time are then colored jointly, with
            f = √(t² + u² + v²) for t waves per video; with a reference size, f = reference_size · √((t/F)² + (u/H)² +
            (v/W)²). Channels are standardized over all frames. `None` colors each frame by itself.

    Raises:
        ValueError: For arguments outside their ranges, for `outside="zero"` without a band, and in a call for noise
            without that dimension of time.
    """

    alpha: float = checked(0.2, "(-inf, inf)")
    _: dataclasses.KW_ONLY
    reference_size: float | None = checked(None, "(0, inf)")
    band: Sequence[float] | None = None
    outside: Literal["flat", "zero"] = "flat"
    standardize: bool = True
    time_dim: int | None = checked(None, "[1, 2]")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.band is not None:
            object.__setattr__(self, "band", checked_band(self.band))
        elif self.outside == "zero":
            raise ValueError('Expected a `band` with `outside="zero"`, but got none. Pass `band=(low, high)`.')

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map white noise `(B, C, H, W)` to pink noise with the same phases and dtype, computed in float32 or more.

        Raises:
            ValueError: For noise that is not spatial, and for sizes without frequencies in the band.
        """
        check_spatial(white.shape)
        if self.time_dim is None:
            return self.colored(white, 2)
        check_has_time(white.shape)
        return self.colored(white.movedim(self.time_dim, -3), 3).movedim(-3, self.time_dim)

    def colored(self, white: torch.Tensor, dims: int) -> torch.Tensor:
        """Map white noise to pink noise in its last two or three dimensions."""
        size, last = white.shape[-dims:], tuple(range(-dims, 0))
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        gain = self.gain(*size).to(exact.dtype).to(exact.device)
        pink = torch.fft.irfftn(torch.fft.rfftn(exact, dim=last) * gain, s=size, dim=last)
        spread = pink.std(last, keepdim=True) if self.standardize else expected_std(gain, size)
        return (pink / spread.clamp_min(torch.finfo(pink.dtype).tiny)).to(white.dtype)

    def gain(self, *size: int) -> torch.Tensor:
        """Return the factor of each entry of `rfftn` of `([F,] H, W)`, float64, with a maximum of 1.

        It is 0 at frequency zero if channels are standardized, to remove their mean before it costs precision.
        """
        f = self.frequency(*size)
        low, high = self.band or (0.0, math.inf)
        shaped = f > 0 if self.standardize else f >= 0
        if self.outside == "zero":
            shaped &= (f >= low) & (f <= high)
        if not shaped.any():
            raise ValueError(
                f"Expected a band with frequencies of {'×'.join(map(str, size))} noise, which go up to "
                f"{f.max():.4g}, but got {tuple(self.band or ())}. Widen it."
            )
        logs = -self.alpha * f.clamp(low, high).log1p()
        return torch.where(shaped, (logs - logs[shaped].max()).exp(), 0.0)

    def frequency(self, *size: int) -> torch.Tensor:
        """Return f of each entry of `rfftn` of `([F,] H, W)`, `([F,] H, W // 2 + 1)` float64."""
        *others, width = size
        axes = [torch.fft.fftfreq(side, dtype=torch.float64) * (self.reference_size or side) for side in others]
        f = torch.fft.rfftfreq(width, dtype=torch.float64) * (self.reference_size or width)
        for distance, axis in enumerate(reversed(axes), start=1):
            f = torch.hypot(axis.view(-1, *[1] * distance), f)
        return f


@register_noise_sampler("blue")
@dataclasses.dataclass(frozen=True)
class BlueNoise(NoiseSampler):
    """White noise with Fourier amplitudes scaled by (1 + f)^α, so that its power rises with frequency: `PinkNoise(-α)`.

    f counts waves per side of the noise. By default each channel has mean 0 and unbiased variance 1.

    Args:
        alpha: α, at least 0. Far above f = 1 the power rises as f^2α. 0 is white noise that is still standardized.
        reference_size: Side of the noise at which f is in waves per side, for the same spectrum per entry at all sizes;
            above 0, or `None`, as for `PinkNoise`.
        standardize: `False` scales by the standard deviation of the distribution, and keeps the means, so that the
            noise is exactly Gaussian.

    Raises:
        ValueError: For arguments outside their ranges.
    """

    alpha: float = checked(0.2, "[0, inf)")
    _: dataclasses.KW_ONLY
    reference_size: float | None = checked(None, "(0, inf)")
    standardize: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map white noise `(B, C, H, W)` to blue noise, as `PinkNoise.color` does."""
        settings = {"reference_size": self.reference_size, "standardize": self.standardize}
        return PinkNoise(-self.alpha, **settings).color(white)


@register_noise_sampler("band_limited")
@dataclasses.dataclass(frozen=True)
class BandLimitedNoise(NoiseSampler):
    """White noise restricted to the radial frequencies low <= ν <= high; its spectrum is flat there and 0 elsewhere.

    ν = 2·√((u/H)² + (v/W)²) for u and v waves per side: 1 is the Nyquist frequency, half a wave per entry, and √2 the
    corner of the spectrum, at any size. The phases are those of the white noise of the same generators. By default
    each channel has mean 0 (ν = 0 is left out) and unbiased variance 1, so the power of white noise is distributed over
    fewer frequencies.

    Args:
        low: At least 0; above 0 removes the layout.
        high: Above `low`; the default of 1 removes the corners only, a fifth of the spectrum, and makes it isotropic.
            Below 1 removes detail.
        standardize: `False` scales by the standard deviation of the distribution, and keeps ν = 0 if `low` is 0, so
            that the noise is exactly Gaussian.

    Raises:
        ValueError: For arguments outside their ranges, and in a call for sizes without frequencies in the band.
    """

    low: float = 0.0
    high: float = 1.0
    _: dataclasses.KW_ONLY
    standardize: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        checked_band((self.low, self.high), "`low` and `high`")

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map white noise `(B, C, H, W)` to band-limited noise, as `PinkNoise.color` does."""
        settings = {"band": (self.low, self.high), "outside": "zero", "standardize": self.standardize}
        return PinkNoise(0.0, reference_size=2.0, **settings).color(white)


def expected_std(gain: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the standard deviation, a scalar, of white noise of a size whose `rfftn` is scaled by `gain`."""
    copies = torch.full_like(gain, 2.0)  # `rfftn` omits the mirrored half of the columns
    copies[..., 0] = 1
    copies[..., -1] = 2 - (size[-1] % 2 == 0)
    return (gain.square() * copies).sum().div(math.prod(size)).sqrt()


@register_noise_sampler("coupled")
@dataclasses.dataclass(frozen=True)
class CoupledNoise(NoiseSampler):
    """Jointly sampled noises, each Gaussian, with the most negative correlation of K noises: their sum is zero.

    `z_i = √(1−ρ)·(g_i − ḡ) + √(1+(K−1)ρ)·ḡ`, the symmetric square root of the covariance (1−ρ)I + ρ11ᵀ, for each entry
    of K white noises g. At ρ = −1/(K−1) this is √(K/(K−1))·(g_i − ḡ), and for K = 2 the antithetic pair (z, −z). Couple
    to Control, https://arxiv.org/abs/2605.11311: sets are more diverse at no cost, and each image keeps its marginal
    distribution.

    Args:
        group_size: K, at least 2: every K consecutive samples are coupled. By default the whole batch is coupled, and
            in a pipeline the samples of each prompt.
        correlation: ρ in [−1/(K−1), 1]; −1/(K−1) by default.
        groups: Alternative to `group_size`: one integer per sample, equal for samples to couple.

    Raises:
        ValueError: For arguments outside their ranges, or both `group_size` and `groups`.
    """

    group_size: int | None = checked(None, "[2, inf)")
    _: dataclasses.KW_ONLY
    correlation: float | None = checked(None, "[-1, 1]")
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group_size is not None and self.groups is not None:
            raise ValueError("Expected `group_size` or `groups`, but got both. Omit one.")
        if self.groups is not None:
            if isinstance(self.groups, str) or not isinstance(self.groups, Sequence):
                raise ValueError(f"Expected `groups` to be integers, one for each sample, but got {self.groups!r}.")
            object.__setattr__(self, "groups", tuple(self.groups))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """Map white noises `(B, ...)` to coupled ones of the same dtype, computed in float32 or more.

        Raises:
            ValueError: If the groups do not fit the batch, and for a correlation that K samples cannot have.
        """
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        coupled = torch.empty_like(exact)
        for rows in self.coupled_rows(len(white)):
            coupled[rows] = self.couple_all(exact[rows])
        return coupled.to(white.dtype)

    def couple_all(self, white: torch.Tensor) -> torch.Tensor:
        """Couple `(K, ...)` white noises."""
        rho, others, mean = self.correlation, len(white) - 1, white.mean(0, keepdim=True)
        if rho is None:
            return math.sqrt(len(white) / others) * (white - mean)
        return math.sqrt(1 - rho) * (white - mean) + math.sqrt(max(1 + others * rho, 0.0)) * mean

    def coupled_rows(self, batch: int) -> list[list[int]]:
        """Return the batch positions of each group."""
        if self.groups is not None and len(self.groups) != batch:
            raise ValueError(f"Expected `groups` of {batch} integers, one for each sample, but got {len(self.groups)}.")
        if self.group_size is not None and batch % self.group_size:
            raise ValueError(f"Expected a batch in groups of {self.group_size}, but got {batch} samples.")
        labels = self.groups or [index // (self.group_size or max(batch, 1)) for index in range(batch)]
        found = [[row for row in range(batch) if labels[row] == label] for label in dict.fromkeys(labels)]
        for rows in found:
            self.check_group(len(rows))
        return found

    def check_group(self, count: int) -> None:
        if count < 2:
            raise ValueError(
                "Expected at least 2 samples in each group of coupled noise, but got 1. Pass `num_images_per_prompt=2` "
                "or more, or `group_size` to couple images of different prompts."
            )
        lowest = -1 / (count - 1)
        if self.correlation is not None and self.correlation < lowest - 1e-12:
            raise ValueError(
                f"Expected `correlation` of {count} samples to be at least {lowest:.4g}, but got {self.correlation!r}. "
                "Omit it for the lowest."
            )

    def within(self, groups: Sequence[int]) -> "CoupledNoise":
        """Return this sampler for the given groups, unless it has its own. Raises `ValueError` if they do not fit."""
        has_groups = self.group_size is not None or self.groups is not None
        bound = self if has_groups else dataclasses.replace(self, groups=tuple(groups))
        bound.coupled_rows(len(groups))
        return bound


def checked_band(band: Sequence[float], name: str = "`band`") -> tuple[float, float]:
    """Return a band as a tuple. Raises `ValueError`, by its name, unless it is (low, high) with 0 <= low < high."""
    limits = tuple(band) if isinstance(band, Sequence) else ()
    if len(limits) == 2 and all(isinstance(limit, Real) for limit in limits) and 0 <= limits[0] < limits[1]:
        return limits
    raise ValueError(f"Expected {name} to be (low, high) with 0 <= low < high, but got {band!r}.")


def check_has_time(shape: Sequence[int]) -> None:
    if len(shape) != 5:
        raise ValueError(
            "Expected noise of videos with `time_dim`, (B, C, F, H, W) or (B, F, C, H, W), but got "
            f"{tuple(shape)}. Leave it out for images."
        )


def check_spatial(shape: Sequence[int]) -> None:
    if len(shape) < 4 or shape[-2] * shape[-1] < 2:
        raise ValueError(
            f"Expected noise of shape (B, C, H, W), with H·W of 2 or more, but got {tuple(shape)}. Sample noise before "
            "it is packed."
        )
