"""Where sampling starts: white, pink and negatively coupled Gaussian noise, by name or as objects."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..registry import Registry

Generators = torch.Generator | list[torch.Generator] | None
NoiseSamplerSpec = str | Mapping[str, Any] | Callable[..., torch.Tensor]

NOISE_SAMPLERS: Registry[type["NoiseSampler"]] = Registry("noise sampler")
SamplerT = TypeVar("SamplerT", bound="NoiseSampler")


class NoiseSampler:
    """Draws initial noise: the white noise that diffusers draws for the same generators, mapped by `color`.

    So each sampler leaves a generator where white noise leaves it. Any callable with the arguments of `__call__` is
    taken as a noise sampler too.
    """

    name: ClassVar[str | None] = None

    def __call__(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Draw noise of a shape `(B, C, H, W)`: spatial, before any scaling or packing.

        Args:
            shape: That of the noise; `(B, 1, C, H, W)` and other shapes that end in height and width do too.
            generator: One for the batch, or a list of one for each sample, which makes samples independent of the batch
                they are drawn in. CPU generators draw on the CPU and move the noise to `device`.
            device: Where the noise goes; by default where the generator is.
            dtype: What the noise is drawn in; float32 by default.

        Raises:
            ValueError: for a list of generators that has another length than the batch, and a shape without images.
        """
        streams = generator if isinstance(generator, list) else [generator]
        if len(streams) not in (1, shape[0]):
            raise ValueError(f"Expected one generator, or one for each of {shape[0]} samples, but got {len(streams)}.")
        if device is None and streams[0] is not None:
            device = streams[0].device
        device = None if device is None else torch.device(device)
        return self.color(randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noise to this noise: same shape, dtype and device."""
        raise NotImplementedError(f"{type(self).__name__} must define `color(white)`.")

    def within(self, groups: Sequence[int]) -> "NoiseSampler":
        """This sampler for a batch with the given groups: one integer for each sample, equal where prompts are."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, which `as_noise_sampler` takes if the sampler is registered."""
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
    """A noise sampler by name (`"pink"`), by name and settings (`{"name": "pink", "alpha": 0.3}`), or as it is.

    Raises:
        ValueError: for an unknown name, and for settings that the sampler does not have or cannot take.
        TypeError: for what is none of these.
    """
    if isinstance(sampler, str):
        return named_noise_sampler(sampler, {})
    if isinstance(sampler, Mapping):
        settings = dict(sampler)
        return named_noise_sampler(str(settings.pop("name", None)), settings)
    if sampler is None or (callable(sampler) and not isinstance(sampler, type)):
        return sampler
    raise TypeError(
        f"Expected a noise sampler such as `PinkNoise(0.2)`, one of the names {list_noise_samplers()} or a dict such "
        f'as {{"name": "pink", "alpha": 0.3}}, but got {sampler!r}.'
    )


def named_noise_sampler(name: str, settings: dict[str, Any]) -> "NoiseSampler":
    sampler = NOISE_SAMPLERS.find(name, ', or a dict such as {"name": "pink", "alpha": 0.3}')
    known = list(inspect.signature(sampler).parameters)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"Expected settings of the noise sampler {name!r} out of {known}, but got {unknown}.")
    return sampler(**settings)


def describe_noise_sampler(sampler: Callable[..., torch.Tensor] | None) -> dict[str, Any] | None:
    """Name and settings of a noise sampler in plain values; of a foreign one its name; `None` for `None`."""
    if sampler is None:
        return None
    if hasattr(sampler, "describe"):
        return sampler.describe()  # pyright: ignore[reportFunctionMemberAccess]
    return {"name": getattr(sampler, "__qualname__", type(sampler).__qualname__)}


@register_noise_sampler("white")
@dataclasses.dataclass(frozen=True)
class WhiteNoise(NoiseSampler):
    """Standard Gaussian noise, bit for bit what a stock pipeline draws."""

    def color(self, white: torch.Tensor) -> torch.Tensor:
        return white


