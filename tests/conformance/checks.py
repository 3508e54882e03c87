"""Checks of one cell against its oracles: the stock pipeline and losses in closed form."""

import copy
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import diffusers
import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from conformance.matrix import (
    COLUMNS,
    EVERY_FAMILY,
    FAMILIES,
    OTHERS,
    REFUSED_VIDEOS,
    VIDEOS,
    Column,
    Family,
    in_fast_tier,
)
from problems import generator, redness
from tiny_families import family_arguments, tiny_family
from tiny_pipelines import quiet
from tiny_videos import VIDEO_CALLS, tiny_video

from noiseopt import (
    CNO,
    PCN,
    BestOfN,
    GroupSelection,
    NeverTooLate,
    NoiseDiffusion,
    NoiseOptimizationMixin,
    NoiseResult,
    ReNO,
    ZeroOrderSearch,
    optimize_noise,
)
from noiseopt.pipelines import MeanVariance, NoiseOptimizer, NoisePGD
from noiseopt.schedulers import predict_x0

PROMPT = "a b"
FLUX_PACKED = (
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "QwenImagePipeline",
    "ChromaPipeline",
    "LongCatImagePipeline",
    "BriaPipeline",
    "OvisImagePipeline",
)
SET_BY_BUILDERS = ("resolutions", "default_sample_size", "vae_image_processor")  # on a pipeline itself
FRAMES = [0, 1, 3, 4]  # four evenly spaced ones of five
SETS = ("cno", "never_too_late", "group_selection")  # compare the images of a prompt


def red_share(images, prompts):
    """Reward in [0, 1]: the mean of the red channel."""
    return images[:, 0].mean((1, 2))


class Distance:
    """Reward that is lowest for the baseline: the mean distance to its first image."""

    def __init__(self, plain: torch.Tensor) -> None:
        self.plain = plain

    def __call__(self, images, prompts):
        first = self.plain[:1].flatten(0, -4)  # all frames of a video
        return 0.25 + (images - first[[row % len(first) for row in range(len(images))]]).abs().mean((1, 2, 3))


def method_of(column: Column, plain: torch.Tensor) -> NoiseOptimizer:
    """Return the method of a column with few steps; `plain` is the baseline, `(B, 3, H, W)` or `(B, F, 3, H, W)`."""
    preview = column.gradient == "preview"
    frozen = column.gradient == "frozen"
    makers: dict[str, Any] = {
        "reno": lambda: ReNO(
            rewards=redness, steps=3, views=0, gradient="frozen" if frozen else "full", preview=preview
        ),
        "cno": lambda: CNO(steps=2, window_size=4, gradient="frozen" if frozen else "full"),
        "noise_diffusion": lambda: NoiseDiffusion(rewards=red_share, steps=3, selection="exact", candidates=1e9),
        "never_too_late": lambda: NeverTooLate(diversity={"pairwise": ("tiny_image", 5.0)}, steps=3),
        "noise_pgd": lambda: NoisePGD(rewards=redness, steps=3, step_size=0.02),
        "mean_variance": lambda: MeanVariance(rewards=redness, steps=3),
        "best_of_n": lambda: BestOfN(rewards=Distance(plain), steps=3, preview=preview, keep=2),
        "zero_order_search": lambda: ZeroOrderSearch(rewards=Distance(plain), steps=3),
        "pcn": lambda: PCN(rewards=Distance(plain), steps=3),
        "group_selection": lambda: GroupSelection(
            rewards=Distance(plain), features="tiny_image", weight=0.5, steps=2, preview=preview
        ),
    }
    return makers[column.method]()


