"""Rewards on another device than the pipeline: images are moved there, scores and gradients back."""

import pytest
import torch
from tiny_features import build_features
from tiny_pipelines import BUILDERS, call_arguments, quiet, tiny_pipeline
from two_devices import OTHER, TwoDevices, elsewhere, weights_elsewhere

from noiseopt import (
    BestOfN,
    NeverTooLate,
    NeverTooLateStableDiffusionPipeline,
    ReNO,
    ReNOStableDiffusionPipeline,
    optimize_noise,
)
from noiseopt.pipelines.registry import METHODS, list_methods
from noiseopt.rewards import DPP, AutoFeatures, AutoReward, Reward, SetRewardSum

CALL = {**call_arguments("sd"), "num_inference_steps": 1, "guidance_scale": 1.0}
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


class Alike(Reward):
    """Similarity of an image to a picture that is a weight."""

    name = "alike"
    picture: torch.Tensor

    def __init__(self, on=lambda tensor: tensor):
        super().__init__()
        self.register_buffer("picture", on(PIXELS.clone()))

    def score(self, images, prompts):
        return (images * self.picture).flatten(1).mean(1) + self.encode_prompt(prompts).mean(1)

    def encode_text(self, prompt):
        return self.picture.new_full((2,), float(len(prompt)), device=self.device)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def run(method, count=1):
    generator = torch.Generator().manual_seed(0)
    arguments = {"generator": generator, "callbacks": [], **CALL, "num_images_per_prompt": count}
    return optimize_noise(tiny_pipeline("sd"), "a", method, **arguments)


def test_the_two_devices_do_not_mix_and_gradients_cross():
    """The two simulated devices behave as real ones."""
    leaf = torch.rand(3, requires_grad=True)
    with TwoDevices():
        there = leaf.to(OTHER)
        assert there.device == OTHER and leaf.device == torch.device("cpu") and (there * 2).device == OTHER
        with pytest.raises(RuntimeError, match="two devices"):
            _ = there + leaf
        (gradient,) = torch.autograd.grad(((there * there).to("cpu") * leaf).sum(), leaf)
    torch.testing.assert_close(gradient, 3 * leaf.detach() ** 2)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("views", [0, 2])
def test_a_reward_elsewhere_beside_one_here(views, chunk_size):
    settings = {"steps": 2, "views": views, "chunk_size": chunk_size}
    here = run(ReNO(rewards=[(Alike(), 2.0), brightness], **settings), 2)
    reward = Alike(elsewhere)
    with TwoDevices():
        assert reward.device == OTHER
        there = run(ReNO(rewards=[(reward, 2.0), brightness], **settings), 2)
        assert all(scores.device == torch.device("cpu") for scores in there.scores.values())
    assert torch.equal(there.noise, here.noise) and torch.equal(there.losses, here.losses)
    assert here.initial_noise is not None and (here.noise - here.initial_noise).norm() > 1e-2


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_features_of_a_set_elsewhere(chunk_size):
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    leaves = [images.clone().requires_grad_() for _ in range(2)]
    features = build_features("dinov2")
    here = SetRewardSum(DPP(features))(leaves[0], images[:1] / 2, chunk_size=chunk_size).total
    here.backward()
    weights_elsewhere(features)
    with TwoDevices():
        assert features.device == OTHER
        there = SetRewardSum(DPP(features))(leaves[1], images[:1] / 2, chunk_size=chunk_size).total
        assert there.device == torch.device("cpu")
        there.backward()
    assert leaves[0].grad.any()
    torch.testing.assert_close(there, here)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.fixture
def loaded(monkeypatch):
    """Record the devices on which named rewards and features are loaded; they stay on the CPU."""
    devices = {}

    def load_reward(name, *, device=None, **_):
        devices[name] = torch.device(device)
        return Alike()

    def load_features(name, *, device=None, **_):
        devices[name] = torch.device(device)
        return build_features("dinov2")

    monkeypatch.setattr(AutoReward, "from_pretrained", load_reward)
    monkeypatch.setattr(AutoFeatures, "from_pretrained", load_features)
    return devices


@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"cno"}))
def test_what_has_a_name_is_loaded_there(name, loaded):
    special = {"never_too_late": {"diversity": {"dpp": 1.0}}, "noise_diffusion": {"score_range": (0.0, 1.0)}}
    named = {"rewards": {"brightness": 1.0}, **special.get(name, {})}
    pipe, cls = BUILDERS["sd"](), METHODS[name]
    cls(**named, reward_device="cuda:1").objective(pipe)
    expected = {"never_too_late": {"brightness", "dinov2"}, "group_selection": {"brightness", "dinov2_patch"}}
    assert loaded == dict.fromkeys(expected.get(name, {"brightness"}), OTHER)
    loaded.clear()
    cls(**named).objective(pipe)
    assert set(loaded.values()) == {torch.device("cpu")}


def test_pipelines_load_there_by_name_and_keep_it_apart(loaded):
    pipe = quiet(BUILDERS["sd"](ReNOStableDiffusionPipeline))

    def reward_on(device):
        loaded.clear()
        method = pipe.method_of({"rewards": "brightness", "reward_device": device})
        return method.objective(pipe).rewards.rewards[0]

    there = reward_on("cuda:1")
    assert loaded == {"brightness": OTHER}
    here = reward_on(None)
    assert loaded == {"brightness": torch.device("cpu")} and here is not there
    assert reward_on("cuda:1") is there and not loaded


def test_the_pipelines_of_sets_too(loaded):
    pipe = quiet(BUILDERS["sd"](NeverTooLateStableDiffusionPipeline))
    settings = {"rewards": {"brightness": 1.0}, "guard": {"red": 0.1}, "reward_device": "cuda:1"}
    method = pipe.method_of({"diversity": {"dpp": 1.0}, **settings})
    assert isinstance(method, NeverTooLate)
    method.objective(pipe)
    assert loaded == dict.fromkeys(("brightness", "red", "dinov2"), OTHER)


def test_no_device_is_refused():
    with pytest.raises(ValueError, match="Expected `reward_device` to be a device.*'gpu-7'"):
        run(BestOfN(rewards=brightness, reward_device="gpu-7"))
