"""Lean layers: values and gradients of the stock layers in less memory, removed without a trace."""

import copy
import dataclasses
import math
from typing import Literal

import pytest
import torch
from diffusers.models.activations import GEGLU
from tiny_pipelines import SIZE, tiny_pipeline, tiny_unet, tiny_vae
from torch import nn
from torch.utils.checkpoint import checkpoint

from noiseopt import optimize_noise
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.memory import lean_layers as lean
from noiseopt.pipelines.memory.graph_size import SavedBytes


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(lean, "LEAN_BYTES", 0)


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(module, dtype=torch.float64):
    """Freeze a module, with reproducible weights."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data = drawn(*parameter.shape, dtype=dtype, seed=index) * 0.5
    return module.eval().requires_grad_(False).to(dtype)


def value_and_gradient(module, x):
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    weights = drawn(*output.shape, dtype=output.dtype, seed=9)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaf)[0]


def assert_same(module, x, **tolerances):
    stock = value_and_gradient(module, x)
    with lean.lean_layers([module]):
        ours = value_and_gradient(module, x)
    for mine, theirs in zip(ours, stock, strict=True):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(mine, theirs, **tolerances)


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "no padding": {"kernel_size": (3, 2)},
    "wide padding": {"kernel_size": 3, "padding": (4, 3)},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "no bias": {"kernel_size": 5, "padding": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_the_gradient_of_stock_ones(name):
    conv = layer(nn.Conv2d(4, 6, **CONVOLUTIONS[name]))
    x = drawn(2, 4, 7, 8)
    assert_same(conv, x)
    assert_same(conv, x.contiguous(memory_format=torch.channels_last))
    with lean.lean_layers([conv]), SavedBytes() as saved:
        kept = conv(x.requires_grad_())
    assert (saved.peak == 0) == (name not in ("same", "circular")) and kept.requires_grad


def test_silu_after_a_normalization_keeps_nothing_of_its_own():
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3))
    layer(block)
    x = drawn(2, 4, 5, 6)
    assert_same(block, x)
    with lean.lean_layers([block]), SavedBytes() as saved:
        kept = block(x.requires_grad_())
    statistics = 2 * 2 * 2 * 8  # mean and deviation of two groups of two images
    assert saved.peak == x.numel() * 8 + statistics and kept.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gated_unit_keeps_its_projection_alone(frozen):
    unit, x = layer(GEGLU(4, 6)).requires_grad_(not frozen), drawn(2, 5, 4)
    assert_same(unit, x)
    with lean.lean_layers([unit]), SavedBytes() as saved:
        kept = unit(x.requires_grad_())
    assert saved.peak == (2 * 5 * 12 + (0 if frozen else x.numel())) * 8 and kept.requires_grad


def test_silu_of_anything_else_is_stock():
    assert_same(nn.SiLU(), drawn(1, 2, 3, 4))


def test_silu_of_a_normalization_that_was_written_to_is_stock():
    class Shifted(nn.Sequential):
        def forward(self, input):
            return self[1](self[0](input).add_(1))

    assert_same(layer(Shifted(nn.GroupNorm(2, 4), nn.SiLU())), drawn(2, 4, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_decoder_has_the_same_gradient_in_a_third_of_the_memory(dtype):
    decoder = layer(tiny_vae().decoder, dtype)
    z = drawn(2, 4, 8, 8, dtype=dtype)
    assert_same(decoder, z, **({} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}))
    peaks = []
    for roots in ([], [decoder]):
        with lean.lean_layers(roots), SavedBytes() as saved:
            kept = decoder(z.clone().requires_grad_())
        peaks.append(saved.peak)
        del kept
    assert peaks[1] < 0.45 * peaks[0]


def test_a_unet_has_the_same_gradient():
    unet = layer(tiny_unet(16))
    text = drawn(1, 5, 16)
    wrapped = nn.ModuleList([unet])
    wrapped.forward = lambda x: unet(x, 500, text, return_dict=False)[0]
    assert_same(wrapped, drawn(1, 4, 16, 16))


def test_checkpointed_layers_agree_too():
    decoder = layer(tiny_vae().decoder)
    wrapped = nn.ModuleList([decoder])
    wrapped.forward = lambda x: checkpoint(decoder, x, use_reentrant=False)
    assert_same(wrapped, drawn(1, 4, 8, 8))


def test_weights_that_learn_get_their_gradient():
    conv = layer(nn.Conv2d(2, 3, 3)).requires_grad_(True)
    with lean.lean_layers([conv]):
        conv(drawn(1, 2, 5, 5).requires_grad_()).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.any()


def test_without_a_graph_values_are_bit_identical():
    decoder, z = layer(tiny_vae().decoder, torch.float32), drawn(1, 4, 8, 8, dtype=torch.float32)
    stock = decoder(z)
    with lean.lean_layers([decoder]):
        assert torch.equal(decoder(z), stock)
        with torch.no_grad():
            assert torch.equal(decoder(z.clone().requires_grad_()), stock)


def test_small_inputs_are_left_to_autograd(monkeypatch):
    monkeypatch.setattr(lean, "LEAN_BYTES", 2 * 5 * 5 * 8 + 1)
    conv = layer(nn.Conv2d(2, 3, 3))
    with lean.lean_layers([conv]):
        assert type(conv(drawn(1, 2, 5, 5).requires_grad_()).grad_fn).__name__ == "ConvolutionBackward0"
        assert "FrozenConvolution" in type(conv(drawn(1, 2, 5, 6).requires_grad_()).grad_fn).__name__


def test_autocast_is_left_to_autograd():
    conv = layer(nn.Conv2d(2, 3, 3), torch.float32)
    x = drawn(1, 2, 5, 5, dtype=torch.float32).requires_grad_()
    with lean.lean_layers([conv]), torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    assert found.dtype == torch.bfloat16 and torch.autograd.grad(found.sum(), x)[0].any()


def test_layers_are_what_they_were_after_an_error_and_others_are_never_touched():
    class Own(nn.Conv2d):
        pass

    compiled = nn.Sequential(nn.Conv2d(1, 1, 1))
    compiled._compiled_call_impl = lambda *args: None
    plain = [nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.SiLU(), GEGLU(1, 1)]
    parts = nn.ModuleList([*plain, Own(1, 1, 1), compiled])
    before = [type(part) for part in parts.modules()]
    with pytest.raises(KeyError), lean.lean_layers([parts]):
        found = [type(part) for part in plain]
        assert found == [lean.LeanConv2d, lean.LeanGroupNorm, lean.LeanSiLU, lean.LeanGEGLU]
        assert type(parts[-2]) is Own and type(compiled[0]) is nn.Conv2d
        raise KeyError
    assert [type(part) for part in parts.modules()] == before


def test_a_copy_made_inside_has_its_own_weights():
    vae, latents = tiny_vae().requires_grad_(False), drawn(1, 4, 8, 8, dtype=torch.float32)
    with lean.lean_layers([vae]):
        twin = copy.deepcopy(vae)
    before = twin.decode(latents).sample
    vae.decoder.conv_in.weight.data.zero_()
    assert torch.equal(twin.decode(latents).sample, before) and not torch.equal(vae.decode(latents).sample, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look(NoiseOptimizer):
    """Method that leaves the noise as it is and records the gradients."""

    steps: int = 2
    gradient: Literal["full", "frozen"] = "full"
    gradients: list = dataclasses.field(default_factory=list)

    def objective(self, pipe):
        return FunctionObjective(lambda sample: (sample.images * sample.images).mean((1, 2, 3)))

    def step(self, run, gradient, state):
        self.gradients.append(gradient)
        return run.noise


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_has_the_gradient_of_stock_layers_and_leaves_them_behind(family, monkeypatch):
    found, pipe = [], tiny_pipeline(family)
    kinds = [type(module) for module in pipe.unet.modules()]
    for size in (0, math.inf):
        monkeypatch.setattr(lean, "LEAN_BYTES", size)
        monkeypatch.setattr(lean, "LEAN_PIXELS", 0)
        look, generator = Look(), torch.Generator().manual_seed(0)
        optimize_noise(pipe, "a", look, generator=generator, num_inference_steps=1, guidance_scale=0.0, **SIZE)
        found.append(look.gradients[0])
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm() and found[1].norm() > 0
    assert [type(module) for module in pipe.unet.modules()] == kinds


def test_tiny_images_are_left_to_stock_layers(monkeypatch):
    kinds = []
    monkeypatch.setattr(lean, "LEAN_BYTES", 0)
    for pixels in (0, 128 * 128):
        monkeypatch.setattr(lean, "LEAN_PIXELS", pixels)
        pipe, seen = tiny_pipeline("sd"), []
        handle = pipe.unet.conv_in.register_forward_hook(lambda layer, *_: seen.append(type(layer)))  # noqa: B023
        optimize_noise(pipe, "a", Look(), num_inference_steps=1, guidance_scale=0.0, **SIZE)
        handle.remove()
        kinds.append(set(seen))
    assert kinds == [{lean.LeanConv2d}, {nn.Conv2d}]
