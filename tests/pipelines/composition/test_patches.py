"""Pipelines patched, wrapped and compiled by their users, at a size at which lean layers act: honored, or refused."""

import functools
import sys
import threading
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compositions import check_composition, draw, fresh
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils.torch_utils import randn_tensor
from problems import generator, redness
from tiers import slow_except
from tiny_pipelines import quiet, sd_pipeline, sdxl_pipeline, tiny_vae
from torch import nn

from noiseopt import CNO, BestOfN, ReNO, ReNOStableDiffusionPipeline, optimize_noise
from noiseopt.pipelines.memory.lean_layers import FrozenConvolution

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 256, "width": 256}


def pipeline(cls=StableDiffusionPipeline):
    """Return a pipeline whose images are 8 times as large as its latents."""
    parts = {**sd_pipeline().components, "vae": tiny_vae(block_out_channels=(4, 4, 4, 8))}
    return quiet(cls(**parts, requires_safety_checker=False))


def convolutions(pipe) -> list[nn.Conv2d]:
    return [m for root in (pipe.unet, pipe.vae) for m in root.modules() if isinstance(m, nn.Conv2d)]


def wrapping(self, input, weight, bias):
    """Convolve on a torus, as in public scripts for seamless tiles."""
    if any(self.padding):
        input = F.pad(input, (self.padding[1],) * 2 + (self.padding[0],) * 2, mode="circular")
    return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)


def scaled(function, factor=0.9):
    """Return a function whose first result is scaled, like that of a profiler or a guidance hack."""
    return lambda *args, **kwargs: (function(*args, **kwargs)[0] * factor,)


# Each patches a fresh pipeline; classes and modules of libraries by `monkeypatch`.


def tiling_on_instances(pipe, monkeypatch):
    for layer in convolutions(pipe):
        layer._conv_forward = types.MethodType(wrapping, layer)


def tiling_on_the_class(pipe, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", wrapping)


def normalization_on_the_class(pipe, monkeypatch):
    stock = nn.GroupNorm.forward
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, input: stock(self, input) * 1.1)


def silu_on_the_class(pipe, monkeypatch):
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, input: F.gelu(input))


def convolution_of_torch(pipe, monkeypatch):
    stock = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: stock(*args, **kwargs) * 1.02)


def attention_of_torch(pipe, monkeypatch):
    stock = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: stock(*args, **kwargs) * 1.2)


def denoiser_closure(pipe, monkeypatch):
    pipe.unet.forward = scaled(pipe.unet.forward)


def denoiser_wrapper(pipe, monkeypatch):
    pipe.unet.forward = functools.wraps(pipe.unet.forward)(scaled(pipe.unet.forward))


def denoiser_partial(pipe, monkeypatch):
    stock = pipe.unet.forward
    pipe.unet.forward = functools.partial(lambda factor, *args, **kwargs: scaled(stock, factor)(*args, **kwargs), 0.9)


def denoiser_method(pipe, monkeypatch):
    stock = UNet2DConditionModel.forward
    pipe.unet.forward = types.MethodType(scaled(stock), pipe.unet)


def denoiser_class(pipe, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "forward", scaled(UNet2DConditionModel.forward))


def denoiser_in_a_module(pipe, monkeypatch):
    class Wrapper(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

        def forward(self, *args, **kwargs):
            return scaled(self.unet)(*args, **kwargs)

    pipe.unet = Wrapper(pipe.unet)


def hooks(pipe, monkeypatch):
    def text(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 1.5}

    pipe.unet.register_forward_pre_hook(text, with_kwargs=True)
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 0.9,))
    block = pipe.vae.decoder.mid_block.resnets[0]
    block.norm1.register_forward_hook(lambda module, args, output: output.mul_(1.1))
    block.nonlinearity.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))
    block.conv1.register_forward_hook(lambda module, args, output: output + 0.1)


