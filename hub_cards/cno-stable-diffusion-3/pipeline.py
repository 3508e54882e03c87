"""CNO for models of the Stable Diffusion 3 kind.

Generated from pipelines/cno_stable_diffusion_3.py by `noiseopt hub build`. Edit the source, not this file.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import numbers
import os
import platform
import re
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.activations import GEGLU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import ImageProcessingMixin, PretrainedConfig


# schedulers/noise_samplers.py


Generators = torch.Generator | list[torch.Generator] | None
NoiseSamplerSpec = str | Mapping[str, Any] | Callable[..., torch.Tensor]

NOISE_SAMPLERS: dict[str, Callable[..., Any]] = {}


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


def register_noise_sampler(name: str):
    """Class decorator: make a noise sampler known by name. The same class may come again, as when code is reloaded."""

    def register(cls):
        known = NOISE_SAMPLERS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"Expected a free noise sampler name, but {name!r} is taken by {known.__qualname__}.")
        NOISE_SAMPLERS[name], cls.name = cls, name
        return cls

    return register


def list_noise_samplers() -> list[str]:
    """The names that `noise_sampler=` takes."""
    return sorted(NOISE_SAMPLERS)


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
        return named_noise_sampler(settings.pop("name", None), settings)
    if sampler is None or (callable(sampler) and not isinstance(sampler, type)):
        return sampler
    raise TypeError(
        f"Expected a noise sampler such as `PinkNoise(0.2)`, one of the names {list_noise_samplers()} or a dict such "
        f'as {{"name": "pink", "alpha": 0.3}}, but got {sampler!r}.'
    )


def named_noise_sampler(name: str | None, settings: dict[str, Any]) -> Callable[..., torch.Tensor]:
    if name not in NOISE_SAMPLERS:
        raise ValueError(
            f"Expected the name of a noise sampler out of {list_noise_samplers()}, but got {name!r}. For settings pass "
            'a dict such as {"name": "pink", "alpha": 0.3}.'
        )
    known = list(inspect.signature(NOISE_SAMPLERS[name]).parameters)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"Expected settings of the noise sampler {name!r} out of {known}, but got {unknown}.")
    return NOISE_SAMPLERS[name](**settings)


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


# callbacks/noise_state.py


@dataclasses.dataclass(eq=False)
class NoiseState:
    """A running optimisation of `B` independent noises.

    Attributes:
        pipeline: The pipeline whose noise is optimised.
        prompts: The `B` prompts that rewards are asked about.
        steps: How many evaluations the method plans.
        noise: `(B, C, H, W)`, unit variance, the noise that was evaluated in this step.
        step: Index of this evaluation, from 0: step 0 is the plain result.
        images: `(B, 3, H, W)` in [0, 1], what the noise draws; `None` if the objective did not ask for images.
        loss: `(B,)`, lower is better, without the regularizer.
        scores: Name to `(B,)`, the raw rewards of this step, higher is better.
        best_loss: `(B,)`, the lowest loss so far.
        best_step: `(B,)`, the step of the lowest loss.
        best_noise: `(B, C, H, W)`, the noise of the lowest loss.
        best_images: `(B, 3, H, W)` or `None`, the images of the lowest loss.
        active: `(B,)` bool. A sample that is not active keeps its best and is not recorded any more.
        reports: What callbacks have to say in the result, by name: plain values.
        stopped: Why the run ended before its last step, or `None`.
    """

    pipeline: Any
    prompts: list[str]
    steps: int
    noise: torch.Tensor
    step: int = -1
    images: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    best_loss: torch.Tensor | None = None
    best_step: torch.Tensor | None = None
    best_noise: torch.Tensor | None = None
    best_images: torch.Tensor | None = None
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    active: torch.Tensor = dataclasses.field(init=False)
    stopped: str | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.active = torch.ones(len(self.noise), dtype=torch.bool, device=self.noise.device)

    @property
    def elapsed(self) -> float:
        """Seconds since the optimisation began."""
        return time.perf_counter() - self.started

    def stop(self, reason: str = "callback", samples: torch.Tensor | None = None) -> None:
        """End the run after this step, or only for the samples where the `(B,)` bool mask `samples` is true."""
        self.active = self.active & ~samples if samples is not None else torch.zeros_like(self.active)
        if not self.active.any():
            self.stopped = reason


# pipelines/chunk_size.py


ChunkSetting = int | Literal["auto"] | None


class KeptTensor:
    """A tensor that a graph has saved; the count is told when the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor.detach(), release  # a result that knows its graph would keep it for ever

    def __del__(self) -> None:
        self.release()


class GraphTooLarge(Exception):
    """A graph that is being built holds more than it may."""


class SavedBytes:
    """The bytes that graphs made inside this context hold, each storage once, parameters left out.

    Args:
        limit: What they may hold; `None` for anything.

    Attributes:
        held: Now.
        peak: The most at any one time.

    Raises:
        GraphTooLarge: Out of the operation that would hold more than the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> KeptTensor:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return KeptTensor(tensor, lambda: None)
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[place]:
            if self.limit is not None and self.held + size > self.limit:
                raise GraphTooLarge
            self.held += size
            self.peak = max(self.peak, self.held)
        self.holders[place] += 1
        return KeptTensor(tensor, lambda: self.release(place, size))

    def release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.held -= size


def fitting_chunk_size(batch: int, per_image: int, free: int) -> int | None:
    """How many images to have in memory at once, `None` for the whole batch.

    Args:
        batch: B, how many there are.
        per_image: The bytes that the graph of one holds.
        free: The bytes that are free; half of them is left to what was not counted.
    """
    fitting = free // 2 // per_image if per_image else batch
    return None if fitting >= batch else max(1, fitting)


def check_chunk_size(chunk_size: Any) -> None:
    """Raise `ValueError` unless `chunk_size` is an integer of 1 or more, "auto" or `None`."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1
    if not whole and chunk_size is not None and chunk_size != "auto":
        raise ValueError(f'Expected `chunk_size` to be 1 or more, "auto" or `None`, but got {chunk_size!r}.')


def free_memory(device: torch.device) -> int:
    """The bytes that tensors on a device can still take; for CUDA what its caching allocator keeps unused as well."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # accelerate brings it; not needed but here

    return psutil.virtual_memory().available


# pipelines/undoing.py


@contextlib.contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, and once more if that is interrupted: Ctrl-C may come while something is put back."""
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


# pipelines/lean_layers.py


LEAN_BYTES = 2**18  # smaller inputs are left to autograd: there is nothing to gain


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps its weights and not its input, as long as they are frozen."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_frozen(self) or self.padding_mode != "zeros" or isinstance(self.padding, str) or not is_lean(input):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(input, self.weight, self.bias, settings)  # pyright: ignore[reportReturnType]


class FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = input.shape, settings
        return F.conv2d(suited(input, weight), weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        gradient = suited(gradient, weight)
        if has_channels_last(gradient) and (turned := turned_settings(weight, *ctx.settings)):
            found = F.conv2d(gradient, weight.flip(2, 3).transpose(0, 1), None, *turned)
        else:
            found = conv2d_input(ctx.shape, weight, gradient, *ctx.settings)
        return found, None, None, None


def turned_settings(weight: Tensor, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> tuple | None:
    """Of the convolution with the turned kernel that is the gradient of one of stride 1.

    With the channels last CPUs are faster at it than at the gradient of a convolution.
    """
    turned = tuple(dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in range(2))
    return (stride, turned, dilation, groups) if stride == (1, 1) and groups == 1 and min(turned) >= 0 else None


class LeanUpsample2D(Upsample2D):
    """Doubles an image in size and convolves it, in one transposed convolution of the small image: 4/9 of the products.

    Pixels that repeat meet several weights of the kernel, whose sum they can be multiplied with. In half precision the
    sums would have to be rounded: it keeps to the stock way.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        fits = is_plain(self) and output_size is None and not args and not kwargs and is_lean(hidden_states)
        # the kernel takes longer to add up than it saves where it is larger than the image
        fits = fits and self.conv.weight.numel() <= 4 * hidden_states.numel()  # pyright: ignore
        if not fits or torch.finfo(hidden_states.dtype).bits < 32:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return FrozenUpsampling.apply(hidden_states, self.conv.weight, self.conv.bias)  # pyright: ignore


class FrozenUpsampling(torch.autograd.Function):
    """A 3 x 3 convolution of the nearest neighbour upsampling by 2, with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv_transpose2d(suited(input), doubling_kernel(weight), bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return F.conv2d(suited(gradient), doubling_kernel(weight), stride=2, padding=1), None, None


def doubling_kernel(weight: Tensor) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) to that of a transposed convolution (I, O, 4, 4) which also doubles the image.

    Doubling is a transposed convolution with four ones; this is the two after one another.
    """
    wide = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    wide = wide[..., 1:, :] + wide[..., :-1, :]
    return suited(wide[..., 1:] + wide[..., :-1])


class LeanGroupNorm(nn.GroupNorm):
    """A group normalization whose output knows what it was made of, for a `LeanSiLU` that comes next."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_lean(input) and output.requires_grad:
            settings = (self.num_groups, self.weight, self.bias, self.eps)
            vars(output)["normalized_from"] = output._version, input, settings
        return output


class LeanSiLU(nn.SiLU):
    """A SiLU that keeps the input of the group normalization before it, which is kept anyway, and not its own."""

    def forward(self, input: Tensor) -> Tensor:
        version, *source = vars(input).get("normalized_from", (None,))
        if not is_lean(input) or self.inplace or version != input._version:  # of something else, or written to since
            return super().forward(input)
        return NormalizedSiLU.apply(input, *source)  # pyright: ignore[reportReturnType]


class NormalizedSiLU(torch.autograd.Function):
    """`silu(normalized)`, where `normalized` is computed again from what was normalized in the backward pass."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, before: Tensor, settings: tuple) -> Tensor:
        ctx.save_for_backward(before)
        ctx.settings = settings
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (before,) = ctx.saved_tensors
        groups, weight, bias, eps = ctx.settings
        normalized = F.group_norm(before, groups, weight, bias, eps)
        return torch.ops.aten.silu_backward(gradient, normalized), None, None


class LeanGEGLU(GEGLU):
    """A gated linear unit that keeps its projection, and not the gate that follows from it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden_states.device.type == "npu" or not is_lean(hidden_states, dimensions=3):
            return super().forward(hidden_states, *args, **kwargs)
        return GatedProjection.apply(self.proj(hidden_states))  # pyright: ignore[reportReturnType]


class GatedProjection(torch.autograd.Function):
    """`values * gelu(gates)` of the two halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        values, gates = projected.chunk(2, dim=-1)
        return values * F.gelu(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        (projected,) = ctx.saved_tensors
        values, gates = projected.chunk(2, dim=-1)
        of_gates = torch.ops.aten.gelu_backward(gradient * values, gates)
        return torch.cat([gradient * F.gelu(gates), of_gates], dim=-1)


def is_frozen(layer: nn.Conv2d) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def is_plain(layer: Upsample2D) -> bool:
    """Whether a layer doubles by repeating pixels, and then does nothing but a frozen 3 x 3 convolution."""
    conv = layer.conv if layer.use_conv and layer.name == "conv" else None
    if type(conv) is not LeanConv2d or layer.norm is not None or not layer.interpolate or layer.use_conv_transpose:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    hooked = conv._forward_hooks or conv._forward_pre_hooks or "forward" in vars(conv)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and is_frozen(conv) and not hooked


def suited(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """In the order in which a CPU convolves fastest with a weight; as they are on other devices.

    With the channels last, unless the weight is not much smaller: those of the middle of a U-Net are larger than its
    images. Where a kernel is of one pixel a change of the order takes as long as it saves.
    """
    if values.device.type != "cpu" or (weight is not None and weight[0, 0].numel() == 1):
        return values
    last = weight is None or values.numel() >= 4 * weight.numel()
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def has_channels_last(values: Tensor) -> bool:
    """Whether values on a CPU are in that order, and in no other at the same time."""
    last = values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()
    return last and values.device.type == "cpu"


def is_lean(input: Tensor, dimensions: int = 4) -> bool:
    """Whether a graph is being made of something large, in the precision of its own tensors."""
    graph = torch.is_grad_enabled() and input.requires_grad and input.ndim == dimensions
    return graph and input.numel() * input.element_size() >= LEAN_BYTES and not in_autocast(input.device.type)


def in_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


LEAN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    nn.GroupNorm: LeanGroupNorm,
    nn.SiLU: LeanSiLU,
    Upsample2D: LeanUpsample2D,
    GEGLU: LeanGEGLU,
}


@contextlib.contextmanager
def lean_layers(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Layers of these modules are lean inside, and what they were outside; subclasses and compiled modules stay."""
    changed = [(layer, type(layer)) for root in roots for layer in plain_layers(root)]

    def put_back() -> None:
        for layer, kind in changed:
            layer.__class__ = kind

    with undoing(put_back):
        for layer, kind in changed:
            layer.__class__ = LEAN_LAYERS[kind]
        yield


def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that have a lean form; a compiled module would be compiled again for them."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return
    if type(module) in LEAN_LAYERS:
        yield module
    for child in module.children():
        yield from plain_layers(child)


# pipelines/module_state.py


DENOISERS = ("unet", "transformer", "transformer_2")
CALLED_IN_STEPS = (*DENOISERS, "controlnet")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENCODERS = ("text_encoder", "image_encoder", "safety_checker")


def modules_of(pipe) -> dict[str, nn.Module]:
    """The pipeline's components that are torch modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@contextlib.contextmanager
def frozen_modules(pipe, decoder: nn.Module | None = None) -> Iterator[None]:
    """All modules, and a decoder that is used beside them, in `eval()`, without parameter gradients and with lean
    layers inside; exactly as before outside."""
    roots = [*modules_of(pipe).values(), *([] if decoder is None else [decoder])]
    modules = [module for root in roots for module in root.modules()]
    trained = [module for module in modules if module.training]
    # by name: offloading puts other parameters in the place of these
    learning = [(module, name) for module in modules for name in learning_parameters(module)]

    def switch(on: bool) -> None:
        for module in trained:
            module.training = on
        for module, name in learning:
            module.get_parameter(name).requires_grad_(on)

    with undoing(lambda: switch(True)):
        switch(False)
        with lean_layers(roots):
            yield


def learning_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that take a gradient."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]


def refuse_unsuited(pipe, gradient: str | None) -> None:
    """Raise `ValueError`, with the remedy, for modules in a state that a method cannot work with.

    Args:
        pipe: The pipeline.
        gradient: What the method differentiates; see `PipelineSampler.images`. What no gradient passes may be offloaded
            and attend by any kernel.
    """
    for name, root in modules_of(pipe).items():
        refuse_cache(name, root)
        if passes(name, gradient):
            refuse_offload(name, root)
            refuse_attention(name, root)
            refuse_casting(name, root)


def passes(name: str, gradient: str | None) -> bool:
    """Whether a gradient passes a component of a pipeline: prompts are encoded without one."""
    if gradient is None or name.startswith(ENCODERS):
        return False
    return gradient == "full" or name not in DENOISERS


def refuse_offload(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module is offloaded: weights that move between forward and backward break gradients."""
    expected = (
        f"Expected `{name}` to stay on its device, but it is offloaded, and weights that move between the forward and "
        "the backward pass break the gradient. Use a method without gradients, such as `BestOfN`, or "
    )
    for module in root.modules():
        if group_offloaded(module):
            raise ValueError(f"{expected}load the pipeline again without group offloading.")
        if offloads(getattr(module, "_hf_hook", None)):
            raise ValueError(f"{expected}call `pipe.remove_all_hooks()` and `pipe.to(device)` first.")


def is_offloaded(root: nn.Module) -> bool:
    """Whether the weights of a module, or of a part of it, move between devices."""
    return any(group_offloaded(module) or offloads(getattr(module, "_hf_hook", None)) for module in root.modules())


def offloads(hook) -> bool:
    """Whether an accelerate hook moves weights: `CpuOffload`, or `AlignDevicesHook(offload=True)`, alone or nested."""
    nested = getattr(hook, "hooks", ())
    return type(hook).__name__ == "CpuOffload" or bool(getattr(hook, "offload", False)) or any(map(offloads, nested))


def group_offloaded(module: nn.Module) -> bool:
    return any("group_offloading" in name for name in diffusers_hooks(module))


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """The hooks that diffusers put on a module, by name."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def refuse_attention(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module attends by a kernel without a backward pass, some of which drop the gradient."""
    for module in root.modules():
        backend = attention_backend_of(module)
        if backend is not None and ("sage" in backend or backend == "_flash_3"):
            raise ValueError(
                f'Expected an attention backend with a backward pass, but `{name}` uses "{backend}", which has none. '
                f'Call `pipe.{name}.set_attention_backend("native")` first, outside any `attention_backend` context, '
                "or use a method without gradients, such as `BestOfN`."
            )


def attention_backend_of(module: nn.Module) -> str | None:
    """The kernel that an attention module calls: its own or the one in force; `None` for one that chooses none."""
    processor = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    own = getattr(processor, "_attention_backend", None)
    return AttentionBackendName(own or _AttentionBackendRegistry.get_active_backend()[0]).value


def refuse_casting(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for convolutions stored in another type: their backward pass finds the stored weights.

    Linear layers keep those that they computed with.
    """
    for module in root.modules():
        if isinstance(module, CONVOLUTIONS) and "layerwise_casting" in diffusers_hooks(module):
            raise ValueError(
                f"Expected convolutions that are stored as they compute, but those of `{name}` are cast layer by "
                "layer, which breaks the gradient. Load the pipeline again and leave them out: "
                f"`pipe.{name}.enable_layerwise_casting(..., skip_modules_classes=(torch.nn.Conv2d,))`."
            )


def refuse_cache(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module reuses what earlier denoising steps computed.

    Some caches ask the pipeline which timestep it is at, and the evaluations run on a copy of it; all hold the graph of
    a step for the next, and a run that is interrupted would leave its state behind.
    """
    for module in root.modules():
        kept = [hook for hook in diffusers_hooks(module).values() if getattr(hook, "_is_stateful", False)]
        if kept:
            raise ValueError(
                f"Expected modules without a cache across denoising steps, but `{name}` has one "
                f"({type(kept[0]).__name__}). Call `pipe.{name}.disable_cache()` first; the final image may be drawn "
                "with the cache again."
            )


def without_gradient(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and whose forward pass leaves no graph."""
    return with_forward(module, torch.no_grad()(module.forward))


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy that shares all weights and has another forward pass."""
    twin = copy.copy(module)
    vars(twin)["forward"] = forward
    return twin


def converted_apart(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights, until it is converted to another dtype: then it has a copy of them.

    A half-precision pipeline whose VAE has `force_upcast` converts the shared VAE to decode, and back, which swaps the
    weights under the graph. This one is converted as well, and leaves the shared one alone.
    """
    twin = copy.copy(module)
    vars(twin).pop("decode", None)  # a compiled one is bound to the shared weights
    contents: dict[torch.dtype, dict[str, Any]] = {module.dtype: vars(module)}  # pyright: ignore

    def to(dtype: torch.dtype) -> nn.Module:
        if dtype not in contents:
            contents[dtype] = vars(copy.deepcopy(module).to(dtype))
        for kind in ("_modules", "_parameters", "_buffers"):
            vars(twin)[kind] = contents[dtype][kind]
        return twin

    vars(twin)["to"] = to
    return twin


# pipelines/checkpointing.py


CheckpointPolicy = Literal["none", "blocks", "steps"]
Checkpointing = Literal["auto", "none", "blocks", "steps"]
POLICIES: tuple[CheckpointPolicy, ...] = ("none", "blocks", "steps")  # each holds less than the one before
BLOCK_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
BLOCK_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


class Checkpoints:
    """The checkpointing of one pipeline call, in force inside `with`; shared by the samplers of its parts.

    "blocks" is diffusers' own: of each block of denoiser and decoder only the input is kept. "steps" keeps the input of
    each call of the denoiser alone, and of the call that is computed again the blocks' inputs, so that the memory
    hardly grows with the number of steps. A denoiser without such blocks, and one whose LoRA is scaled by the call, is
    kept by its calls with "blocks" too: diffusers scales it around its forward pass, and a block that was computed
    again later would miss that.

    A call that was begun inside has to be passed backwards inside, as blocks look at their setting then too. Outside
    the modules are exactly as they were; what has been turned on by the user stays on throughout.

    Args:
        setting: A policy, or "auto": the first of none, blocks and steps whose graph takes at most half of the memory
            that is free. It is counted while the first graph is built, which is begun again with the next policy where
            it does not fit.
        denoisers: What is called in each step with a gradient.
        decoder: What is called once.
        scaled_lora: Whether the call scales the LoRA of its denoiser.

    Attributes:
        policy: What is in force.
    """

    policy: CheckpointPolicy = "none"

    def __init__(
        self,
        setting: Checkpointing,
        denoisers: Sequence[nn.Module] = (),
        decoder: Any = None,
        scaled_lora: bool = False,
    ) -> None:
        self.setting: Checkpointing = setting
        self.denoisers, self.scaled_lora = list(denoisers), scaled_lora
        self.decoder = decoder
        self.in_force = self.settled = False
        self.counted: set[Hashable] = set()
        self.changed: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> "Checkpoints":
        self.in_force = True
        self.take("none" if self.setting == "auto" else self.setting)
        return self

    def __exit__(self, *error: Any) -> None:
        with undoing(self.restore):
            pass

    def restore(self) -> None:
        for module, before in self.changed:
            for name in BLOCK_SETTINGS:
                vars(module).pop(name, None)
            vars(module).update(before)
        self.changed = []
        self.policy, self.in_force, self.settled = "none", False, False
        self.counted.clear()

    @property
    def ladder(self) -> Sequence[CheckpointPolicy]:
        """The policies that may be taken from here on: one, unless the setting is "auto"."""
        if self.setting != "auto" or not self.in_force:
            return (self.policy,)
        within = POLICIES if self.denoisers else POLICIES[:2]  # without them there is a decoder only
        return within[within.index(self.policy) :]

    def take(self, policy: CheckpointPolicy) -> None:
        """Put a policy in force for the graphs from here on; those that exist stay as they are."""
        self.policy = policy
        if policy != "none" and not self.changed:
            kept_by_blocks = [part for part in [*self.denoisers, self.decoder] if self.has_blocks(part)]
            modules = [module for part in kept_by_blocks for module in blocks_of(part)]
            self.changed = [(module, own_block_settings(module)) for module in modules]
            for module in modules:
                vars(module).update(zip(BLOCK_SETTINGS, (True, BLOCK_CHECKPOINT), strict=True))

    def has_blocks(self, part: Any) -> bool:
        """Whether a module is kept by its blocks."""
        scaled = self.scaled_lora and part is not self.decoder
        return bool(getattr(part, "_supports_gradient_checkpointing", False)) and not scaled

    def call_of(self, part: Any) -> Any:
        """A denoiser as it is to be called in a step."""
        whole = self.policy == "steps" or (self.policy == "blocks" and not self.has_blocks(part))
        return recomputed_whole(part) if whole and part in self.denoisers else part

    def settle(self) -> None:
        """Leave it at the policy that is in force, or that is taken by hand."""
        self.settled = True

    def fitted(self, kind: Hashable, device: torch.device, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`draw()`, which builds a graph, with the first policy of those that may be taken whose graph fits.

        Graphs are counted once of each `kind`: the images of a run are all made in the same way.
        """
        if self.settled or kind in self.counted:
            return draw()
        self.counted.add(kind)
        *others, last = self.ladder
        for policy in others:
            self.take(policy)
            try:
                with SavedBytes(limit=free_memory(device) // 2):
                    return draw()
            except GraphTooLarge:
                continue
        self.take(last)
        return draw()


def blocks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that keep their inputs alone once they are told to, and are not yet."""
    for module in part.modules():
        if getattr(module, "gradient_checkpointing", True) is False:
            yield module


def own_block_settings(module: nn.Module) -> dict[str, Any]:
    """What a module has of its own to say about keeping its inputs alone."""
    return {name: vars(module)[name] for name in BLOCK_SETTINGS if name in vars(module)}


def recomputed_whole(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and keeps of each call its inputs alone, where there is a gradient."""
    forward = module.forward

    @functools.wraps(forward)
    def keep_inputs(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return with_forward(module, keep_inputs)


def check_checkpointing(checkpointing: Any) -> None:
    """Raise `ValueError` unless `checkpointing` is "auto" or a policy."""
    if checkpointing not in ("auto", *POLICIES):
        raise ValueError(
            f'Expected `checkpointing` to be "auto", "none", "blocks" or "steps", but got {checkpointing!r}.'
        )


def scales_lora(request: dict[str, Any]) -> bool:
    """Whether a call scales the LoRA of its denoiser, as by `cross_attention_kwargs={"scale": 0.5}`."""
    settings = [value for value in request.values() if isinstance(value, dict)]
    return any(value.get("scale") not in (None, 1, 1.0) for value in settings)


# rewards/frozen_module.py


FrozenT = TypeVar("FrozenT", bound="FrozenModule")


class FrozenModule(nn.Module):
    """A module of frozen parts that stays in evaluation mode: what it gives are measurements.

    Args:
        modules: the parts by name.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module.requires_grad_(False))
        self.eval()

    def train(self: FrozenT, mode: bool = True) -> FrozenT:
        """Stay in evaluation mode: the dropout of a scoring head would make the scores random."""
        return super().train(False)

    @property
    def device(self) -> torch.device | None:
        """Where the weights are, or None without any."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, float32 without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)


# rewards/transforms.py


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resample = Literal["bicubic", "bilinear"]
PIL_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for numerical checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamp to [0, 1] in the forward pass; the gradient passes as if there were no clamp."""
    return x + (x.clamp(0, 1) - x).detach()


def resize(images: Tensor, size: tuple[int, int], resample: Resample = "bicubic", single_pass: bool = False) -> Tensor:
    """Resize (B, C, H, W) images in [0, 1] to `size` = (height, width), antialiased, in float32 or more.

    Pillow resizes uint8 images in two passes, each of which is rounded and clipped. Doing the same on float images,
    without the rounding, agrees with it to 1.13/255 in the worst case. One unclamped pass (`single_pass=True`, what
    torchvision and ReNO do on float tensors) is off by up to 22/255 on sharp edges.
    """
    images = at_least_float32(images)
    if single_pass:
        return F.interpolate(images, size, mode=resample, antialias=True, align_corners=False)
    # The clamps are straight-through: in a saturated area the resized values lie at 1 plus or minus a rounding error,
    # and a hard clamp would drop the gradient of every pixel that was rounded up, so it could never darken again.
    for target in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        images = F.interpolate(images, target, mode=resample, antialias=True, align_corners=False)
        images = straight_through_clamp(images)
    return images


def first_pass_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """What the first of Pillow's two passes makes of (height, width) on the way to `size`.

    The width goes first, unless the height loses more than twice as many pixels (since Pillow 13). The order is visible
    because of the clipping in between: up to 13/255 on a checkerboard.
    """
    if height - size[0] > max(0, 2 * (width - size[1])):
        return size[0], width
    return height, size[1]


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """The (height, width) that brings the shorter side to `edge`; the longer one is truncated, as transformers does."""
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre crop of (..., H, W) to `size`; a side that is too short is padded with zeros, as transformers does."""
    (height, width), (crop_height, crop_width) = images.shape[-2:], size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return F.pad(images, (-left, crop_width - width + left, -top, crop_height - height + top))


def longest_edge_pad(images: Tensor, edge: int = 224) -> Tensor:
    """Bring the longer side to `edge` and pad with zeros to a square: the preprocessing of HPSv2.

    One pass without a clamp, since the original resizes float tensors.
    Source: https://github.com/tgxs002/HPSv2, `ResizeMaxSize`.
    """
    scale = edge / max(images.shape[-2:])
    size = (round(images.shape[-2] * scale), round(images.shape[-1] * scale))
    images = resize(images, size, single_pass=True)
    top, left = (edge - size[0]) // 2, (edge - size[1]) // 2
    return F.pad(images, (left, edge - size[1] - left, top, edge - size[0] - top))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images - mean) / std` per channel of (B, C, H, W)."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ImageTransform:
    """Images (B, 3, H, W) in [0, 1] -> the pixels a vision tower expects, in float32. The defaults are CLIP's.

    Args:
        size: the shorter side's length, an exact (height, width), or None not to resize.
        crop: (height, width) of the centre crop, or None.
        mean, std: per channel, or None not to normalise.
        resample: the filter, always antialiased.
        single_pass: resize as float-tensor code does (one pass, no clamp) and not as Pillow does.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    resample: Resample = "bicubic"
    single_pass: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        images = at_least_float32(images)
        if not self.single_pass:
            # Decoders overshoot. A hard clamp would give those pixels no gradient, and they would stay saturated.
            images = straight_through_clamp(images)
        size = self.size
        if isinstance(size, int):
            size = shortest_edge(images.shape[-2], images.shape[-1], size)
        if size is not None:
            images = resize(images, size, self.resample, self.single_pass)
        if self.crop is not None:
            images = center_crop(images, self.crop)
        if self.mean is not None and self.std is not None:
            images = normalize(images, self.mean, self.std)
        return images

    def as_in_reno(self) -> "ImageTransform":
        """What ReNO's released code does in place of this transform: the same in one unclamped pass."""
        return replace(self, single_pass=True)

    @classmethod
    def from_processor_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "ImageTransform":
        """Read a checkpoint's image processor settings; what they leave out is as in transformers' CLIP processor.

        Args:
            config: the settings as a dict, or the Hub id or folder that holds `preprocessor_config.json`.

        Raises:
            ValueError: for a `size` or `resample` that has no differentiable equivalent here.
            OSError: when there is no such file.
        """
        if not isinstance(config, Mapping):
            config, _ = ImageProcessingMixin.get_image_processor_dict(
                config, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        size = processor_size(config.get("size", 224))
        # Processors that squash to an exact size (BLIP, SigLIP) leave `do_center_crop` out and do not crop.
        cropped = config.get("do_center_crop", isinstance(size, int))
        return cls(
            size=size if config.get("do_resize", True) else None,
            crop=processor_crop(config.get("crop_size", 224)) if cropped else None,
            mean=tuple(config.get("image_mean", CLIP_MEAN)) if config.get("do_normalize", True) else None,
            std=tuple(config.get("image_std", CLIP_STD)) if config.get("do_normalize", True) else None,
            resample=processor_resample(config.get("resample", 3)),
        )


@dataclass(frozen=True)
class PadTransform:
    """HPSv2's pixels: the longer side to `size`, black to a square, CLIP's normalisation, float32.

    As in the original, one pass without a clamp. See `longest_edge_pad`.

    Args:
        size: the side of the square.
        mean, std: per channel.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(longest_edge_pad(images, self.size), self.mean, self.std)

    def as_in_reno(self) -> ImageTransform:
        """What ReNO's released code does in place of this transform: it crops, as for every other reward."""
        return ImageTransform(self.size, (self.size, self.size), self.mean, self.std, single_pass=True)


def processor_size(size: int | Mapping[str, int | None]) -> int | tuple[int, int]:
    """The `size` of a processor config: an int for the shorter side, a (height, width) for an exact size."""
    if isinstance(size, int):
        return size
    given = {key: value for key, value in size.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(
        f"Expected the image processor's `size` to be an int, {{'shortest_edge'}} or {{'height', 'width'}}, but got "
        f"{size}. Pass your own `image_transform` to the reward."
    )


def processor_crop(size: int | Mapping[str, int]) -> tuple[int, int]:
    """The `crop_size` of a processor config as (height, width)."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def processor_resample(resample: int) -> Resample:
    """The `resample` code of Pillow as a mode of `torch.nn.functional.interpolate`."""
    if resample not in PIL_RESAMPLE:
        raise ValueError(
            f"Expected the image processor's `resample` to be 2 (bilinear) or 3 (bicubic), but got {resample}. Pass "
            "your own `image_transform` to the reward."
        )
    return PIL_RESAMPLE[resample]


# rewards/reward.py


RewardT = TypeVar("RewardT", bound="Reward")


class NonFiniteReward(ValueError):
    """A reward, its gradient or the images it was given are NaN or infinite."""


class NonDifferentiableReward(ValueError):
    """A gradient was asked of a reward that gives none."""


class Reward(FrozenModule):
    """Scores images: `reward(images, prompts) -> (B,)`, float32, higher is better, in the published units.

    A subclass implements `score`; one with text features also `encode_text`, one with weights also `load`. It hands its
    modules to this constructor, which freezes them. The gradient from the scores to the images is always kept.

    Attributes:
        name: the name under which scores are reported.
        differentiable: whether the scores have a gradient with respect to the images.
        requires_prompt: whether `prompts=None` is refused.
        range: the lowest and highest possible score, where the formula bounds it.
        license: the licence of the default checkpoint.
        default_checkpoint: the Hub id that `from_pretrained()` loads.
        weights_file: the file of the default checkpoint that holds the weights, where it is not what transformers
            saves; a folder that has it is recognised by it.
        published_at: where that file is to be had, for weights that are in no Hub repository.
        parameter_count: how many parameters the default checkpoint has.
        text_modules: dotted names of the modules that only `encode_text` needs; `drop_text_encoder` removes them.
    """

    name: str = "reward"
    differentiable: bool = True
    requires_prompt: bool = True
    range: tuple[float, float] | None = None
    license: str | None = None
    default_checkpoint: str | None = None
    weights_file: str | None = None
    published_at: str | None = None
    parameter_count: int | None = None
    text_modules: tuple[str, ...] = ()

    def __init__(self, **modules: nn.Module):
        super().__init__(**modules)
        # The text of a run is encoded once, not once per step; about 4 kB per prompt. Beside the features is the
        # precision of the tower that gave them: another one encodes anew.
        self.prompt_features: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.has_text_encoder = True

    def forward(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """Check the input, score it, check the scores.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device.
            prompts: one per image, or a single one for all.

        Returns:
            (B,) float32, on the device of `images`.

        Raises:
            ValueError: images or prompts that do not meet the contract, or scores of another shape than (B,).
            NonFiniteReward: NaN images, or scores that are not finite.
            NonDifferentiableReward: the images require a gradient and a reward with `differentiable = True` cut it.
        """
        check_images(images, f"reward '{self.name}'")
        texts = prompts_per_image(prompts, len(images), self.name, self.requires_prompt)
        device = self.device or images.device
        pixels = at_least_float32(images if self.differentiable else images.detach()).to(device)
        scores = self.score(pixels, texts)
        check_scores(scores, len(images), self.name)
        if pixels.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise NonDifferentiableReward(
                f"Expected a gradient from reward '{self.name}', but its scores are detached from the images. Remove "
                "`.detach()`, `.item()`, `no_grad` and round trips through NumPy or PIL from it, or set "
                "`differentiable = False` on it and use a method without gradients, such as best-of-N."
            )
        return scores.to(images.device, torch.float32)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1], on this reward's device, and B prompts -> (B,).

        The input has been checked. `prompts` are empty strings when none were given to a reward that requires none.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def check_size(self, prompt: str, height: int, width: int) -> None:
        """Raise `ValueError` for images of a size that cannot be scored. Called before a diffusion model runs."""

    def encode_text(self, prompt: str) -> Tensor:
        """The features of one prompt, any shape. Called once per prompt, without gradients."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode_text`.")

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """(N, ...) features of N prompts, float32; each distinct prompt is encoded once and kept.

        Raises:
            ValueError: a new prompt after `drop_text_encoder`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        for text in dict.fromkeys(texts):
            precision, _ = self.prompt_features.get(text, (None, None))
            if precision is None and not self.has_text_encoder:
                raise ValueError(
                    f"Expected a prompt that reward '{self.name}' encoded before its text encoder was dropped, but "
                    f"got {text!r}. Pass it to `drop_text_encoder` too, or load the reward again."
                )
            if self.has_text_encoder and precision != self.dtype:
                # Tensors made in inference mode could never enter a graph later.
                with torch.inference_mode(False), torch.no_grad():
                    self.prompt_features[text] = self.dtype, at_least_float32(self.encode_text(text))
        return torch.stack([self.prompt_features[text][1] for text in texts]).to(self.device)

    def drop_text_encoder(self, prompts: str | Sequence[str]) -> None:
        """Encode `prompts`, then free what only text needs: a CLIP-H has a third of its weights there.

        From then on the reward scores these prompts, and those that it encoded before, only. Nothing happens to a
        reward that reads text and image together, or no text.
        """
        if not self.text_modules:
            return
        self.encode_prompt(prompts)
        for path in self.text_modules:
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, None)
        self.has_text_encoder = False

    @classmethod
    def from_pretrained(
        cls: type[RewardT],
        checkpoint: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RewardT:
        """Load from a Hub id or a folder, by default `default_checkpoint`.

        `dtype` is that of the weights, by default bfloat16 on CUDA and float32 elsewhere. Scores are float32 anyway.
        """
        checkpoint = checkpoint or cls.require_default_checkpoint()
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        on_cuda = device is not None and torch.device(device).type == "cuda"
        reward = cls.load(str(checkpoint), hub)
        return reward.to(device=device, dtype=dtype or (torch.bfloat16 if on_cuda else torch.float32))

    @classmethod
    def require_default_checkpoint(cls) -> str:
        """The default checkpoint.

        Raises:
            ValueError: there is none; it says where the weights are.
        """
        if cls.default_checkpoint is None and cls.published_at is not None:
            raise ValueError(
                f"Expected a folder for reward '{cls.name}', whose weights are not on the Hub, but got only its name. "
                f"Download {cls.weights_file} from {cls.published_at} and pass the folder that it is in."
            )
        if cls.default_checkpoint is None:
            raise ValueError(f"`{cls.__name__}` has no default checkpoint. Pass a Hub id or a folder.")
        return cls.default_checkpoint

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        """Build the reward in float32 from a checkpoint. `hub` holds `from_pretrained`'s revision, cache_dir, token and
        local_files_only."""
        raise NotImplementedError(f"`{cls.__name__}` has no weights to load: build it with its constructor.")


class CallableReward(Reward):
    """Any callable `(images, prompts) -> (B,)` as a reward, under its own name and with its own class facts.

    `name`, `differentiable`, `requires_prompt`, `range` and `license` are read from the callable where it has them. A
    module is frozen and set to evaluation mode.
    """

    function: Callable[[Tensor, list[str]], Tensor]

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]):
        super().__init__(**({"function": function} if isinstance(function, nn.Module) else {}))
        if not isinstance(function, nn.Module):
            self.function = function
        self.name = callable_name(function)
        source = function.func if isinstance(function, functools.partial) else function
        self.differentiable = getattr(source, "differentiable", True)
        self.requires_prompt = getattr(source, "requires_prompt", True)
        self.range = getattr(source, "range", None)
        self.license = getattr(source, "license", None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images, prompts)


def callable_name(function: Any) -> str:
    """The `name` or `__name__` of a callable, the class name of an object, "reward" for a lambda."""
    if isinstance(function, functools.partial):
        function = function.func
    for name in (getattr(function, "name", None), getattr(function, "__name__", None), type(function).__name__):
        if isinstance(name, str):
            return "reward" if name == "<lambda>" else name
    return "reward"


def check_images(images: Tensor, who: str) -> None:
    """Raise unless `images` is a (B, 3, H, W) floating-point tensor in [0, 1], with 0.05 of tolerance, for `who`."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"Expected images for {who} as a floating-point tensor (B, 3, H, W), but got {got}. Call the "
            'pipeline with `output_type="pt"`.'
        )
    if not images.numel():
        raise ValueError(f"Expected at least one image of at least one pixel for {who}, but got {tuple(images.shape)}.")
    low, high = (bound.item() for bound in images.detach().aminmax())
    if low != low or high != high:
        raise NonFiniteReward(
            f"Expected pixels in [0, 1] for {who}, but got NaN. A VAE that overflows in float16 "
            "needs float32 or bfloat16."
        )
    # Models trained on [0, 1] score [-1, 1] images without complaint, and finite gradients hide the mistake.
    if low < -0.05 or high > 1.05:
        raise ValueError(
            f"Expected pixels in [0, 1] for {who}, but got values from {low:.3g} to {high:.3g}. Map decoder "
            "output in [-1, 1] with `(images / 2 + 0.5).clamp(0, 1)`."
        )


def check_reward_device(device: Any) -> None:
    """Raise `ValueError` unless `device` is a device, its name, or `None`."""
    try:
        torch.device(device if device is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'Expected `reward_device` to be a device such as "cuda:1" or "cpu", or `None`, but got {device!r}.'
        ) from error


def prompts_per_image(prompts: str | Sequence[str] | None, batch: int, name: str, required: bool) -> list[str]:
    """`batch` prompts: a single one is repeated; None becomes empty strings unless `required`."""
    if prompts is None:
        if required:
            raise ValueError(
                f"Expected a prompt for reward '{name}', but got None. Pass `prompts`, also beside "
                "embeddings, or set `requires_prompt = False` on a reward that does not read it."
            )
        return [""] * batch
    texts = [prompts] * batch if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"Expected prompts for reward '{name}' as strings, but got {[type(t).__name__ for t in texts]}."
        )
    if len(texts) != batch:
        raise ValueError(
            f"Expected {batch} prompts for reward '{name}', one per image, but got {len(texts)}. Pass a single "
            "string to use it for every image."
        )
    return texts


def check_scores(scores: Tensor, batch: int, name: str) -> None:
    """Raise unless `scores` is a finite tensor of shape (batch,)."""
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"Expected reward '{name}' to return a tensor of shape ({batch},), one score per image, but got {got}. "
            "Average each image's values over everything but the batch, as in `values.flatten(1).mean(1)`."
        )
    finite = scores.detach().isfinite()
    if not finite.all():
        where = (~finite).nonzero().flatten().tolist()
        raise NonFiniteReward(
            f"Expected finite scores from reward '{name}', but those of images {where} are NaN or infinite. Load "
            "it with `dtype=torch.float32` if it ran in half precision."
        )


def check_gradient(reward: Reward, prompts: str | None = "a photo", height: int = 64, width: int = 64) -> None:
    """Score one random image and see that a gradient reaches its pixels, before any diffusion model runs.

    Warns when the gradient is zero everywhere, as it is behind a `round()`. The global random state is left alone.

    Raises:
        NonDifferentiableReward: the reward says so, or cuts the graph.
        NonFiniteReward: the score or its gradient is NaN or infinite.
    """
    if not reward.differentiable:
        raise NonDifferentiableReward(f"Expected a reward with a gradient, but '{reward.name}' is not differentiable.")
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images, allow_unused=True)
    if gradient is None:
        raise NonDifferentiableReward(
            f"Expected a gradient from reward '{reward.name}', but its scores do not depend on the images."
        )
    if not gradient.isfinite().all():
        raise NonFiniteReward(
            f"Expected a finite gradient from reward '{reward.name}', but it has NaN or infinite values."
        )
    if not gradient.any():
        warnings.warn(
            f"The gradient of reward '{reward.name}' is zero on a random image, as behind `round` or a threshold.",
            stacklevel=2,
        )


# rewards/registry.py


RewardFactory = Callable[..., Reward]
RewardFactoryT = TypeVar("RewardFactoryT", bound=RewardFactory)

# name or alias -> (name, what builds it); architecture or `model_type` of a config.json -> the class that loads it
REWARDS: dict[str, tuple[str, RewardFactory]] = {}
REWARD_LOADERS: dict[str, tuple[str, type[Reward]]] = {}


def register_reward(
    name: str, *aliases: str, loads: str | Iterable[str] = ()
) -> Callable[[RewardFactoryT], RewardFactoryT]:
    """Register a `Reward` class, or a function that returns a reward, under a name.

    Args:
        name: what users write in `rewards=` and read in results.
        aliases: further names it is found by.
        loads: which checkpoints the class loads when only a Hub id or folder is given: their `model_type` in
            config.json, or the class under `architectures`, which is looked up first.

    Raises:
        ValueError: a name that something else has. Registering again what has the same qualified name replaces it,
            since diffusers executes the code of a Hub pipeline twice per load.
    """

    def register(factory: RewardFactoryT) -> RewardFactoryT:
        claims = [(REWARDS, key) for key in (name, *aliases)]
        claims += [(REWARD_LOADERS, key) for key in ((loads,) if isinstance(loads, str) else loads)]
        for table, key in claims:
            taken_by = table[key][1].__qualname__ if key in table else factory.__qualname__
            if taken_by != factory.__qualname__:
                raise ValueError(f"Expected a free reward name, but '{key}' is taken by `{taken_by}`. Choose another.")
        for table, key in claims:
            table[key] = (name, factory)
        return factory

    return register


def list_rewards() -> list[str]:
    """The registered names, sorted, without aliases."""
    return sorted({name for name, _ in REWARDS.values()})


def find_reward(name_or_path: str) -> RewardFactory | None:
    """What is registered under a name or alias, or None for a Hub id or an existing folder.

    Raises:
        ValueError: for anything else, and for a reward whose weights are in no Hub repository.
    """
    if name_or_path in REWARDS:
        factory = REWARDS[name_or_path][1]
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.published_at:
            factory.require_default_checkpoint()
        return factory
    if os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path):
        return None
    close = difflib.get_close_matches(name_or_path.lower(), REWARDS)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    raise ValueError(
        f"Expected a reward name out of {list_rewards()}, a Hub id such as 'org/name' or a folder, but got "
        f"'{name_or_path}'.{hint} A callable `(images, prompts) -> (B,)` works too."
    )


class AutoReward:
    """Loads the reward that a name, a Hub id or a folder stands for."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Reward:
        """A registered name gives that reward with its default checkpoint. A Hub id or folder gives the reward whose
        default checkpoint it is, or whose weights are in the folder under their published name, or which loads the
        architecture or `model_type` in its config.json. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Reward.from_pretrained`; a reward without weights needs none of them.

        Raises:
            ValueError: an unknown name, or a model type that no reward loads.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        factory = find_reward(path)
        if factory is None:
            reward_class = published_as(path) or reward_class_of(PretrainedConfig.get_config_dict(path, **hub)[0], path)
            return reward_class.from_pretrained(path, dtype=dtype, device=device, **hub)
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.default_checkpoint:
            return factory.from_pretrained(dtype=dtype, device=device, **hub)
        return factory().to(device=device, dtype=dtype)


def published_as(path: str) -> type[Reward] | None:
    """The first registered class whose default checkpoint `path` is, or whose weights file is in that folder."""
    for _, factory in REWARDS.values():
        if not (isinstance(factory, type) and issubclass(factory, Reward)):
            continue
        in_folder = factory.weights_file is not None and os.path.isfile(os.path.join(path, factory.weights_file))
        if in_folder or path == factory.default_checkpoint:
            return factory
    return None


def reward_class_of(config: Mapping[str, Any], path: str) -> type[Reward]:
    """The class that loads checkpoints with this config.json, also of types that transformers does not know."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for kind in (*(architectures or ()), model_type):
        if kind in REWARD_LOADERS:
            return REWARD_LOADERS[kind][1]
    raise ValueError(
        f"Expected a checkpoint of the model type or architecture {sorted(REWARD_LOADERS)}, but '{path}' is of type "
        f"'{model_type}', architecture {architectures}. Load it yourself and pass a callable "
        "`(images, prompts) -> (B,)`."
    )


# rewards/reward_sum.py


RewardLike = str | os.PathLike[str] | Callable[..., Any]
RewardsLike = RewardLike | Mapping[Any, float] | Sequence[Any]


# the weights that a paper's own code has, by its name: https://arxiv.org/abs/2406.04312
REWARD_PRESETS: dict[str, dict[str, float]] = {
    "reno": {"hpsv2.1": 5.0, "imagereward": 1.0, "clipscore": 0.01, "pickscore": 0.05}
}


@dataclass(frozen=True)
class RewardSumOutput:
    """Scores of B images.

    Attributes:
        total: (B,) float32, the weighted sum, with its gradient.
        components: name -> (B,) float32, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class AttachedGradient(torch.autograd.Function):
    """Values (B,), or one of the set, with a gradient with respect to images (B, 3, H, W) that is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        if torch.is_grad_enabled():  # asked for by `create_graph=True`
            raise RuntimeError(
                "Expected a first derivative of a `RewardSum` or `SetRewardSum`, whose gradient is a constant once "
                "taken."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values.to(gradient.dtype).reshape(-1, 1, 1, 1), None, None


class RewardSum(nn.Module):
    """`sum_i weight_i * reward_i(images, prompts)`, higher is better.

    The gradients of the rewards with respect to the pixels are taken one after the other, when the scores are, and only
    their weighted sum is kept: so a decoder and a diffusion model before them are passed once, backwards too, and of
    the rewards' own activations no more than those of the largest are held at any time. It is the gradient of the sum,
    as the score of an image depends on that image alone; it cannot be differentiated again.

    Args:
        rewards: a registered name, Hub id or folder; a `Reward` or any callable `(images, prompts) -> (B,)`; a dict of
            these to weights; a list of them, or of (reward, weight) pairs; another `RewardSum`; or the name of a preset
            in `REWARD_PRESETS`: "reno" has the rewards and weights of the ReNO paper.
        weights: one per entry of a list without pairs; 1 by default. A reward of weight 0 is evaluated and reported,
            not optimised.
        normalization: name -> (mean, std) of a reward that counts as `(score - mean) / std`, as `calibrated` measures
            them: weights then compare rewards of different units. Raw scores are reported all the same.
        dtype, device: of the rewards that are loaded by name.

    Attributes:
        rewards: the rewards, in the order given.
        names: their names; the second `clipscore` becomes `clipscore_2`.
        weights: name -> weight.
        normalization: name -> (mean, std), of those that have one.

    Raises:
        TypeError: something that is no reward.
        ValueError: an unknown name, weights that are negative, not finite, or all zero, or a normalisation that is
            none. Names and weights are checked before anything is loaded.
    """

    def __init__(
        self,
        rewards: RewardsLike,
        weights: Sequence[float] | None = None,
        *,
        normalization: Mapping[str, tuple[float, float]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        pairs = reward_weight_pairs(rewards, weights)
        for reward, weight in pairs:
            check_reward_pair(reward, weight)
        if not any(weight for _, weight in pairs):
            raise ValueError(
                "Expected a reward with a weight above 0, but all weights are 0: nothing would be optimised."
            )
        self.rewards = nn.ModuleList(as_reward(reward, dtype, device) for reward, _ in pairs)
        self.names = distinct_names([str(reward.name) for reward in self.rewards])
        self.weights = {name: float(weight) for name, (_, weight) in zip(self.names, pairs, strict=True)}
        given = getattr(rewards, "normalization", {}) if normalization is None else normalization
        self.normalization = checked_normalization(given, self.names)

    @property
    def differentiable(self) -> bool:
        """Whether every reward that is optimised has a gradient."""
        return not self.without_gradient()

    @property
    def has_gradient(self) -> bool:
        """Whether any reward that is optimised has a gradient."""
        return any(
            weight and reward.differentiable for weight, reward in zip(self.weights.values(), self.rewards, strict=True)
        )

    @property
    def requires_prompt(self) -> bool:
        return any(reward.requires_prompt for reward in self.rewards)

    def without_gradient(self) -> list[str]:
        """The names of the rewards that are optimised and have no gradient."""
        entries = zip(self.weights.items(), self.rewards, strict=True)
        return [name for (name, weight), reward in entries if weight and not reward.differentiable]

    def check_differentiable(
        self, height: int | None = None, width: int | None = None, prompts: str | None = "a photo"
    ) -> None:
        """What a method with gradients calls before any model runs.

        With the size of the images it also tries each optimised reward on a random image (see `check_gradient`), which
        finds callables that cut the graph.

        Raises:
            NonDifferentiableReward: naming the rewards that give no gradient.
            NonFiniteReward: a score or gradient that is NaN or infinite.
        """
        if names := self.without_gradient():
            raise NonDifferentiableReward(
                f"Expected rewards with a gradient, but {names} are not differentiable. Give them weight 0 to have "
                "them reported only, or use a method without gradients, such as best-of-N."
            )
        if height is not None and width is not None:
            for weight, reward in zip(self.weights.values(), self.rewards, strict=True):
                if weight and isinstance(reward, Reward):
                    check_gradient(reward, prompts, height, width)

    def forward(
        self,
        images: Tensor,
        prompts: str | Sequence[str] | None = None,
        return_dict: bool = True,
        chunk_size: int | None = None,
    ) -> RewardSumOutput | tuple[Tensor, dict[str, Tensor]]:
        """Score (B, 3, H, W) images in [0, 1]; see `Reward.forward` for the other arguments and errors.

        Args:
            chunk_size: score at most so many images at a time, with the memory of so many; `None` for all at once.
        """
        with_gradient = images.requires_grad and torch.is_grad_enabled() and self.has_gradient
        if not isinstance(prompts, (str, type(None))):
            prompts = prompts_per_image(prompts, len(images), self.names[0], False)
        pixels, size = images.detach(), chunk_size or max(1, len(images))
        dtype = torch.promote_types(images.dtype, torch.float32)
        gradient = torch.zeros_like(pixels, dtype=dtype) if with_gradient else None
        parts = []
        for start in range(0, max(1, len(images)), size):
            rows = slice(start, start + size)
            its_gradient = None if gradient is None else gradient[rows]
            parts.append(self.scores(pixels[rows], part_of_prompts(prompts, rows), its_gradient))
        components = {name: torch.cat([part[name] for part in parts]) for name in self.names}
        total = images.new_zeros(len(images), dtype=torch.float32)
        for name, weight in self.weights.items():
            total = total + weight * self.normalized(name, components[name])
        if gradient is not None:
            total = AttachedGradient.apply(images, total, gradient.to(images.dtype))
        return RewardSumOutput(total, components) if return_dict else (total, components)  # pyright: ignore

    def scores(self, images: Tensor, prompts: Any, gradient: Tensor | None) -> dict[str, Tensor]:
        """The scores (B,) by name, detached; the gradient of their weighted sum is added to `gradient` (B, 3, H, W)."""
        components = {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            if weight and gradient is not None and reward.differentiable:
                components[name], its_gradient = score_and_gradient(reward, images, prompts)
                gradient.add_(its_gradient, alpha=weight / self.scale(name))
            else:
                components[name] = reward(images, prompts).detach()
        return components

    def normalized(self, name: str, scores: Tensor) -> Tensor:
        mean, std = self.normalization.get(name, (0.0, 1.0))
        return (scores - mean) / std

    def scale(self, name: str) -> float:
        return self.normalization.get(name, (0.0, 1.0))[1]

    def optimised(self) -> "RewardSum":
        """The sum without the rewards of weight 0; weights of the models are shared."""
        parts = zip(self.names, self.rewards, strict=True)
        return self.like({name: reward for name, reward in parts if self.weights[name]})

    def like(self, rewards: Mapping[str, nn.Module]) -> "RewardSum":
        """A sum of rewards by the names of some here, each with the weight and the normalisation of that name.

        Names are given anew: where the first of two `clipscore` is left out, `clipscore_2` becomes `clipscore`.
        """
        names = distinct_names([str(reward.name) for reward in rewards.values()])
        renamed = zip(names, rewards, strict=True)
        normalization = {new: self.normalization[name] for new, name in renamed if name in self.normalization}
        return RewardSum(
            [(reward, self.weights[name]) for name, reward in rewards.items()], normalization=normalization
        )

    @torch.no_grad()
    def calibrated(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, batch_size: int = 8
    ) -> "RewardSum":
        """The same rewards, each in units of its own spread over a calibration set.

        Args:
            images: (N, 3, H, W) in [0, 1], N of at least 2: such as the plain results of your own pipeline and prompts.
            prompts: one per image, or one for all.
            batch_size: how many are scored at once.

        Returns:
            A `RewardSum` of the same rewards and weights; its `normalization` is plain numbers, to be kept and given to
            another `RewardSum`.

        Raises:
            ValueError: fewer than 2 images, or a reward that gives all of them the same score.
        """
        if len(images) < 2:
            raise ValueError(f"Expected at least 2 images to calibrate by, but got {len(images)}.")
        texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else list(prompts)
        normalization = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            parts = range(0, len(images), batch_size)
            scores = [reward(images[i : i + batch_size], as_prompts(texts[i : i + batch_size])) for i in parts]
            std, mean = torch.std_mean(torch.cat(scores).double())
            normalization[name] = (mean.item(), std.item())
        pairs = list(zip(self.rewards, self.weights.values(), strict=True))
        return RewardSum(pairs, normalization=normalization)

    def drop_text_encoders(self, prompts: str | Sequence[str]) -> None:
        """`Reward.drop_text_encoder` of each reward that has one."""
        for reward in self.rewards:
            if hasattr(reward, "drop_text_encoder"):
                reward.drop_text_encoder(prompts)  # pyright: ignore[reportCallIssue]

    def describe(self) -> dict[str, Any]:
        """Weights, and the normalisation if there is one: plain values for the provenance of a result."""
        normalization = {name: list(pair) for name, pair in self.normalization.items()}
        return self.weights | ({"normalization": normalization} if normalization else {})


def score_and_gradient(reward: nn.Module, images: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
    """Scores (B,), detached, and their gradient (B, 3, H, W) in float32 or better; the graph is freed on return."""
    pixels = at_least_float32(images.detach()).requires_grad_()
    scores = reward(pixels, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, materialize_grads=True)
    return scores.detach(), gradient


def part_of_prompts(prompts: str | Sequence[str] | None, rows: slice) -> Any:
    """The prompts of some images: those of a list, or the one for all."""
    return prompts if prompts is None or isinstance(prompts, str) else prompts[rows]


def as_prompts(texts: Sequence[str | None]) -> list[str] | None:
    """What a reward takes: a list of prompts, or None where none are given."""
    return None if None in texts else list(texts)  # pyright: ignore[reportReturnType]


def checked_normalization(
    normalization: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """name -> (mean, std) as floats. Raises `ValueError` for another name, another number of values, or no spread."""
    checked = {}
    for name, values in normalization.items():
        if name not in names:
            raise ValueError(f"Expected a normalisation of rewards out of {list(names)}, but got one of '{name}'.")
        mean, std = (float(value) for value in values) if len(values) == 2 else (math.nan, math.nan)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"Expected (mean, std) with a finite mean and a std above 0 for reward '{name}', but got "
                f"{tuple(values)}. Calibrate on images that it scores differently."
            )
        checked[name] = (mean, std)
    return checked


def reward_weight_pairs(rewards: RewardsLike, weights: Sequence[float] | None) -> list[tuple[Any, Any]]:
    """Every accepted form of `rewards=` as a list of (reward, weight)."""
    entries = reward_entries(rewards)
    malformed = [entry for entry in entries if isinstance(entry, tuple) and len(entry) != 2]
    if malformed:
        raise ValueError(f"Expected (reward, weight) pairs, but got {malformed[0]!r}.")
    if not entries:
        raise ValueError("Expected at least one reward, but got none. Pass for example `rewards={'clipscore': 1.0}`.")
    if weights is None:
        return [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in entries]
    if any(isinstance(entry, tuple) for entry in entries):
        raise ValueError(
            "Expected weights once, but got them within `rewards` and as `weights`. Leave one of them out."
        )
    if len(weights) != len(entries):
        raise ValueError(f"Expected {len(entries)} weights, one per reward, but got {len(weights)}.")
    return list(zip(entries, weights, strict=True))


def reward_entries(rewards: RewardsLike) -> list[Any]:
    """The entries of `rewards=`: a reward each, or a (reward, weight) tuple."""
    if isinstance(rewards, str) and rewards in REWARD_PRESETS:
        return list(REWARD_PRESETS[rewards].items())
    if isinstance(rewards, Mapping):
        return list(rewards.items())
    if isinstance(rewards, (list, tuple)):
        return [tuple(entry) if isinstance(entry, list) else entry for entry in rewards]
    # A sum is known by its attributes: a pipeline from the Hub has its own copy of the class.
    parts, weights = getattr(rewards, "rewards", None), getattr(rewards, "weights", None)
    if isinstance(parts, nn.ModuleList) and isinstance(weights, Mapping):
        return list(zip(parts, weights.values(), strict=True))
    return [rewards]


def check_reward_pair(reward: Any, weight: Any) -> None:
    """Raise unless `reward` can become a reward and `weight` is a finite number of at least 0."""
    if isinstance(reward, (str, os.PathLike)):
        find_reward(os.fspath(reward))
    elif isinstance(reward, type):
        raise TypeError(f"Expected a reward, but got the class `{reward.__name__}`. Pass an instance of it.")
    elif not callable(reward):
        raise TypeError(
            f"Expected a reward name, a Hub id, a folder or a callable `(images, prompts) -> (B,)`, but got "
            f"{reward!r}. Weighted rewards are written `{{reward: weight}}` or `[(reward, weight), ...]`."
        )
    name = reward if isinstance(reward, str) else callable_name(reward)
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"Expected a finite number as the weight of reward '{name}', but got {weight!r}.")
    if weight < 0:
        raise ValueError(
            f"Expected a weight of at least 0 for reward '{name}', but got {weight}. To minimise it, pass a callable "
            "that returns the negated score: `lambda images, prompts: -reward(images, prompts)`."
        )


def as_reward(reward: RewardLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Reward:
    """A name, Hub id or folder is loaded, a plain callable is wrapped, a `Reward` stays as it is."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, (str, os.PathLike)):
        return AutoReward.from_pretrained(reward, dtype=dtype, device=device)
    return CallableReward(reward)


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, with `_2`, `_3` ... appended to those that have been taken."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{count}" for count in itertools.count(2))
        distinct.append(name if name not in distinct else next(new for new in numbered if new not in distinct))
    return distinct


# rewards/views.py


VIEW_SHIFT = 0.05  # of the image's side
VIEW_ZOOM = 0.05
VIEW_NOISE = 0.03  # standard deviation, pixels in [0, 1]


def random_views(images: Tensor, count: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Slightly shifted, zoomed and noisy copies of the images, differentiable.

    The gradient of a reward averaged over such views lacks the patterns that please one exact grid of pixels, which is
    how reward hacking begins ("expectation over transformation", Athalye et al., https://arxiv.org/abs/1707.07397).

    Args:
        images: (B, 3, H, W) in [0, 1].
        count: How many views.
        seeds: B integers: the views of an image depend on its own seed alone.

    Yields:
        `count` tensors (B, 3, H, W) in [0, 1], moved by up to 5% of the side, zoomed by up to 5%, with noise of 0.03.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(count):
        chance = torch.stack([torch.rand(3, generator=stream) for stream in streams]) * 2 - 1
        grain = torch.stack([torch.randn(images.shape[1:], generator=stream) for stream in streams])
        affine = torch.zeros(len(images), 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 + VIEW_ZOOM * chance[:, 0]
        affine[:, :, 2] = 2 * VIEW_SHIFT * chance[:, 1:]  # the grid of an image spans 2
        grid = F.affine_grid(affine, list(images.shape), align_corners=False).to(images)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        yield (moved + VIEW_NOISE * grain.to(images)).clamp(0, 1)


# schedulers/x0_prediction.py


AffineCoefficients = tuple[torch.Tensor, torch.Tensor]


def predict_x0(
    scheduler: Any, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
) -> torch.Tensor:
    """The x0 estimate of one model call, differentiable in `sample` and in `model_output`.

    It is affine in both, x0 = skip·sample + out·model_output, and the two coefficients follow from the noise level
    x = a·x0 + b·ε of the call and from what the model predicts. The level is, with σ and ᾱ from the scheduler's tables,

    * variance preserving (DDIM, DDPM, LCM, TCD, PNDM, UnCLIP, Würstchen): a = √ᾱ, b = √(1−ᾱ), by timestep;
    * sigma space (Euler, Heun, KDPM2, LMS, DPMSolverSDE): a = 1, b = σ;
    * multistep solvers (DPMSolver, UniPC, DEIS, SASolver): a = 1/√(1+σ²), b = σ·a, or a = 1−σ, b = σ with flow sigmas;
    * flow matching: a = 1−σ, b = σ; TrigFlow (SCM): a = cos t, b = sin t; IPNDM: its own tables;
    * EDM and consistency models precondition: their scheduler's c_skip and c_out are the coefficients.

    See Karras et al. (https://arxiv.org/abs/2206.00364), table 1, for the preconditioning, Salimans & Ho
    (https://arxiv.org/abs/2202.00512), appendix D, for v-prediction, Lu & Song (https://arxiv.org/abs/2410.11081),
    section 3, for TrigFlow.

    The value is the one that the scheduler itself goes on with: where its `step` clips x0 (`clip_sample`) or thresholds
    it (`thresholding`), so does this function. The gradient is that of the unclipped estimate (straight-through), since
    a hard clip has no gradient exactly where x0 is too large and has to come back. What LCM reports as `denoised` is
    this x0 after its boundary scaling, which gives the sample a weight below 1e-5 from timestep 16 on; what TCD reports
    is noised again. With `s_churn > 0` Euler perturbs the sample inside `step`, which nothing here knows.

    The only thing that changes in the scheduler is its step index: where it is unset, the scheduler sets it itself,
    as its first `step` would, from `begin_index` or from `timestep`.

    Args:
        scheduler: The scheduler in use, after `set_timesteps`. A subclass of a known one counts as that one.
        model_output: `(B, C, ...)`, already guided, as handed to `scheduler.step`; with a learned variance
            `(B, 2C, ...)`, of which the first C channels are the prediction.
        timestep: The timestep of this call: a number, a tensor with one or with `(B,)` entries.
        sample: `(B, C, ...)`, the noisy latents of this call, as handed to `scheduler.step`: not yet scaled by
            `scale_model_input`.

    Returns:
        `(B, C, ...)`, the estimate of the clean latents in float32, or in float64 if `sample` is.

    Raises:
        TypeError: The scheduler has no x0 estimate or is unknown.
        ValueError: The scheduler's `prediction_type` does not go with its noise level, there is no signal to predict x0
            from (ε-prediction at zero terminal SNR), or `model_output` has not the shape of `sample`.
    """
    space = space_of(scheduler)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, output = sample.to(dtype), prediction_channels(scheduler, model_output, sample).to(dtype)
    skip, out = (spread_over_images(coefficient, sample) for coefficient in space.coefficients(scheduler, timestep))
    x0 = skip * sample + out * output
    if space.bound is None:
        return x0
    return space.bound(scheduler, x0.detach()) + (x0 - x0.detach())  # adds exactly 0


def prediction_channels(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`model_output` without the channels of a learned variance: it has the shape of `sample` then."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if learned and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        raise ValueError(
            f"Expected a model output of the shape {tuple(sample.shape)} of the sample, but got "
            f"{tuple(model_output.shape)}. If the rest is a learned variance, pass the prediction only, or use "
            f'`{type(scheduler).__name__}.from_config(scheduler.config, variance_type="learned_range")`.'
        )
    return model_output


def spread_over_images(coefficient: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`coefficient`, one number or `(B,)`, in a shape, dtype and device that multiplies `sample` image by image."""
    return coefficient.to(sample).reshape(-1, *[1] * (sample.ndim - 1))


def exact(entry: torch.Tensor | float) -> torch.Tensor:
    """An entry of a scheduler's table in float64, which not every device has."""
    return torch.as_tensor(entry).detach().cpu().double()


def index_of_call(scheduler: Any, timestep: torch.Tensor | float) -> int:
    """Where the scheduler is in its list of sigmas; at the first call it finds out by itself."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return scheduler._step_index


def affine_in_prediction(
    scheduler: Any, prediction: str, signal: torch.Tensor, noise: torch.Tensor, flow: bool = False
) -> AffineCoefficients:
    """(skip, out) of x0 = skip·sample + out·model_output for a model that predicts `prediction`.

    v is defined on the circle, so a level off it is first scaled back to it: with r² = signal² + noise²,
    x/r = cos φ·x0 + sin φ·ε and v = cos φ·ε − sin φ·x0. A flow velocity is ε − x0, on the line signal + noise = 1.
    """
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "epsilon":
        require_signal(scheduler, signal)
        return 1 / signal, -noise / signal
    if prediction == "flow_prediction" and flow:
        return torch.ones_like(noise), -noise
    if prediction == "v_prediction" and not flow:
        squared = signal**2 + noise**2
        return signal / squared, -noise / squared.sqrt()
    raise unknown_prediction(scheduler, ("epsilon", "sample", "flow_prediction" if flow else "v_prediction"))


def require_signal(scheduler: Any, signal: torch.Tensor) -> None:
    """ε says nothing about x0 where the sample is nothing but ε."""
    if (signal == 0).any():
        raise ValueError(
            f'Expected some signal in the sample of {type(scheduler).__name__} with `prediction_type="epsilon"`, but '
            'got a timestep with zero SNR. Pass `rescale_betas_zero_snr=False`, `timestep_spacing="leading"`, or use a '
            "model with v-prediction."
        )


def unknown_prediction(scheduler: Any, known: tuple[str, ...]) -> ValueError:
    """The error about a `prediction_type` that the space of `scheduler` gives no meaning."""
    name = type(scheduler).__name__
    return ValueError(
        f"Expected `prediction_type` of {name} to be one of {', '.join(known)}, but got "
        f"{scheduler.config.get('prediction_type')!r}. Pass what the model was trained with: "
        f"`{name}.from_config(scheduler.config, prediction_type=...)`; where the scheduler has `use_flow_sigmas`, "
        "flow_prediction goes with True and v_prediction with False."
    )


def configured_prediction(scheduler: Any) -> str:
    """What the config says that the model predicts; Euler also knows an older name of "sample"."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    return "sample" if prediction == "original_sample" else prediction


def from_alphas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Variance preserving: ᾱ is looked up by timestep."""
    steps = torch.as_tensor(timestep).to(scheduler.alphas_cumprod.device, torch.long)
    alpha_bar = exact(scheduler.alphas_cumprod[steps])
    return affine_in_prediction(scheduler, configured_prediction(scheduler), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_cosine_time(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Würstchen and Stable Cascade: the timestep is a ratio in [0, 1] and ᾱ a function of it; they predict ε."""
    time = torch.as_tensor(timestep)
    alpha_bar = exact(scheduler._alpha_cumprod(time, time.device))
    return affine_in_prediction(scheduler, "epsilon", alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_sigma(scheduler: Any, sigma: torch.Tensor) -> AffineCoefficients:
    """Variance exploding: x = x0 + σ·ε."""
    sigma = exact(sigma)
    return affine_in_prediction(scheduler, configured_prediction(scheduler), torch.ones_like(sigma), sigma)


def from_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """The sigma of the step; a second-order scheduler that evaluates at the end of a step lists that sigma twice."""
    return from_sigma(scheduler, scheduler.sigmas[index_of_call(scheduler, timestep)])


def from_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """KDPM2: every second call is at a sigma between two steps."""
    index = index_of_call(scheduler, timestep)
    table = scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol
    return from_sigma(scheduler, table[index])


def from_ancestral_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Ancestral KDPM2 keeps the sigma between two steps at the index of the first of them."""
    index = index_of_call(scheduler, timestep)
    first_order = scheduler.state_in_first_order
    return from_sigma(scheduler, scheduler.sigmas[index] if first_order else scheduler.sigmas_interpol[index - 1])


def from_midpoint_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """DPMSolverSDE remembers the sigma between two steps that it evaluates at."""
    sigma = scheduler.sigmas[index_of_call(scheduler, timestep)]
    return from_sigma(scheduler, sigma if scheduler.state_in_first_order else scheduler.mid_point_sigma)


def from_solver_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Multistep solvers, whether they go on with x0 or with ε: sigma is b/a, or b with flow sigmas."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    flow = bool(scheduler.config.get("use_flow_sigmas"))
    signal = 1 - sigma if flow else (1 + sigma**2).rsqrt()
    noise = sigma if flow else sigma * signal
    return affine_in_prediction(scheduler, configured_prediction(scheduler), signal, noise, flow)


def from_flow_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Flow matching, x0 = x − σ·v; with `invert_sigmas` sigma counts the signal and the velocity points to it."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    return torch.ones_like(sigma), 1 - sigma if scheduler.config.get("invert_sigmas") else -sigma


def from_angle(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """TrigFlow (Sana-Sprint): the timestep is the angle, the output a velocity on the circle of radius `sigma_data`."""
    if scheduler.config.get("prediction_type") != "trigflow":
        raise unknown_prediction(scheduler, ("trigflow",))
    angle = exact(scheduler.timesteps[index_of_call(scheduler, timestep)])
    return angle.cos(), -angle.sin()


def from_own_tables(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """IPNDM: `alphas` is the signal and `betas` the noise, and its models predict v."""
    index = index_of_call(scheduler, timestep)
    return exact(scheduler.alphas[index]), -exact(scheduler.betas[index])


def from_edm(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """EDM: `prediction_type` is no more than the sign of the preconditioned output."""
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if configured_prediction(scheduler) not in signs:
        raise unknown_prediction(scheduler, tuple(signs))
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    data = scheduler.config["sigma_data"]
    total = sigma**2 + data**2
    return data**2 / total, signs[configured_prediction(scheduler)] * sigma * data / total.sqrt()


def from_consistency(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Consistency models: as EDM, with the identity as boundary condition at the smallest sigma."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    return scheduler.get_scalings_for_boundary_condition(sigma)


def clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`clip_sample`: to a fixed range."""
    limit = scheduler.config.get("clip_sample_range", 1.0)
    return x0.clamp(-limit, limit) if scheduler.config.get("clip_sample") else x0


def thresholded(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`thresholding`: to a percentile of each image (https://arxiv.org/abs/2205.11487, section 2.3)."""
    return scheduler._threshold_sample(x0) if scheduler.config.get("thresholding") else x0


def thresholded_or_clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Thresholding takes the place of clipping."""
    return thresholded(scheduler, x0) if scheduler.config.get("thresholding") else clipped(scheduler, x0)


def thresholded_if_x0(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """UniPC thresholds only if x0 is what it goes on with."""
    return thresholded(scheduler, x0) if scheduler.predict_x0 else x0


def clipped_to_images(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`clip_denoised` of consistency models, which have no latents."""
    return x0.clamp(-1, 1) if scheduler.config.get("clip_denoised") else x0


class SampleSpace(NamedTuple):
    """What a scheduler means by its sample and by its model's output.

    Attributes:
        coefficients: `(scheduler, timestep) -> (skip, out)` of x0 = skip·sample + out·model_output.
        bound: `(scheduler, x0) -> x0`: what `step` does to its x0. None where it does nothing, whatever the config
            says: `from_config` keeps settings of the scheduler before, so one counts only where the class reads it.
    """

    coefficients: Callable[[Any, Any], AffineCoefficients]
    bound: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


SAMPLE_SPACES = {
    "DDIMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDIMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "LCMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "UnCLIPScheduler": SampleSpace(from_alphas, clipped),
    "PNDMScheduler": SampleSpace(from_alphas),
    "TCDScheduler": SampleSpace(from_alphas),
    "DDPMWuerstchenScheduler": SampleSpace(from_cosine_time),
    "EulerDiscreteScheduler": SampleSpace(from_sigmas),
    "EulerAncestralDiscreteScheduler": SampleSpace(from_sigmas),
    "HeunDiscreteScheduler": SampleSpace(from_sigmas, clipped),
    "LMSDiscreteScheduler": SampleSpace(from_sigmas),
    "KDPM2DiscreteScheduler": SampleSpace(from_interpolated_sigmas),
    "KDPM2AncestralDiscreteScheduler": SampleSpace(from_ancestral_interpolated_sigmas),
    "DPMSolverSDEScheduler": SampleSpace(from_midpoint_sigmas),
    "DPMSolverMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DPMSolverSinglestepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DEISMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "SASolverScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "UniPCMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded_if_x0),
    "FlowMatchEulerDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchHeunDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchLCMScheduler": SampleSpace(from_flow_sigmas),
    "SCMScheduler": SampleSpace(from_angle),
    "IPNDMScheduler": SampleSpace(from_own_tables),
    "EDMEulerScheduler": SampleSpace(from_edm),
    "EDMDPMSolverMultistepScheduler": SampleSpace(from_edm, thresholded),
    "CosineDPMSolverMultistepScheduler": SampleSpace(from_edm),
    "CMStochasticIterativeScheduler": SampleSpace(from_consistency, clipped_to_images),
}

WITHOUT_ESTIMATE = {
    "AmusedScheduler": "samples discrete tokens",
    "BlockRefinementScheduler": "samples discrete tokens",
    "DiscreteDDIMScheduler": "samples discrete tokens",
    "EntropyBoundScheduler": "samples discrete tokens",
    "VQDiffusionScheduler": "samples discrete tokens",
    "DDIMInverseScheduler": "runs from an image to its noise",
    "DPMSolverMultistepInverseScheduler": "runs from an image to its noise",
    "CogVideoXDDIMScheduler": "is made for video",
    "CogVideoXDPMScheduler": "is made for video",
    "HeliosScheduler": "is made for video",
    "HeliosDMDScheduler": "is made for video",
    "LTXEulerAncestralRFScheduler": "is made for video",
    "MiniMaxH3Scheduler": "is made for video",
    "RFD4ProteinaScheduler": "is made for proteins",
    "PiflowScheduler": "takes a policy over many times from its model",
    "FlowMapEulerDiscreteScheduler": "takes a mean velocity between two times from its model",
    "ScoreSdeVeScheduler": "takes a score from its model",
    "ScoreSdeVpScheduler": "takes a score from its model",
    "KarrasVeScheduler": "takes two noise levels for a step",
    "RePaintScheduler": "takes a known image and a mask for a step",
    "ConsistencyDecoderScheduler": "decodes latents",
}


def space_of(scheduler: Any) -> SampleSpace:
    """The space of a scheduler by the names of its classes: a copy from the Hub is another class of the same name."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    known = next((name for name in names if name in SAMPLE_SPACES or name in WITHOUT_ESTIMATE), None)
    if known in SAMPLE_SPACES:
        return SAMPLE_SPACES[known]
    raise TypeError(
        f"Expected an image scheduler of diffusers whose x0 estimate is known, but got {names[0]}, which "
        f"{WITHOUT_ESTIMATE.get(known or '', 'is not one of them')}. Give the pipeline another one, such as "
        "`DDIMScheduler.from_config(pipe.scheduler.config)`, or `FlowMatchEulerDiscreteScheduler` for flow matching."
    )


# pipelines/chunks.py


SAME_FOR_ALL = ("sigmas", "timesteps")  # lists of numbers that are not one for each image
PLAIN_VALUES = (str, int, float, bool, type(None))
ChunkRun = Callable[[list[int], torch.Tensor], torch.Tensor]


class WholeBatchDraws(TorchFunctionMode):
    """Random numbers for some images of a batch, as the whole batch would have drawn them from its one generator.

    Samplers that add noise on the way draw for the images that they have; inside this context a `torch.randn` for so
    many images from this generator draws for all and keeps the rows, so that the stream goes on as in the whole batch.

    Args:
        generator: The generator of the call.
        batch: How many images the whole batch has.
        rows: Which of them are drawn here.
    """

    def __init__(self, generator: torch.Generator, batch: int, rows: list[int]) -> None:
        super().__init__()
        self.generator, self.batch, self.rows = generator, batch, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "size"}
        shape = kwargs["size"] if "size" in kwargs else args if isinstance(args[0], int) else args[0]
        if shape[0] != len(self.rows):
            return func(shape, **rest)
        return func((self.batch, *shape[1:]), **rest)[self.rows]


class ChunkedRun(torch.autograd.Function):
    """`run(rows, noise[rows])` of all chunks of a batch, with the memory of one: the backward pass runs each again.

    The gradient is that of the joint run, as no image depends on the noise of another.
    """

    @staticmethod
    def forward(ctx: Any, noise: torch.Tensor, run: ChunkRun, chunks: list[list[int]]) -> torch.Tensor:
        ctx.save_for_backward(noise)
        ctx.run, ctx.chunks = run, chunks
        return run_each(run, noise, chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        (noise,) = ctx.saved_tensors
        found = torch.empty_like(noise)
        for rows in ctx.chunks:
            found[rows] = chunk_gradient(ctx.run, rows, noise[rows], gradient[rows])
        return found, None, None


def run_in_chunks(run: ChunkRun, noise: torch.Tensor, chunk_size: int, differentiable: bool) -> torch.Tensor:
    """`run` of a batch `(B, ...)`, at most `chunk_size` images at a time.

    Args:
        run: Rows of the batch, and their noise, to what is drawn of them.
        noise: `(B, ...)`.
        chunk_size: 1 or more.
        differentiable: Whether the result has a gradient, where the noise has one.
    """
    chunks = [rows.tolist() for rows in torch.arange(len(noise)).split(chunk_size)]
    if differentiable and noise.requires_grad:
        return ChunkedRun.apply(noise, run, chunks)  # pyright: ignore[reportReturnType]
    return run_each(run, noise.detach(), chunks)


def run_each(run: ChunkRun, noise: torch.Tensor, chunks: list[list[int]]) -> torch.Tensor:
    """The results of all chunks in one tensor, without a graph."""
    first = run(chunks[0], noise[chunks[0]].detach())
    found = first.new_empty(len(noise), *first.shape[1:])
    found[chunks[0]] = first
    for rows in chunks[1:]:
        found[rows] = run(rows, noise[rows].detach())
    return found


def chunk_gradient(run: ChunkRun, rows: list[int], noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of one chunk with respect to its noise; the graph is gone on return."""
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_()
        output = run(rows, leaf)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    return found


class BatchLayout:
    """Which prompt each image of a call has, and so what an argument of the call is for some of its images.

    Args:
        request: The arguments of the call.
        batch: B, how many images it draws.
    """

    def __init__(self, request: dict[str, Any], batch: int) -> None:
        self.request, self.batch = request, batch
        prompt = request.get("prompt")
        prompt = request.get("prompt_embeds") if prompt is None else prompt
        self.prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)

    def prompt_rows(self, rows: list[int]) -> list[int]:
        """The prompt of each image: those of a prompt lie one after the other."""
        return [row * self.prompts // self.batch for row in rows]

    def request_of(self, rows: list[int]) -> dict[str, Any]:
        """The arguments of a call for these images alone.

        Raises:
            ValueError: For an argument that may hold something for each image and is none of the prompts.
        """
        for name, value in self.request.items():
            check_for_all(name, value)
        if self.prompts == 1:
            found, count = dict(self.request), len(rows)
        else:
            found, count = {name: self.picked(name, value, rows) for name, value in self.request.items()}, 1
        return found | ({"num_images_per_prompt": count} if "num_images_per_prompt" in found else {})

    def picked(self, name: str, value: Any, rows: list[int]) -> Any:
        """An argument for the prompts of these images; what is no argument for each prompt as it is."""
        if "prompt" not in name or isinstance(value, str) or not hasattr(value, "__len__"):
            return value
        return take(value, self.prompt_rows(rows)) if len(value) == self.prompts else value

    def encoded_of(self, value: Any, rows: list[int]) -> Any:
        """What `encode_prompt` returned, for these images.

        Tensors and lists have an entry for each image, or for each prompt where the pipeline repeats them itself;
        position ids `(L, 3)`, as those of Flux, are the same for all.

        Raises:
            ValueError: For a tensor with neither.
        """
        if isinstance(value, dict):
            return {name: self.encoded_of(part, rows) for name, part in value.items()}
        if isinstance(value, torch.Tensor):
            return self.tensor_of(value, rows)
        if isinstance(value, list) and len(value) == self.batch:
            return take(value, rows)
        if isinstance(value, list) and len(value) == self.prompts > 1:
            return take(value, self.prompt_rows(rows))
        if isinstance(value, (tuple, list)):
            return type(value)([self.encoded_of(part, rows) for part in value])
        return value

    def tensor_of(self, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if value.ndim == 0 or (value.ndim == 2 and value.shape[1] == 3):
            return value
        if len(value) == self.batch:
            return value[rows]
        if len(value) == self.prompts:
            return value if self.prompts == 1 else value[self.prompt_rows(rows)]
        raise ValueError(
            f"Expected `encode_prompt` to return tensors with an entry for each of {self.batch} images, but got the "
            f"shape {tuple(value.shape)}, of which no part can be told apart. Use `chunk_size=None`."
        )


def take(value: Any, rows: Sequence[int]) -> Any:
    """The rows of a tensor, or of a list or tuple."""
    return value[list(rows)] if hasattr(value, "shape") else type(value)(value[row] for row in rows)


def check_for_all(name: str, value: Any) -> None:
    """Raise `ValueError` for an argument that is no prompt and may hold something for each image."""
    if "prompt" in name or name in SAME_FOR_ALL:
        return
    if (name.startswith("ip_adapter") and value is not None) or holds_several(value):
        raise ValueError(
            f"Expected arguments that are the same for all images, to draw some of them by themselves, but got "
            f"`{name}`, which may hold one for each. Use `chunk_size=None`."
        )


def holds_several(value: Any) -> bool:
    """Whether there are several tensors, images or the like in an argument: numbers and strings are settings."""
    if isinstance(value, dict):
        return any(map(holds_several, value.values()))
    if getattr(value, "ndim", 0) > 0:  # torch and numpy
        return len(value) > 1
    return isinstance(value, (list, tuple)) and len(value) > 1 and not all(isinstance(x, PLAIN_VALUES) for x in value)


# pipelines/global_draws.py


DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class GlobalDraws(TorchFunctionMode):
    """Inside this context a random number that comes from no generator raises `ValueError`. Other threads may draw.

    Args:
        sampler: What the error says that draws.
    """

    def __init__(self, sampler: str) -> None:
        super().__init__()
        self.sampler = sampler

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            raise ValueError(
                f"Expected all noise to come from `generator`, but {self.sampler} draws some on the way from torch's "
                "own stream, so that no two evaluations would see the same. Use a scheduler that draws nothing, as "
                "`FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`, or whose seed is a setting, as "
                "`DPMSolverSDEScheduler(noise_sampler_seed=0)`."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_global_draws(pipe) -> Iterator[list[torch.Tensor]]:
    """Let no `scheduler.step` of a pipeline draw from torch's own stream; see `GlobalDraws`. Its scheduler is a copy.

    Every inner run begins with the generators in the same state, so that all of them see the same noise on the way.
    Yields an empty list, as `first_step_only` does.
    """
    scheduler, sampler = pipe.scheduler, f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}"
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args, **kwargs):
        with GlobalDraws(sampler):
            return step(*args, **kwargs)

    vars(scheduler)["step"] = watched
    try:
        yield []
    finally:
        del scheduler.step


# pipelines/latent_space.py


def drawing_function(cls: type) -> Callable[..., types.FunctionType]:
    """`draw -> prepare_latents`: the stock function of `cls` with `draw` in the place of its `randn_tensor`.

    A copy of the function with that one global replaced hands our noise to the stock scaling and packing: no global
    patch, and differentiable. Raises `TypeError` if the class does not draw that way.
    """
    stock = next((vars(base) for base in cls.__mro__ if defines_latents(base)), {})
    function = inspect.unwrap(stock.get("prepare_latents", lambda: None))
    if "randn_tensor" in function.__code__.co_names:
        return lambda draw: with_globals(function, randn_tensor=draw)
    raise TypeError(
        "Expected a text-to-image pipeline whose `prepare_latents` draws its noise with diffusers' `randn_tensor`, but "
        f"that of {cls.__name__} does not. Draw the noise by `randn_tensor` there, and call no `super()`."
    )


def defines_latents(cls: type) -> bool:
    """Whether a class has a `prepare_latents` of its own that is not our hook."""
    return "prepare_latents" in vars(cls) and not hasattr(cls, "_noise_run")


def with_globals(function: types.FunctionType, **replaced: Any) -> types.FunctionType:
    """A copy of a function that sees other values under some of its global names."""
    names = {**function.__globals__, **replaced}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def drawing_with(noise_sampler: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """What stands in for `randn_tensor`: that function itself, or a noise sampler with its shape checked."""
    if noise_sampler is None:
        return randn_tensor

    def draw(shape, generator=None, device=None, dtype=None, layout=None) -> torch.Tensor:
        noise = noise_sampler(tuple(shape), generator=generator, device=device, dtype=dtype)
        if noise.shape != torch.Size(shape):
            raise ValueError(
                f"Expected the noise sampler to return noise of shape {tuple(shape)}, but got {tuple(noise.shape)}. "
                "Draw the shape that it is called with."
            )
        return noise.to(device=device, dtype=dtype)

    return draw


def first_of(prepared):
    """What `prepare_latents` returns is the latents, or a tuple that begins with them."""
    return prepared[0] if isinstance(prepared, tuple) else prepared


class LatentSpace:
    """Between unit, spatial noise and the latents of one call of `pipe.prepare_latents(*args, **kwargs)`.

    * noise: `(B, C, H, W)`, what the pipeline draws, before scaling and packing (`(B, 1, C, H, W)` for Qwen-Image).
    * prepared: what `prepare_latents` returns: scaled by `init_noise_sigma`, packed into tokens where the family packs,
      mixed with the encoded image where it begins with one.
    * latents: what the pipeline accepts as `latents=`: packed, not scaled; what is prepared, where it begins with an
      image.

    No family is named here: the stock function does the packing, and is asked which form it takes back.

    Functions that draw more than the noise, as from the posterior of an encoded image, need a generator in the state
    that they first had: give it as `generator=...` wherever `overrides` are taken.

    Args:
        pipe, args, kwargs: The call.
        noise_sampler: Draws the noise of the call in the place of diffusers' `randn_tensor`, which `None` leaves there.
    """

    def __init__(
        self, pipe, args: tuple, kwargs: dict[str, Any], noise_sampler: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.with_draw = drawing_function(type(pipe))
        self.noise_sampler, self.draw_noise = noise_sampler, drawing_with(noise_sampler)
        signature = inspect.signature(self.with_draw(randn_tensor))
        arguments = dict(signature.bind(pipe, *args, **kwargs).arguments)
        self.takes_latents = "latents" in signature.parameters
        self.given = arguments.pop("latents", None)
        extra = arguments.pop("kwargs", {})
        self.arguments = {name: value for name, value in {**arguments, **extra}.items() if name != "self"}
        self.known_packing: Packing | None = None

    def for_images(self, count: int) -> "LatentSpace":
        """The same space for so many images.

        Raises:
            ValueError: The family is not told how many there are, or begins with an image for each.
        """
        if "batch_size" not in self.arguments or "image" in self.arguments:
            raise ValueError(
                "Expected a `prepare_latents` with the argument `batch_size` and without an image, to draw some images "
                f"by themselves, but got one with {list(self.arguments)}. Use `chunk_size=None`."
            )
        space = copy.copy(self)
        space.known_packing = None
        # generators are given with each call: one for each image would not fit the new number
        unset = {"generator": None} if "generator" in self.arguments else {}
        space.arguments = {**self.arguments, "batch_size": count, **unset}
        return space

    def on(self, pipe, draw: Callable[..., torch.Tensor], latents: torch.Tensor | None = None, **overrides):
        """Run the stock function on `pipe` with `draw(shape, **kwargs)` for its random numbers."""
        given = {"latents": latents} if self.takes_latents else {}
        return self.with_draw(draw)(pipe, **{**self.arguments, **given, **overrides})

    def draw(self, pipe) -> tuple[torch.Tensor, bool]:
        """The base noise of the call, and whether it was drawn (rather than given as `latents=`)."""
        drawn: list[torch.Tensor] = []

        def record(*args, **kwargs):
            drawn.append(self.draw_noise(*args, **kwargs))
            return drawn[-1]

        prepared = first_of(self.on(pipe, record, self.given))
        if drawn:
            return drawn[0], True
        if self.given is None:
            raise ValueError(
                f"Expected a call that draws its noise, but this one of {type(pipe).__name__} draws none, and there is "
                "nothing to optimise. Leave out the argument that lets it begin without, such as `denoising_start`."
            )
        noise = self.to_noise(pipe, self.given)
        again = first_of(self.prepare(pipe, noise))
        comparable = again.shape == prepared.shape  # families that pack hand spatial noise on as it is
        if comparable and not torch.allclose(again.float(), prepared.float(), rtol=0.05, atol=0.05):
            raise latents_with_image(pipe)  # the tolerance is that of half precision
        return noise, False

    def prepare(self, pipe, noise: torch.Tensor, draw: bool = False, **overrides):
        """Noise to what `prepare_latents` returns, differentiable; with `draw` what it draws is drawn and discarded."""

        def put(*args, **kwargs) -> torch.Tensor:
            if draw:
                self.draw_noise(*args, **kwargs)
            return noise.to(kwargs.get("dtype") or noise.dtype)

        return self.on(pipe, put, **overrides)

    def to_latents(self, pipe, noise: torch.Tensor, **overrides) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in the pipeline's dtype."""
        prepared = first_of(self.prepare(pipe, noise, **overrides))
        if not self.takes_latents:  # then the pipeline goes on with `latents` as they are
            return prepared
        for candidate in (noise.to(prepared.dtype), prepared):
            if self.accepts(pipe, candidate, prepared):
                return candidate
        raise TypeError(f"{type(pipe).__name__} takes neither its own noise nor its own latents as `latents=`.")

    def to_noise(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """What a user passed as `latents=` to noise. Raises `ValueError` if the shape fits neither form."""
        shape, packed = self.packing(pipe).noise, self.packing(pipe).packed
        if latents.shape not in (shape, packed):
            raise ValueError(
                f"Expected `latents` of shape {tuple(shape)} or {tuple(packed)}, but got {tuple(latents.shape)}."
            )
        return self.unpack(pipe, latents)

    def unpack(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the layout of the denoiser to the spatial layout of the noise, differentiable."""
        packing = self.packing(pipe)
        if latents.shape == packing.noise:
            return latents
        return latents.flatten(1).gather(1, packing.places.to(latents.device)).view(packing.noise)

    def packing(self, pipe) -> "Packing":
        """How the family packs."""
        if self.known_packing is None:
            leaves: list[torch.Tensor] = []

            def draw(shape, *_, device=None, dtype=None, **__) -> torch.Tensor:
                leaves.append(torch.zeros(shape, device=device, dtype=dtype, requires_grad=True))
                return leaves[-1]

            any_generator: Any = torch.Generator().manual_seed(0)  # not the one of the call, which would go on
            with torch.enable_grad():
                prepared = first_of(self.on(pipe, draw, generator=any_generator))
            self.known_packing = Packing(leaves[0].shape, prepared.shape, places_in(prepared, leaves[0]))
        return self.known_packing

    def accepts(self, pipe, latents: torch.Tensor, prepared: torch.Tensor) -> bool:
        try:
            returned = first_of(self.on(pipe, randn_tensor, latents))
        except ValueError:  # the family checks the shape of given latents
            return False
        return returned.shape == prepared.shape and torch.equal(returned, prepared)


class Packing(NamedTuple):
    """The shape of the noise and of what is prepared, and `(B, C·H·W)` where each entry of the noise is put there."""

    noise: torch.Size
    packed: torch.Size
    places: torch.Tensor


def places_in(prepared: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """For each entry of the noise its place among those that are `prepared` from it, each image by itself.

    Preparing permutes, scales by one number and adds, so the gradient leads back from each place to its entry. Numbers
    go that way digit by digit, since half precision has no large ones.
    """

    def lead_back(values: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(prepared, noise, values.to(prepared), retain_graph=True)[0].flatten(1).double()

    scale = lead_back(torch.ones_like(prepared))
    numbers = torch.arange(prepared[0].numel()).view(prepared.shape[1:]).expand(prepared.shape)
    places, unit = torch.zeros_like(scale, dtype=torch.long), 1
    while unit < prepared[0].numel():
        places += unit * (lead_back(numbers // unit % 64) / scale).round().long()
        unit *= 64
    return places


def latents_with_image(pipe) -> ValueError:
    """The error about `latents` that are not the noise alone."""
    return ValueError(
        f"Expected no `latents`, as {type(pipe).__name__} takes there what its image and the noise make together, and "
        "only the noise is optimised. Leave them out, and choose the noise by `generator` or `noise_sampler`."
    )


# pipelines/sampling.py


Gradient = Literal["full", "frozen"] | None
Clamp = Literal["straight_through", "hard"]


def stock_call(cls: type):
    """The `__call__` of the stock pipeline class under our hook, without its `@torch.no_grad`."""
    for base in cls.__mro__:
        if "__call__" in vars(base) and not hasattr(base, "_noise_run"):
            return inspect.unwrap(vars(base)["__call__"])
    raise TypeError(f"Expected a diffusers pipeline with a `__call__`, but {cls.__name__} has none.")


class RandomState:
    """The random streams of a call, as they were at one moment: every inner run starts from the same state."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.several = isinstance(generator, list)
        streams = generator if isinstance(generator, list) else [generator or default_generator(device)]
        self.states = [(stream.device, stream.get_state(), stream.initial_seed()) for stream in streams]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, _, seed in self.states]

    def generator(self) -> torch.Generator | list[torch.Generator]:
        """Fresh generators in this state, in the form that the pipeline was given."""
        fresh = []
        for device, state, _ in self.states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.several else fresh[0]

    def of_rows(self, rows: list[int]) -> "RandomState":
        """The streams of some images, or the one that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on `device` when none is given."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


class PipelineSampler:
    """One pipeline call as `images(noise)` and `x0(noise)`.

    Works on a shallow twin of the pipeline that shares its modules: the scheduler is a copy, `encode_prompt` replays
    what the outer call recorded, in call order, and `prepare_latents` returns our noise through the stock scaling and
    packing.

    Args:
        pipe: The pipeline whose call is under way, after its prompts were encoded.
        request: The arguments of that call.
        encoded: What `encode_prompt` returned, in call order.
        space: The noise and latents of the call.
        random_state: The streams before the base noise was drawn.
        drew: Whether the outer call drew its base noise; if so each inner call draws and discards, to leave samplers
            that add noise on the way the same stream.
        clamp: How pixels are brought into [0, 1]: "straight_through" keeps the gradient of saturated pixels, so that
            they can come back; "hard" (as stock pipelines do) has none there. The values are equal.
        decoder: What decodes latents in the place of the pipeline's VAE; `None` for that.
        checkpointing: What is computed again in the backward pass, once `checkpoints` are in force.
        through_denoiser: Whether gradients pass through the denoiser, so that there is anything of it to be kept.

    Attributes:
        timesteps: How many the whole chain has, once it has been run; `None` before.
        checkpoints: What is computed again, of the whole batch and of its parts.
    """

    timesteps: int | None = None

    def __init__(
        self,
        pipe,
        request: dict[str, Any],
        encoded: list,
        space: LatentSpace,
        random_state: RandomState,
        drew: bool,
        clamp: Clamp = "straight_through",
        decoder: Any = None,
        checkpointing: Checkpointing = "none",
        through_denoiser: bool = True,
    ) -> None:
        self.space, self.encoded, self.random_state, self.drew = space, encoded, random_state, drew
        self.call = stock_call(type(pipe))
        ours = ("latents", "generator", "output_type", "return_dict", "callback_on_step_end", "callback")
        self.request = {name: value for name, value in request.items() if name not in ours}
        self.image_embeds: list[Any] = []  # of an IP-Adapter: what its method returned in the first run, in call order
        self.twin = self.make_twin(pipe, clamp)
        self.own_decoder, self.decoder = vars(self.twin).get("vae"), decoder
        if decoder is not None:
            vars(self.twin)["vae"] = decoder
        called = parts_of(self.twin, CALLED_IN_STEPS).values() if through_denoiser else ()
        decodes = vars(self.twin).get("vae")
        self.checkpoints = Checkpoints(checkpointing, tuple(called), decodes, scales_lora(self.request))
        # as it was before any run: schedulers hold the graph of one afterwards, so that each run has its own copy
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.part_of: tuple[int, list[int]] | None = None  # the size of the whole batch, and which rows of it are drawn
        self.chunks: dict[tuple[int, ...], PipelineSampler] = {}

    def make_twin(self, pipe, clamp: str):
        twin = copy.copy(pipe)
        attributes = vars(twin)
        attributes.pop("_noise_run", None)
        attributes["_progress_bar_config"] = {"disable": True}
        # both go through numpy, which no gradient passes; the final run has them
        attributes.update({name: None for name in ("safety_checker", "watermark") if name in attributes})
        vae = attributes.get("vae")
        upcast = vae is not None and vae.config.get("force_upcast") and vae.dtype == torch.float16
        if upcast and not is_offloaded(vae):  # no gradient passes one that is offloaded
            attributes["vae"] = converted_apart(vae)
        if clamp == "straight_through" and hasattr(pipe, "image_processor"):
            attributes["image_processor"] = copy.copy(pipe.image_processor)
            vars(twin.image_processor)["denormalize"] = denormalize_straight_through
        return twin

    def with_own_decoder(self) -> "PipelineSampler":
        """The same sampler with the pipeline's own decoder."""
        found = copy.copy(self)
        found.twin, found.chunks, found.decoder = copy.copy(self.twin), {}, None
        vars(found.twin)["vae"] = self.own_decoder
        return found

    def random_state_after_draw(self) -> RandomState:
        """The random streams once the base noise is drawn."""
        generator = self.random_state.generator()
        if self.drew:
            self.space.on(self.twin, self.space.draw_noise, generator=generator)
        return RandomState(generator, torch.device("cpu"))

    def prepare(self, pipe, noise: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None):
        """What `prepare_latents` of the call returns for another noise; all else that it draws is the same."""
        generator = generator or self.random_state.generator()
        return self.space.prepare(pipe, noise, draw=self.drew, generator=generator)

    def to_latents(self, pipe, noise: torch.Tensor) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in its dtype."""
        return self.space.to_latents(pipe, noise, draw=self.drew, generator=self.random_state.generator())

    def states_after_draw(self) -> list[tuple[str, torch.Tensor]]:
        """Device type and state of each random stream once the base noise is drawn."""
        return [(device.type, state) for device, state, _ in self.random_state_after_draw().states]

    def chunk(self, rows: list[int]) -> "PipelineSampler":
        """A sampler of some images of the batch alone: what the whole batch draws in these rows, but for rounding.

        Samplers that add noise on the way see the same noise, if they draw it from the generator of the call.

        Raises:
            ValueError: Naming an argument of the call that cannot be told apart by image, such as a list of images.
        """
        if tuple(rows) not in self.chunks:
            batch = self.space.arguments.get("batch_size", 0)
            layout = BatchLayout(self.request, batch)
            part = copy.copy(self)
            part.space = self.space.for_images(len(rows))
            part.request = layout.request_of(rows)
            part.encoded = [layout.encoded_of(each, rows) for each in self.encoded]
            part.random_state, part.drew = self.random_state_after_draw().of_rows(rows), False
            part.part_of, part.chunks, part.image_embeds = (batch, rows), {}, []
            self.chunks[tuple(rows)] = part
        return self.chunks[tuple(rows)]

    def images(
        self,
        noise: torch.Tensor,
        gradient: Gradient = None,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """`noise` (B, C, H, W) to images (B, 3, H, W) in [0, 1], float32 or better.

        Args:
            noise: The initial noise.
            gradient: "full" back-propagates through the whole chain; "frozen" holds the model's outputs constant, so no
                graph is kept in the denoiser; `None` keeps no graph at all.
            preview: Draw the x0 estimate of the first model call instead of the whole chain.
            chunk_size: Draw at most so many images at a time, and draw them again, with their graph, in the backward
                pass: the same gradient in the memory of so many images, for one more forward pass. `None` for all.
        """
        if chunk_size is not None and chunk_size < len(noise):

            def draw(rows: list[int], part: torch.Tensor) -> torch.Tensor:
                return self.chunk(rows).images(part, gradient, preview)

            return run_in_chunks(draw, noise, chunk_size, gradient is not None)
        images = self.run(noise, gradient, preview, "pt")
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def x0(self, noise: torch.Tensor, gradient: Gradient = None, chunk_size: int | None = None) -> torch.Tensor:
        """`noise` (B, C, H, W) to the x0 estimate of the first model call, in the layout of the noise; see `images`."""
        if chunk_size is not None and chunk_size < len(noise):
            return run_in_chunks(
                lambda rows, part: self.chunk(rows).x0(part, gradient), noise, chunk_size, gradient is not None
            )
        latents = self.run(noise, gradient, True, "latent")
        return self.space.unpack(self.twin, latents)

    def run(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        """What the pipeline puts out for a noise; the latents of a preview are the x0 estimate, in no other layout.

        With a graph, it is as the checkpointing says.
        """
        if gradient is None or not noise.requires_grad:
            return self.run_once(noise, gradient, preview, output_type)
        kind = (preview, output_type)
        return self.checkpoints.fitted(kind, noise.device, lambda: self.run_once(noise, gradient, preview, output_type))

    def run_once(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        twin = self.fresh_twin(noise, gradient)
        watched = first_step_only(twin) if preview else no_global_draws(twin)
        ours = {"generator": twin.sampling_generator, "output_type": output_type, "return_dict": False}
        draws, graph = self.draws_from(twin.sampling_generator), gradient is not None and noise.requires_grad
        try:
            with watched as estimates, draws, torch.set_grad_enabled(graph):
                output = self.call(twin, **self.request, **ours)[0]
            if estimates and output_type == "latent":  # families unpack and scale what they put out
                output = estimates[0]
            if not preview:  # some families set their timesteps after `prepare_latents`: no scheduler knows them before
                self.timesteps = count_timesteps(twin)
        finally:  # its methods refer to it: its scheduler would keep the graph until the next collection
            vars(twin).clear()
        if noise.requires_grad and gradient is not None and not output.requires_grad:
            raise ValueError(
                f"Expected {type(twin).__name__} to be differentiable from image to noise, but its result carries no "
                "gradient. Use a method without gradients, such as `BestOfN`."
            )
        return output

    def draws_from(self, generator: torch.Generator | list[torch.Generator]) -> contextlib.AbstractContextManager[Any]:
        """Lets a part of a batch that shares one generator draw from it as the whole batch does."""
        if self.part_of is None or isinstance(generator, list):
            return contextlib.nullcontext()
        return WholeBatchDraws(generator, *self.part_of)

    def fresh_twin(self, noise: torch.Tensor, gradient: Gradient):
        twin = copy.copy(self.twin)
        generator = self.random_state.generator()
        replay = iter(self.encoded)

        vars(twin).update(
            scheduler=copy.deepcopy(self.scheduler),
            encode_prompt=lambda *_, **__: next(replay),
            prepare_latents=lambda *_, **__: self.prepare(twin, noise, generator),
            sampling_generator=generator,
        )
        if hasattr(twin, "prepare_ip_adapter_image_embeds"):
            embed = twin.prepare_ip_adapter_image_embeds
            vars(twin)["prepare_ip_adapter_image_embeds"] = replayed(embed, self.image_embeds)
        if gradient == "frozen":
            vars(twin).update({name: without_gradient(part) for name, part in parts_of(twin, CALLED_IN_STEPS).items()})
        elif gradient == "full":
            parts = parts_of(twin, CALLED_IN_STEPS)
            vars(twin).update({name: self.checkpoints.call_of(part) for name, part in parts.items()})
        return twin


def parts_of(pipe, names: tuple[str, ...]) -> dict[str, Any]:
    """The modules that a pipeline has of these."""
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def replayed(function: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """A function that returns what is kept of its earlier calls, in call order, and keeps what it computes beyond."""
    index = itertools.count()

    def replay(*args, **kwargs):
        call = next(index)
        if call == len(kept):
            with torch.no_grad():
                kept.append(function(*args, **kwargs))
        return kept[call]

    return replay


@contextlib.contextmanager
def first_step_only(pipe) -> Iterator[list[torch.Tensor]]:
    """Let a pipeline make one model call, whose `step` returns the x0 estimate. It and its scheduler must be copies.

    The loop is stopped by `pipe.interrupt`, or in families that do not look at it by cutting the list of timesteps.

    Yields:
        An empty list, for the estimate.

    Raises:
        TypeError: If the pipeline takes no step, or takes one before a denoiser was called.
    """
    scheduler, interruptible = pipe.scheduler, "interrupt" in stock_call(type(pipe)).__code__.co_names
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    calls: list[int] = []
    stepped: list[bool] = []  # for each step whether a denoiser had been called
    estimates: list[torch.Tensor] = []

    @functools.wraps(set_timesteps)
    def set_one(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if not interruptible:
            scheduler.timesteps = scheduler.timesteps[:1]

    @functools.wraps(step)
    def estimate(model_output, timestep, sample, *_, **__):
        stepped.append(bool(calls))
        x0 = predict_x0(scheduler, model_output, timestep, sample).to(model_output.dtype)
        estimates.append(x0)
        pipe._interrupt = True
        return (x0, x0)

    vars(scheduler).update(set_timesteps=set_one, step=estimate)
    # copies that count: a hook on modules that others have too would have to be taken off again, whatever happens
    parts = parts_of(pipe, DENOISERS)
    vars(pipe).update({name: with_forward(part, counted(part.forward, calls)) for name, part in parts.items()})
    try:
        yield estimates
    finally:
        del scheduler.set_timesteps, scheduler.step
    if not all(stepped or [False]):
        raise TypeError(
            f"Expected a pipeline that calls its denoiser ({', '.join(DENOISERS)}) before the first `scheduler.step`, "
            f"but {type(pipe).__name__} does not, and no x0 can be estimated. Use a method that looks at images."
        )


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, with an entry in `calls` for each call."""

    @functools.wraps(function)
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return count


def count_timesteps(pipe) -> int:
    """How many timesteps the loop of a call had: pipelines may take a part of those of the scheduler."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def denormalize_straight_through(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1] as diffusers does it, with the clamp's value and the identity's gradient."""
    pixels = images * 0.5 + 0.5
    clamped = pixels.clamp(0, 1)
    return clamped.detach() + (pixels - pixels.detach()) if pixels.requires_grad else clamped  # adds exactly 0


class Sample:
    """What an objective may look at, computed once and only if asked for.

    Attributes:
        noise: `(B, C, H, W)`, the initial noise.
        prompts: `B` prompts.
        groups: `B` integers, equal where images share their prompt.
        seeds: `B` integers that differ from step to step and from image to image: for objectives that draw at random.
        images: `(B, 3, H, W)` in [0, 1]: the result of the whole chain, or of one model call for a preview.
        x0: `(B, C, H, W)`: the estimate of the clean latents after one model call.
        chunk_size: At most so many images are held in memory with their graphs at a time, `None` for all; objectives
            with models of their own keep to it.
    """

    def __init__(
        self,
        sampler: PipelineSampler,
        noise: torch.Tensor,
        prompts: list[str],
        groups: list[int],
        seeds: list[int],
        gradient: Gradient,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.sampler, self.noise, self.prompts = sampler, noise, prompts
        self.groups, self.seeds = groups, seeds
        self.gradient: Gradient = gradient
        self.preview, self.chunk_size = preview, chunk_size

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return self.sampler.images(self.noise, self.gradient, self.preview, self.chunk_size)

    @functools.cached_property
    def x0(self) -> torch.Tensor:
        return self.sampler.x0(self.noise, self.gradient, self.chunk_size)

    @property
    def drawn_images(self) -> torch.Tensor | None:
        """The images if the objective asked for them, without their graph."""
        images = vars(self).get("images")
        return None if images is None else images.detach()


# pipelines/objectives.py


class Objective:
    """`objective(sample) -> (B,)`, lower is better. `evaluate` also reports what it is made of.

    Attributes:
        requires_prompt: Whether the prompts are looked at.
    """

    requires_prompt: bool = False

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss `(B,)` with its graph, and named raw scores `(B,)` without."""
        raise NotImplementedError(f"{type(self).__name__} must define `evaluate(sample)`.")

    def __call__(self, sample: Sample) -> torch.Tensor:
        return self.evaluate(sample)[0]

    def check_groups(self, groups: Sequence[int]) -> None:
        """Raise `ValueError` for a batch that cannot be compared, before any model runs; see `Sample.groups`."""

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Raise for user code that cannot work on images of this size, before any model runs."""

    def describe(self) -> Any:
        """What goes into the provenance of a result: plain values."""
        return type(self).__name__


class FunctionObjective(Objective):
    """A plain function `(sample) -> (B,)` as an objective."""

    def __init__(self, function: Callable[[Sample], torch.Tensor]) -> None:
        self.function = function

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.function(sample), {}

    def describe(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def differentiable_rewards(rewards: Any, device: torch.device) -> RewardSum:
    """A `RewardSum` that loads names onto `device`. Raises `NonDifferentiableReward` where one that counts has none."""
    total = RewardSum(rewards, device=device)
    total.check_differentiable()
    return total


class RewardObjective(Objective):
    """The negative weighted sum of rewards of the images: `−Σᵢ λᵢ·rewardᵢ(images, prompts)`.

    Args:
        rewards: Anything that `RewardSum` takes, or a `RewardSum`.
        prompts: Ask the rewards about these instead of the pipeline's prompts: one, or one for each image.
        views: The value stays that of the image itself, but the gradient is the mean of so many random views of it; see
            `random_views`. 0 for the gradient of the image itself.
    """

    def __init__(self, rewards: Any, prompts: str | Sequence[str] | None = None, views: int = 0) -> None:
        self.rewards = rewards if isinstance(rewards, RewardSum) else RewardSum(rewards)
        self.prompts = prompts
        self.requires_prompt = self.rewards.requires_prompt and prompts is None
        self.views = views

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        prompts = self.prompts if self.prompts is not None else sample.prompts
        images = sample.images
        by_views = self.views > 0 and images.requires_grad
        output = self.rewards(images.detach() if by_views else images, prompts, chunk_size=sample.chunk_size)
        if not by_views:
            return -output.total, output.components
        gradient = self.gradient_by_views(images, prompts, sample.seeds, sample.chunk_size or len(images))
        return -AttachedGradient.apply(images, output.total, gradient), output.components  # pyright: ignore

    def gradient_by_views(
        self, images: torch.Tensor, prompts: Any, seeds: Sequence[int], chunk_size: int
    ) -> torch.Tensor:
        """The mean gradient `(B, 3, H, W)` of random views with respect to the pixels, a few images at a time."""
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            rows = slice(start, start + chunk_size)
            leaf, texts = images[rows].detach().requires_grad_(), part_of_prompts(prompts, rows)
            views = random_views(leaf, self.views, seeds[rows])
            total = torch.stack([self.optimised(view, texts).total.sum() for view in views]).mean()
            gradient[rows] = torch.autograd.grad(total, leaf)[0] if total.requires_grad else 0
        return gradient

    @functools.cached_property
    def optimised(self) -> RewardSum:
        """The rewards that have a weight."""
        return self.rewards.optimised()

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Score one random image with each plain callable: its shape, its numbers and, if asked for, its gradient.

        The project's own rewards are tested to meet the contract: they only say whether they take images of this size.
        """
        prompt = self.first_prompt(prompt)
        for name, reward in zip(self.rewards.names, self.rewards.rewards, strict=True):
            if not hasattr(reward, "function"):
                reward.check_size(prompt, height, width)  # pyright: ignore[reportCallIssue]
                continue
            if gradient and self.rewards.weights[name]:
                check_gradient(reward, prompt, height, width)  # pyright: ignore[reportArgumentType]
            else:
                reward(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)), prompt)

    def first_prompt(self, prompt: str) -> str:
        """What the first image is scored by: its own prompt, unless the rewards are asked about others."""
        asked = prompt if self.prompts is None else self.prompts
        return asked if isinstance(asked, str) else asked[0]

    def describe(self) -> dict[str, Any]:
        return self.rewards.describe()


# pipelines/contrast.py


def attraction_gamma(size: int, tau: float) -> float:
    """γ at which the strongest attraction equals the strongest repulsion: `exp(1/(γτ)) = (size − 1)·exp(1/τ)`.

    CNO, https://arxiv.org/abs/2510.03813, closed form `1 / (τ·ln(size − 1) + 1)`: 0.878 for 5 images and τ = 0.1, and 1
    for two. A smaller γ attracts more.
    """
    return 1 / (tau * math.log(size - 1) + 1)


def pooled_directions(x0: torch.Tensor, window_size: int) -> torch.Tensor:
    """`(B, C, H, W)` to unit vectors along the channels of a pooled grid, `(B, C, P)` in float32 or better.

    Args:
        x0: Latents; `(B, 1, C, H, W)` as well.
        window_size: The grid has so many cells down and across, at most H and W: P of them.
    """
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32)).flatten(1, -3)
    down, across = (min(window_size, side) for side in x0.shape[-2:])
    return F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """InfoNCE of a set against its own reference, for each image; CNO, https://arxiv.org/abs/2510.03813.

    In every pooled cell, with `f` the cosine along the channels, image i is told from the others by

        −log( exp(f(i, refᵢ)/(γτ)) / (exp(f(i, refᵢ)/(γτ)) + Σ_{j≠i} exp(f(i, j)/τ)) ),

    a cross-entropy whose own logit is the attraction to its reference. The mean over the cells is the loss of image i,
    the mean over the images the loss of the paper. The gradient goes into both members of each pair.

    Attributes:
        tau: τ, above 0.
        gamma: γ, above 0, or "auto" for `attraction_gamma`.
        attraction: Whether the numerator counts; without it only the others are fled from.
        repulsion: Whether the denominator counts.
    """

    tau: float
    gamma: float | str
    attraction: bool
    repulsion: bool

    def __call__(self, directions: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """`(B, C, P)` unit vectors of one set, B >= 2, and of its reference, to the losses `(B,)`."""
        size = len(directions)
        gamma = attraction_gamma(size, self.tau) if self.gamma == "auto" else float(self.gamma)
        own = (directions * reference).sum(1) / (gamma * self.tau)
        loss = -own if self.attraction else torch.zeros_like(own)
        if self.repulsion:
            others = torch.einsum("icp,jcp->ipj", directions, directions) / self.tau
            diagonal = torch.eye(size, dtype=torch.bool, device=own.device)[:, None]
            logits = torch.where(diagonal, own[..., None] if self.attraction else -torch.inf, others)
            loss = loss + logits.logsumexp(-1)
        return loss.mean(1)


class ContrastiveObjective(Objective):
    """`ContrastiveLoss` of the x0 estimates of one model call, each group of images with the same prompt for itself.

    The first evaluation is the reference: it costs no model call of its own. An object serves one run.

    Args:
        loss: The loss of one set.
        window_size: The estimates are pooled to a grid of so many cells down and across, at most the latent's.
    """

    def __init__(self, loss: ContrastiveLoss, window_size: int) -> None:
        self.loss, self.window_size = loss, window_size
        self.reference: torch.Tensor | None = None

    def check_groups(self, groups: Sequence[int]) -> None:
        if alone := [group for group in set(groups) if groups.count(group) == 1]:
            raise ValueError(
                f"Expected at least 2 images of each prompt to contrast, but got 1 of prompt {min(alone)}: alone it "
                "has nothing to differ from. Pass `num_images_per_prompt=5`, say."
            )

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        directions = pooled_directions(sample.x0, self.window_size)
        if self.reference is None:
            self.reference = directions.detach()
        losses, similarities = directions.new_zeros(2, len(directions))
        for rows in sets(sample.groups):
            part = directions[rows]
            losses = losses.index_put((rows,), self.loss(part, self.reference[rows]))
            similarities[rows] = mean_similarity(part.detach())
        return losses, {"similarity": similarities}

    def describe(self) -> dict[str, float | int | str | bool]:
        return {**dataclasses.asdict(self.loss), "window_size": self.window_size}


def sets(groups: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of each group."""
    labels = torch.tensor(groups)
    for group in sorted(set(groups)):
        yield (labels == group).nonzero().flatten()


def mean_similarity(directions: torch.Tensor) -> torch.Tensor:
    """`(B, C, P)` unit vectors to each image's mean cosine to the B − 1 others, `(B,)` in [-1, 1]."""
    cosines = torch.einsum("icp,jcp->ij", directions, directions) / directions.shape[-1]
    return (cosines.sum(1) - cosines.diagonal()) / (len(directions) - 1)


# callbacks/noise_callback.py


class NoiseCallback:
    """Base of callbacks per *optimisation* step. (diffusers' `callback_on_step_end` is per denoising step.)

    Subclasses override what they need. A plain function `(state) -> bool | None` does where one hook is enough.
    """

    def on_run_start(self, state: NoiseState) -> None:
        """Called once, before the first evaluation."""

    def on_step_end(self, state: NoiseState) -> bool | None:
        """Called after each evaluation. Return `False`, or call `state.stop()`, to end the run."""

    def on_run_end(self, state: NoiseState) -> None:
        """Called once at the end, also when the run ends in an exception."""


class FunctionCallback(NoiseCallback):
    """A plain function as a callback."""

    def __init__(self, function: Callable[[NoiseState], bool | None]) -> None:
        self.function = function

    def on_step_end(self, state: NoiseState) -> bool | None:
        return self.function(state)


CallbackSpec = NoiseCallback | Callable[[NoiseState], bool | None]


def as_callbacks(callbacks: CallbackSpec | Iterable[CallbackSpec] | None) -> list[NoiseCallback]:
    """One callback, several, or none, as a list. Raises `TypeError` for what is neither callback nor function.

    Anything with an `on_step_end` counts, whichever copy of `NoiseCallback` it derives from.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Iterable):
        return [as_callback(each) for each in callbacks]
    return [as_callback(callbacks)]


def as_callback(callback: CallbackSpec) -> NoiseCallback:
    if hasattr(callback, "on_step_end"):
        return callback  # pyright: ignore[reportReturnType]
    if callable(callback):
        return FunctionCallback(callback)
    raise TypeError(
        f"Expected a callback with `on_step_end(state)` or a function of `state`, but got {type(callback).__name__}."
    )


# callbacks/progress.py


class ProgressBar(NoiseCallback):
    """One tick per evaluation, with the mean best loss. `pipe.set_progress_bar_config` applies."""

    bar = None

    def on_run_start(self, state: NoiseState) -> None:
        self.bar = state.pipeline.progress_bar(total=state.steps)
        self.bar.set_description("Optimising noise")

    def on_step_end(self, state: NoiseState) -> None:
        if self.bar is None:
            return
        if not self.bar.disable:  # reading the loss waits for the device: only for those who look
            self.bar.set_postfix(best_loss=f"{state.best_loss.mean():.4f}", refresh=False)  # pyright: ignore
        self.bar.update()

    def on_run_end(self, state: NoiseState) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


# pipelines/frequency_bands.py


BANDS = ("lowest third", "middle third", "highest third")


def band_energies(change: torch.Tensor) -> torch.Tensor:
    """`change` (B, ..., H, W) to how much of its squared norm lies in each third of the frequencies, `(B, 3)`.

    With the orthonormal FFT of each channel the three add up to `‖change‖²` (Parseval). See `frequency_bands`.
    """
    power = torch.fft.fft2(change, norm="ortho").abs().square().flatten(1, -3).sum(1)
    return (power[:, None] * frequency_bands(*change.shape[-2:]).to(power)).sum((-2, -1))


@functools.cache
def frequency_bands(height: int, width: int) -> torch.Tensor:
    """Which third each entry of `fft2` belongs to, `(3, H, W)` zeros and ones: lowest, middle, highest.

    The thirds are of the radial frequency √(u² + v²) in cycles per entry, from 0 to the largest that the grid has, in
    its corner. "It's Never Too Late", https://arxiv.org/abs/2601.00090, figure 6, speaks of thirds of the spectrum and
    does not say where it ends. The lowest third of the radius holds only about 17% of the entries of large grids, the
    middle 52% and the highest 30%: white noise has its energy in these shares.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot(rows[:, None], columns)
    third = (3 * radius / radius.max().clamp_min(1e-12)).long().clamp(max=2)
    return torch.stack([third == band for band in range(3)])


# pipelines/loop_decoder.py


FULL_DECODER = "full_decoder"


def as_loop_decoder(decoder: Any, pipe: Any, denoisers: Sequence[nn.Module]) -> Any:
    """What `decoder=` takes as a module on the pipeline's device, in the dtype of its denoiser; `None` stays.

    The pipeline's own call scales and shifts the latents as the configuration of the decoder says, which for a tiny
    autoencoder are those that the denoiser gives, unchanged.

    Args:
        decoder: A Hub id or a folder of an `AutoencoderTiny`, or a loaded module with `decode` and a `config`.
        pipe: The pipeline.
        denoisers: Its denoisers.

    Raises:
        ValueError: For a pipeline whose latents a tiny autoencoder does not know, and for a decoder that takes other
            latents, makes images of another size, or is elsewhere.
        TypeError: For what is no decoder.
    """
    if decoder is None:
        return None
    check_plain_latents(pipe)
    dtype = next(next(iter(denoisers), pipe.vae).parameters()).dtype
    device = torch.empty(0, device=pipe._execution_device).device  # with its index
    if isinstance(decoder, str | os.PathLike):
        found: Any = AutoencoderTiny.from_pretrained(os.fspath(decoder), torch_dtype=dtype)
        decoder = found.to(device).requires_grad_(False).eval()
    check_decoder(decoder, device, dtype)
    check_channels(decoder, pipe)
    check_scale(decoder, pipe, device, dtype)
    return decoder


def check_plain_latents(pipe: Any) -> None:
    """Raise `ValueError` unless latents are scaled and shifted by two numbers before they are decoded."""
    vae = getattr(pipe, "vae", None)
    normalised = isinstance(vae, AutoencoderKL) and any(
        vae.config.get(name) is not None for name in ("latents_mean", "latents_std")
    )
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny) or normalised:
        other = "one that normalises each channel of its latents" if normalised else type(vae).__name__
        raise ValueError(
            f"Expected a pipeline with an `AutoencoderKL` that scales its latents by one number, for which there are "
            f"tiny autoencoders, but {type(pipe).__name__} has {other}. Use `decoder=None`."
        )


def check_decoder(decoder: Any, device: torch.device, dtype: torch.dtype) -> None:
    if not (
        isinstance(decoder, nn.Module) and callable(getattr(decoder, "decode", None)) and hasattr(decoder, "config")
    ):
        raise TypeError(
            "Expected `decoder` to be a Hub id, a folder or a loaded `AutoencoderTiny`, with `decode` and `config`, "
            f"but got {type(decoder).__name__}."
        )
    weight = next(decoder.parameters(), None)
    if weight is not None and (weight.device, weight.dtype) != (device, dtype):
        raise ValueError(
            f"Expected the decoder in {dtype} on {device}, as the denoiser, but got {weight.dtype} on {weight.device}. "
            f'Call `decoder.to("{device}", {dtype})`.'
        )


def check_channels(decoder: Any, pipe: Any) -> None:
    expected, found = pipe.vae.config.latent_channels, decoder.config.get("latent_channels")
    if found != expected:
        raise ValueError(
            f"Expected a decoder of latents with {expected} channels, as those of {type(pipe).__name__}, but got one "
            f"of {found}. There are taesd, taesdxl, taesd3 and taef1 of `madebyollin` for SD, SDXL, SD3 and Flux."
        )


def check_scale(decoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless images have the size that the pipeline's own have. Decodes a few zeros."""
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8, device=device, dtype=dtype)
    with torch.no_grad():
        images = decoder.decode(latents, return_dict=False)[0]
    side = 8 * pipe.vae_scale_factor
    if images.shape != (1, 3, side, side):
        raise ValueError(
            f"Expected a decoder that makes {side} × {side} pixels of latents of 8 × 8, as that of "
            f"{type(pipe).__name__} does, but got images of shape {tuple(images.shape)}."
        )


def describe_decoder(decoder: Any) -> dict[str, Any] | None:
    """What the provenance says of a decoder."""
    if decoder is None:
        return None
    return {
        "class": type(decoder).__name__,
        "name": str(decoder.config.get("_name_or_path") or "") or None,
        "approximation": True,
        "scores": f"of its images; those of the pipeline's own decoder are in reports[{FULL_DECODER!r}]",
    }


# pipelines/whole_file.py


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there as a whole or not at all, whenever the process ends.

    If the writing ends in an exception, Ctrl-C among them, what was there before is still there, and nothing else.
    """
    part = part_of_file(path)
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_of_file(path: Path) -> Path:
    """Where a file is written before it is moved to its place: a name of the same kind in the same folder."""
    return path.with_name(f".part-{path.name}")


# pipelines/result_file.py


RESULT_FORMAT = "noiseopt-result-1"
RESULT_HEADER = {"format": str, "provenance": dict, "generator_devices": list, "reports": dict}
RESULT_TENSORS = ("noise", "latents", "losses", "norms", "best_step")
PROVENANCE: dict[str, type] = {"method": str, "pipeline": str, "generators": str, "dtype": str}
PROVENANCE |= {"settings": dict, "scheduler": dict, "arguments": dict, "prompts": list, "seeds": list}
LATER_TENSORS = ("initial_noise", "band_changes")  # which files of older versions lack
PER_SCORE, PER_STREAM = "scores.", "generator_states."
NOISE_DTYPES = (torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, *NOISE_DTYPES)
CUDA_STATE_BYTES, MOST_STATE_BYTES = 16, 1024  # generators of accelerators count; that of the CPU has 5056 bytes
TORCH_FILES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(6)))  # a zip, and pickles

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class UnusableResult(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


def write_result_file(path: Path, tensors: Tensors, header: Header) -> None:
    """Write both so that the file is there as a whole or not at all; the format is added."""
    metadata = {"noiseopt": json.dumps({"format": RESULT_FORMAT, **header})}
    # clones: safetensors refuses tensors that share memory, as noise and latents do in float32
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: save_file(copies, part, metadata=metadata))


def read_result_file(path: Path) -> tuple[Header, Tensors]:
    """What `write_result_file` wrote, on the CPU. Nothing is unpickled, whatever the file is.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: For any other file, naming it and what is wrong.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a file that `NoiseResult.save` wrote, but there is no {path}.")
    try:
        header, tensors = read_checked(path)
    except UnusableResult as problem:
        raise ValueError(f"Expected a file that `NoiseResult.save` wrote, but {path} {problem}.") from None
    return header, tensors


def read_checked(path: Path) -> tuple[Header, Tensors]:
    if not path.is_file():
        raise UnusableResult("is a folder" if path.is_dir() else "is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            header = parsed_header(file.metadata() or {})
            check_names(set(file.keys()), header)  # before the tensors, which may be large
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnusableResult(why_unreadable(path, error)) from None
    check_tensors(tensors)
    check_streams(tensors, header)
    check_provenance(header["provenance"], tensors)
    return header, tensors


def why_unreadable(path: Path, error: Exception) -> str:
    """What a file seems to be that is no safetensors file; it is looked at, and nothing in it is executed."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start.startswith(TORCH_FILES) and isinstance(error, SafetensorError):
        return "is a pickle or a file of `torch.save`, which may execute anything and is not opened"
    return f"is no whole safetensors file ({str(error).strip().partition(chr(10))[0].rstrip('.')})"


def parsed_header(metadata: dict[str, str]) -> Header:
    try:
        header = json.loads(metadata.get("noiseopt", "{}"))
    except (ValueError, RecursionError):
        raise UnusableResult("has a header that is no JSON") from None
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, str) and re.fullmatch(r"noiseopt-result-[2-9]|noiseopt-result-[1-9]\d+", found):
        raise UnusableResult(f"was written by a newer noiseopt, which calls its format {found}. Update noiseopt")
    if found != RESULT_FORMAT:
        raise UnusableResult(f"has no {RESULT_FORMAT} header")
    unknown = sorted((metadata.keys() - {"noiseopt"}) | (header.keys() - RESULT_HEADER.keys()))
    if unknown:
        raise UnusableResult(f"has unknown metadata {brief(unknown)}")
    header.setdefault("reports", {})  # which the first files lack
    wrong = [name for name, kind in RESULT_HEADER.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise UnusableResult(f"has metadata that are missing or of another type: {brief(wrong)}")
    return header


def check_names(names: set[str], header: Header) -> None:
    """That the tensors are those of a result, with one state for each random stream."""
    streams = {f"{PER_STREAM}{index}" for index in range(len(header["generator_devices"]))}
    if missing := sorted((streams | set(RESULT_TENSORS)) - names):
        raise UnusableResult(f"lacks the tensors {brief(missing)}")
    known = {*RESULT_TENSORS, *LATER_TENSORS, *streams}
    if unknown := sorted(name for name in names - known if not name.startswith(PER_SCORE)):
        raise UnusableResult(f"has unknown tensors {brief(unknown)}")


def check_tensors(tensors: Tensors) -> None:
    """That dtypes and shapes are those of `B` noises and of as many steps, and all noises are finite."""
    noise, steps = tensors["noise"], tensors["losses"].shape[:1]
    if noise.ndim < 2 or not noise.numel() or not steps or not steps[0]:
        losses = tuple(tensors["losses"].shape)
        raise UnusableResult(f"has a noise of shape {tuple(noise.shape)} and losses of shape {losses}")
    batch, rows = noise.shape[:1], (*steps, *noise.shape[:1])
    shapes = {"losses": rows, "norms": rows, "best_step": batch, "initial_noise": noise.shape}
    shapes |= {"band_changes": (*rows, 3)} | {name: rows for name in tensors if name.startswith(PER_SCORE)}
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != torch.Size(shapes[name]):
            raise UnusableResult(
                f"has '{name}' of shape {tuple(tensor.shape)}, where {tuple(shapes[name])} goes with the others"
            )
        if not name.startswith(PER_STREAM) and tensor.dtype not in dtypes_of(name):
            raise UnusableResult(f"has '{name}' of {tensor.dtype}")
    latents = tensors["latents"]
    if latents.shape[:1] != batch or latents.ndim < 2 or not latents.numel():
        raise UnusableResult(f"has latents of shape {tuple(latents.shape)} for noise of {tuple(noise.shape)}")
    check_values(tensors, steps[0])


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    if name == "best_step":
        return (torch.int64,)
    return NOISE_DTYPES if name in ("noise", "initial_noise") else FLOAT_DTYPES


def check_values(tensors: Tensors, steps: int) -> None:
    """That what is drawn from is finite, and the best step is one. (Losses of a sample that stopped are NaN.)"""
    for name in ("noise", "latents", "initial_noise"):
        if name in tensors and not tensors[name].isfinite().all():
            raise UnusableResult(f"has '{name}' with values that are not finite")
    best = tensors["best_step"]
    if best.min() < 0 or best.max() >= steps:
        raise UnusableResult(f"has the best steps {brief(best.tolist())}, but {steps} steps")


def check_streams(tensors: Tensors, header: Header) -> None:
    """That there are as many random streams as the run had, each with a state that its generator takes."""
    devices, several = header["generator_devices"], header["provenance"].get("generators") == "list"
    expected = len(tensors["noise"]) if several else 1
    if devices and len(devices) != expected:
        raise UnusableResult(f"has {len(devices)} generator states, where {expected} go with the others")
    for index, device in enumerate(devices):
        state = tensors[f"{PER_STREAM}{index}"]
        if not isinstance(device, str) or not fits_generator(device, state):
            raise UnusableResult(f"has a generator state that no generator on {device!r} takes")


def fits_generator(device: str, state: torch.Tensor) -> bool:
    """Whether a generator on a kind of device, which need not be here, can have a state."""
    if state.dtype != torch.uint8 or state.ndim != 1 or not re.fullmatch("[a-z_]{1,16}", device):
        return False
    if device != "cpu":
        sizes = (CUDA_STATE_BYTES,) if device == "cuda" else range(1, MOST_STATE_BYTES + 1)
        return is_device(device) and len(state) in sizes
    try:
        torch.Generator().set_state(state.clone())
    except RuntimeError:
        return False
    return True


def is_device(name: str) -> bool:
    """Whether torch knows a kind of device, which need not be here."""
    try:
        return torch.device(name).index is None
    except RuntimeError:
        return False


def check_provenance(provenance: dict[str, Any], tensors: Tensors) -> None:
    """That what is read from it is of the types and numbers that `provenance_of` writes; any of it may be missing."""
    batch = len(tensors["noise"])
    wrong = [name for name, kind in PROVENANCE.items() if not isinstance(provenance.get(name, kind()), kind)]
    wrong += [name for name in ("model", "revision") if not isinstance(provenance.get(name), str | None)]
    if not wrong:
        prompts, seeds = provenance.get("prompts", [""] * batch), provenance.get("seeds", [])
        checks = {
            "prompts": len(prompts) == batch and all(isinstance(each, str) for each in prompts),
            "seeds": len(seeds) in (0, 1, batch) and all(type(each) is int for each in seeds),
            "dtype": isinstance(getattr(torch, provenance.get("dtype", "float32"), None), torch.dtype),
        }
        wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise UnusableResult(f"has a provenance whose {brief(wrong)} cannot be that of its noise")


def brief(values: list[Any]) -> str:
    """The first few of what a stranger may have written at any length."""
    text = ", ".join(str(value) for value in values[:5])
    return text if len(text) <= 200 else text[:200] + "…"


# pipelines/noise_result.py


@dataclasses.dataclass(eq=False, repr=False)
class NoiseResult:
    """What `optimize_noise` returns, for `B` independent noises.

    `pipe(prompt, latents=result.latents, ...)` with the arguments of the run draws the best images again. For a sampler
    that adds noise on the way pass `generator=result.generator()` too.

    Attributes:
        noise: `(B, C, H, W)` float32, unit variance: the best noise, or the last for methods that return it.
        latents: The same as the pipeline takes it as `latents=`: in its dtype, packed where the family packs.
        scores: Name to `(steps, B)`: each reward at each step, raw units, higher is better.
        losses: `(steps, B)`, lower is better, without the regularizer. NaN where a sample had stopped.
        norms: `(steps, B)`, ‖noise‖ / √d at each step: 1 is what a Gaussian has.
        best_step: `(B,)`, the step whose noise is returned.
        provenance: Model, scheduler, dtype, prompts, seeds, versions, method and its settings: plain values.
        reports: What callbacks found, by name, in plain values: see `HeldOutReward`. After a run with `decoder=` also
            "full_decoder": scores and losses by the pipeline's own decoder, of the plain result (`initial_scores`,
            `initial_loss`) and of what is returned (`best_scores`, `best_loss`). `scores` and `losses` are then those
            of the images of that tiny decoder: an approximation.
        generator_states: The state of each random stream after the base noise was drawn.
        initial_noise: `(B, C, H, W)`, the noise of the plain result; `None` in files of versions that did not keep it.
        band_changes: `(steps, B, 3)`, how much of ‖noise − initial_noise‖² lies in the lowest, middle and highest third
            of the radial frequencies at each step; the three add up to it. NaN where a sample had stopped, `None` in
            old files. See `frequency_bands`.
        images: `(B, 3, H, W)` in [0, 1], the images of `noise`, if they were drawn. Not saved.
        initial_images: `(B, 3, H, W)`, the plain result. Not saved.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    scores: dict[str, torch.Tensor]
    losses: torch.Tensor
    norms: torch.Tensor
    best_step: torch.Tensor
    provenance: dict[str, Any]
    generator_states: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    initial_noise: torch.Tensor | None = None
    band_changes: torch.Tensor | None = None
    images: torch.Tensor | None = None
    initial_images: torch.Tensor | None = None

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.noise.shape))
        best = ", ".join(f"{name} {values.mean():.4g}" for name, values in self.best_scores.items())
        by = f", by {decoder['class']}" if (decoder := self.provenance.get("decoder")) else ""
        return f"NoiseResult({shape}, best of {len(self.losses)} steps at {self.best_step.tolist()}: {best}{by})"

    @property
    def best_scores(self) -> dict[str, torch.Tensor]:
        """Name to `(B,)`: the rewards of the returned noise."""
        return {name: self.at_best(values) for name, values in self.scores.items()}

    @property
    def initial_scores(self) -> dict[str, torch.Tensor]:
        """Name to `(B,)`: the rewards of the plain result."""
        return {name: values[0] for name, values in self.scores.items()}

    @property
    def best_loss(self) -> torch.Tensor:
        """`(B,)`: the loss of the returned noise."""
        return self.at_best(self.losses)

    @property
    def band_shares(self) -> torch.Tensor | None:
        """`(steps, B, 3)`: `band_changes` as shares of their sum; NaN where nothing has changed."""
        return None if self.band_changes is None else self.band_changes / self.band_changes.sum(-1, keepdim=True)

    def at_best(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(0, self.best_step.to(values.device)[None])[0]

    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Fresh generators that continue where the base noise ended; a list if the run had one for each image."""
        fresh = []
        for device, state in self.generator_states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.provenance.get("generators") == "list" else (fresh or [None])[0]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, and the provenance as JSON in its header.

        The file is there as a whole or not at all; if the writing is interrupted, one that was there before stays.
        """
        own = {name: getattr(self, name) for name in RESULT_TENSORS + LATER_TENSORS}
        tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
        tensors |= {f"{PER_SCORE}{name}": values for name, values in self.scores.items()}
        tensors |= {f"{PER_STREAM}{index}": state for index, (_, state) in enumerate(self.generator_states)}
        devices = [device for device, _ in self.generator_states]
        header = {"provenance": self.provenance, "generator_devices": devices, "reports": self.reports}
        write_result_file(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "NoiseResult":
        """Read what `save` wrote. Nothing is unpickled, and nothing is used before all of it is checked.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: For any other file, one of a newer version, and one that was damaged or made to mislead: what
                it holds must be consistent and finite. The message names the file and what is wrong.
        """
        header, tensors = read_result_file(Path(path))
        streams = enumerate(header["generator_devices"])
        states = [(kind, tensors.pop(f"{PER_STREAM}{index}")) for index, kind in streams]
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        names = [name for name in tensors if name.startswith(PER_SCORE)]
        scores = {name.removeprefix(PER_SCORE): tensors.pop(name) for name in names}
        facts = {name: header[name] for name in ("provenance", "reports")}
        return cls(**tensors, **facts, scores=scores, generator_states=states)


# pipelines/noise_file.py


SECONDS_BETWEEN_WRITES = 10.0


class NoiseFile:
    """The file that holds the best noise so far: from the first step on, whatever ends the run, always whole.

    Args:
        path: Where the file is to be; its folder is made. What is there already is replaced.

    Raises:
        ValueError: If no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ValueError(f"Expected `save_noise_to` to be the path of a file, but got {path!r}.")
        self.path = Path(path)
        self.next_write = -math.inf
        if os.path.isdir(self.path):
            raise ValueError(f"Expected `save_noise_to` to be a file, but {path} is a folder. Add a name to it.")
        part = part_of_file(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_and_remove(part)
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected `save_noise_to` to be a file that can be written, but got {error}.") from None

    def keep(self, result: Callable[[], NoiseResult]) -> None:
        """Write what a run has found after a step, unless that was done a moment ago."""
        if time.monotonic() >= self.next_write:
            self.write_if_possible(result())
            self.next_write = time.monotonic() + SECONDS_BETWEEN_WRITES

    def write_if_possible(self, result: NoiseResult) -> None:
        """Write a result, and warn where that fails: a run does not end because the disk is full."""
        try:
            result.save(self.path)
        except Exception as error:
            warnings.warn(f"The noise found so far cannot be written to {self.path}: {error}", stacklevel=2)


def write_and_remove(file: Path) -> None:
    """Raise `OSError` where no file can be written."""
    try:
        file.touch()
    finally:
        file.unlink(missing_ok=True)


# pipelines/noise_problem.py


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


# pipelines/provenance.py


def provenance_of(problem: NoiseProblem, objective: Objective, state: NoiseState) -> dict[str, Any]:
    """Where a result came from, in plain values that JSON takes. The method adds itself."""
    pipe, scheduler = problem.pipe, problem.pipe.scheduler
    arguments = {name: value for name, value in problem.request.items() if name not in ("prompt", "latents")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "objective": objective.describe(),
        "prompts": problem.prompts,
        "seeds": problem.sampler.random_state.seeds,
        "generators": "list" if problem.sampler.random_state.several else "single",
        "noise_sampler": describe_noise_sampler(problem.space.noise_sampler),
        "model": str(pipe.config.get("_name_or_path") or "") or None,
        "revision": revision_of(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(scheduler).__name__, **plain(dict(scheduler.config))},
        "dtype": str(problem.dtype).removeprefix("torch."),
        "arguments": plain(arguments),
        "decoder": describe_decoder(problem.sampler.decoder),
        "checkpointing": problem.sampler.checkpoints.policy,
        "stopped": state.stopped,
        "seconds": round(state.elapsed, 3),
        "versions": {"python": platform.python_version(), **versions},
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that JSON takes as they are."""
    kept = (bool, int, float, str, type(None))
    flat = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, kept) or isinstance(value, list) and all(isinstance(item, kept) for item in value)
    }


def revision_of(pipe) -> str | None:
    """The commit of the Hub snapshot that the modules were loaded from, if they were."""
    for part in pipe.components.values():
        config = getattr(part, "config", None)
        path = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(part, "name_or_path", None)
        if match := re.search(r"snapshots[/\\]([0-9a-f]{40})", str(path)):
            return match[1]
    return None


# pipelines/regularizers.py


@dataclasses.dataclass(frozen=True)
class ChiPrior:
    """Negative log-density of the norm of a d-dimensional standard Gaussian, up to a constant.

    ReNO, https://arxiv.org/abs/2406.04312, equation 4: `weight · (r²/2 − (d−1)·ln r)` with `r = ‖noise‖₂`. Its minimum
    is at `r = √(d−1)`, where the curvature is `2·weight`. It constrains the norm alone and is blind to the spectrum.

    Args:
        weight: λ_reg, at least 0. The paper uses 0.01.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight >= 0 or math.isinf(self.weight):
            raise ValueError(f"Expected a prior weight of 0 or more, but got {self.weight}.")

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """`noise` (B, ...) to the penalty `(B,)`, each sample by itself; at least float32 whatever the noise is."""
        norm = per_sample_norm(noise)
        return self.weight * (norm.square() / 2 - (noise[0].numel() - 1) * norm.log())


def per_sample_norm(noise: torch.Tensor) -> torch.Tensor:
    """`(B, ...)` to the L2 norms `(B,)`, in float32 or better: in bfloat16 the spacing of numbers near 256 is 2."""
    return noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).norm(dim=1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B,)` values in a shape that broadcasts over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def clip_per_sample(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """`(B, ...)` scaled down where a sample's norm exceeds `max_norm`, as `clip_grad_norm_` does for a whole tensor."""
    factor = (max_norm / (per_sample_norm(gradient) + 1e-6)).clamp(max=1)
    return gradient * per_image(factor, gradient)


# pipelines/noise_optimizer.py


class NoiseOptimizer:
    """A method: what it looks at, how it moves the noise, what it returns. `run` owns the loop.

    Subclasses are frozen, keyword-only dataclasses whose fields are the method's settings.

    Attributes:
        steps: Evaluations, the plain result included: the noise is moved `steps − 1` times, or after each of them by a
            method that returns the last.
        gradient: "full", "frozen" or `None`; see `PipelineSampler.images`.
        preview: Look at the x0 estimate of one model call instead of the whole chain.
        clamp: "straight_through" or "hard"; see `PipelineSampler`.
        chunk_size: How many images are in memory with their graphs at a time: the gradient is the same, for one more
            forward pass. "auto" for as many as fit, by what the graph of one image holds; `None` for all.
        checkpointing: What of denoiser and decoder is computed again in the backward pass instead of kept: the same
            images and gradients in less memory. "none": nothing. "blocks": each block, for one more forward pass.
            "steps": each call of the denoiser, and in it each block, for two more; the memory hardly grows with the
            number of denoising steps. "auto": the first of these whose graph takes at most half of the free memory,
            counted while the first one is built. Beside a `chunk_size` that is a number, it is the graph of a chunk
            that has to fit; beside `chunk_size="auto"` images are drawn a few at a time only where "steps" is not
            enough for all.
        decoder: A tiny autoencoder that decodes in the place of the pipeline's own while the noise is optimised, an
            approximation for less time and memory: a Hub id such as "madebyollin/taesdxl", a folder, or a loaded
            module. The images of the result are drawn with the pipeline's own; see `NoiseResult`. `None` for that
            throughout.
        reward_device: Where rewards that are given by name are loaded, such as "cuda:1"; `None` for the pipeline's
            device. Those that are loaded already stay where they are.
        returns: "best", the noise of the lowest loss, or "last", the noise after the last move, which is not evaluated.
        final_steps: How many evaluations `finish` asks for after these steps.
    """

    steps: int
    gradient: Gradient = "full"
    preview: bool = False
    clamp: Clamp = "straight_through"
    chunk_size: ChunkSetting = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None
    returns: ClassVar[Literal["best", "last"]] = "best"
    final_steps: int = 0

    def objective(self, pipe) -> Objective:
        """What is minimised. Called once, before any model runs: the place to refuse bad settings."""
        raise NotImplementedError(f"{type(self).__name__} must define `objective(pipe)`.")

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        """`(B,)` penalty that steers the noise but does not count when the best is chosen."""
        return 0.0

    def start(self, problem: NoiseProblem) -> Any:
        """What the method remembers from step to step, such as momentum."""
        return None

    def step(self, state: NoiseState, gradient: Any, memory: Any) -> torch.Tensor:
        """The method: the next noise `(B, C, H, W)`.

        `state` holds what was evaluated: `state.noise`, its `state.loss`, the best so far; `gradient` `(B, C, H, W)` is
        that of the loss with respect to the noise, `None` for a method without; `memory` is what `start` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `step(state, gradient, memory)`.")

    def inspect(self, state: NoiseState, objective: Objective, memory: Any) -> torch.Tensor | None:
        """Look at what was evaluated, before the best is chosen and callbacks see it.

        Returns:
            `(B,)` bool, the samples for which this step may be the best; `None` is all. The first step counts in any
            case. Samples may be stopped: `state.stop(reason, samples)`.
        """
        return None

    def finish(self, state: NoiseState, objective: Objective, memory: Any) -> Iterable[torch.Tensor]:
        """Noises `(B, C, H, W)` to evaluate at the end, one after the other, also of a run that was stopped.

        For methods that choose among all that was seen; asked for the next when the last has been evaluated.
        """
        return ()

    def watchers(self) -> list[NoiseCallback]:
        """Callbacks that belong to the method, such as one that stops it; they see each step before the user's."""
        return []

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot work."""
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Expected `steps` to be an integer of 1 or more, but got {self.steps!r}.")
        choices = {"gradient": ("full", "frozen", None), "clamp": ("straight_through", "hard")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {getattr(self, name)!r}.")
        check_chunk_size(self.chunk_size)
        check_checkpointing(self.checkpointing)
        check_reward_device(self.reward_device)

    def device_of_rewards(self, pipe) -> torch.device:
        """Where rewards that are given by name are loaded."""
        return torch.device(self.reward_device or pipe._execution_device)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for the provenance."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | None)}

    def run(
        self,
        problem: NoiseProblem,
        objective: Objective,
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
        noise_file: NoiseFile | None = None,
    ) -> NoiseResult:
        """Optimise. An exception on the way carries what was found so far as its `noise_result`.

        The file, if one is given, holds the best noise so far from the first step on, and the result at the end.
        """
        state = NoiseState(problem.pipe, problem.prompts, self.steps + self.final_steps, problem.noise)
        every = [ProgressBar(), *self.watchers(), *as_callbacks(callbacks)]
        loop = OptimizationLoop(self, problem, objective, state, every, noise_file)
        try:
            try:
                loop.run()
            finally:
                loop.end()
            return loop.saved_result()
        except BaseException as error:
            loop.rescue(error)
            raise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepRow:
    """What is kept of a step: `(B,)` losses and norms, `(B, 3)` energies by band, and a `(B,)` for each score."""

    loss: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    scores: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BestSoFar:
    """The best after so many steps. Replaced as a whole: Ctrl-C finds all that a step brought, or nothing of it."""

    steps: int
    noise: torch.Tensor
    step: torch.Tensor
    images: torch.Tensor | None


class OptimizationLoop:
    """One run of a method: its current noise, its best, its history. See `NoiseOptimizer.run`."""

    def __init__(
        self,
        method: NoiseOptimizer,
        problem: NoiseProblem,
        objective: Objective,
        state: NoiseState,
        callbacks: Sequence[NoiseCallback],
        noise_file: NoiseFile | None = None,
    ) -> None:
        self.method, self.problem, self.objective = method, problem, objective
        self.state, self.callbacks, self.noise_file = state, callbacks, noise_file
        self.rows: list[StepRow] = []
        self.best: BestSoFar | None = None
        self.initial_images: torch.Tensor | None = None
        self.redrawn: dict[str, torch.Tensor] = {}
        self.total: torch.Tensor | None = None
        self.leaf = self.evaluated = problem.noise

    def run(self) -> None:
        self.start()
        for step in range(self.method.steps):
            self.evaluate(step)
            if self.state.stopped or not self.moves_after(step):
                break
            self.move()
            if self.state.stopped:
                break
        self.finish()
        self.redraw()

    def start(self) -> None:
        self.chunk_size = chunk_size_of(self.method, self.problem)
        self.memory = self.method.start(self.problem)
        for callback in self.callbacks:
            if hasattr(callback, "on_run_start"):
                callback.on_run_start(self.state)

    def end(self) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "on_run_end"):
                callback.on_run_end(self.state)

    def moves_after(self, step: int) -> bool:
        """Whether the noise is moved after this step: a best noise has been evaluated, a last one need not be."""
        return self.method.returns == "last" or step < self.method.steps - 1

    def evaluate(self, step: int) -> None:
        """Score the current noise, keep it where it is the best, and ask the callbacks."""
        state, method = self.state, self.method
        gradient = method.gradient if self.moves_after(step) else None
        self.leaf = state.noise.detach().requires_grad_(gradient is not None)
        sample = self.sample_of(self.problem.sampler, self.leaf, step, gradient, method.preview)
        try:
            with torch.set_grad_enabled(gradient is not None):
                loss, scores = self.objective.evaluate(sample)
                self.check_loss(loss, gradient, step)
                self.total = loss + method.regularizer(self.leaf)
        except NonFiniteReward as error:
            if step == 0:
                raise
            return self.give_up(str(error))
        state.step, state.images, state.scores = step, sample.drawn_images, scores
        self.evaluated = state.noise
        state.loss = loss.detach().where(state.active, torch.nan)
        self.record(method.inspect(state, self.objective, self.memory))
        for callback in self.callbacks:
            if callback.on_step_end(state) is False:
                state.stop()
        if self.noise_file is not None:
            self.noise_file.keep(self.result)

    def sample_of(
        self, sampler: PipelineSampler, noise: torch.Tensor, step: int, gradient: Gradient, preview: bool
    ) -> Sample:
        """What the objective looks at in a step."""
        seeds = [seed + step for seed in self.problem.seeds]
        groups, prompts = self.problem.groups, self.state.prompts
        return Sample(sampler, noise, prompts, groups, seeds, gradient, preview, self.chunk_size)

    def check_loss(self, loss: torch.Tensor, gradient: Gradient, step: int) -> None:
        batch = len(self.state.noise)
        if not isinstance(loss, torch.Tensor) or loss.shape != (batch,):
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"Expected the objective to return a tensor of shape ({batch},), but got {got}.")
        if gradient is not None and not loss.requires_grad:
            raise ValueError(
                "Expected a loss that depends differentiably on the noise, but it carries no gradient. Remove "
                "`.detach()`, `.item()` and numpy from the objective, or use a method without gradients, such as "
                "`BestOfN`."
            )
        if step == 0 and not loss.detach().isfinite().all():
            raise NonFiniteReward(f"Expected a finite loss for the plain result, but got {loss.tolist()}.")

    def record(self, eligible: torch.Tensor | None = None) -> None:
        """Keep this step, as the best of the samples where it is, among those that are `eligible`, `(B,)` bool."""
        state = self.state
        assert state.loss is not None
        norm = per_sample_norm(state.noise) / math.sqrt(state.noise[0].numel())
        bands = band_energies(state.noise - self.problem.noise).where(state.active[:, None], torch.nan)
        self.rows.append(StepRow(loss=state.loss, norm=norm, bands=bands, scores=state.scores))
        if state.step == 0:
            self.initial_images = state.images
            state.best_loss = torch.full_like(state.loss, torch.inf)
            state.best_step = torch.zeros_like(state.loss, dtype=torch.long)
            state.best_noise, state.best_images = state.noise, state.images
        assert state.best_loss is not None and state.best_step is not None and state.best_noise is not None
        better = state.loss < state.best_loss  # strictly: of equals the first wins; false for NaN
        if eligible is not None and state.step > 0:
            better = better & eligible
        state.best_loss = torch.where(better, state.loss, state.best_loss)
        state.best_step = torch.where(better, state.step, state.best_step)
        state.best_noise = torch.where(per_image(better, state.noise), state.noise, state.best_noise)
        if state.images is not None and state.best_images is not None:
            state.best_images = torch.where(per_image(better, state.images), state.images, state.best_images)
        best = {"noise": state.best_noise, "step": state.best_step, "images": state.best_images}
        self.best = BestSoFar(steps=len(self.rows), **best)

    def move(self) -> None:
        """Take the gradient where the method wants one, and the method's step."""
        state, gradient = self.state, None
        if self.leaf.requires_grad:
            assert self.total is not None
            (gradient,) = torch.autograd.grad(self.total.sum(), self.leaf)
            finite = gradient.flatten(1).isfinite().all(1)
            gradient = gradient.nan_to_num(0, 0, 0) * per_image(finite, gradient)
            self.drop_samples(state.active & ~finite)
        self.total = None
        moved = self.method.step(state, gradient, self.memory).detach()
        state.noise = torch.where(per_image(state.active, moved), moved, state.noise)

    def finish(self) -> None:
        """Evaluate what the method still gives, of all samples: a callback may watch, but not keep it from being."""
        for noise in self.method.finish(self.state, self.objective, self.memory):
            self.state.noise, self.state.active = noise.detach(), torch.ones_like(self.state.active)
            self.evaluate(len(self.rows))

    @torch.no_grad()
    def redraw(self) -> None:
        """Where a tiny decoder stood in, draw the plain result and what is returned with the pipeline's own, and let
        the objective score them."""
        if self.problem.sampler.decoder is None or self.initial_images is None:
            return
        sampler, report = self.problem.sampler.with_own_decoder(), {}
        for name, noise in (("initial", self.problem.noise), ("best", self.returned())):
            sample = self.sample_of(sampler, noise.detach(), 0, None, self.method.preview)
            loss, scores = self.objective.evaluate(sample)
            self.redrawn[name] = sample.images
            report[f"{name}_scores"] = {name: values.tolist() for name, values in scores.items()}
            report[f"{name}_loss"] = loss.tolist()
        self.state.reports[FULL_DECODER] = report

    def returned(self) -> torch.Tensor:
        """The noise of the result `(B, C, H, W)`."""
        assert self.best is not None
        return self.state.noise if self.method.returns == "last" else self.best.noise

    def drop_samples(self, broken: torch.Tensor) -> None:
        """Stop the samples whose gradient is not finite; the others go on."""
        if broken.any():
            self.state.stop("non-finite gradient", broken)
            warnings.warn(
                f"The gradient of sample {broken.nonzero().flatten().tolist()} is not finite after step "
                f"{self.state.step}: it keeps its best noise so far.",
                stacklevel=2,
            )

    def give_up(self, why: str) -> None:
        """End the run with what it has."""
        self.state.stop("non-finite reward")
        warnings.warn(f"The run stops after step {self.state.step} and keeps the best so far: {why}", stacklevel=2)

    def saved_result(self) -> NoiseResult:
        """The result at the end, in its file if there is one."""
        result = self.result()
        if self.noise_file is not None:
            result.save(self.noise_file.path)
        return result

    def rescue(self, error: BaseException) -> None:
        """Give an exception what was found before it, and write that."""
        if self.best is None:
            return
        result = self.result()
        result.provenance["stopped"] = self.state.stopped or type(error).__name__
        vars(error)["noise_result"] = result
        if self.noise_file is not None:
            self.noise_file.write_if_possible(result)

    def result(self) -> NoiseResult:
        """What has been found up to now."""
        problem, state, best = self.problem, self.state, self.best
        assert best is not None
        rows, last, noise = self.rows[: best.steps], self.method.returns == "last", self.returned()
        last_images = state.images if state.noise is self.evaluated else None
        latents = problem.sampler.to_latents(problem.pipe, noise.to(problem.dtype))
        return NoiseResult(
            noise=noise.detach(),
            latents=latents.detach(),
            scores={name: torch.stack([row.scores[name] for row in rows]) for name in rows[0].scores},
            losses=torch.stack([row.loss for row in rows]),
            norms=torch.stack([row.norm for row in rows]),
            best_step=torch.full_like(best.step, best.steps - 1) if last else best.step,
            provenance={
                "method": type(self.method).__name__,
                "settings": self.method.settings(),
                **provenance_of(problem, self.objective, state),
                "steps": best.steps,
            },
            generator_states=problem.sampler.states_after_draw(),
            reports=dict(state.reports),
            initial_noise=problem.noise.detach(),
            band_changes=torch.stack([row.bands for row in rows]),
            images=self.redrawn.get("best", last_images if last else best.images),
            initial_images=self.redrawn.get("initial", self.initial_images),
        )


def chunk_size_of(method: NoiseOptimizer, problem: NoiseProblem) -> int | None:
    """How many images a method has in memory at a time; `None` for the whole batch.

    "auto" draws one image, and counts what its graph holds: with each checkpointing that may be taken, until the whole
    batch fits. Raises `ValueError` for a number, if the call cannot be taken apart.
    """
    setting, batch = method.chunk_size, len(problem.noise)
    if setting is None or batch == 1:
        return None
    try:
        one = problem.sampler.chunk([0])
    except ValueError:
        if setting != "auto":
            raise
        return None
    if isinstance(setting, int):
        return setting if setting < batch else None
    if method.gradient is None:
        return None
    size, checkpoints = None, problem.sampler.checkpoints
    checkpoints.settle()
    for policy in checkpoints.ladder:
        checkpoints.take(policy)
        with SavedBytes() as saved, torch.enable_grad():
            one.images(problem.noise[:1].detach().requires_grad_(), method.gradient, method.preview)
        size = fitting_chunk_size(batch, saved.peak, free_memory(problem.noise.device))
        if size is None:
            break
    return size


# pipelines/methods.py


METHODS: dict[str, type[NoiseOptimizer]] = {}


def register_noise_optimizer(name: str):
    """Class decorator: make a method known by name. The same class may come again, as it does when code is reloaded."""

    def register(cls):
        known = METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"The method name {name!r} is taken by {known.__qualname__}.")
        METHODS[name] = cls
        return cls

    return register


def list_noise_optimizers() -> list[str]:
    """The names that `optimize_noise` takes."""
    return sorted(METHODS)


def call_settings(named: dict[str, Any], others: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    """The settings of a method from a pipeline call: arguments that are not `None`, and a dict of others.

    Raises `ValueError` for a setting that is given both ways; `argument` is what the dict is called.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(settings.keys() & (others or {}).keys()):
        raise ValueError(f"Expected each setting once, but got {twice} by argument and in `{argument}` too.")
    return {**settings, **(others or {})}


def as_noise_optimizer(method: Any, settings: dict[str, Any] | None = None) -> NoiseOptimizer:
    """A method by its name and settings, or a method as it is. Raises `ValueError` or `TypeError` otherwise."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}. Available: {', '.join(list_noise_optimizers())}.")
        return METHODS[method](**(settings or {}))
    if settings:
        raise ValueError("Expected `method_kwargs` only beside the name of a method, but got a method object as well.")
    if isinstance(method, type) or not hasattr(method, "run"):
        raise TypeError(
            f"Expected a method such as `ReNO(rewards=...)` or one of the names {list_noise_optimizers()}, but got "
            f"{method!r}."
        )
    return method


# pipelines/cno.py


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


# pipelines/pipeline_code.py


DYNAMIC_MODULES = "diffusers_modules."  # where diffusers puts what it loaded by `custom_pipeline`


class SavedWithCode:
    """Makes `save_pretrained` and `push_to_hub` write the pipeline's `pipeline.py` and name it in `model_index.json`.

    Then `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads what was saved, and so does the class
    itself, which needs no trust as it runs none of that code.
    """

    _code: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the code of a class that was loaded from a file: diffusers puts the next one in the same place."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(DYNAMIC_MODULES):
            cls._code = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """The stock method, which `save_pretrained` and `push_to_hub` call, with the code beside the configuration."""
        if has_code(type(self)):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / "pipeline.py").write_text(code_of(type(self)), encoding="utf-8", newline="\n")
        super().save_config(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_json_string(self) -> str:
        """The stock configuration, with the class named as one of `pipeline.py`."""
        text: str = super().to_json_string()  # pyright: ignore[reportAttributeAccessIssue]
        if not has_code(type(self)):
            return text
        named = json.loads(text) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """The configuration in a file, for a class that is at hand and needs no code to be loaded."""
        index = super()._dict_from_json_file(json_file)  # pyright: ignore[reportAttributeAccessIssue]
        return index | ({"_class_name": cls.__name__} if isinstance(index.get("_class_name"), list) else {})


def has_code(cls: type) -> bool:
    """Whether a class was loaded from a file or can be imported, unlike one of a script or a notebook."""
    importable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls and cls.__module__ != "__main__"
    return "_code" in vars(cls) or importable


def code_of(cls: type) -> str:
    """The source of a file that has a class which `has_code`.

    That of the file that it was loaded from, else a self-contained file for a class of this package, and for another an
    import of it from where it is installed.
    """
    if "_code" in vars(cls):
        return vars(cls)["_code"]
    if cls.__module__.startswith("noiseopt.pipelines."):  # what bundles its modules is no part of a bundle
        return importlib.import_module("noiseopt.hub.build").code_of_pipeline(cls)
    name, package = cls.__name__, cls.__module__.split(".")[0]
    return f'"""{name} of the package {package}, which has to be installed."""\n\nfrom {cls.__module__} import {name}\n'


# pipelines/noise_hook.py


class NoiseFound(Exception):
    """Ends a pipeline call once its noise is known, when nobody asked for the final image."""


class NoiseDraw:
    """One pipeline call on noise of a sampler, and nothing optimised."""

    def __init__(self, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> None:
        prompts_of(request, required=False)
        self.noise_sampler = noise_sampler_of(noise_sampler, request, groups_of(request))

    def encode_prompt(self, encode, *args, **kwargs):
        return encode(*args, **kwargs)

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: the stock method, on noise of the sampler."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        return space.on(pipe, space.draw_noise)


class NoiseRun:
    """One pipeline call under optimisation: what it was asked for, encoded, and found."""

    def __init__(
        self,
        pipe,
        method: NoiseOptimizer,
        request: dict[str, Any],
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None,
        render: bool = True,
        noise_sampler: NoiseSamplerSpec | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
    ) -> None:
        self.method, self.request, self.render = method, request, render
        self.callbacks = as_callbacks(callbacks)
        method.check()
        check_class(pipe, request)
        if torch.is_inference_mode_enabled():
            raise ValueError("Expected a call outside `torch.inference_mode()`, where no gradient exists. Remove it.")
        refuse_unsuited(pipe, method.gradient)
        self.objective: Objective = method.objective(pipe)
        self.prompts = prompts_of(request, self.objective.requires_prompt)
        self.groups = groups_of(request)
        self.objective.check_groups(self.groups)
        check_latents(request, len(self.prompts))
        self.noise_sampler = noise_sampler_of(noise_sampler, request, self.groups)
        self.noise_file = None if save_noise_to is None else NoiseFile(save_noise_to)
        if size := image_size(pipe, request):
            self.objective.try_out(self.prompts[0], *size, gradient=method.gradient is not None)
        self.decoder = as_loop_decoder(method.decoder, pipe, list(parts_of(pipe, DENOISERS).values()))
        self.encoded: list[Any] = []
        self.result: NoiseResult | None = None

    def encode_prompt(self, encode, *args, **kwargs):
        """Record what the stock method returns, for the inner runs."""
        self.encoded.append(encode(*args, **kwargs))
        return self.encoded[-1]

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: draw the base noise as the stock method does, optimise it, prepare the result."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        device = torch.device(space.arguments.get("device") or pipe._execution_device)
        random_state = RandomState(self.request.get("generator"), device)
        noise, drew = space.draw(pipe)
        sampler = PipelineSampler(
            pipe,
            self.request,
            self.encoded,
            space,
            random_state,
            drew,
            clamp=self.method.clamp,
            decoder=self.decoder,
            checkpointing=self.method.checkpointing,
            through_denoiser=self.method.gradient == "full",
        )
        master = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
        prompts, groups = self.prompts, self.groups
        problem = NoiseProblem(pipe, sampler, space, master, prompts, groups, noise.dtype, self.request)
        with torch.enable_grad(), sampler.checkpoints:
            self.result = self.method.run(problem, self.objective, self.callbacks, self.noise_file)
        if not self.render:
            raise NoiseFound
        return sampler.prepare(pipe, self.result.noise.to(noise.dtype))


def check_class(pipe, request: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for a pipeline whose noise cannot be had in this call."""
    parameters = inspect.signature(drawing_function(type(pipe))(randn_tensor)).parameters
    if request.get("latents") is not None and "latents" not in parameters:
        raise latents_with_image(pipe)


def check_latents_taken(pipe) -> None:
    """Raise `TypeError` for a pipeline that cannot draw a noise again."""
    if "latents" not in inspect.signature(stock_call(type(pipe))).parameters:
        name = type(pipe).__name__
        raise TypeError(
            f"Expected a pipeline that takes `latents`, to draw the noise that was found, but {name} takes none. Give "
            f"it the hook, `class Ours(NoiseOptimizationMixin, {name})`, and call that with `noise_optimizer=...`: it "
            "draws the image in the same call."
        )


def prompts_of(request: dict[str, Any], required: bool) -> list[str]:
    """The prompt of each image, in the order in which pipelines lay them out."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    if prompt is None and required:
        raise ValueError(
            "Expected the text of the prompt for the rewards, but got `prompt_embeds` only. Name it in the method: "
            "`ReNO(..., reward_prompt=...)`."
        )
    if prompt is None:
        prompt = [""] * len(embeds)  # pyright: ignore[reportArgumentType]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(request.get("num_images_per_prompt") or 1)]


def groups_of(request: dict[str, Any]) -> list[int]:
    """For each image the index of the first prompt, or the first embedding, that equals its own."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        first = [texts.index(text) for text in texts]
    else:
        rows = list(embeds)  # pyright: ignore[reportArgumentType]
        first = [next(i for i, other in enumerate(rows) if torch.equal(row, other)) for row in rows]
    return [group for group in first for _ in range(request.get("num_images_per_prompt") or 1)]


def check_latents(request: dict[str, Any], batch: int) -> None:
    latents, generator = request.get("latents"), request.get("generator")
    if latents is not None and len(latents) != batch:
        raise ValueError(
            f"Expected `latents` for {batch} images (prompts × `num_images_per_prompt`), but got {len(latents)}."
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Expected one generator for each of {batch} images, but got {len(generator)}.")


def noise_sampler_of(
    noise_sampler: NoiseSamplerSpec | None, request: dict[str, Any], groups: list[int]
) -> Callable[..., torch.Tensor] | None:
    """The noise sampler of a call, coupled where it couples: among the images of a prompt.

    Raises `ValueError` beside `latents`, where there is nothing to draw.
    """
    found = as_noise_sampler(noise_sampler)
    if found is None:
        return None
    if request.get("latents") is not None:
        raise ValueError(
            "Expected `noise_sampler` or `latents`, but got both. Given latents are taken as they are: leave one out."
        )
    return found.within(groups) if hasattr(found, "within") else found  # pyright: ignore[reportFunctionMemberAccess]


def image_size(pipe, request: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images in pixels, if they can be told before the call."""
    if request.get("height") and request.get("width"):
        return request["height"], request["width"]
    if request.get("image") is not None:
        return size_of_image(pipe, request["image"])
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    return (side * scale, side * scale) if isinstance(side, int) and isinstance(scale, int) else None


def size_of_image(pipe, image: Any) -> tuple[int, int] | None:
    """Height and width that a pipeline makes of a given image, or of the first of several."""
    image = image[0] if isinstance(image, list) else image
    size_of = getattr(getattr(pipe, "image_processor", None), "get_default_height_width", None)
    is_latents = isinstance(image, torch.Tensor) and image.shape[-3] != 3
    return None if size_of is None or is_latents else size_of(image)


class NoiseOptimizationMixin(SavedWithCode):
    """Gives any diffusers text-to-image pipeline an optimisation hook in `prepare_latents`.

    `class ReNOTurboPipeline(NoiseOptimizationMixin, StableDiffusionXLPipeline)` is all that a pipeline needs. With
    `noise_optimizer=None` and no `noise_sampler` every call goes straight to the stock class, bit-identical to it.

    The stock `__call__` runs once as it is. When it reaches `prepare_latents`, its prompts are encoded; there the noise
    is optimised, each evaluation being the same stock `__call__` on a shallow twin (see `PipelineSampler`). Then the
    call goes on with the noise that was found: only this final run fires `callback_on_step_end`.
    """

    _noise_run: NoiseRun | NoiseDraw | None = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The stock method; unless `dtype` is given, the modules that both pipelines share keep theirs.

        The stock method converts them to float32 then, in the pipeline that they came from too.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        as_they_are = {"to": lambda pipe, *_, **__: pipe, "__module__": cls.__module__}
        unconverted = type(cls.__name__, (cls,), as_they_are)
        made = super(NoiseOptimizationMixin, unconverted).from_pipe(pipeline, **kwargs)  # pyright: ignore
        made.__class__ = cls
        return made

    def __call__(
        self,
        *args,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: CallbackSpec | Iterable[CallbackSpec] | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call, with the initial noise optimised first if `noise_optimizer` is given.

        Args:
            noise_optimizer: A method, such as `ReNO(rewards={"clipscore": 1.0})`.
            noise_sampler: What the initial noise is drawn from, optimised or not: `"white"`, as in the stock pipeline,
                `"pink"`, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step; see `NoiseCallback`.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call; see
                `optimize_noise`.
            args, kwargs: Those of the stock pipeline.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute. An exception on
            the way, Ctrl-C among them, carries the best so far as its `noise_result`.
        """
        stock = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if noise_optimizer is None and save_noise_to is not None:
            raise ValueError(
                "Expected something to optimise beside `save_noise_to`, but got nothing: no noise would be found. "
                "Leave it out, or pass what the noise is to be optimised for."
            )
        if noise_optimizer is None and noise_sampler is None:
            return stock(*args, **kwargs)
        request = bind_request(self, args, kwargs)
        if noise_optimizer is None:
            with hook_on(self, NoiseDraw(request, noise_sampler)):
                return stock(*args, **kwargs)
        callbacks = callback_on_optimization_step_end
        own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
        run = NoiseRun(self, noise_optimizer, request, callbacks, **own)
        try:
            with frozen_modules(self, run.decoder), hook_on(self, run):
                output = stock(*args, **kwargs)
        except BaseException as error:
            if run.result is not None:
                vars(error)["noise_result"] = run.result
            raise
        result = found_by(run, self)
        if not isinstance(output, tuple):
            output.noise_result = result
        return output

    def encode_prompt(self, *args, **kwargs):
        """The stock method; under optimisation its results are kept for the inner runs."""
        encode = super().encode_prompt  # pyright: ignore[reportAttributeAccessIssue]
        run = self._noise_run
        return encode(*args, **kwargs) if run is None else run.encode_prompt(encode, *args, **kwargs)

    def prepare_latents(self, *args, **kwargs):
        """The stock method, or under optimisation the hook: its noise is optimised before it is handed on."""
        run = self._noise_run
        if run is None:
            return super().prepare_latents(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return run.prepare_latents(self, *args, **kwargs)


def found_by(run: NoiseRun, pipe) -> NoiseResult:
    """The result of a call that is over."""
    if run.result is None:
        raise TypeError(
            f"Expected a call that prepares its latents by `prepare_latents`, but that of {type(pipe).__name__} did "
            "not, and nothing was optimised. Leave out the argument that takes the place of the noise."
        )
    return run.result


@contextlib.contextmanager
def hook_on(pipe, run: NoiseRun | NoiseDraw) -> Iterator[None]:
    """Let a run have the prompts and latents of a pipeline's call."""
    with undoing(lambda: vars(pipe).pop("_noise_run", None)):
        vars(pipe)["_noise_run"] = run
        yield


def bind_request(pipe, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stock call by name. Raises `TypeError` for an unknown one."""
    bound = dict(inspect.signature(stock_call(type(pipe))).bind(pipe, *args, **kwargs).arguments)
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "self"}


@functools.cache
def hooked(cls: type) -> type:
    """A subclass of a pipeline class with the hook, unless it has one."""
    if hasattr(cls, "_noise_run"):
        return cls
    return type(cls.__name__, (NoiseOptimizationMixin, cls), {"__module__": cls.__module__})


def optimize_noise(
    pipe,
    prompt: str | list[str] | None,
    method: NoiseOptimizer | str,
    *,
    method_kwargs: dict[str, Any] | None = None,
    callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    save_noise_to: str | os.PathLike[str] | None = None,
    **call_kwargs,
) -> NoiseResult:
    """Find the initial noise of a call to any diffusers text-to-image pipeline, which stays as it is.

    Args:
        pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise.
        prompt: As in the pipeline's call. Each image is a problem of its own.
        method: Such as `ReNO(rewards={"pickscore": 1.0})`, or a name of `list_noise_optimizers()`.
        method_kwargs: The settings of a method given by name.
        callbacks: Per optimisation step; see `NoiseCallback`.
        noise_sampler: What noise is drawn from, that of candidates too: `"white"`, as in the pipeline itself, `"pink"`,
            `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, `PinkNoise(0.3)`, or any function `(shape,
            generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
        save_noise_to: A file for the best noise so far, for `NoiseResult.load`: there from the first step on, brought
            up to date every few seconds, when the run ends and when an exception or Ctrl-C ends it; always whole. One
            that is there already is replaced.
        call_kwargs: What `pipe(prompt, ...)` takes: steps, guidance, size, generator, latents ...

    Returns:
        The result; `pipe(prompt, latents=result.latents, **call_kwargs)` draws it. An exception on the way, Ctrl-C
        among them, leaves the pipeline as it was, and carries the best so far as its `noise_result`.

    Raises:
        ValueError: Before any model runs, for settings or a pipeline state that cannot work.
        TypeError: For an argument that the pipeline does not take, or a pipeline without a noise to optimise.
    """
    optimizer = as_noise_optimizer(method, method_kwargs)
    twin = copy.copy(pipe)
    twin.__class__ = hooked(type(pipe))
    vars(twin)["scheduler"] = copy.deepcopy(pipe.scheduler)  # a call sets the timesteps of its scheduler
    check_latents_taken(twin)
    request = bind_request(twin, (), {"prompt": prompt, **call_kwargs})
    own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
    run = NoiseRun(twin, optimizer, request, callbacks, render=False, **own)
    vars(twin)["_noise_run"] = run
    with frozen_modules(twin, run.decoder), torch.no_grad(), contextlib.suppress(NoiseFound):
        stock_call(type(pipe))(twin, **request)
    return found_by(run, twin)


# pipelines/cno_mixin.py


class CNOMixin(NoiseOptimizationMixin):
    """Optimises the noises of each prompt's images for diversity in the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        optimization_steps: int | None = None,
        gamma: float | str | None = None,
        stop_gradient: bool | None = None,
        cno_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call on noises that CNO moved apart: at least two images of each prompt.

        Args:
            optimization_steps: Updates of CNO, each one more call of the denoiser for each image; 3 by default. 0
                leaves the pipeline bit-identical to the stock class.
            gamma: Scales the temperature of the attraction, a number above 0 (smaller attracts more) or "auto", the
                default: the paper's closed form for the number of images.
            stop_gradient: `True`, the default, as in the paper; `False` back-propagates through the denoiser as the
                released code does.
            cno_kwargs: More settings of `CNO`, by name: `{"window_size": 8}`.
            noise_optimizer: Another method instead of CNO.
            noise_sampler: What the initial noise is drawn from: `"white"`, as in the stock pipeline, `"pink"`,
                `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape, generator, device,
                dtype)`. Works without a method too; not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step: functions of the state, or objects with
                `on_step_end(state)`; return `False` to stop.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call.
            args, kwargs: Those of the stock pipeline; pass `num_images_per_prompt`.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute.

        Raises:
            ValueError: For settings that cannot work, and for a prompt with one image, before any model runs.
        """
        named = {"steps": optimization_steps, "gamma": gamma, "stop_gradient": stop_gradient}
        settings = call_settings(named, cno_kwargs, "cno_kwargs")
        if noise_optimizer is not None and settings:
            raise ValueError(
                f"Expected `noise_optimizer` or settings of CNO, but got both: {sorted(settings)}. Give them to the "
                "method."
            )
        if noise_optimizer is None and settings.get("steps") != 0:
            noise_optimizer = CNO(**settings)
        return super().__call__(
            *args,
            noise_optimizer=noise_optimizer,
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )


# pipelines/cno_stable_diffusion_3.py


class CNOStableDiffusion3Pipeline(CNOMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` whose images of one prompt differ. See `CNOMixin.__call__`.

    Contrastive Noise Optimization, https://arxiv.org/abs/2510.03813.

    Examples:
        >>> model = "stabilityai/stable-diffusion-3.5-medium"
        >>> pipe = CNOStableDiffusion3Pipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> images = pipe("a cat in a garden", num_images_per_prompt=5).images
    """
