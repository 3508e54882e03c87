"""Whatever the arguments are: a run works, or it is refused in our words before the denoiser or the decoder runs."""

import contextlib
import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_pipelines import BUILDERS, SIZE, quiet

import noiseopt
from noiseopt import EarlyStopping, NoiseResult, list_methods, optimize_noise
from noiseopt.demo import load_pipeline
from noiseopt.pipelines.registry import METHODS
from noiseopt.pipelines.sampling.first_call import stock_call

FAST, SLOW = 3, 90  # examples for each method and class

NUMBERS = [-1, 0, 1, 2, 0.5, -0.5, 2**31, 2**63, 1e9, float("nan"), float("inf"), np.int64(2), np.float32(0.5), 1j]
TEXTS = ["", "x", "1", "auto", "default", "a red circle", b"x"]
CONTAINERS = [
    [],
    [1],
    ["a"],
    ["a", "b"],
    (),
    (0.0, 1.0),
    (1, 2),
    {},
    {"a": 1},
    {3: 4},
    {"name": "pink", "alpha": "x"},
    {1},
]
FUNCTIONS = [
    lambda: None,
    lambda one: None,
    lambda one, two: None,
    lambda *any, **named: None,
    lambda a, b, c, d: a,
    id,
]
OBJECTS = [
    object(),
    dict,
    EarlyStopping,
    EarlyStopping(patience=2),
    torch.nn.Linear(1, 1),
    torch.Generator(),
    Path("x"),
]
TENSORS = [torch.zeros(()), torch.zeros(2), torch.zeros(1, 3, 4, 4), torch.full((1, 4, 32, 32), torch.nan)]
JUNK = [None, True, False, *NUMBERS, *TEXTS, *CONTAINERS, *FUNCTIONS, *OBJECTS, *TENSORS]

ENDLESS = {  # right, but slow
    "steps": lambda value: value is None or (isinstance(value, int) and value > 3),
    "budget": lambda value: isinstance(value, int) and value > 3,
}
# these are known from the first evaluation on, and say so
OURS_TEXT = re.compile(r"Expected .*\bbut\b", re.DOTALL)
KNOWN_LATER = re.compile(
    r"Expected (`stop_ratio` of|x0 estimates that depend on|rewards of 0 or more for a guard with)"
)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def in_numpy(images, prompts):
    return images.detach().numpy().mean((1, 2, 3))


def of_one(images):
    return images.mean((1, 2, 3))


def failing(images, prompts):
    raise KeyError(prompts[0])


def whole(images, prompts):
    return images.mean()


def column(images, prompts):
    return images.mean((1, 2, 3))[:, None]


def of_trl(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


def flat(images, prompts):
    return images.mean((1, 2, 3)) * 0


def cut(images, prompts):
    return images.detach().mean((1, 2, 3))


REWARDS = [brightness, "red", {"red": 1.0, brightness: 0.5}, [("red", 1.0)], ["red", "sharpness"], flat]
BAD_REWARDS = [in_numpy, of_one, failing, whole, column, of_trl, cut, "redd", {"red": -1}, {"red": "x"}, [("red",)]]
SETS = [{"pairwise": ("tiny_image", 1.0)}, [("pairwise", "tiny_image", 1.0)], {"vendi": ("color_histogram", 2.0)}]
BAD_SETS = ["pairwize", {"pairwise": ("tiny", 1.0)}, {"pairwise": ("tiny_image", -1.0)}, {"pairwise": (1, 2, 3)}]
GUARDS = [
    None,
    {"red": 0.5},
    {"sharpness": {"keep": 0.1}},
    [noiseopt.pipelines.QualityGuard(reward="red", threshold=0.9)],
]
BAD_GUARDS = [{"redd": 1.0}, {"red": {"mode": "stop"}}, {"red": "x"}, {"red": {3: 4}}, {brightness: True}]
PROPER = {
    "rewards": REWARDS + BAD_REWARDS,
    "diversity": SETS + BAD_SETS,
    "guard": GUARDS + BAD_GUARDS,
    "features": ["tiny_image", "color_histogram", "tiny"],
    "score_range": [None, (0.0, 1.0), (-1, 2), (1.0, 0.0)],
    "decoder": [None],
    "reward_device": [None, "cpu", "gpu"],
    "hinge": [None, 0.5, {"pairwise": 0.5}, {"dpp": 0.5}],
    "stop_at": [None, 0.5, {"pairwise": 0.5}],
    "stop_ratio": [None, 1.5, 100.0],
    "references": [None, torch.rand(1, 3, 64, 64), torch.rand(2, 3, 32, 32)],
    "method": ["reno", "best_of_n", "rino", noiseopt.BestOfN(rewards="red", steps=1)],
    "method_kwargs": [{"rewards": "red", "steps": 1}, {"reward": "red"}, {"steps": 1}],
    "callbacks": [None, EarlyStopping(patience=2), [id], lambda state: None],
    "noise_sampler": [None, "white", "pink", "coupled", {"name": "pink", "alpha": 0.1}, {"name": "pink", "beta": 1}],
    "reward_prompt": [None, "a blue square", ["a", "b"]],
    "save_noise_to": [None],
    "prompt": ["a red circle", ["a red circle", "a blue square"]],
    "negative_prompt": [None, "a", ["a"]],
    "num_inference_steps": [1, 2],
    "num_images_per_prompt": [None, 1, 2],
    "generator": [None, torch.Generator().manual_seed(0), [torch.Generator()]],
    "output_type": ["pil", "pt", "np", "latent"],
    "return_dict": [True, False],
    "height": [None, 64, 33],
    "width": [None, 64, 33],
}
BASE: dict[str, dict[str, Any]] = {
    "cno": {"steps": 1},
    "never_too_late": {"steps": 1, "diversity": SETS[0]},
    "group_selection": {"steps": 1, "rewards": brightness, "features": "tiny_image"},
}


def base_of(method: str) -> dict[str, Any]:
    return BASE.get(method, {"steps": 1, "rewards": brightness})


def values_of(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Return values for an argument: those of its annotation, of its kind, and anything else."""
    members = [hint, *get_args(hint)]
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    sensible = choices + ([True, False] if hint is bool else []) + PROPER.get(name, [])
    allowed = [value for value in JUNK if not ENDLESS.get(name, lambda _: False)(value)]
    return st.one_of(*([st.sampled_from(sensible)] if sensible else []), st.sampled_from(allowed))


def changes(hints: dict[str, Any], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Return values for up to `most` of the arguments, or for one that does not exist."""
    named = {name: values_of(name, hint) for name, hint in hints.items()}
    some = st.lists(st.sampled_from(sorted(named)), max_size=most, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: named[name] for name in names})
    )
    misspelt = st.sampled_from(sorted(named)).map(lambda name: {name[:-1] + "z": None})
    return st.one_of(some, some, some, misspelt)


