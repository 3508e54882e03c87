"""Pipelines that share modules or run at the same time do not affect one another."""

import functools
import sys
import threading
from typing import Any

import pytest
import torch
from compositions import Painter, draw, embeddings_of, state_of
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from diffusers.utils import dynamic_modules_utils
from problems import generator, redness
from tiers import slow_except
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, sdxl_pipeline

import noiseopt
from noiseopt import NoiseOptimizationMixin, ReNO, ReNOStableDiffusionPipeline, ReNOTurboPipeline, optimize_noise


def dtypes_of(pipe) -> dict[str, Any]:
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def half_precision_with_a_float32_vae(build):
    pipe = quiet(build()).to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    return pipe


def test_a_pipeline_made_of_another_shares_its_modules_and_converts_none():
    stock = half_precision_with_a_float32_vae(sdxl_pipeline)
    dtypes, state = dtypes_of(stock), state_of(stock)
    pipe = ReNOTurboPipeline.from_pipe(stock)
    assert type(pipe) is ReNOTurboPipeline and pipe.unet is stock.unet and pipe.vae is stock.vae
    assert dtypes_of(stock) == dtypes == dtypes_of(pipe) and set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert state_of(stock) == state and pipe.config.keys() == stock.config.keys()
    assert pipe.to(torch.bfloat16) is pipe and pipe.vae.dtype == torch.bfloat16  # on request, as in any pipeline


def test_a_pipeline_made_of_another_draws_the_same_and_optimizes():
    stock, arguments = quiet(sdxl_pipeline()).to(torch.bfloat16), call_arguments("sdxl")
    plain = draw(stock, **arguments)
    pipe = quiet(ReNOTurboPipeline.from_pipe(stock))
    assert torch.equal(draw(pipe, **arguments), plain)
    output = pipe("a b", rewards=redness, steps=2, generator=generator(), **arguments)
    expected = optimize_noise(stock, "a b", ReNO(rewards=redness, steps=2), generator=generator(), **arguments)
    assert torch.equal(output.noise_result.noise, expected.noise)
    assert torch.equal(draw(stock, **arguments), plain)


def test_a_dtype_that_is_asked_for_is_given():
    stock = quiet(sdxl_pipeline())
    assert set(dtypes_of(ReNOTurboPipeline.from_pipe(stock, dtype=torch.bfloat16)).values()) == {torch.bfloat16}


def test_a_pipeline_made_of_ours_takes_other_parts():
    ours = ReNOStableDiffusionPipeline.from_pipe(sd_pipeline())
    vae = sd_pipeline().vae
    other = ReNOStableDiffusionPipeline.from_pipe(ours, vae=vae, scheduler=ours.scheduler)
    assert other.vae is vae and other.unet is ours.unet and type(other.scheduler) is type(ours.scheduler)


class InANotebook:
    """Scope of a class that cannot be imported by module and name."""

    class Painter(NoiseOptimizationMixin, StableDiffusionPipeline):
        pass


def test_a_class_that_nobody_can_import_is_saved_as_its_stock_class(tmp_path):
    pipe = InANotebook.Painter(**sd_pipeline().components, requires_safety_checker=False)
    pipe.save_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
    assert InANotebook.Painter.load_config(tmp_path)["_class_name"] == "StableDiffusionPipeline"


def test_a_class_of_another_package_is_saved_as_an_import_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setitem(sys.modules, "diffusers_modules.local.pipeline", None)  # loaded by earlier tests
    monkeypatch.delitem(sys.modules, "diffusers_modules.local.pipeline")
    Painter.from_pipe(sd_pipeline()).save_pretrained(tmp_path / "painter")
    code = (tmp_path / "painter/pipeline.py").read_text()
    assert code.endswith("\n\nfrom compositions import Painter\n")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "painter", custom_pipeline="pipeline")
    load = {"custom_pipeline": "pipeline", "trust_remote_code": True, "safety_checker": None}
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "painter", **load)) is Painter
    assert type(Painter.from_pretrained(tmp_path / "painter", safety_checker=None)) is Painter


STOCK = {type(build()): family for family, build in BUILDERS.items()}
OURS = {name: getattr(noiseopt, name) for name in noiseopt.__all__ if name.endswith("Pipeline")}