def hook_that_reads_the_pipeline(pipe, monkeypatch):
    def scale(module, args, output):
        index = pipe.scheduler.timesteps.tolist().index(args[1])
        return (output[0] * (0.5 + 0.1 * index + 0.1 * pipe.num_timesteps + 0.05 * pipe.guidance_scale),)

    pipe.unet.register_forward_hook(scale)


def attention_processor(pipe, monkeypatch):
    class Processor(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * (1 + pipe.scheduler.timesteps.tolist()[0] / 1000)

    pipe.unet.set_attn_processor(Processor())


def merged_tokens(pipe, monkeypatch):
    """Swap the class of blocks, and set what they share before each call, as ToMe does."""
    for block in pipe.unet.modules():
        kind = type(block)
        if kind.__name__ == "BasicTransformerBlock":

            class Merging(kind):
                def forward(self, hidden_states, *args, **kwargs):
                    return super().forward(hidden_states * self.shared["factor"], *args, **kwargs)

            block.__class__, block.shared = Merging, {"factor": 1.0}
            pipe.unet.register_forward_pre_hook(lambda module, args, block=block: block.shared.update(factor=0.9))


def cached_steps(pipe, monkeypatch):
    """Reuse the output of every other step, as DeepCache does, which reads the timesteps of the pipeline."""
    stock, kept = pipe.unet.forward, {}

    def forward(sample, timestep, *args, **kwargs):
        if pipe.scheduler.timesteps.tolist().index(timestep) % 2 == 0:
            kept["output"] = stock(sample, timestep, *args, **kwargs)[0]
            return (kept["output"],)
        return (kept["output"] * 0.8,)

    pipe.unet.forward = forward


def decoder_closure(pipe, monkeypatch):
    pipe.vae.decode = scaled(pipe.vae.decode, 0.5)


def decoder_method(pipe, monkeypatch):
    pipe.vae.decode = types.MethodType(scaled(type(pipe.vae).decode, 0.5), pipe.vae)


def step_closure(pipe, monkeypatch):
    pipe.scheduler.step = scaled(pipe.scheduler.step)


def step_method(pipe, monkeypatch):
    pipe.scheduler.step = types.MethodType(scaled(type(pipe.scheduler).step), pipe.scheduler)


def step_of_a_multistep_solver(pipe, monkeypatch):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.step = scaled(pipe.scheduler.step)


def step_of_a_subclass(pipe, monkeypatch):
    class Scaled(EulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            return scaled(super().step)(*args, **kwargs)

    pipe.scheduler = Scaled.from_config(pipe.scheduler.config)


def scaling_of_inputs(pipe, monkeypatch):
    stock = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda sample, timestep: stock(sample, timestep) * 1.1


def timesteps(pipe, monkeypatch):
    stock, scheduler = pipe.scheduler.set_timesteps, pipe.scheduler

    def set_timesteps(count, device=None):
        stock(count + 1, device=device)
        scheduler.timesteps = scheduler.timesteps[:-1]

    scheduler.set_timesteps = set_timesteps


def scheduler_with_a_lock(pipe, monkeypatch):
    step_method(pipe, monkeypatch)
    pipe.scheduler.lock = threading.Lock()  # which has no copy


def noise_of_the_module(pipe, monkeypatch):
    """Draw in another order, as scripts do that reproduce the images of another program."""
    module = sys.modules[StableDiffusionPipeline.__module__]

    def draw_backwards(shape, generator=None, device=None, dtype=None, layout=None):
        return randn_tensor(shape, generator, torch.device("cpu"), dtype).flip(-1)

    monkeypatch.setattr(module, "randn_tensor", draw_backwards)


def louder(encode):
    def encode_prompt(*args, **kwargs):
        text, negative = encode(*args, **kwargs)
        return text * 1.5, negative

    return encode_prompt


def prompt_closure(pipe, monkeypatch):
    pipe.encode_prompt = louder(pipe.encode_prompt)


def prompt_method(pipe, monkeypatch):
    pipe.encode_prompt = types.MethodType(louder(StableDiffusionPipeline.encode_prompt), pipe)


def prompt_class(pipe, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", louder(StableDiffusionPipeline.encode_prompt))


def postprocessing(pipe, monkeypatch):
    stock = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image, **kwargs: stock(image * 0.5, **kwargs)


def denormalization(pipe, monkeypatch):
    monkeypatch.setattr(VaeImageProcessor, "denormalize", staticmethod(lambda image: (image / 4 + 0.5).clamp(0, 1)))


def weight_norms(pipe, monkeypatch):
    pipe.vae.decoder.conv_in.weight.data *= 1.5
    for layer in (pipe.vae.decoder.conv_in, pipe.unet.conv_out):
        nn.utils.weight_norm(layer)


def parametrizations(pipe, monkeypatch):
    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.9

    for layer in (pipe.vae.decoder.conv_in, pipe.unet.conv_out):
        nn.utils.parametrize.register_parametrization(layer, "weight", Scale())


HONORED = [
    *(tiling_on_instances, tiling_on_the_class, normalization_on_the_class, silu_on_the_class, convolution_of_torch),
    *(attention_of_torch, denoiser_closure, denoiser_wrapper, denoiser_partial, denoiser_method, denoiser_class),
    *(denoiser_in_a_module, hooks, hook_that_reads_the_pipeline, attention_processor, merged_tokens, cached_steps),
    *(decoder_closure, decoder_method, step_closure, step_method, step_of_a_multistep_solver, step_of_a_subclass),
    *(scaling_of_inputs, timesteps, prompt_closure, prompt_method, prompt_class, postprocessing, denormalization),
    *(weight_norms, parametrizations, scheduler_with_a_lock, noise_of_the_module),
]
PATCHES = {patch.__name__.replace("_", " "): patch for patch in HONORED}
FAST = (
    *("tiling on instances", "tiling on the class", "normalization on the class", "convolution of torch"),
    *("denoiser closure", "hook that reads the pipeline", "attention processor", "cached steps", "step closure"),
    *("prompt closure", "denormalization", "scheduler with a lock", "noise of the module"),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", slow_except(PATCHES, *FAST))
def test_a_patched_pipeline_is_optimized_as_it_is(name, monkeypatch):
    pipe = pipeline()
    unpatched = draw(pipe, **CALL)
    PATCHES[name](pipe, monkeypatch)
    assert (draw(pipe, **CALL) - unpatched).abs().max() > 1e-3
    check_composition(pipe, oracle="stock" if name in FAST else None, **CALL)


IN_CLASSES = ["tiling on instances", "prompt closure", "step closure", "cached steps", "hook that reads the pipeline"]


@pytest.mark.parametrize("name", slow_except(IN_CLASSES, "prompt closure", "step closure"))
def test_a_patched_pipeline_of_ours_returns_the_image_that_it_found(name, monkeypatch):
    pipe = pipeline(ReNOStableDiffusionPipeline)
    PATCHES[name](pipe, monkeypatch)
    plain = draw(pipe, **CALL)
    output = pipe("a b", rewards=redness, steps=3, generator=generator(), output_type="pt", **CALL)
    result = output.noise_result
    assert torch.equal(result.initial_images, plain) and torch.equal(result.images, output.images)
    assert result.losses.min() < result.losses[0]
    assert torch.equal(draw(pipe, latents=result.latents, **{**CALL, "generator": result.generator()}), output.images)
    assert torch.equal(draw(pipe, **CALL), plain)


def test_nothing_that_was_replaced_is_stood_in_for(monkeypatch):
    """Without a patch the layers of this pipeline are lean at this size; with one on a class none of that class is."""
    calls, stock = [], FrozenConvolution.apply
    monkeypatch.setattr(FrozenConvolution, "apply", lambda *args: calls.append(1) or stock(*args))
    for patch, expected in ((None, True), (tiling_on_the_class, False)):
        pipe = pipeline()
        if patch:
            patch(pipe, monkeypatch)
        calls.clear()
        optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=2), **CALL)
        assert bool(calls) is expected


def latents_on_the_instance(pipe, monkeypatch):
    stock = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: stock(*args, **kwargs) * 1.1


def latents_wrapped_on_the_class(pipe, monkeypatch):
    stock = StableDiffusionPipeline.prepare_latents
    louder = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs) * 1.1)
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", louder)


