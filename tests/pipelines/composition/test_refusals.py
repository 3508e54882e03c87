"""Module states that a method cannot work with are refused before anything runs."""

import diffusers.models.attention_dispatch as attention_dispatch
import pytest
import torch
from accelerate import cpu_offload
from compositions import draw, state_of
from diffusers import (
    DDIMScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPanoramaPipeline,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from problems import generator, redness
from tiny_pipelines import call_arguments, flux_pipeline, quiet, sd_pipeline, sdxl_pipeline

from noiseopt import CNO, BestOfN, ReNO, optimize_noise
from noiseopt.pipelines.sampling.module_state import passes

CPU = torch.device("cpu")


def reno() -> ReNO:
    return ReNO(rewards=redness, steps=2)


def best_of_n() -> BestOfN:
    return BestOfN(rewards=redness, steps=3)


def run(pipe, method, prompt="a b", **arguments):
    """Run a method from the noise of `draw`."""
    return optimize_noise(pipe, prompt, method, generator=generator(), **arguments)


def refused(pipe, message: str, method=None, **arguments) -> None:
    """Assert that a call raises with the message before any module runs."""

    def ran(module, *_):
        raise AssertionError(f"{type(module).__name__} ran")

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    handles = [part.register_forward_pre_hook(ran) for part in parts]
    with pytest.raises(ValueError, match=message):
        run(pipe, method or reno(), **arguments)
    for handle in handles:
        handle.remove()


def offload(pipe, how: str, folder) -> None:
    """Offload a pipeline. Without an accelerator the weights stay, but all hooks are set."""
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        for name in ("text_encoder", "unet", "vae"):
            cpu_offload(getattr(pipe, name), CPU, offload_buffers=True)
    else:
        disk = {"offload_to_disk_path": str(folder)} if how == "group to disk" else {}
        pipe.enable_group_offload(CPU, offload_type="leaf_level", **disk)


OFFLOADS = ["model", "sequential", "group", "group to disk"]


@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_pipelines_are_refused_for_gradients_and_work_without(how, tmp_path):
    pipe, arguments = quiet(sd_pipeline()), call_arguments("sd")
    expected, plain = run(pipe, best_of_n(), **arguments), draw(pipe, **arguments)
    offload(pipe, how, tmp_path)
    remedy = "load the pipeline again" if how.startswith("group") else "remove_all_hooks"
    refused(pipe, f"`vae` to stay on its device, but it is offloaded.*BestOfN.*{remedy}", **arguments)
    learning = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    assert torch.equal(run(pipe, best_of_n(), **arguments).noise, expected.noise)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == learning
    assert torch.equal(draw(pipe, **arguments), plain)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_pipelines_work_again_once_their_hooks_are_removed(how, tmp_path):
    pipe, arguments = quiet(sd_pipeline()), call_arguments("sd")
    expected = run(pipe, reno(), **arguments)
    offload(pipe, how, tmp_path)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert torch.equal(run(pipe, reno(), **arguments).noise, expected.noise)


def test_half_precision_with_an_upcasting_vae_can_be_offloaded_without_gradients(tmp_path):
    pipe, arguments = quiet(sdxl_pipeline(force_upcast=True)).to(torch.float16), call_arguments("sdxl")
    plain = draw(pipe, **arguments)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(pipe, best_of_n(), **arguments).initial_images, plain)
    assert torch.equal(draw(pipe, **arguments), plain)


def test_modules_outside_the_gradient_path_may_be_offloaded():
    pipe, arguments = quiet(sd_pipeline()), {**call_arguments("sd"), "num_images_per_prompt": 2}
    method = CNO(steps=2)
    expected = {"ReNO": run(pipe, reno(), **arguments), "CNO": run(pipe, method, **arguments)}
    apply_group_offloading(pipe.text_encoder, CPU, offload_type="leaf_level")
    assert torch.equal(run(pipe, reno(), **arguments).noise, expected["ReNO"].noise)
    pipe.unet.enable_group_offload(CPU, offload_type="leaf_level")
    refused(pipe, "`unet` to stay on its device", **arguments)
    assert torch.equal(run(pipe, method, **arguments).noise, expected["CNO"].noise)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_3", "unet", "transformer_2", "controlnet", "vae"])
def test_a_gradient_passes_what_draws_but_what_encodes_and_a_frozen_denoiser(name):
    encodes, denoises = name.startswith("text"), name in ("unet", "transformer_2")
    assert passes(name, "full") == (not encodes)
    assert passes(name, "frozen") == (not encodes and not denoises)
    assert not passes(name, None)


@pytest.fixture
def flux():
    return quiet(flux_pipeline())


@pytest.fixture
def sage(monkeypatch):
    """Simulate an installed Sage attention, which computes like torch and drops the gradient."""
    registry = attention_dispatch._AttentionBackendRegistry
    native = registry._backends[AttentionBackendName.NATIVE]
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setattr(registry, "_active_backend", AttentionBackendName.NATIVE)
    monkeypatch.setitem(registry._backends, AttentionBackendName.SAGE, lambda **arguments: native(**arguments).detach())