@register_noise_sampler("pink")
@dataclasses.dataclass(frozen=True)
class PinkNoise(NoiseSampler):
    """White noise with amplitudes times (1 + f)^-α, by default each channel of each sample at mean 0 and variance 1.

    It's Never Too Late, https://arxiv.org/abs/2601.00090, eq. 7: images of one prompt differ more from pink noise. f is
    the distance from frequency zero in index units, that is in waves for each side of the noise, not for each pixel.
    Phases are those of the white noise of the same generators. The variance is the unbiased one, so the squared norm of
    a channel is H·W − 1: what white noise has on average without its mean.

    Args:
        alpha: α, any finite number: above 0 favours low frequencies (the paper takes 0.2 and finds patches above 0.3),
            below 0 is blue noise. 0 is white noise that is still standardised in each channel; take `WhiteNoise` for
            the stock draw.
        reference_size: Side of the noise, in its own entries, at which f is the paper's; `None` for any. f then counts
            waves per `reference_size` entries, f = reference_size · √((u/H)² + (v/W)²), so that α gives the same
            spectrum per entry at all sizes; without, larger noises are shaped more.
        band: (low, high) in the units of f: the slope is limited to this band.
        outside: What becomes of frequencies outside the band: "flat" continues the gain that it has at the edge, "zero"
            leaves noise of the band alone.
        standardize: `False` scales by the standard deviation over all draws instead of that of each channel, and keeps
            the means, that is f = 0: so the noise is exactly Gaussian. In small latents the means decide much of an
            image: of 8 × 8 entries, without them images of a prompt are far more alike.

    Raises:
        ValueError: for settings that cannot work.
    """

    alpha: float = 0.2
    _: dataclasses.KW_ONLY
    reference_size: float | None = None
    band: Sequence[float] | None = None
    outside: Literal["flat", "zero"] = "flat"
    standardize: bool = True

    def __post_init__(self) -> None:
        if not is_finite_number(self.alpha):
            raise ValueError(f"Expected `alpha` to be a finite number, but got {self.alpha!r}. The paper takes 0.2.")
        if self.reference_size is not None and not (is_finite_number(self.reference_size) and self.reference_size > 0):
            raise ValueError(f"Expected `reference_size` to be a number above 0, but got {self.reference_size!r}.")
        if self.outside not in ("flat", "zero"):
            raise ValueError(f'Expected `outside` to be "flat" or "zero", but got {self.outside!r}.')
        if self.band is not None:
            object.__setattr__(self, "band", checked_band(self.band))
        elif self.outside == "zero":
            raise ValueError('Expected a `band` beside `outside="zero"`, but got none. Pass `band=(low, high)`.')

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noise `(B, C, H, W)` to pink noise of its phases, in its dtype; computed in float32 or better.

        Raises:
            ValueError: for noise that is not spatial, and for sizes that have no frequency in the band.
        """
        check_spatial(white.shape)
        size = white.shape[-2:]
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        gain = self.gain(*size).to(exact.dtype).to(exact.device)
        pink = torch.fft.irfft2(torch.fft.rfft2(exact) * gain, s=size)
        spread = pink.std((-2, -1), keepdim=True) if self.standardize else expected_std(gain, *size)
        return (pink / spread.clamp_min(torch.finfo(pink.dtype).tiny)).to(white.dtype)

    def gain(self, height: int, width: int) -> torch.Tensor:
        """The factor of each entry of `rfft2`, `(H, W // 2 + 1)` float64, scaled to a largest of 1.

        That of frequency zero is 0 where channels are standardised: their mean is taken away in any case, and so before
        it can cost precision.
        """
        f = self.frequency(height, width)
        low, high = self.band or (0.0, math.inf)
        shaped = f > 0 if self.standardize else f >= 0
        if self.outside == "zero":
            shaped &= (f >= low) & (f <= high)
        if not shaped.any():
            raise ValueError(
                f"Expected a `band` with frequencies of noise of {height}×{width}, which go up to {f.max():.4g}, but "
                f"got {tuple(self.band or ())}. Widen it."
            )
        logs = -self.alpha * f.clamp(low, high).log1p()
        return torch.where(shaped, (logs - logs[shaped].max()).exp(), 0.0)

    def frequency(self, height: int, width: int) -> torch.Tensor:
        """f of each entry of `rfft2`, `(H, W // 2 + 1)` float64."""
        rows = torch.fft.fftfreq(height, dtype=torch.float64) * (self.reference_size or height)
        columns = torch.fft.rfftfreq(width, dtype=torch.float64) * (self.reference_size or width)
        return torch.hypot(rows[:, None], columns)


def expected_std(gain: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The standard deviation of each entry of white noise `(height, width)` times a `gain` of its `rfft2`, a scalar."""
    copies = torch.full_like(gain, 2.0)  # `rfft2` leaves out the mirrored half of the columns
    copies[:, 0] = 1
    copies[:, -1] = 2 - (width % 2 == 0)
    return (gain.square() * copies).sum().div(height * width).sqrt()