def hints_of_call(cls: type) -> dict[str, Any]:
    """Return the annotations of a stock call by parameter, without images and embeddings."""
    left_out = re.compile("self|kwargs|.*ip_adapter.*|.*embeds")
    parameters = inspect.signature(stock_call(cls)).parameters.values()
    return {each.name: each.annotation for each in parameters if not left_out.fullmatch(each.name)}


OURS = dict.fromkeys(("callbacks", "noise_sampler", "reward_prompt", "save_noise_to"))


@contextlib.contextmanager
def models_that_run(pipe) -> Iterator[list[str]]:
    """Yield the names of the denoisers and decoders that have run."""
    ran: list[str] = []
    modules = {"vae": pipe.vae.decoder}
    modules |= {name: module for name in ("unet", "transformer") if (module := getattr(pipe, name, None)) is not None}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, module in modules.items()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def check_outcome(pipe, call: Callable[[], Any]) -> None:
    """Assert that a call returns, or that its error is one of ours, and no model ran before it."""
    with models_that_run(pipe) as ran, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = ""
        try:
            call()
        except (TypeError, ValueError) as error:
            text = f"{error} "
        assert not text or OURS_TEXT.match(text), f"a raw error: {text}"
        assert not text or not ran or KNOWN_LATER.match(text), f"{ran} ran before: {text}"


def check_examples(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run a check on examples, the same ones each time."""
    quick = settings(
        max_examples=examples,
        phases=[Phase.generate],  # they are small, and each one runs a model: no search for a smaller one
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    quick(given(strategy)(check))()


AMOUNTS = [FAST, pytest.param(SLOW, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def turbo():
    return quiet(load_pipeline("turbo"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files of `save_noise_to` are written here."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("examples", AMOUNTS)
@pytest.mark.parametrize("name", list_methods())
def test_any_arguments_of_optimize_noise(turbo, name, examples):
    method = METHODS[name]
    fields = {field.name: get_type_hints(method)[field.name] for field in dataclasses.fields(method)}
    pipes = st.sampled_from([turbo] * 30 + [None, "stabilityai/sdxl-turbo", turbo.unet, 3])
    strategy = st.tuples(pipes, changes(fields, 2), changes({**hints_of_call(type(turbo)), **OURS}, 2))
    count = 2 if name in ("cno", "never_too_late") else 1

    def check(example):
        pipe, changed, given_call = example
        call = {"prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 0.0}
        call |= {"num_images_per_prompt": count, **given_call}
        own = {**base_of(name), **changed}

        def run():
            result = optimize_noise(pipe, method=name, method_kwargs=own, **call)
            assert isinstance(result, NoiseResult) and result.noise.isfinite().all()

        check_outcome(turbo, run)

    check_examples(examples, strategy, check)


FAMILIES = {
    "StableDiffusion3": "sd3",
    "Flux": "flux",
    "StableDiffusionXL": "sdxl",
    "Turbo": "sdxl",
    "StableDiffusion": "sd",
}
CLASSES = sorted({name for name in noiseopt.__all__ if name.endswith("Pipeline")} - {"ReNOStableDiffusionXLPipeline"})


@functools.cache
def pipeline_of(name: str):
    """Return a tiny pipeline of one of our classes."""
    family = next(family for part, family in FAMILIES.items() if f"{part}Pipeline" in name)
    return quiet(BUILDERS[family](getattr(noiseopt, name)))


@pytest.mark.parametrize("examples", AMOUNTS)
@pytest.mark.parametrize("name", CLASSES)
def test_any_arguments_of_the_call_of_a_class(name, examples):
    pipe = pipeline_of(name)
    room = type(pipe).__module__.split(".")[-2]
    own = {parameter.name: parameter.annotation for parameter in type(pipe).own_parameters()}
    strategy = st.tuples(changes({**own, "method_kwargs": None}, 2), changes(hints_of_call(type(pipe)), 2))

    def check(example):
        changed, given_call = example
        call = {"prompt": "a", "num_inference_steps": 1, **SIZE}
        call |= {"num_images_per_prompt": 2, **base_of(room), **given_call, **changed}
        target = call.get("steps" if pipe.target is None else pipe.target)
        if call.get("method") is None and (target is None or (type(target) is int and target == 0)):
            return  # the stock call, whose errors are its own

        def run():
            output = pipe(**call)
            images = output[0] if isinstance(output, tuple) else output.images
            assert len(images) > 0

        check_outcome(pipe, run)

    check_examples(examples, strategy, check)