def call_wrapped_on_the_class(pipe, monkeypatch):
    stock = StableDiffusionPipeline.__call__
    wrapper = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", wrapper)


def call_replaced_on_the_class(pipe, monkeypatch):
    stock = StableDiffusionPipeline.__call__
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *args, **kwargs: stock(*args, **kwargs))


def sage_attention(pipe, monkeypatch):
    stock = F.scaled_dot_product_attention

    def sageattn(*args, **kwargs):
        return stock(*args, **kwargs).detach()

    sageattn.__module__ = "sageattention.core"
    monkeypatch.setattr(F, "scaled_dot_product_attention", sageattn)


@torch.inference_mode()
def made_in_inference_mode(pipe, monkeypatch):
    pipe.vae = quiet(pipeline()).vae


REFUSED = {
    latents_on_the_instance: "the `prepare_latents` of StableDiffusionPipeline, but it was replaced.*subclass",
    latents_wrapped_on_the_class: r"prepare_latents` as its class defines it.*test_patches\.py",
    call_wrapped_on_the_class: r"__call__` as its class defines it.*test_patches\.py.*subclass",
    call_replaced_on_the_class: r"__call__` as its class defines it",
    sage_attention: "replaced by Sage attention",
    made_in_inference_mode: "those of `vae` were made under `torch.inference_mode.*BestOfN",
}


