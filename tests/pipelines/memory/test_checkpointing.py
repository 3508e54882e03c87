"""Checkpointing stores less, with the same images and gradients, and leaves the modules as they were."""

import copy
import dataclasses
import functools
import gc
from typing import Literal

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
)
from peft import LoraConfig
from tiers import slow_except
from tiny_pipelines import BUILDERS, call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import CNO, ReNO, ReNOStableDiffusionPipeline, optimize_noise
from noiseopt.evaluation.live_bytes import LiveBytes
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.memory.checkpointing import POLICIES
from noiseopt.pipelines.memory.graph_size import GraphTooLarge, SavedBytes
from noiseopt.pipelines.registry import METHODS, list_methods
from noiseopt.private_names import BLOCK_SETTINGS

FAMILIES = ["sd", "sdxl", "sd3", "flux"]
ONE_STEP = {**call_arguments("sd"), "num_inference_steps": 1}
FREE = "noiseopt.pipelines.memory.checkpointing.free_memory"
FREE_FOR_CHUNKS = "noiseopt.pipelines.loop.free_memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching(NoiseOptimizer):
    """Method that leaves the noise as it is and records the problem, gradients, policies and chunk sizes."""

    gradient: Literal["full", "frozen"] = "full"
    problems: list = dataclasses.field(default_factory=list)
    gradients: list = dataclasses.field(default_factory=list)
    policies: list = dataclasses.field(default_factory=list)
    sizes: list = dataclasses.field(default_factory=list)

    @property
    def problem(self):
        return self.problems[-1]

    def objective(self, pipe):
        def look(sample):
            weights = torch.linspace(-1, 1, sample.images[0].numel()).view_as(sample.images[0])
            self.policies.append(sample.sampler.checkpoints.policy)
            self.sizes.append(sample.chunk_size)
            return (sample.images * weights).flatten(1).sum(1)

        return FunctionObjective(look)

    def start(self, problem):
        self.problems.append(problem)

    def step(self, run, gradient, state):
        self.gradients.append(gradient)
        return run.noise


def watched(pipe, checkpointing, prompt="a red b", gradient="full", chunk_size=None, steps=2, **arguments):
    method = Watching(checkpointing=checkpointing, gradient=gradient, chunk_size=chunk_size, steps=steps)
    arguments = {"generator": torch.Generator().manual_seed(0), "callbacks": [], **arguments}
    return method, optimize_noise(pipe, prompt, method, **arguments)


@functools.cache
def double_pipeline(family):
    return quiet(BUILDERS[family]()).to(torch.float64)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def assert_policies_agree(pipe, tolerance=1e-12, **arguments):
    """Assert that images and gradients of all policies equal those of "none"."""
    kept, expected = watched(pipe, "none", **arguments)
    assert kept.gradients[0].abs().max() > 0
    for policy in POLICIES[1:]:
        method, result = watched(pipe, policy, **arguments)
        assert torch.equal(result.images, expected.images)
        assert relative(method.gradients[0], kept.gradients[0]) < tolerance
        assert result.provenance["checkpointing"] == policy
    return kept.gradients[0]


def modules_of(pipe):
    roots = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [module for root in roots for module in root.modules()]


def settings_of(pipe):
    return [
        {name: vars(module)[name] for name in BLOCK_SETTINGS if name in vars(module)} for module in modules_of(pipe)
    ]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("family", slow_except(FAMILIES, "sd"))
def test_images_and_gradients_are_those_of_none(family, steps):
    pipe = double_pipeline(family)
    before = settings_of(pipe)
    assert_policies_agree(pipe, **call_arguments(family) | {"num_inference_steps": steps})
    assert settings_of(pipe) == before


def peak_of(policy, steps, gradient="full"):
    """Return the peak memory of one evaluation and its backward pass, after which the graph is freed."""
    arguments = {"num_inference_steps": steps, "guidance_scale": 1.0, "height": 64, "width": 64}
    method, _ = watched(tiny_pipeline("sd"), policy, steps=1, **arguments)
    sampler, leaf = method.problem.sampler, method.problem.noise.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with sampler.checkpoints, LiveBytes() as live:
            torch.autograd.grad(sampler.images(leaf, gradient).square().sum(), leaf)
    finally:
        gc.enable()
    assert live.held < 1e-2 * live.peak
    return live.peak


@pytest.mark.slow
def test_memory_of_blocks_is_less_and_that_of_steps_hardly_grows():
    few, many = ({policy: peak_of(policy, count) for policy in POLICIES} for count in (2, 6))
    assert few["blocks"] < 0.5 * few["none"] and many["blocks"] < 0.5 * many["none"]
    assert many["none"] > 2 * few["none"] and many["blocks"] > 1.5 * few["blocks"]
    assert many["steps"] < 1.3 * few["steps"] and many["steps"] < 0.5 * many["blocks"]


@pytest.mark.slow
def test_a_frozen_gradient_keeps_less_of_the_decoder():
    assert peak_of("blocks", 2, "frozen") < 0.6 * peak_of("none", 2, "frozen")
    assert_policies_agree(double_pipeline("sd"), gradient="frozen", **ONE_STEP)


