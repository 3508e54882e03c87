"""The five checks of every cell, and what the results of a cell are compared with: stock pipelines and closed forms."""

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from conformance.matrix import COLUMNS, FAMILIES, Column
from problems import generator, redness
from tiny_families import family_arguments, tiny_family
from tiny_pipelines import quiet

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
SETS = ("cno", "never_too_late", "group_selection")  # methods that compare the images of a prompt


def red_share(images, prompts):
    """A score in [0, 1]."""
    return images[:, 0].mean((1, 2))


class Distance:
    """A reward that any image but the plain one raises: how far it is from that."""

    def __init__(self, plain: torch.Tensor) -> None:
        self.plain = plain

    def __call__(self, images, prompts):
        return 0.25 + (images - self.plain[:1]).abs().mean((1, 2, 3))


def method_of(column: Column, plain: torch.Tensor) -> NoiseOptimizer:
    """The method of a column with few steps; `plain` are the images that it begins with."""
    preview = column.route == "preview"
    frozen = column.route == "frozen"
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
    """`(B,)`: the loss of a method for images that it did not draw, restated from its definition."""
    if column.method == "noise_diffusion":
        return -red_share(images, None)
    if column.route == "none" or column.method in ("best_of_n", "group_selection"):
        rewards = Distance(images)(images, None)
        if column.method == "group_selection":
            return -(rewards.sum() + 0.5 * tiny_distance(images)).expand(len(images))
        return -rewards
    if column.method == "never_too_late":
        return -5.0 * tiny_distance(images).expand(len(images))
    return -redness(images, None)


def tiny_distance(images: torch.Tensor) -> torch.Tensor:
    """L2 distance of the two pictures of a set, over its largest value."""
    return (images[0] - images[1]).norm() / math.sqrt(images[0].numel())


def contrastive_loss(x0: torch.Tensor, reference: torch.Tensor, tau: float = 0.1) -> torch.Tensor:
    """CNO's loss of two images against what they were first; γ is 1 for two of them."""
    now, first = cells(x0), cells(reference)
    own, other = (torch.exp((now * partner).sum(1) / tau) for partner in (first, now.flip(0)))
    return -torch.log(own / (own + other)).mean(1)


def cells(x0: torch.Tensor) -> torch.Tensor:
    """Unit vectors along the channels of a grid of at most 4 × 4, in float64."""
    return F.normalize(F.adaptive_avg_pool2d(x0.double(), min(4, x0.shape[-1])), dim=1).flatten(2)