def plain_loss(column: Column, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of a method, `(B,)`, for images of the stock pipeline, restated from its definition."""
    if images.ndim == 5 and column.method not in ("never_too_late", "group_selection"):  # a mean over frames
        return torch.stack([plain_loss(column, images[:, each]) for each in range(images.shape[1])]).mean(0)
    if column.method == "noise_diffusion":
        return -red_share(images, None)
    if column.gradient == "none" or column.method in ("best_of_n", "group_selection"):
        rewards = Distance(images)(images.flatten(0, -4), None).view(len(images), -1).mean(1)
        if column.method == "group_selection":
            return -(rewards.sum() + 0.5 * tiny_distance(images)).expand(len(images))
        return -rewards
    if column.method == "never_too_late":
        return -5.0 * tiny_distance(images).expand(len(images))
    return -redness(images, None)


def tiny_distance(images: torch.Tensor) -> torch.Tensor:
    """Return the L2 distance between the two images of a set, divided by its maximum."""
    return (images[0] - images[1]).norm() / math.sqrt(images[0].numel())


def contrastive_loss(x0: torch.Tensor, reference: torch.Tensor, tau: float = 0.1) -> torch.Tensor:
    """Return CNO's loss of two images against their initial estimates; γ is 1 for two images."""
    now, first = cells(x0), cells(reference)
    own, other = (torch.exp((now * partner).sum(1) / tau) for partner in (first, now.flip(0)))
    return -torch.log(own / (own + other)).mean(1)


def cells(x0: torch.Tensor) -> torch.Tensor:
    """Pool to a grid of at most 4 × 4 and normalize along the channels, in float64."""
    pooled = F.adaptive_avg_pool2d(x0.double().flatten(1, -3), min(4, x0.shape[-1]))  # frames count as channels
    return F.normalize(pooled, dim=1).flatten(2)


class Stepped(NamedTuple):
    """The result of a step, which pipelines read by place or by name."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class Call:
    """One call of a stock pipeline, run without noiseopt as the oracle or with `optimize_noise`."""

    def __init__(self, pipe, arguments: dict[str, Any], prompt: str | list[str] | None = PROMPT) -> None:
        self.pipe, self.arguments, self.prompt = pipe, arguments, prompt

    def sample(self, **kwargs) -> torch.Tensor:
        kwargs = {"generator": generator(), **kwargs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for schedulers that are passed no generator
            return seen(self.pipe(prompt=self.prompt, output_type="pt", **self.arguments, **kwargs)[0])

    @functools.cached_property
    def plain(self) -> torch.Tensor:
        return self.sample()

    def preview(self, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the x0 estimate of the first model call in the layout of the noise, and its decoded images.

        The stock call runs to its end, with a scheduler whose every step returns the first step's estimate.
        """
        estimates: list[torch.Tensor] = []
        pipe = copy.copy(self.pipe)
        scheduler = vars(pipe)["scheduler"] = copy.deepcopy(self.pipe.scheduler)

        parameters = inspect.signature(scheduler.step)

        @functools.wraps(scheduler.step)
        def step(*args, **kwargs):
            given = parameters.bind(*args, **kwargs).arguments
            output = given["model_output"]
            if not estimates:
                estimates.append(predict_x0(scheduler, output, given["timestep"], given["sample"]).to(output.dtype))
            return Stepped(estimates[0], estimates[0])

        vars(scheduler)["step"] = step
        images = type(self)(pipe, self.arguments, self.prompt).sample(**kwargs)
        return self.spatial(pipe, estimates[0]), images

    def spatial(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        return spatial(pipe, latents)

    def optimize(self, method: NoiseOptimizer, **kwargs) -> NoiseResult:
        asked = {"reward_prompt": PROMPT} if self.prompt is None else {}  # embeddings in place of it
        given = {"generator": generator(), **asked, **self.arguments, **kwargs}
        return optimize_noise(self.pipe, self.prompt, method, **given)


def seen(images: torch.Tensor) -> torch.Tensor:
    """Return images, and of videos the frames that rewards see by default."""
    return images[:, FRAMES] if images.ndim == 5 else images


class ModularCall(Call):
    """One call of a modular pipeline."""

    patches: ClassVar[Mapping[str, int]] = {"Flux": 2, "FluxKontext": 2, "QwenImage": 2, "Krea2": 2, "Krea2Turbo": 2}

    def sample(self, **kwargs) -> torch.Tensor:
        kwargs = {"generator": generator(), "output_type": "pt", **self.arguments, **kwargs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return on_white(self.pipe(prompt=PROMPT, output="images", **kwargs))

    def spatial(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Unpack tokens, which stand for a square of latents each, with a patch of `p` × `p` in the channels."""
        if latents.ndim > 3:
            return latents.flatten(1, -3)
        p, side = self.patches.get(type(pipe).__name__.removesuffix("ModularPipeline"), 1), math.isqrt(latents.shape[1])
        grid = latents.view(len(latents), side, side, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(latents), -1, side * p, side * p)


def on_white(images: torch.Tensor) -> torch.Tensor:
    """Return images with a fourth channel for opacity as they look on white."""
    return images if images.shape[1] != 4 else images[:, :3] * images[:, 3:] + (1 - images[:, 3:])


def spatial(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Unpack latents to the layout of the noise with the pipeline's own function."""
    name = type(pipe).__name__
    if name == "LTXPipeline":
        return pipe._unpack_latents(latents, 3, 16, 16)
    if name in ("Flux2KleinPipeline", "Flux2Pipeline"):
        side = math.isqrt(latents.shape[1])
        return pipe._unpack_latents_with_ids(
            latents, pipe._prepare_latent_ids(latents.new_zeros(len(latents), 1, side, side))
        )
    if name in FLUX_PACKED:
        return pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor).flatten(1, -3)
    if name == "BriaFiboPipeline":
        return pipe._unpack_latents_no_patch(latents, 32, 32, pipe.vae_scale_factor)
    if name == "Krea2Pipeline":
        return pipe._unpack_latents(latents, 32, 32).flatten(1, -3)
    return latents


@functools.cache
def family_call(family: str, count: int) -> Call:
    if family in FAMILIES:
        return Call(tiny_family(family), {**family_arguments(family), "num_images_per_prompt": count})
    from conformance.builders import arguments_of, tiny_pipeline_of  # of classes that the oldest diffusers has not

    cls = getattr(diffusers, OTHERS[family].pipeline)
    arguments, several = arguments_of(cls), {"num_images_per_prompt": count} if count > 1 else {}
    if family == "prx":  # its stock call fails with guidance for several images
        arguments["guidance_scale"] = 1.0
    prompt = arguments.pop("prompt", PROMPT)
    return Call(tiny_pipeline_of(cls), {**arguments, **several}, prompt)


@functools.cache
def video_call(family: str, count: int) -> Call:
    """Return a call for some videos of one prompt, for some stock calls a prompt for each: others fail or make one."""
    if count > 1 and family.startswith(("cogvideox", "ltx_timed")):
        return Call(tiny_video(family), VIDEO_CALLS[family], [PROMPT] * count)
    return Call(tiny_video(family), {**VIDEO_CALLS[family], "num_videos_per_prompt": count})


def check_video_cell(family: str, column_name: str) -> None:
    column = COLUMNS[column_name]
    call = video_call(family, 2 if column.method in SETS else 1)
    if (family, column_name) not in REFUSED_VIDEOS:
        check_cell(call, column)
        return
    with pytest.raises(ValueError, match='zero terminal SNR.*gradient="full"'):
        call.optimize(method_of(column, call.plain))
    assert torch.equal(call.sample(), call.plain)


@functools.cache
def modular_call(family: str, count: int) -> ModularCall:
    from tiny_modular import modular_arguments, tiny_modular  # of classes that the oldest diffusers has not

    return ModularCall(tiny_modular(family), {**modular_arguments(family), "num_images_per_prompt": count})


def family_cells(families: Iterable[str], among: Mapping[str, Family] = EVERY_FAMILY) -> list[ParameterSet]:
    """Return all pairs of family and column; those outside the fast tier of `among` are marked slow."""
    return [
        pytest.param(family, column, marks=[] if in_fast_tier(family, column, among) else pytest.mark.slow)
        for family in families
        for column in COLUMNS
    ]


def check_family_cell(family: str, column_name: str) -> None:
    column = COLUMNS[column_name]
    check_cell(family_call(family, 2 if column.method in SETS else 1), column)


def check_modular_cell(family: str, column_name: str) -> None:
    column = COLUMNS[column_name]
    check_cell(modular_call(family, 2 if column.method in SETS else 1), column)


def check_off_and_class(family: str) -> None:
    """Compare a class with the mixin to its stock class: equal without a method, and returning the best with one."""
    call, row = (video_call if family in VIDEOS else family_call)(family, 1), EVERY_FAMILY[family]
    cls = type(call.pipe)
    assert (cls.__name__, type(call.pipe.scheduler).__name__) == (row.pipeline, row.scheduler)
    settings = {name: call.pipe.config[name] for name in ("boundary_ratio",) if name in call.pipe.config}  # of Wan 2.2
    ours = quiet(type("Ours", (NoiseOptimizationMixin, cls), {})(**call.pipe.components, **settings))
    vars(ours).update({name: value for name, value in vars(call.pipe).items() if name in SET_BY_BUILDERS})
    assert torch.equal(Call(ours, call.arguments, call.prompt).plain, call.plain)
    method, before = method_of(COLUMNS["reno-full"], call.plain), state_of(ours)
    arguments = {**call.arguments, "generator": generator(), "output_type": "pt"}
    asked = {"reward_prompt": PROMPT} if call.prompt is None else {}
    output = ours(prompt=call.prompt, method=method, **asked, **arguments)
    assert torch.equal(output.noise_result.initial_images, call.plain)
    assert torch.equal(seen(output[0]), output.noise_result.images)
    after = state_of(ours)
    assert {name: after[name] for name in after if name not in ("attributes", "scheduler")} == {
        name: before[name] for name in before if name not in ("attributes", "scheduler")
    }
    assert torch.equal(Call(ours, call.arguments, call.prompt).plain, call.plain)


def check_cell(call: Call, column: Column) -> None:
    """Check the first loss, that the loss falls, that the result is reproduced, and that the pipeline is restored."""
    method, before = method_of(column, call.plain), state_of(call.pipe)
    result = call.optimize(method)
    assert state_of(call.pipe) == before
    if column.method == "cno":
        check_contrast(call, result)
    elif column.gradient == "preview" and column.method == "reno":
        check_previews(call, column, result)
    else:
        check_images(call, column, result)
    assert torch.equal(call.sample(), call.plain)


def check_images(call: Call, column: Column, result: NoiseResult) -> None:
    assert torch.equal(result.initial_images, call.plain)
    torch.testing.assert_close(result.losses[0], plain_loss(column, call.plain), rtol=1e-5, atol=1e-6)
    assert (result.best_loss < result.losses[0]).all()
    assert result.best_loss.equal(result.losses.nan_to_num(torch.inf).amin(0))
    again = call.sample(latents=result.latents, generator=result.generator())
    assert torch.equal(again, result.images)


def check_previews(call: Call, column: Column, result: NoiseResult) -> None:
    _, plain = call.preview()
    assert torch.equal(result.initial_images, plain)
    torch.testing.assert_close(result.losses[0], plain_loss(column, plain), rtol=1e-5, atol=1e-6)
    assert (result.best_loss < result.losses[0]).all()
    _, again = call.preview(latents=result.latents, generator=result.generator())
    assert torch.equal(again, result.images)


def check_contrast(call: Call, result: NoiseResult) -> None:
    plain, _ = call.preview()
    first = contrastive_loss(plain, plain)
    torch.testing.assert_close(result.losses[0].double(), first, rtol=1e-4, atol=1e-6)
    assert (result.losses[-1] < result.losses[0]).all()
    last, _ = call.preview(latents=result.latents, generator=result.generator())  # after the last step
    assert (contrastive_loss(last, plain) < result.losses[-1]).all()


def state_of(pipe) -> dict[str, Any]:
    """Return all that a run must restore: attributes, scheduler, and each module's flags, hooks and parameters."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "attributes": {name: id(value) for name, value in vars(pipe).items()},
        "scheduler": {name: plain_value(value) for name, value in vars(pipe.scheduler).items()},
        "guider": {name: plain_value(value) for name, value in guider_of(pipe).items()},
        "blocks": state_of_block(getattr(pipe, "_blocks", None)),
        **{name: [state_of_module(each) for each in module.modules()] for name, module in modules.items()},
    }


def guider_of(pipe) -> dict[str, Any]:
    """Return the attributes of what guides a modular pipeline."""
    guider = getattr(pipe, "guider", None)
    return {} if guider is None else vars(guider)


def state_of_block(block: Any) -> Any:
    """Return the class and attributes of a block of a modular pipeline, and of those in it."""
    inner = {name: state_of_block(each) for name, each in getattr(block, "sub_blocks", {}).items()}
    return type(block), {name: id(value) for name, value in vars(block).items()} if block else {}, inner


def plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def state_of_module(module: torch.nn.Module) -> tuple:
    parameters = [(id(each), each._version, each.requires_grad, each.dtype) for each in module.parameters(False)]
    hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
    return module.training, hooks, sorted(vars(module)), parameters
