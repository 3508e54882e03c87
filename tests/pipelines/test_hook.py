"""The hook: nothing changes when it is off, and a run is the stock pipeline's own result, made better."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from problems import generator, problem_of, redness
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, sdxl_pipeline, tiny_pipeline

from noiseopt import (
    CNO,
    BestOfN,
    NeverTooLate,
    NoiseOptimizationMixin,
    ReNO,
    ReNOStableDiffusionPipeline,
    ReNOTurboPipeline,
    list_methods,
    optimize_noise,
)

FAMILIES = list(BUILDERS)
PIPELINES = {ReNOStableDiffusionPipeline: sd_pipeline, ReNOTurboPipeline: sdxl_pipeline}


def draw(pipe, prompt="a b", **kwargs) -> torch.Tensor:
    return pipe(prompt, output_type="pt", **kwargs).images


def reno(**settings) -> ReNO:
    return ReNO(**{"rewards": redness, "steps": 3, **settings})


@pytest.mark.parametrize("given", ["nothing", "generator", "latents"])
@pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
def test_without_an_optimizer_a_pipeline_is_bit_identical_to_its_stock_class(cls, given):
    stock = quiet(PIPELINES[cls]())
    ours = cls(**stock.components)
    ours.set_progress_bar_config(disable=True)
    arguments = {
        "nothing": dict,
        "generator": lambda: {"generator": generator(3)},
        "latents": lambda: {"latents": noise},
    }
    noise = torch.randn(1, 4, 16, 16, generator=generator(5))
    images = []
    for pipe in (stock, ours):
        torch.manual_seed(7)
        images.append(draw(pipe, num_inference_steps=2, **SIZE, **arguments[given]()))
    assert torch.equal(*images)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_evaluation_is_the_plain_result_and_a_redraw_is_the_best(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    before = draw(pipe, generator=generator(), **arguments)
    result = optimize_noise(pipe, "a b", reno(), generator=generator(), **arguments)
    assert torch.equal(result.initial_images, before)
    assert result.losses[0].item() == pytest.approx(-redness(before, None).item(), rel=1e-6)
    assert result.losses.min() < result.losses[0]
    again = draw(pipe, latents=result.latents, generator=result.generator(), **arguments)
    assert torch.equal(again, result.images)
    assert torch.equal(draw(pipe, generator=generator(), **arguments), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_given_in_the_form_that_the_pipeline_takes_are_where_a_run_begins(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    latents = optimize_noise(pipe, "a b", reno(steps=1), generator=generator(), **arguments).latents
    result = optimize_noise(pipe, "a b", reno(steps=1), latents=latents, generator=generator(8), **arguments)
    assert torch.equal(result.latents, latents)
    assert torch.equal(result.initial_images, draw(pipe, latents=latents, generator=generator(8), **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_agrees_with_finite_differences(family):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    # the other clamp has, on purpose, another gradient than the function's at saturated pixels
    problem = problem_of(pipe, "a b", clamp="hard", **arguments)
    sampler, noise = problem.sampler, problem.noise
    weights = torch.randn(1, 3, 32, 32, generator=generator(2))
    direction = torch.randn(noise.shape, generator=generator(1))
    leaf = noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((sampler.images(leaf, "full") * weights).sum(), leaf)

    def value(step: float) -> float:
        return (sampler.images(noise + step * direction) * weights).double().sum().item()

    step = 4e-3
    numeric = (value(step) - value(-step)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=2e-2)


def test_samples_of_a_batch_are_independent_problems():
    pipe = tiny_pipeline("sd")
    arguments = call_arguments("sd")
    prompts, seeds = ["a b", "c d"], [0, 1]
    batch = optimize_noise(pipe, prompts, reno(), generator=[generator(seed) for seed in seeds], **arguments)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = optimize_noise(pipe, prompt, reno(), generator=generator(seed), **arguments)
        torch.testing.assert_close(batch.noise[index], alone.noise[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(batch.losses[:, index], alone.losses[:, 0], rtol=1e-4, atol=1e-5)


def test_num_images_per_prompt_repeats_the_prompt():
    seen = []

    def spy(images, prompts):
        seen.append(list(prompts))
        return redness(images, prompts)

    optimize_noise(tiny_pipeline("sd"), ["a", "b"], reno(rewards=spy, steps=1), num_images_per_prompt=2, **SIZE)
    assert seen == [["a"], ["a", "a", "b", "b"]]  # first on a random image, to see that it works


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler, DDIMScheduler])
@pytest.mark.parametrize("seeded", [True, False])
def test_stochastic_samplers_see_the_same_noise_in_every_evaluation(scheduler, seeded):
    pipe = quiet(sd_pipeline(scheduler=scheduler(steps_offset=1) if scheduler is not LCMScheduler else LCMScheduler()))
    arguments = {"num_inference_steps": 3, "eta": 1.0, **SIZE}
    torch.manual_seed(4)
    plain = draw(pipe, generator=generator() if seeded else None, **arguments)
    torch.manual_seed(4)
    result = optimize_noise(pipe, "a b", reno(), generator=generator() if seeded else None, **arguments)
    assert torch.equal(result.initial_images, plain)
    again = draw(pipe, latents=result.latents, generator=result.generator(), **arguments)
    assert torch.equal(again, result.images)


def test_a_pipeline_class_returns_the_stock_output_with_the_result():
    pipe = ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments("sd")
    output = pipe("a b", rewards=redness, steps=3, generator=generator(), output_type="pt", **arguments)
    assert torch.equal(output.images, output.noise_result.images)
    alone = optimize_noise(tiny_pipeline("sd"), "a b", reno(), generator=generator(), **arguments)
    assert torch.equal(output.noise_result.noise, alone.noise)
    arguments |= {"steps": 3, "output_type": "pt", "return_dict": False}
    bare = pipe("a b", rewards=redness, generator=generator(), **arguments)
    images, _ = bare
    assert isinstance(bare, tuple) and torch.equal(images, output.images)
    assert torch.equal(bare.noise_result.noise, alone.noise)


def test_denoising_callbacks_fire_only_in_the_final_run():
    pipe = ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)
    pipe.set_progress_bar_config(disable=True)
    calls = []

    def on_step_end(pipe, index, timestep, kwargs):
        calls.append(index)
        return kwargs

    pipe("a b", rewards=redness, steps=4, callback_on_step_end=on_step_end, **call_arguments("sd"))
    assert calls == [0, 1]


@pytest.mark.parametrize(
    "method",
    [ReNO(rewards=redness, steps=2), CNO(steps=2), NeverTooLate(diversity={"pairwise": ("tiny_image", 5.0)}, steps=2)],
)
def test_a_denoising_callback_can_interrupt_the_final_run(method):
    pipe = type("Ours", (NoiseOptimizationMixin, StableDiffusionXLPipeline), {})(**tiny_pipeline("sdxl").components)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_arguments("sdxl"), "num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "latent"}
    seen = []

    def keep(pipe, index, timestep, kwargs):
        seen.append(kwargs["latents"])
        return kwargs

    def interrupt(pipe, index, timestep, kwargs):
        pipe._interrupt = index == 1
        return kwargs

    pipe("a b", method=method, generator=generator(), callback_on_step_end=keep, **call)
    stopped = pipe("a b", method=method, generator=generator(), callback_on_step_end=interrupt, **call)
    assert torch.equal(stopped.images, seen[1])
    assert len(seen) == 3 and not torch.equal(stopped.images, seen[2])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_no_trace_and_hands_out_its_best(error):
    pipe = ReNOTurboPipeline(**tiny_pipeline("sdxl").components)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.train()
    pipe.vae.requires_grad_(True)
    arguments = call_arguments("sdxl")
    state = {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
    scheduler = copy.deepcopy(vars(pipe.scheduler))
    before = draw(pipe, generator=generator(), **arguments)

    def interrupt(state):
        if state.step == 1:
            raise error("stop")

    with pytest.raises(error) as raised:
        pipe(
            "a b",
            rewards=redness,
            callbacks=interrupt,
            generator=generator(),
            **arguments,
        )
    assert len(raised.value.noise_result.losses) == 2
    assert pipe.unet.training and all(module.training for module in pipe.unet.modules())
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())
    assert "prepare_latents" not in vars(pipe) and pipe.scheduler is state["scheduler"]
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert torch.equal(draw(pipe, generator=generator(), **arguments), before)
    pipe.unet.eval()


class Untouched:
    """Fails if any module of the pipeline runs."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __enter__(self):
        def refuse(module, *_):
            raise AssertionError(f"{type(module).__name__} ran")

        parts = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.handles = [part.register_forward_pre_hook(refuse) for part in parts]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def detached(images, prompts):
    return redness(images, prompts).detach()