def test_sage_attention_is_refused_until_the_backend_is_native(flux, sage):
    arguments = call_arguments("flux")
    expected = run(flux, reno(), **arguments)
    flux.transformer.set_attention_backend("sage")
    message = r'`transformer` uses "sage".*`pipe\.transformer\.set_attention_backend\("native"\)`.*BestOfN'
    refused(flux, message, **arguments)
    flux.transformer.reset_attention_backend()  # the active backend remains the one that was set
    refused(flux, message, **arguments)
    flux.transformer.set_attention_backend("native")
    assert torch.equal(run(flux, reno(), **arguments).noise, expected.noise)


def test_sage_attention_in_force_is_refused_and_left_to_pipelines_that_ignore_it(flux, sage):
    sd, arguments = quiet(sd_pipeline()), call_arguments("sd")
    expected = run(sd, reno(), **arguments)
    with attention_backend("sage"):
        refused(flux, 'uses "sage".*outside any `attention_backend` context', **call_arguments("flux"))
        flux.transformer.set_attention_backend("native")
        with attention_backend("sage"):
            run(flux, reno(), **call_arguments("flux"))
        assert torch.equal(run(sd, reno(), **arguments).noise, expected.noise)


@pytest.mark.parametrize("backend", [name for name in AttentionBackendName if "SAGE" in name.name] + ["_flash_3"])
def test_backends_without_a_backward_pass_are_refused_by_name(flux, backend):
    flux.transformer.single_transformer_blocks[0].attn.processor._attention_backend = AttentionBackendName(backend)
    refused(flux, f'uses "{AttentionBackendName(backend).value}", which has none', **call_arguments("flux"))


def test_methods_without_a_gradient_through_the_denoiser_may_attend_by_sage(flux, sage):
    arguments = {**call_arguments("flux"), "num_images_per_prompt": 2}
    methods = [best_of_n(), CNO(steps=2)]
    expected = [run(flux, method, **arguments).noise for method in methods]
    flux.transformer.set_attention_backend("sage")
    for method, noise in zip(methods, expected, strict=True):
        assert torch.equal(run(flux, method, **arguments).noise, noise)


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.2),
    "pyramid attention": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
    ),
    "faster": lambda pipe: FasterCacheConfig(current_timestep_callback=lambda: pipe._current_timestep),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=2, mag_ratios=torch.ones(2)),
    "taylor": lambda pipe: TaylorSeerCacheConfig(),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", [reno(), best_of_n()], ids=["gradient", "no gradient"])
def test_caches_across_denoising_steps_are_refused_until_they_are_disabled(flux, cache, method):
    arguments = call_arguments("flux")
    state = state_of(flux)
    flux.transformer.enable_cache(CACHES[cache](flux))
    refused(flux, r"`transformer` has one.*`pipe\.transformer\.disable_cache\(\)`", method, **arguments)
    flux.transformer.disable_cache()
    run(flux, method, **arguments)
    assert state.keys() == state_of(flux).keys()


def test_a_cache_that_was_applied_by_hand_is_refused(flux):
    apply_first_block_cache(flux.transformer, FirstBlockCacheConfig(threshold=0.2))
    refused(flux, "FBCHeadBlockHook", **call_arguments("flux"))


def test_convolutions_that_are_cast_layer_by_layer_are_refused_and_linear_layers_are_not():
    arguments, casting = call_arguments("sd"), {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    pipe = quiet(sd_pipeline())
    pipe.unet.enable_layerwise_casting(**casting)
    refused(pipe, r"`unet` are cast layer by layer.*skip_modules_classes", **arguments)
    assert torch.equal(run(pipe, best_of_n(), **arguments).initial_images, draw(pipe, **arguments))
    linear = quiet(sd_pipeline())
    linear.unet.enable_layerwise_casting(**casting, skip_modules_classes=(torch.nn.Conv2d,))
    rounded = quiet(sd_pipeline())
    rounded.unet.load_state_dict({name: value.float() for name, value in linear.unet.state_dict().items()})
    assert torch.equal(run(linear, reno(), **arguments).noise, run(rounded, reno(), **arguments).noise)


def test_a_call_that_writes_over_its_tensors_is_refused_for_gradients():
    parts = sd_pipeline(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1)).components
    panorama = quiet(StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False))
    arguments = {"num_inference_steps": 2, "height": 32, "width": 64}
    refused(panorama, "StableDiffusionPanoramaPipeline writes over them.*BestOfN", **arguments)
    assert torch.equal(run(panorama, best_of_n(), **arguments).initial_images, draw(panorama, **arguments))


@pytest.mark.parametrize("method", [reno(), best_of_n()], ids=["gradient", "no gradient"])
def test_inference_mode_is_refused_and_no_grad_is_not(method):
    pipe, arguments = quiet(sd_pipeline()), call_arguments("sd")
    with torch.inference_mode():
        refused(pipe, "outside `torch.inference_mode", method, **arguments)
    with torch.no_grad():
        assert torch.equal(run(pipe, method, **arguments).noise, run(pipe, method, **arguments).noise)