class Call:
    """One call of a stock pipeline: its images, with nothing of ours in between."""

    def __init__(self, pipe, arguments: dict[str, Any]) -> None:
        self.pipe, self.arguments = pipe, arguments

    def draw(self, **kwargs) -> torch.Tensor:
        kwargs = {"generator": generator(), **kwargs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for samplers that draw from no generator
            return self.pipe(prompt=PROMPT, output_type="pt", **self.arguments, **kwargs).images

    @functools.cached_property
    def plain(self) -> torch.Tensor:
        return self.draw()

    def preview(self, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The x0 estimate of the first model call in spatial layout, and its image.

        The whole stock call runs; only `scheduler.step` returns at every step what the first one predicts.
        """
        seen: list[torch.Tensor] = []
        pipe = copy.copy(self.pipe)
        scheduler = vars(pipe)["scheduler"] = copy.deepcopy(self.pipe.scheduler)

        @functools.wraps(scheduler.step)
        def step(output, timestep, sample, *_, **__):
            if not seen:
                seen.append(predict_x0(scheduler, output, timestep, sample).to(output.dtype))
            return seen[0], seen[0]

        vars(scheduler)["step"] = step
        images = Call(pipe, self.arguments).draw(**kwargs)
        return spatial(pipe, seen[0]), images

    def optimize(self, method: NoiseOptimizer, **kwargs) -> NoiseResult:
        return optimize_noise(self.pipe, PROMPT, method, generator=generator(), **self.arguments, **kwargs)


def spatial(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Packed latents as `(B, C, H, W)`, by the family's own function."""
    name = type(pipe).__name__
    if name == "Flux2KleinPipeline":
        side = math.isqrt(latents.shape[1])
        return pipe._unpack_latents_with_ids(
            latents, pipe._prepare_latent_ids(latents.new_zeros(len(latents), 1, side, side))
        )
    if name in ("FluxPipeline", "FluxImg2ImgPipeline", "QwenImagePipeline"):
        return pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor).flatten(1, -3)
    return latents


@functools.cache
def family_call(family: str, count: int) -> Call:
    return Call(tiny_family(family), {**family_arguments(family), "num_images_per_prompt": count})


def check_family_cell(family: str, column_name: str) -> None:
    column = COLUMNS[column_name]
    check_cell(family_call(family, 2 if column.method in SETS else 1), column)


def check_off_and_class(family: str) -> None:
    """A class with the hook: as the stock class without an optimizer, and with one its own image is the best."""
    call, row = family_call(family, 1), FAMILIES[family]
    cls = type(call.pipe)
    assert (cls.__name__, type(call.pipe.scheduler).__name__) == (row.pipeline, row.scheduler)
    ours = quiet(type("Ours", (NoiseOptimizationMixin, cls), {})(**call.pipe.components))
    assert torch.equal(Call(ours, call.arguments).plain, call.plain)
    method, before = method_of(COLUMNS["reno-full"], call.plain), state_of(ours)
    arguments = {**call.arguments, "generator": generator(), "output_type": "pt"}
    output = ours(prompt=PROMPT, method=method, **arguments)
    assert torch.equal(output.noise_result.initial_images, call.plain)
    assert torch.equal(output.images, output.noise_result.images)
    after = state_of(ours)
    assert {name: after[name] for name in after if name not in ("attributes", "scheduler")} == {
        name: before[name] for name in before if name not in ("attributes", "scheduler")
    }
    assert torch.equal(Call(ours, call.arguments).plain, call.plain)


def check_cell(call: Call, column: Column) -> None:
    """First loss, falling loss, redraw, and nothing left behind; that it is off when it is off is a test of its own."""
    method, before = method_of(column, call.plain), state_of(call.pipe)
    result = call.optimize(method)
    assert state_of(call.pipe) == before
    if column.method == "cno":
        check_contrast(call, result)
    elif column.route == "preview" and column.method == "reno":
        check_previews(call, column, result)
    else:
        check_images(call, column, result)
    assert torch.equal(call.draw(), call.plain)


def check_images(call: Call, column: Column, result: NoiseResult) -> None:
    assert torch.equal(result.initial_images, call.plain)
    torch.testing.assert_close(result.losses[0], plain_loss(column, call.plain), rtol=1e-5, atol=1e-6)
    assert (result.best_loss < result.losses[0]).all()
    assert result.best_loss.equal(result.losses.nan_to_num(torch.inf).amin(0))
    again = call.draw(latents=result.latents, generator=result.generator())
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
    last, _ = call.preview(latents=result.latents, generator=result.generator())  # of the noise after the last move
    assert (contrastive_loss(last, plain) < result.losses[-1]).all()


def state_of(pipe) -> dict[str, Any]:
    """What a run must leave as it was: attributes, scheduler, and each module's flags, hooks and parameters."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "attributes": {name: id(value) for name, value in vars(pipe).items()},
        "scheduler": {name: plain_value(value) for name, value in vars(pipe.scheduler).items()},
        **{name: [state_of_module(module) for module in part.modules()] for name, part in parts.items()},
    }


def plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def state_of_module(module: torch.nn.Module) -> tuple:
    parameters = [(id(each), each._version, each.requires_grad, each.dtype) for each in module.parameters(False)]
    hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
    return module.training, hooks, sorted(vars(module)), parameters
