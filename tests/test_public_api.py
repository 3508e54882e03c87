"""The public names: what a user imports, completes and reads in a signature."""

import inspect
import re

import pytest
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

import noiseopt
from noiseopt import callbacks, pipelines, rewards, schedulers
from noiseopt.pipelines.sampling.first_call import stock_call

TOP = """
AutoReward BestOfN BlackBox CNO CNOFluxPipeline CNOStableDiffusion3Pipeline CNOStableDiffusionPipeline
CNOStableDiffusionXLPipeline DiversityBoost EarlyStopping EmbeddingNoise GroupSelection HeldOutReward ImageSet
NeverTooLate NeverTooLateFluxPipeline NeverTooLateStableDiffusionPipeline NeverTooLateTurboPipeline NoiseDiffusion
NoiseDiffusionFluxPipeline NoiseDiffusionStableDiffusion3Pipeline NoiseDiffusionStableDiffusionPipeline
NoiseDiffusionStableDiffusionXLPipeline NoiseOptimizationMixin NoiseResult PCN PinkNoise ReNO
ReNOStableDiffusionPipeline ReNOStableDiffusionXLPipeline ReNOTurboPipeline RewardGuidance RewardSum TimeBudget Vary
ZeroOrderSearch find_preset grow_set list_methods list_presets list_rewards noise_shape optimize_noise release_rewards
shapes_world
"""
CLASSES = [name for name in TOP.split() if name.endswith("Pipeline")]


def test_the_names_at_the_top():
    assert sorted(noiseopt.__all__) == TOP.split()
    assert all(getattr(noiseopt, name) is not None for name in noiseopt.__all__)
    assert [name for name in dir(noiseopt) if not name.startswith("__")] == TOP.split()
    with pytest.raises(AttributeError, match="no attribute 'ReNo'"):
        _ = noiseopt.ReNo  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("module", [callbacks, pipelines, rewards, schedulers], ids=lambda module: module.__name__)
def test_folders_export_what_they_name(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__ if callable(getattr(module, name)))


@pytest.mark.parametrize("name", CLASSES)
def test_calls_show_the_stock_parameters_and_ours(name):
    cls = getattr(noiseopt, name)
    shown = inspect.signature(cls.__call__).parameters
    stock = inspect.signature(stock_call(cls)).parameters
    names = [name for name in stock if name != "kwargs"]
    assert list(shown)[: len(names)] == names
    assert all(shown[name] == stock[name] for name in names)
    ours = list(shown)[len(names) :]
    common = ["method", "method_kwargs", "callbacks", "noise_sampler", "variation_seed", "variation_strength"]
    common += ["reward_prompt", "save_noise_to"]
    assert [name for name in ours if name != "kwargs"] == [*cls.own_arguments, *common]
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours if name != "kwargs")
    documented = re.findall(r"^    ([\w, ]+):", cls.__call__.__doc__, flags=re.MULTILINE)
    assert set(ours) - {"kwargs"} <= {name for names in documented for name in names.split(", ")}


def test_a_class_of_a_user_shows_them_too():
    class Ours(noiseopt.NoiseOptimizationMixin, StableDiffusionXLPipeline):
        pass

    shown = inspect.signature(Ours.__call__).parameters
    assert list(shown)[:2] == ["self", "prompt"] and "method" in shown and "guidance_scale" in shown
    assert noiseopt.ReNOStableDiffusionXLPipeline is noiseopt.ReNOTurboPipeline