@register_noise_sampler("coupled")
@dataclasses.dataclass(frozen=True)
class CoupledNoise(NoiseSampler):
    """Noises that are Gaussian each, and as negatively correlated as K noises can be: their sum is zero.

    `z_i = √(1−ρ)·(g_i − ḡ) + √(1+(K−1)ρ)·ḡ`, the symmetric square root of the covariance (1−ρ)I + ρ11ᵀ, for each entry
    of K white noises g. At ρ = −1/(K−1) that is √(K/(K−1))·(g_i − ḡ), and for K = 2 the antithetic pair (z, −z). Couple
    to Control, https://arxiv.org/abs/2605.11311: sets differ more, at no cost, while each image has its own law.

    Args:
        group_size: K: each K samples in a row are coupled; at least 2. By default all of the batch are, and in a
            pipeline those that share their prompt.
        correlation: ρ in [−1/(K−1), 1]; −1/(K−1) by default.
        groups: Instead of `group_size`: one integer for each sample, equal where samples are coupled.

    Raises:
        ValueError: for settings that cannot work.
    """

    group_size: int | None = None
    _: dataclasses.KW_ONLY
    correlation: float | None = None
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 2):
            raise ValueError(f"Expected `group_size` to be an integer of 2 or more, but got {self.group_size!r}.")
        if self.group_size is not None and self.groups is not None:
            raise ValueError("Expected `group_size` or `groups`, but got both. Leave one out.")
        if self.correlation is not None and not (is_finite_number(self.correlation) and -1 <= self.correlation <= 1):
            raise ValueError(f"Expected `correlation` to be in [-1/(K-1), 1], but got {self.correlation!r}.")
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(self.groups))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noises `(B, ...)` to coupled ones, in their dtype; computed in float32 or better.

        Raises:
            ValueError: for a batch that the groups do not fit, and a correlation that K samples cannot have.
        """
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        coupled = torch.empty_like(exact)
        for rows in self.coupled_rows(len(white)):
            coupled[rows] = self.couple_all(exact[rows])
        return coupled.to(white.dtype)

    def couple_all(self, white: torch.Tensor) -> torch.Tensor:
        """`(K, ...)` white noises to K coupled ones."""
        rho, others, mean = self.correlation, len(white) - 1, white.mean(0, keepdim=True)
        if rho is None:
            return math.sqrt(len(white) / others) * (white - mean)
        return math.sqrt(1 - rho) * (white - mean) + math.sqrt(max(1 + others * rho, 0.0)) * mean

    def coupled_rows(self, batch: int) -> list[list[int]]:
        """The samples of each group, by their places in the batch."""
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
                "Leave it out for the lowest."
            )

    def within(self, groups: Sequence[int]) -> "CoupledNoise":
        """Coupled within the given groups, unless the sampler has its own. Raises `ValueError` where that fails."""
        own = self.group_size is not None or self.groups is not None
        bound = self if own else dataclasses.replace(self, groups=tuple(groups))
        bound.coupled_rows(len(groups))
        return bound


def is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_band(band: Sequence[float]) -> tuple[float, float]:
    """A band as a tuple. Raises `ValueError` unless it is (low, high) with 0 <= low < high."""
    limits = tuple(band) if isinstance(band, Sequence) else ()
    if len(limits) == 2 and is_finite_number(limits[0]) and isinstance(limits[1], Real) and 0 <= limits[0] < limits[1]:
        return limits
    raise ValueError(f"Expected `band` to be (low, high) with 0 <= low < high, but got {band!r}.")


def check_spatial(shape: Sequence[int]) -> None:
    if len(shape) < 4 or shape[-2] * shape[-1] < 2:
        raise ValueError(
            f"Expected noise of shape (B, C, H, W), with H·W of 2 or more, but got {tuple(shape)}. Draw packed latents "
            "before they are packed."
        )