BAD_CALLS = {
    "unknown method": (("nosuch", {}), ValueError, "Expected a method out of .*best_of_n"),
    "no method": ((3, {}), TypeError, "Expected a method"),
    "a class instead of an object": ((ReNO, {}), TypeError, "Expected a method"),
    "unknown reward": ((ReNO(rewards="clipscor"), {}), ValueError, "clipscore"),
    "no steps": ((reno(steps=0), {}), ValueError, "`steps` to be an integer in"),
    "unknown mode": ((reno(mode="fast"), {}), ValueError, "mode"),
    "negative weight": ((ReNO(rewards={"red": -1.0}), {}), ValueError, "at least 0"),
    "negative prior": ((reno(regularization=-1.0), {}), ValueError, "`regularization`"),
    "too many latents": ((reno(), {"latents": torch.zeros(2, 4, 16, 16)}), ValueError, "but got 2"),
    "too few generators": ((reno(), {"generator": [generator()] * 3}), ValueError, "one generator"),
    "no prompt": ((reno(), {"prompt": None}), ValueError, "neither"),
    "embeddings without text": (
        (ReNO(rewards=redness), {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}),
        ValueError,
        "reward_prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_before_any_model_runs(case):
    (method, arguments), error, message = BAD_CALLS[case]
    pipe = tiny_pipeline("sdxl")
    with Untouched(pipe), pytest.raises(error, match=message):
        optimize_noise(pipe, arguments.pop("prompt", "a b"), method, **{"num_inference_steps": 1, **SIZE, **arguments})


def test_an_argument_that_the_pipeline_lacks_is_refused():
    with pytest.raises(TypeError, match="true_cfg"):
        optimize_noise(tiny_pipeline("sd3"), "a b", reno(), true_cfg=2.0, **call_arguments("sd3"))


def test_inference_mode_is_refused():
    pipe = tiny_pipeline("sd")
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        optimize_noise(pipe, "a b", reno(), **call_arguments("sd"))


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_tensors_that_are_not_numbers_or_let_no_gradient_pass_are_refused(name):
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    tensor = torch.zeros(1, 4, 16, 16) if name == "latents" else torch.zeros(1, 77, 16)
    prompt = "a b" if name == "latents" else None
    with torch.inference_mode():
        inference = tensor + 1
    for bad, message in ((tensor / 0, "finite"), (inference, "ordinary tensor.*clone")):
        with Untouched(pipe), pytest.raises(ValueError, match=f"{message}.*{name}|{name}.*{message}"):
            optimize_noise(pipe, prompt, reno(), reward_prompt="a b", **{name: bad}, **arguments)


def test_noise_that_is_not_finite_is_told_as_such():
    def broken(shape, generator=None, device=None, dtype=None):
        return torch.full(shape, torch.nan, dtype=dtype)

    with pytest.raises(ValueError, match="noise of finite numbers.*`noise_sampler`"):
        optimize_noise(tiny_pipeline("sd"), "a b", reno(), noise_sampler=broken, **call_arguments("sd"))


def whole_batch(images, prompts):
    return redness(images, prompts).mean()


def black_box(images, prompts):
    return redness(images, prompts).detach()


black_box.differentiable = False  # pyright: ignore[reportFunctionMemberAccess]


BAD_REWARDS = {
    "cuts the gradient": (ReNO(rewards=detached), "detached"),
    "says that it has none": (ReNO(rewards=black_box), "differentiable"),
    "one number for all": (BestOfN(rewards=whole_batch), "whole_batch"),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_rewards_that_cannot_work_are_refused_before_any_model_runs(case):
    method, message = BAD_REWARDS[case]
    pipe = tiny_pipeline("sd")
    with Untouched(pipe), pytest.raises(ValueError, match=message):
        optimize_noise(pipe, "a b", method, **call_arguments("sd"))


def test_names_of_methods_are_listed():
    names = ["best_of_n", "cno", "group_selection", "mean_variance", "never_too_late", "noise_diffusion", "noise_pgd"]
    names += ["pcn", "reno", "zero_order_search"]
    assert set(names) <= set(list_methods()) and list_methods() == sorted(list_methods())


def test_a_compiled_denoiser_needs_no_size_in_the_call():
    """It has no truth value."""
    pipe = quiet(sd_pipeline())
    plain = optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), generator=generator(1), num_inference_steps=1)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    found = optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), generator=generator(1), num_inference_steps=1)
    torch.testing.assert_close(found.losses, plain.losses)


def test_dropout_that_a_run_turns_off_is_told():
    pipe = quiet(sd_pipeline())
    pipe.unet.add_module("noise", torch.nn.Dropout(0.5))
    pipe.unet.train()
    with pytest.warns(UserWarning, match="The `unet` is in training mode with dropout"):
        optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), num_inference_steps=1, **SIZE)
    assert pipe.unet.training