@pytest.fixture(params=OURS)
def ours(request) -> tuple[Any, Any, str]:
    """A tiny pipeline of each of our classes, its stock class, and its family."""
    stock = next(base for base in OURS[request.param].__mro__ if base in STOCK)
    return quiet(OURS[request.param](**BUILDERS[STOCK[stock]]().components)), stock, STOCK[stock]


def test_diffusers_converts_our_pipelines_as_those_of_the_stock_class(ours):
    pipe, stock, family = ours
    text = AutoPipelineForText2Image.from_pipe(pipe)
    assert type(text) is stock and text.vae is pipe.vae
    if family != "sd3":  # the tiny one lacks its third text encoder, which `from_pipe` asks for
        image = AutoPipelineForImage2Image.from_pipe(pipe)
        assert type(image).__name__ == stock.__name__.replace("Pipeline", "Img2ImgPipeline")
        assert image.vae is pipe.vae


@pytest.mark.slow
def test_what_our_pipelines_save_is_loaded_by_stock_classes(ours, tmp_path):
    pipe, stock, family = ours
    pipe.save_pretrained(tmp_path)
    without = {name: None for name, part in pipe.components.items() if part is None}
    expected = draw(quiet(stock(**pipe.components)), **call_arguments(family))
    for loader in (stock, DiffusionPipeline, AutoPipelineForText2Image):
        loaded = loader.from_pretrained(tmp_path, **without)
        assert type(loaded) is stock
        torch.testing.assert_close(draw(quiet(loaded), **call_arguments(family)), expected, rtol=0, atol=1e-5)


@pytest.fixture
def turns():
    """Return a function that runs functions concurrently, one thread each, and returns their results."""

    def take(functions):
        results, barrier = [None] * len(functions), threading.Barrier(len(functions))

        def work(index):
            barrier.wait()
            results[index] = functions[index]()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return take


def pipelines_of_one_class():
    pipes = [quiet(ReNOStableDiffusionPipeline.from_pipe(sd_pipeline())) for _ in range(2)]

    def run(pipe, seed, steps):
        arguments = {**call_arguments("sd"), "num_inference_steps": steps, "generator": generator(seed)}
        return pipe("a b", rewards=redness, steps=3, output_type="pt", **arguments).noise_result

    return pipes, [lambda: run(pipes[0], 0, 1), lambda: run(pipes[1], 1, 3)]


def one_pipeline(family):
    """Return runs of one pipeline on encoded prompts, since the tokenizers of transformers are not thread-safe."""
    pipe = quiet(BUILDERS[family]())
    arguments = {**SIZE, **embeddings_of(pipe, family)}

    def run(seed, steps):
        method = ReNO(rewards=redness, steps=3)
        call = {**arguments, "num_inference_steps": steps, "generator": generator(seed)}
        return optimize_noise(pipe, None, method, reward_prompt="a b", **call)

    return [pipe], [lambda: run(0, 1), lambda: run(1, 3)]


def pipelines_that_share_modules():
    """Return runs that switch modules to other states: with dropout that is on, and with checkpointed blocks."""
    stock = quiet(sd_pipeline())
    arguments = {**SIZE, **embeddings_of(stock, "sd"), "num_inference_steps": 2, "guidance_scale": 3.0}
    for module in stock.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    stock.unet.train()
    pipes = [stock, *(type(stock)(**stock.components, requires_safety_checker=False) for _ in range(2))]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)

    def run(pipe, seed, checkpointing):
        method = ReNO(rewards=redness, steps=3, checkpointing=checkpointing)
        return optimize_noise(pipe, None, method, reward_prompt="a b", generator=generator(seed), **arguments)

    settings = zip(pipes, ("none", "blocks", "steps"), strict=True)
    return pipes, [functools.partial(run, pipe, seed, each) for seed, (pipe, each) in enumerate(settings)]


TOGETHER = {
    "pipelines that share modules": pipelines_that_share_modules,
    "two pipelines of a class": pipelines_of_one_class,
    "one pipeline": lambda: one_pipeline("sdxl"),
    "one pipeline that packs": lambda: one_pipeline("flux"),
}


@pytest.mark.parametrize("case", slow_except(TOGETHER, "one pipeline", "pipelines that share modules"))
def test_runs_at_the_same_time_find_what_they_find_alone(case, turns):
    pipes, runs = TOGETHER[case]()
    state = [state_of(pipe) for pipe in pipes]
    alone = [run() for run in runs]
    for found, expected in zip(turns(runs), alone, strict=True):
        assert torch.equal(found.noise, expected.noise) and torch.equal(found.losses, expected.losses)
        assert torch.equal(found.images, expected.images)
    assert [state_of(pipe) for pipe in pipes] == state
    assert torch.is_grad_enabled()


