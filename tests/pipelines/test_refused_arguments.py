"""Arguments that cannot work are refused before any model runs, and the error names the remedy."""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from problems import generator, redness
from tiny_pipelines import SIZE, sd_pipeline, tiny_pipeline

from noiseopt import BestOfN, NoiseDiffusion, ReNO, ReNOStableDiffusionPipeline, ZeroOrderSearch, optimize_noise
from noiseopt.pipelines.request import known_arguments

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
BEST = BestOfN(rewards=redness, steps=1)


def refused(message: str, *, pipe=None, prompt="a", method=BEST, error=(TypeError, ValueError), **call) -> None:
    """Assert that `optimize_noise` refuses a call before any module runs."""
    pipe = tiny_pipeline("sd") if pipe is None else pipe

    def ran(module, *_):
        raise AssertionError(f"{type(module).__name__} ran")

    parts = [part for part in tiny_pipeline("sd").components.values() if isinstance(part, torch.nn.Module)]
    handles = [part.register_forward_pre_hook(ran) for part in parts]
    try:
        with pytest.raises(error, match=message):
            optimize_noise(pipe, prompt, method, **{**CALL, **call})
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_inference_step", "Did you mean 'num_inference_steps'"),
        ("guidence_scale", "Did you mean 'guidance_scale'"),
        ("scale", ""),  # a text in the code of the stock call
        ("seed", r"generator=torch.Generator\(\).manual_seed\(0\)"),
        ("callback", "Did you mean 'callbacks'"),
        ("reward_promt", "Did you mean 'reward_prompt'"),
        ("views", "It is a setting of ReNO: pass `ReNO\\(views=...\\)` or `method_kwargs={'views': ...}`"),
    ],
)
def test_unknown_arguments_are_refused_with_a_suggestion(name, hint):
    """`StableDiffusionPipeline` takes `**kwargs` and reads "callback" alone, `StableDiffusion3Pipeline` takes none."""
    message = rf"Expected arguments of the call of StableDiffusion\w*, but got '{name}'.*{hint}"
    method = ReNO(rewards=redness, steps=1)
    if name != "callback":
        refused(message, method=method, error=TypeError, **{name: 1})
    refused(message, pipe=tiny_pipeline("sd3"), method=method, error=TypeError, **{name: 1})


@pytest.mark.parametrize("arguments", [{"reward": redness}, {"num_inference_step": 1}, {"step": 3, "rewards": redness}])
def test_a_misspelt_argument_of_a_class_does_not_turn_the_optimization_off(arguments):
    pipe = ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)
    with pytest.raises(
        TypeError, match="Expected arguments of the call of ReNOStableDiffusionPipeline, but got '.*Did"
    ):
        pipe("a", **{**CALL, **arguments})


def test_deprecated_arguments_that_a_stock_call_still_reads_are_passed_on():
    seen = []
    call = {**CALL, "callback": lambda *step: seen.append(step), "callback_steps": 1}
    ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)("a", rewards=redness, steps=1, **call)
    assert len(seen) == 1
    optimize_noise(tiny_pipeline("sd"), "a", BEST, **call)