@pytest.mark.parametrize("patch", REFUSED, ids=lambda patch: patch.__name__)
def test_what_cannot_be_honored_is_refused_before_any_model_runs(patch, monkeypatch):
    pipe = pipeline()
    patch(pipe, monkeypatch)
    encoder = pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises((TypeError, ValueError), match=REFUSED[patch]):
        optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=2), **CALL)
    encoder.remove()


def test_latents_that_a_subclass_prepares_are_those_that_are_optimized():
    class Drawing(ReNOStableDiffusionPipeline):
        def prepare_latents(
            self, batch_size, num_channels_latents, height, width, dtype, device, generator, latents=None
        ):
            shape = (batch_size, num_channels_latents, height // 8, width // 8)
            if latents is None:
                latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return latents * 0.5

    class Calling(ReNOStableDiffusionPipeline):
        def prepare_latents(self, *args, **kwargs):
            return super().prepare_latents(*args, **kwargs) * 0.5

    pipe = pipeline(Drawing)
    plain = draw(pipe, **CALL)
    output = pipe("a b", rewards=redness, steps=2, generator=generator(), output_type="pt", **CALL)
    result = output.noise_result
    assert torch.equal(result.initial_images, plain) and torch.equal(result.images, output.images)
    assert not torch.equal(plain, draw(pipeline(), **CALL))
    with pytest.raises(TypeError, match="Call `randn_tensor` there"):
        pipeline(Calling)("a b", rewards=redness, steps=2, **CALL)


def test_an_estimate_that_would_bypass_a_replaced_step_is_refused(monkeypatch):
    pipe = pipeline()
    step_closure(pipe, monkeypatch)
    for method in (CNO(steps=2), ReNO(rewards=redness, steps=2, preview=True)):
        with pytest.raises(ValueError, match="the `step` of EulerDiscreteScheduler, but it was replaced"):
            optimize_noise(pipe, "a b", method, num_images_per_prompt=2, **CALL)


def half_precision(patch):
    pipe = quiet(sdxl_pipeline(force_upcast=True)).to(torch.float16)
    patch(pipe)
    return pipe, {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}


def test_a_replaced_decoder_of_a_vae_that_is_converted_is_run_or_refused():
    def scale(pipe):
        pipe.vae.decode = scaled(pipe.vae.decode, 0.5)

    pipe, arguments = half_precision(scale)
    plain = draw(pipe, **arguments)
    with pytest.raises(ValueError, match="converts it to float32.*bfloat16.*BestOfN"):
        optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=2), **arguments)
    result = optimize_noise(pipe, "a b", BestOfN(rewards=redness, steps=2), generator=generator(), **arguments)
    assert torch.equal(result.initial_images, plain) and pipe.vae.dtype == torch.float16
    assert not torch.equal(plain, draw(half_precision(lambda pipe: None)[0], **arguments))