def test_schedulers_that_remember_and_draw_are_outside():
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", beta_schedule="scaled_linear")
    pipe = copy.copy(double_pipeline("sd"))
    vars(pipe)["scheduler"] = scheduler
    assert_policies_agree(pipe, **call_arguments("sd") | {"num_inference_steps": 3}, num_images_per_prompt=2)


def test_modules_are_as_before_also_after_an_exception_and_with_settings_of_the_user():
    pipe = quiet(BUILDERS["sd"]())
    own = lambda module, *args: module(*args)  # noqa: E731
    pipe.unet.enable_gradient_checkpointing(own)
    before, seen = settings_of(pipe), []

    def fail_later(images, prompts):
        if len(seen) > 1:  # the first call is by `try_out`
            raise RuntimeError("broken")
        seen.append(settings_of(pipe))
        return images.flatten(1).mean(1)

    for policy in ("blocks", "steps"):
        seen.clear()
        method = ReNO(rewards=fail_later, views=0, checkpointing=policy)
        with pytest.raises(RuntimeError, match="broken"):
            optimize_noise(pipe, "a", method, callbacks=[], **call_arguments("sd"))
        assert settings_of(pipe) == before and seen.pop() != before
    blocks = [module for module in pipe.unet.modules() if hasattr(module, "gradient_checkpointing")]
    assert blocks and all(module._gradient_checkpointing_func is own for module in blocks)


def test_a_lora_that_the_call_scales_is_scaled_when_it_is_computed_again():
    pipe = quiet(BUILDERS["sd"]())
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    pipe.to(torch.float64)
    scaled = assert_policies_agree(pipe, cross_attention_kwargs={"scale": 0.2}, **ONE_STEP)
    assert relative(watched(pipe, "none", **ONE_STEP)[0].gradients[0], scaled) > 1e-3


def test_a_denoiser_without_blocks_is_kept_by_its_calls():
    pipe = copy.copy(double_pipeline("sd"))
    vars(pipe)["unet"] = copy.copy(pipe.unet)
    vars(pipe.unet)["_supports_gradient_checkpointing"] = False
    held = {}
    for policy in ("none", "blocks"):
        method, _ = watched(pipe, policy, steps=1, **call_arguments("sd"))
        sampler = method.problem.sampler
        with sampler.checkpoints, SavedBytes() as saved:
            latents = sampler.run(method.problem.noise.clone().requires_grad_(), "full", False, "latent")
        held[policy] = saved.held
        del latents
    assert held["blocks"] < 0.1 * held["none"]
    assert_policies_agree(pipe, **ONE_STEP)


def test_random_numbers_of_a_denoiser_are_the_same_again():
    pipe = copy.copy(double_pipeline("sd"))
    vars(pipe)["unet"] = copy.copy(pipe.unet)
    forward = pipe.unet.forward
    vars(pipe.unet)["forward"] = lambda sample, *args, **kwargs: forward(
        torch.nn.functional.dropout(sample, 0.5), *args, **kwargs
    )
    found = []
    for policy in ("none", "steps"):
        torch.manual_seed(3)
        found.append(watched(pipe, policy, **ONE_STEP)[0].gradients[0])
    assert relative(found[1], found[0]) < 1e-12


def test_autocast_is_the_same_again():
    pipe = tiny_pipeline("sd")
    with torch.autocast("cpu", torch.bfloat16):
        low = assert_policies_agree(pipe, 1e-5, **ONE_STEP)
    assert relative(low, watched(pipe, "none", **ONE_STEP)[0].gradients[0]) > 1e-4