class Meeting:
    """Callback that stops at its first step until another thread is done, or 60 seconds have passed."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.met: bool | None = None

    def __call__(self, state) -> None:
        self.began.set()
        if self.met is None:
            self.met = self.go_on.wait(self.patience)

    patience = 60.0


def meet(pipe, other, meeting) -> None:
    """Start a run of one pipeline, and a run or call of another when it is at its first step."""

    def second():
        meeting.began.wait(60)
        other()
        meeting.go_on.set()

    thread = threading.Thread(target=second)
    thread.start()
    method = ReNO(rewards=redness, steps=2)
    optimize_noise(pipe, "a b", method, callbacks=meeting, **call_arguments("sd"))
    thread.join()


def test_runs_of_other_modules_do_not_wait():
    meeting, others = Meeting(), quiet(sd_pipeline())
    meet(quiet(sd_pipeline()), lambda: draw(others, **call_arguments("sd")), meeting)
    assert meeting.met
    meeting = Meeting()
    method = ReNO(rewards=redness, steps=2)
    meet(quiet(sd_pipeline()), lambda: optimize_noise(others, "a", method, **call_arguments("sd")), meeting)
    assert meeting.met


def test_runs_of_shared_modules_and_calls_of_one_pipeline_wait():
    pipe = quiet(ReNOStableDiffusionPipeline.from_pipe(sd_pipeline()))
    twin = quiet(StableDiffusionPipeline.from_pipe(pipe))
    method = ReNO(rewards=redness, steps=2)
    waiting = [
        lambda: optimize_noise(twin, "a", method, **call_arguments("sd")),
        lambda: pipe("a", rewards=redness, steps=2, **call_arguments("sd")),
        lambda: draw(pipe, **call_arguments("sd")),
        lambda: draw(pipe, noise_sampler="pink", **call_arguments("sd")),
    ]
    for other in waiting:
        meeting = Meeting()
        meeting.patience = 0.3
        meet(pipe, other, meeting)
        assert meeting.met is False


def own_call(pipe, callbacks=None, reward=redness, **arguments):
    output = pipe("a b", rewards=reward, steps=3, callbacks=callbacks, output_type="pt", **arguments)
    assert torch.equal(output.images, output.noise_result.images)
    return output.noise_result


def optimized(pipe, callbacks=None, reward=redness, **arguments):
    return optimize_noise(pipe, "a b", ReNO(rewards=reward, steps=3), callbacks=callbacks, **arguments)


@pytest.fixture(params=[own_call, optimized], ids=["own call", "optimize_noise"])
def way(request):
    """Return a pipeline, whose noise level depends on the number of steps, and a function that runs ReNO on it."""
    cls = ReNOStableDiffusionPipeline if request.param is own_call else StableDiffusionPipeline
    return quiet(sd_pipeline(cls)), request.param


OTHER = {"num_inference_steps": 5, "guidance_scale": 1.0, "height": 48, "width": 32}


@pytest.mark.parametrize("patched", slow_except([False, True], False))
def test_callbacks_and_rewards_may_draw_with_the_pipeline(way, patched):
    pipe, run = way
    if patched:
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: (step(*args, **kwargs)[0] * 0.9,)
    arguments = call_arguments("sd")
    expected, plain = run(pipe, generator=generator(), **arguments), draw(pipe, "c", **OTHER)
    previews, given = [], []

    def preview(state):
        previews.append(draw(state.pipeline, "c", **OTHER))
        previews.append(draw(pipe, "c", **OTHER))
        given.append(optimize_noise(pipe, "c", ReNO(rewards=redness, steps=2), generator=generator(3), **OTHER))

    def reward(images, prompts):
        previews.append(draw(pipe, "c", **OTHER))
        return redness(images, prompts)

    found = run(pipe, preview, reward, generator=generator(), **arguments)
    assert torch.equal(found.noise, expected.noise) and torch.equal(found.images, expected.images)
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.losses, expected.losses)
    assert len(previews) >= 9 and all(torch.equal(each, plain) for each in previews)
    assert len({result.losses.sum().item() for result in given}) == 1 and len(given) == 3
    assert torch.equal(draw(pipe, "c", **OTHER), plain)