@pytest.mark.parametrize("part", ["decode", "convolutions"])
def test_methods_on_a_vae_that_is_converted_are_those_of_the_copy(part):
    def bind(pipe):
        if part == "decode":
            pipe.vae.decode = types.MethodType(scaled(type(pipe.vae).decode, 0.5), pipe.vae)
        else:
            tiling_on_instances(pipe, None)

    pipe, arguments = half_precision(bind)
    check_composition(pipe, oracle=None, **arguments)


def test_modules_of_inference_mode_work_without_a_gradient(monkeypatch):
    pipe = pipeline()
    made_in_inference_mode(pipe, monkeypatch)
    pipe.vae.train()
    plain = draw(pipe, **CALL)
    result = optimize_noise(pipe, "a b", BestOfN(rewards=redness, steps=2), generator=generator(), **CALL)
    assert torch.equal(result.initial_images, plain) and pipe.vae.training


def compiled_decoder(pipe):
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


def compiled_denoiser(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


def compiled_module(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_function_around_modules(pipe):
    stock = pipe.vae.decode
    decode = torch.compile(lambda latents: stock(latents, return_dict=False)[0], backend="eager")
    pipe.vae.decode = lambda latents, **kwargs: (decode(latents),)


COMPILED = [compiled_decoder, compiled_denoiser, compiled_module, compiled_function_around_modules]


@pytest.mark.slow
@pytest.mark.parametrize("compile_part", COMPILED, ids=lambda function: function.__name__)
def test_compiled_methods_are_run(compile_part):
    torch.compiler.reset()
    pipe = pipeline()
    compile_part(pipe)
    draw(pipe, **CALL)  # compiles, as the first call after a guide of diffusers would
    check_composition(pipe, oracle=None, **fresh(CALL))


class Lost(torch.autograd.Function):
    """Identity that loses the gradient, or fails to compute it, as compiled backward passes may."""

    @staticmethod
    def forward(ctx: Any, input, fails):
        ctx.fails = fails
        return input.clone()

    @staticmethod
    def backward(ctx: Any, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.fails:
            raise RuntimeError("Expected X.is_contiguous(memory_format) to be true")
        return torch.zeros_like(gradient), None


@pytest.mark.parametrize("fails", [True, False])
def test_a_gradient_that_a_compiled_module_loses_is_an_error(fails):
    pipe = pipeline()
    stock = pipe.vae.decode

    def decode(latents, **kwargs):
        return (Lost.apply(stock(latents, return_dict=False)[0], fails),)

    vars(decode)["_torchdynamo_orig_callable"] = stock  # how a compiled function is told
    pipe.vae.decode = decode
    message = "with vae compiled it fails" if fails else "it is exactly zero, and vae is compiled"
    with pytest.raises(ValueError, match=f"{message}.*BestOfN") as error:
        optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=2), **CALL)
    assert error.value.noise_result.losses.shape == (1, 1)  # what was found so far


def test_a_module_that_writes_into_its_input_is_named():
    pipe = pipeline()
    kept = []

    def write(module, args, output):
        kept.append(output.exp())
        return kept[-1] + kept[-1].mul_(2)

    pipe.vae.decoder.conv_out.register_forward_hook(write)
    with pytest.raises(ValueError, match="writes into one in place.*BestOfN"):
        optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=2), **CALL)