def test_a_controlnet_is_computed_again_too():
    base = quiet(sd_pipeline()).to(torch.float64)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)).double().eval()
    for parameter in controlnet.parameters():  # initialized with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {**base.components, "controlnet": controlnet}
    pipe = quiet(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    picture = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    steered = assert_policies_agree(pipe, 1e-11, image=picture, **ONE_STEP)
    assert relative(steered, watched(base, "none", **ONE_STEP)[0].gradients[0]) > 1e-3


def counted(pipe, **arguments):
    """Return method and result of a run, and the number of denoiser calls."""
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        return *watched(pipe, **arguments), len(calls)
    finally:
        handle.remove()


@functools.cache
def held_by(policy):
    """Return the bytes of the graph of one evaluation."""
    method, _ = watched(tiny_pipeline("sd"), policy, steps=1, **call_arguments("sd"))
    with method.problem.sampler.checkpoints, SavedBytes() as saved:
        images = method.problem.sampler.images(method.problem.noise.clone().requires_grad_(), "full")
    del images
    return saved.peak


@pytest.mark.parametrize(
    ("fitting", "expected"), [("none", "none"), ("blocks", "blocks"), ("steps", "steps"), (None, "steps")]
)
def test_auto_takes_the_first_policy_whose_graph_takes_half_of_what_is_free(monkeypatch, fitting, expected):
    asked = []
    free = 2 * held_by(fitting) if fitting else 0
    monkeypatch.setattr(FREE, lambda device: asked.append(1) or free)
    pipe, arguments = tiny_pipeline("sd"), {**call_arguments("sd"), "steps": 3}
    before = settings_of(pipe)
    method, result, calls = counted(pipe, checkpointing="auto", **arguments)
    kept, plain, plain_calls = counted(pipe, checkpointing="none", **arguments)
    assert method.policies == [expected] * 3 and result.provenance["checkpointing"] == expected
    assert result.provenance["settings"]["checkpointing"] == "auto" and settings_of(pipe) == before
    assert len(asked) == min(2, POLICIES.index(expected) + 1)  # in the first step only, without the last policy
    assert torch.equal(result.images, plain.images)
    assert relative(method.gradients[1], kept.gradients[1]) < 1e-5
    if expected == "none":
        assert calls == plain_calls


def test_auto_knows_that_steps_do_not_help_a_frozen_gradient(monkeypatch):
    monkeypatch.setattr(FREE, lambda device: 0)
    _, result = watched(tiny_pipeline("sd"), "auto", gradient="frozen", **call_arguments("sd"))
    assert result.provenance["checkpointing"] == "blocks"


def test_a_graph_that_is_given_up_is_gone_at_once():
    """It is freed without a garbage collection, although this scheduler stores its last outputs."""
    pipe = copy.copy(tiny_pipeline("sd"))
    vars(pipe)["scheduler"] = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    method, _ = watched(pipe, "auto", steps=1, **call_arguments("sd"))
    sampler, leaf = method.problem.sampler, method.problem.noise.clone().requires_grad_()
    limit = int(0.9 * held_by("none"))
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            with pytest.raises(GraphTooLarge), SavedBytes(limit):
                sampler.images(leaf, "full")
            assert live.peak > limit / 2
            assert live.held < 1e-2 * live.peak
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_number_of_images_at_a_time_is_what_has_to_fit(monkeypatch):
    pipe, arguments = tiny_pipeline("sd"), {**call_arguments("sd"), "num_images_per_prompt": 3}
    one = held_by("none")
    monkeypatch.setattr(FREE, lambda device: 2.2 * one)
    for size, expected in ((1, "none"), (None, "blocks")):
        _, result = watched(pipe, "auto", chunk_size=size, **arguments)
        assert result.provenance["checkpointing"] == expected
    monkeypatch.setattr(FREE, lambda device: 0)
    method, result = watched(pipe, "auto", chunk_size=1, **arguments)
    kept, _ = watched(pipe, "none", **arguments)
    assert result.provenance["checkpointing"] == "steps"
    assert relative(method.gradients[0], kept.gradients[0]) < 1e-4


@pytest.mark.parametrize(
    ("policy", "images", "size"), [("none", 3, None), ("blocks", 3, None), ("steps", 3, None), ("steps", 1, 1)]
)
def test_two_automatics_cut_the_batch_last(monkeypatch, policy, images, size):
    monkeypatch.setattr(FREE_FOR_CHUNKS, lambda device: int(2.1 * images * held_by(policy)))
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 3}
    method, result = watched(tiny_pipeline("sd"), "auto", chunk_size="auto", **arguments)
    assert (result.provenance["checkpointing"], method.sizes) == (policy, [size] * 2)


def test_a_policy_and_automatic_chunks(monkeypatch):
    monkeypatch.setattr(FREE_FOR_CHUNKS, lambda device: 0)
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 3}
    method, result = watched(tiny_pipeline("sd"), "blocks", chunk_size="auto", **arguments)
    assert (result.provenance["checkpointing"], method.sizes) == ("blocks", [1, 1])


def test_cno_through_the_denoiser():
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 2}

    def run(policy):
        method = CNO(gradient="full", window_size=4, checkpointing=policy)
        return optimize_noise(
            double_pipeline("sd"), "a", method, generator=torch.Generator().manual_seed(0), **arguments
        )

    kept = run("none")
    assert kept.initial_noise is not None and (kept.noise - kept.initial_noise).abs().max() > 1e-3
    for policy in ("blocks", "steps"):
        assert relative(run(policy).noise, kept.noise) < 1e-10


def test_a_pipeline_takes_it_by_name():
    pipe = quiet(sd_pipeline(ReNOStableDiffusionPipeline))
    outputs = [
        pipe(
            "a",
            rewards="brightness",
            steps=2,
            method_kwargs={"checkpointing": policy},
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **call_arguments("sd"),
        )
        for policy in ("none", "steps")
    ]
    assert outputs[1].noise_result.provenance["checkpointing"] == "steps"
    torch.testing.assert_close(outputs[1].images, outputs[0].images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list_methods())
def test_other_values_are_refused(name):
    needed = {} if name == "cno" else {"rewards": "brightness"}
    with pytest.raises(ValueError, match="Expected `checkpointing` to be.*'all'"):
        METHODS[name](checkpointing="all", **needed).check()
