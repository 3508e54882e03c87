"""Batches in chunks: the images and gradients of the whole batch in the memory of one chunk."""

import copy
import functools
import gc

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from problems import problem_of
from tiers import slow_except
from tiny_features import build_features
from tiny_pipelines import BUILDERS, call_arguments, quiet, tiny_pipeline

from noiseopt import ReNO, RewardSum, optimize_noise
from noiseopt.pipelines.loop import chunk_size_of
from noiseopt.pipelines.memory.chunks import BatchLayout, WholeBatchDraws
from noiseopt.pipelines.memory.graph_size import SavedBytes
from noiseopt.rewards import DPP, SetRewardSum

FAMILIES = ["sd", "sdxl", "sd3", "flux"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STOCHASTIC = [LCMScheduler(**BETAS), EulerAncestralDiscreteScheduler(**BETAS), DDPMScheduler(**BETAS)]
MULTISTEP = [DPMSolverMultistepScheduler(**BETAS), UniPCMultistepScheduler(**BETAS)]


def arguments_for(family, prompt):
    """Return the arguments of a call; Flux needs a negative prompt for each prompt."""
    arguments = call_arguments(family)
    if family == "flux" and not isinstance(prompt, str):
        arguments["negative_prompt"] = ["b"] * len(prompt)
    return arguments


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def with_scheduler(scheduler, family="sd"):
    pipe = copy.copy(tiny_pipeline(family))
    vars(pipe)["scheduler"] = scheduler
    return pipe


@functools.cache
def double_pipeline(family):
    return quiet(BUILDERS[family]()).to(torch.float64)


def assert_same_images(problem, tolerance=1e-5):
    joint = problem.sampler.images(problem.noise)
    spread = (joint[0] - joint[-1]).abs().max()
    for size in (1, 3):
        chunked = problem.sampler.images(problem.noise, chunk_size=size)
        assert (chunked - joint).abs().max() < tolerance < 1e-2 * spread


def gradient_of(draw, noise, **arguments):
    """Return the output, and the gradient of a fixed random projection of it."""
    leaf = noise.clone().requires_grad_()
    drawn = draw(leaf, "full", **arguments)
    weights = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(drawn)
    return drawn.detach(), torch.autograd.grad((drawn * weights).sum(), leaf)[0]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("several", [False, True], ids=["one generator", "one each"])
@pytest.mark.parametrize("prompt", ["a red b", ["a red b", "c 2"]], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_chunks_are_those_of_the_batch(family, prompt, several):
    count = 4 if isinstance(prompt, str) else 2
    arguments = {**arguments_for(family, prompt), "num_images_per_prompt": count}
    if several:
        arguments["generator"] = generators(4)
    assert_same_images(problem_of(tiny_pipeline(family), prompt, **arguments))


@pytest.mark.parametrize("several", [False, True], ids=["one generator", "one each"])
@pytest.mark.parametrize("scheduler", STOCHASTIC, ids=lambda scheduler: type(scheduler).__name__)
def test_noise_added_on_the_way_is_that_of_the_batch(scheduler, several):
    pipe = with_scheduler(scheduler)
    arguments = {**call_arguments("sd"), "num_inference_steps": 3, "num_images_per_prompt": 4}
    if several:
        arguments["generator"] = generators(4)
    problem = problem_of(pipe, **arguments)
    assert_same_images(problem, 2e-5)
    if not several:  # the difference without the draws of the whole batch
        part = copy.copy(problem.sampler.chunk([2]))
        part.batch_rows = None
        alone, joint = part.images(problem.noise[2:3]), problem.sampler.images(problem.noise)[2:3]
        assert (alone - joint).abs().max() > 1e-3


def test_prompts_may_be_embeddings_and_noise_may_be_coupled():
    pipe = tiny_pipeline("sd")
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(["a", "b 2"], "cpu", 1, True, ["c", "d"])
    arguments = {**call_arguments("sd"), "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same_images(problem_of(pipe, None, **arguments, num_images_per_prompt=2))
    assert_same_images(problem_of(pipe, "a", **call_arguments("sd"), num_images_per_prompt=4, noise_sampler="coupled"))


@pytest.mark.parametrize("family", slow_except(FAMILIES, "sd"))
def test_gradients_of_chunks_are_those_of_the_batch(family):
    arguments = {**arguments_for(family, ["a red b", "c 2"]), "num_images_per_prompt": 2}
    problem = problem_of(double_pipeline(family), ["a red b", "c 2"], **arguments)
    for draw in (problem.sampler.images, problem.sampler.x0):
        images, joint = gradient_of(draw, problem.noise)
        assert joint.abs().max() > 0
        for size in (1, 3):
            chunked_images, chunked = gradient_of(draw, problem.noise, chunk_size=size)
            assert relative(chunked_images, images) < 1e-5
            assert relative(chunked, joint) < 1e-5


def test_frozen_gradients_and_previews_are_those_of_the_batch():
    problem = problem_of(double_pipeline("sd"), **call_arguments("sd"), num_images_per_prompt=3)
    for arguments in ({"gradient": "frozen"}, {"gradient": "full", "preview": True}):
        found = []
        for size in (None, 1):
            leaf = problem.noise.clone().requires_grad_()
            images = problem.sampler.images(leaf, chunk_size=size, **arguments)
            found.append(torch.autograd.grad(images.square().sum(), leaf)[0])
        assert relative(found[1], found[0]) < 1e-5


def test_second_derivatives_are_refused():
    problem = problem_of(tiny_pipeline("sd"), **call_arguments("sd"), num_images_per_prompt=2)
    leaf = problem.noise.clone().requires_grad_()
    images = problem.sampler.images(leaf, "full", chunk_size=1)
    (gradient,) = torch.autograd.grad(images.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_chunk_as_large_as_the_batch_is_the_batch():
    problem = problem_of(tiny_pipeline("sd"), **call_arguments("sd"), num_images_per_prompt=2)
    images = problem.sampler.images(problem.noise, chunk_size=2)
    assert torch.equal(images, problem.sampler.images(problem.noise)) and not problem.sampler.chunks.keys() - {(0,)}


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=lambda scheduler: type(scheduler).__name__)
def test_nothing_keeps_the_graph_of_a_run(scheduler):
    """It is freed without a garbage collection, although these schedulers store their last outputs."""
    arguments = {**call_arguments("sd"), "num_inference_steps": 3, "num_images_per_prompt": 2}
    sampler = (problem := problem_of(with_scheduler(scheduler), **arguments)).sampler
    gc.disable()
    try:
        with SavedBytes() as saved:
            images = sampler.images(problem.noise.clone().requires_grad_(), "full")
            x0 = sampler.x0(problem.noise.clone().requires_grad_(), "full")
        assert saved.held == saved.peak > 0
        del images, x0
        assert saved.held == 0
    finally:
        gc.enable()


def peak_of(batch, chunk_size):
    arguments = {**call_arguments("sd"), "num_inference_steps": 3, "num_images_per_prompt": batch}
    problem = problem_of(with_scheduler(DPMSolverMultistepScheduler(**BETAS)), **arguments)
    with SavedBytes() as saved:
        gradient_of(problem.sampler.images, problem.noise, chunk_size=chunk_size)
    return saved.peak


@pytest.mark.slow
def test_graphs_of_chunks_take_the_memory_of_one_image():
    single = peak_of(1, 1)
    assert peak_of(8, 1) < 1.15 * single
    assert peak_of(8, None) > 6 * single
    assert 1.7 * single < peak_of(8, 2) < 2.3 * single


def set_peak(total, images, chunk_size):
    leaf = images.clone().requires_grad_()
    with SavedBytes() as saved:
        total(leaf, chunk_size=chunk_size).total.backward()
    return saved.peak, leaf.grad


@pytest.mark.parametrize("features", ["dinov2", "dinov2_patch", "lpips"])
@pytest.mark.parametrize("references", [0, 2])
def test_set_rewards_in_chunks(features, references):
    built = build_features(features).double()
    total = SetRewardSum([("pairwise", built, 2.0), (DPP(build_features("dinov2").double()), 3.0)])
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.rand(references, 3, 40, 40, dtype=torch.float64) if references else None
    leaves = [images.clone().requires_grad_() for _ in range(3)]
    outputs = [total(leaf, known, chunk_size=size) for leaf, size in zip(leaves, (None, 1, 2), strict=True)]
    for leaf, output in zip(leaves, outputs, strict=True):
        (2 * output.total).backward()
        torch.testing.assert_close(output.total, outputs[0].total, rtol=1e-6, atol=0)
        assert output.components.keys() == outputs[0].components.keys()
        assert relative(leaf.grad, leaves[0].grad) < 1e-5
    assert not total(images, known, chunk_size=2).total.requires_grad


def test_set_rewards_in_chunks_take_the_memory_of_one_image():
    total = SetRewardSum(DPP(build_features("dinov2")))
    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small, large = (set_peak(total, images[:count], 1)[0] for count in (2, 16))
    joint = set_peak(total, images, None)[0]
    one_by_one = set_peak(total, images[:2], None)[0] / 2
    pixels = images[0].numel() * images.element_size()
    assert large - small <= 1.1 * 14 * pixels + 0.15 * one_by_one  # the attached gradient is as large as the images
    assert joint > 6 * one_by_one


def test_set_rewards_of_weight_zero_have_no_gradient_in_chunks():
    total = SetRewardSum([(DPP(build_features("dinov2")), 0.0)])
    images = torch.rand(3, 3, 40, 40).requires_grad_()
    output = total(images, chunk_size=1)
    assert output.total == 0 and output.components["dpp"] > 0


def contrast(images, prompts):
    """Return a reward that depends on the prompt, and nonlinearly on the image."""
    sizes = torch.tensor([float(len(prompt)) for prompt in prompts]).to(images)
    return sizes * images.square().flatten(1).mean(1)


def test_rewards_in_chunks():
    total = RewardSum({"brightness": 1.0, contrast: 2.0, "jpeg_compressibility": 0.0})
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    for texts in (prompts, "one"):
        leaves = [images.clone().requires_grad_() for _ in range(3)]
        outputs = [total(leaf, texts, chunk_size=size) for leaf, size in zip(leaves, (None, 1, 2), strict=True)]
        for leaf, output in zip(leaves, outputs, strict=True):
            output.total.square().sum().backward()
            torch.testing.assert_close(output.total, outputs[0].total)
            torch.testing.assert_close(leaf.grad, leaves[0].grad)
            for name, scores in output.components.items():
                torch.testing.assert_close(scores, outputs[0].components[name])
    with pytest.raises(ValueError, match="Expected 5 prompts"):
        total(images, [*prompts, "f"], chunk_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mode": "parity"}, {"views": 2}], ids=["parity", "views"])
@pytest.mark.parametrize("chunk_size", slow_except([1, 2, "auto"], 2))
def test_a_run_in_chunks_is_the_run(settings, chunk_size):
    pipe = double_pipeline("sd")
    arguments = {**call_arguments("sd"), "num_images_per_prompt": 3}

    def run(size):
        method = ReNO(rewards={contrast: 1.0}, steps=4, chunk_size=size, **settings)
        return optimize_noise(pipe, "a red b", method, generator=torch.Generator().manual_seed(0), **arguments)

    joint, chunked = run(None), run(chunk_size)
    assert (joint.noise - joint.noise.mean()).norm() > 1 and joint.best_step.max() > 0
    assert relative(chunked.noise, joint.noise) < 1e-5
    torch.testing.assert_close(chunked.losses, joint.losses, rtol=1e-5, atol=1e-6)
    assert chunked.provenance["settings"]["chunk_size"] == chunk_size


def per_image_arguments():
    pictures = torch.rand(4, 3, 32, 32)
    return [("image", pictures), ("control_image", [object(), object()]), ("ip_adapter_image", object()),
            ("cross_attention_kwargs", {"boxes": pictures})]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), per_image_arguments())
def test_what_cannot_be_told_apart_is_refused_by_name(name, value):
    layout = BatchLayout({"prompt": "a", "num_images_per_prompt": 4, name: value}, 4)
    with pytest.raises(ValueError, match=f"`{name}`.*chunk_size=None"):
        layout.request_of([0])


def test_arguments_are_those_of_the_prompts():
    embeds = torch.arange(4.0).view(2, 1, 2)
    request = {
        "prompt": ["a", "b"],
        "prompt_2": ("c", "d"),
        "negative_prompt": "n",
        "negative_prompt_embeds": embeds,
        "num_images_per_prompt": 3,
        "sigmas": [1.0, 0.5],
        "original_size": (32, 32),
    }
    found = BatchLayout(request, 6).request_of([2, 3, 4])
    assert (found["prompt"], found["prompt_2"], found["negative_prompt"]) == (["a", "b", "b"], ("c", "d", "d"), "n")
    assert torch.equal(found["negative_prompt_embeds"], embeds[[0, 1, 1]])
    assert (found["num_images_per_prompt"], found["sigmas"], found["original_size"]) == (1, [1.0, 0.5], (32, 32))
    single = BatchLayout({"prompt": "a", "num_images_per_prompt": 6}, 6).request_of([1, 5])
    assert single == {"prompt": "a", "num_images_per_prompt": 2}


def test_encodings_are_those_of_the_images():
    layout = BatchLayout({"prompt": ["a", "b"], "num_images_per_prompt": 2}, 4)
    images, texts, ids = torch.arange(12.0).view(4, 3, 1), torch.arange(2.0).view(2, 1, 1), torch.zeros(7, 3)
    value = ((images, None), [images[i] for i in range(4)], {"texts": texts, "ids": ids})
    (first, nothing), per_image, named = layout.encoded_of(value, [1, 2])
    assert torch.equal(first, images[1:3]) and nothing is None and torch.equal(torch.stack(per_image), images[1:3])
    assert torch.equal(named["texts"], texts) and named["ids"] is ids
    with pytest.raises(ValueError, match=r"each of 4 images.*\(5, 1, 1\).*chunk_size=None"):
        layout.encoded_of(torch.zeros(5, 1, 1), [0])


def test_a_number_is_refused_and_auto_falls_back_where_the_call_cannot_be_taken_apart():
    problem = problem_of(tiny_pipeline("sd"), **call_arguments("sd"), num_images_per_prompt=2)
    problem.sampler.request["image"] = [object(), object()]
    with pytest.raises(ValueError, match="`image`.*chunk_size=None"):
        chunk_size_of(ReNO(rewards=contrast, chunk_size=1), problem)
    assert chunk_size_of(ReNO(rewards=contrast, chunk_size="auto"), problem) is None


def test_draws_of_others_are_left_alone():
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with WholeBatchDraws(ours, 4, [1, 3]):
        found = torch.randn((2, 5), generator=ours)
        other = torch.randn((2, 5), generator=theirs)
        scalar = torch.randn(3, 5, generator=theirs)
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(other, torch.randn((2, 5), generator=fresh))
    assert torch.equal(scalar, torch.randn((3, 5), generator=fresh))
    assert torch.equal(found, torch.randn((4, 5), generator=torch.Generator().manual_seed(0))[[1, 3]])