class PassesOn(StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class PassesElsewhere(StableDiffusionPipeline):
    def __call__(self, prompt, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.generate(prompt, **kwargs)

    def generate(self, prompt, anything=None):
        raise NotImplementedError


class ReadsIts(StableDiffusionPipeline):
    def __call__(self, prompt, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return kwargs.pop("popped", 1), kwargs.get("got"), kwargs["item"], "asked" in kwargs, "not read"


def test_what_a_stock_call_reads_is_known_from_its_code_and_that_of_its_base():
    sd = known_arguments(StableDiffusionPipeline)
    assert sd is not None and {"prompt", "clip_skip", "callback_steps"} <= sd and "seed" not in sd
    assert known_arguments(PassesOn) == sd
    assert known_arguments(PassesElsewhere) is None
    assert known_arguments(ReadsIts) == {"prompt", "popped", "got", "item", "asked"}
    assert "callback" in (known_arguments(StableDiffusionXLPipeline) or ())


@pytest.mark.parametrize(
    ("pipe", "got"),
    [
        ("stabilityai/sdxl-turbo", "'stabilityai/sdxl-turbo'. Load it first: `DiffusionPipeline.from_pretrained"),
        (None, "None. Load it first"),
        (torch.nn.Linear(1, 1), "Linear. Pass the pipeline that it is a part of"),
        (3, "int"),
    ],
)
def test_only_a_loaded_pipeline_is_one(pipe, got):
    with pytest.raises(TypeError, match=f"Expected a loaded diffusers pipeline, but got {got}"):
        optimize_noise(pipe, "a", BEST)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": []}, r"`prompt` to be a text or a list of at least one text, but got \[\]"),
        ({"prompt": 3}, "`prompt` to be a text"),
        ({"prompt": ["a", None]}, "`prompt` to be a text"),
        ({"prompt": None}, "`prompt` or `prompt_embeds`, but got neither"),
        ({"num_images_per_prompt": 2**31}, "`num_images_per_prompt` to be an integer from 1 to 4096"),
        ({"num_images_per_prompt": "2"}, "`num_images_per_prompt` to be an integer from 1 to 4096, but got '2'"),
        ({"num_images_per_prompt": -1}, "`num_images_per_prompt` to be an integer"),
        ({"num_images_per_prompt": True}, "`num_images_per_prompt` to be an integer"),
        ({"num_inference_steps": 0}, "`num_inference_steps` to be an integer from 1"),
        ({"num_inference_steps": None}, "`num_inference_steps` to be an integer from 1"),
        ({"num_images_per_prompt": None}, "`num_images_per_prompt` to be an integer from 1"),
        ({"height": "32"}, "`height` to be an integer from 1 to 65536, but got '32'"),
        (
            {"height": 33, "width": 33},
            "StableDiffusionPipeline accepts, but it raised ValueError: `height` and `width`",
        ),
        ({"guidance_scale": math.nan}, "`guidance_scale` as float, with finite numbers, but got nan"),
        ({"guidance_scale": "7"}, "`guidance_scale` as float"),
        ({"guidance_rescale": None}, "`guidance_rescale` as float"),
        ({"eta": [0.0]}, "`eta` as float"),
        ({"timesteps": 3}, "`timesteps` as "),
        ({"negative_prompt": 3}, "`negative_prompt` as "),
        ({"clip_skip": 2}, "`clip_skip` to be an integer from 0 to 1, but got 2"),
        ({"generator": 3}, "`generator` to be a `torch.Generator` or a list of them, but got 3. A seed is written"),
        ({"latents": [0.0]}, "`latents` to be a floating-point tensor"),
        ({"latents": torch.full((1, 4, 16, 16), math.nan)}, "finite numbers in `latents`"),
        ({"cross_attention_kwargs": "x"}, "StableDiffusionPipeline accepts, but it raised AttributeError"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` to be a function, but got 3"),
        ({"callback_on_step_end": lambda state: None}, r"takes \(state\). A callback of each optimization step"),
        ({"reward_prompt": ["a", "b"]}, "`reward_prompt` to be one text, or one for each of 1 images"),
        ({"reward_prompt": 3}, "`reward_prompt` to be one text"),
        ({"save_noise_to": 3}, "`save_noise_to` to be a path, but got 3"),
        ({"noise_sampler": lambda shape: None}, r"a noise sampler `\(shape, generator, device, dtype\)`, but got"),
        ({"noise_sampler": {"name": "pink", 3: 4}}, "settings of the noise sampler 'pink'"),
        ({"method": "reno", "rewards": redness}, r"`ReNO\(rewards=...\)` or `method_kwargs={'rewards': ...}`"),
        ({"method": "reno"}, "`rewards` for ReNO, but got none"),
        ({"method": "reno", "method_kwargs": 1}, "`method_kwargs` to be a dict of settings by name, but got 1"),
        ({"method": "reno", "method_kwargs": {"reward": redness}}, "settings of ReNO out of .*Did you mean 'rewards'"),
        ({"method": ZeroOrderSearch(rewards=redness, restart=1)}, "`restart` to be True or False, but got 1"),
        ({"method": BestOfN(rewards=redness, preview="no")}, "`preview` to be True or False, but got 'no'"),
        ({"method": BestOfN(rewards=redness, decoder="taesd")}, "`decoder` to be a folder or a Hub id"),
        ({"method": ReNO(rewards=redness, views=2**63)}, r"`views` to be an integer in \[0, 1000\]"),
        ({"method": NoiseDiffusion(rewards=redness, score_range=3)}, r"`score_range` as \(low, high\)"),
        ({"method": NoiseDiffusion(rewards=redness, score_range=(0.0, 1.0), candidates=2**63)}, "at most 100000"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_arguments_that_cannot_work_are_refused_before_any_model_runs(call, message):
    refused(f"Expected .*{message}", **call)


def fails(images, prompts):
    return np.asarray(images).mean((1, 2, 3))


def test_a_reward_that_fails_is_named_with_the_remedy_and_its_own_error():
    with pytest.raises(ValueError, match="Expected reward 'fails' to score a random image .*RuntimeError") as caught:
        optimize_noise(tiny_pipeline("sd"), "a", ReNO(rewards=fails, steps=1), **CALL)
    assert isinstance(caught.value.__cause__, RuntimeError) and "without gradients" in str(caught.value)


def test_values_of_numpy_are_numbers():
    numbers = {"num_inference_steps": np.int64(1), "guidance_scale": np.float32(0.0), "height": np.int32(32)}
    found = optimize_noise(tiny_pipeline("sd"), "a", BEST, generator=generator(), **{**CALL, **numbers})
    plain = optimize_noise(tiny_pipeline("sd"), "a", BEST, generator=generator(), **CALL)
    assert torch.equal(found.noise, plain.noise)


def test_settings_go_by_their_names():
    with pytest.raises(TypeError, match="Expected the settings of ReNO by name, as in `steps=10`, but got 'red'"):
        ReNO("red")  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="settings of BestOfN out of .*, but got 'step'. Did you mean 'steps'"):
        BestOfN(rewards="red", step=3)  # pyright: ignore[reportCallIssue]


def test_the_pipeline_of_a_stopped_or_refused_call_is_as_it_was():
    pipe = sd_pipeline()
    before = dict(vars(pipe))
    with pytest.raises(TypeError):
        optimize_noise(pipe, "a", BEST, sed=1)
    with pytest.raises(ValueError, match="accepts, but it raised"):
        optimize_noise(pipe, "a", BEST, **{**CALL, "height": 33, "width": 33})
    assert vars(pipe) == before


def test_a_reward_does_not_change_the_images_of_the_others_or_of_the_result():
    def writes(images, prompts):
        return images.clamp_(0.4, 0.6).mean((1, 2, 3))

    def first(images, prompts):
        return images.mean((1, 2, 3))

    pipe = tiny_pipeline("sd")
    rewards = [(writes, 1.0), (first, 1.0)]
    found = optimize_noise(pipe, "a", ReNO(rewards=rewards, steps=2), generator=generator(), **CALL)
    alone = optimize_noise(pipe, "a", BestOfN(rewards=first, steps=1), generator=generator(), **CALL)
    assert torch.equal(found.initial_images, alone.images)
    assert found.scores["first"][0].item() == alone.scores["first"][0].item()


def test_settings_without_names_are_refused_by_a_class():
    pipe = ReNOStableDiffusionPipeline.from_pipe(tiny_pipeline("sd"))
    for settings in ({3: 4}, 1):
        with pytest.raises(TypeError, match="`method_kwargs` to be a dict of settings by name"):
            pipe("a", rewards=redness, method_kwargs=settings, **CALL)
