"""Calls that draw more than their noise: the image is drawn again from `latents`, or in the same call, or refused."""

import copy

import diffusers
import pytest
import torch
from conformance.all_pipelines import Redness, in_unit_range, one_global_stream, plain_images, seed
from conformance.builders import arguments_of, tiny_pipeline_of

from noiseopt import CNO, BestOfN, NoiseOptimizationMixin, ReNO, optimize_noise

METHOD = ReNO(rewards=Redness(), steps=2)


def call_of(name: str, strength: float = 1.0, **changes):
    cls = getattr(diffusers, name)
    return tiny_pipeline_of(cls), {**arguments_of(cls, strength), **changes}


def as_class(pipe):
    found = copy.copy(pipe)
    found.__class__ = type("Ours", (NoiseOptimizationMixin, type(pipe)), {})
    return found


INPAINTING = [
    ("ZImageInpaintPipeline", 1.0),
    ("StableDiffusionInpaintPipeline", 0.6),
    ("StableDiffusionXLInpaintPipeline", 0.6),
    ("QwenImageInpaintPipeline", 1.0),
    ("FluxInpaintPipeline", 0.6),
]


@pytest.mark.parametrize(("name", "strength"), INPAINTING)
def test_inpainting_that_latents_do_not_draw_again_is_refused_before_any_step(name, strength):
    pipe, arguments = call_of(name, strength)
    steps = []
    with pytest.raises(TypeError, match=rf"{name} draws other random numbers then.*NoiseOptimizationMixin, {name}"):
        optimize_noise(pipe, method=METHOD, callbacks=steps.append, generator=seed(), **arguments)
    assert not steps


OTHERS = [
    ("StableDiffusionXLInpaintPipeline", 1.0),
    ("KandinskyImg2ImgPipeline", 0.6),  # the `latents` of its preparation are those of the image
    ("DreamLitePipeline", 1.0),  # encodes the prompt after the preparation
    ("JoyImageEditPipeline", 1.0),  # samples the encoded image from the global stream, in the preparation
]


@pytest.mark.parametrize(("name", "strength"), [*INPAINTING, *OTHERS])
def test_a_class_in_the_same_call_returns_its_best_and_leaves_the_generator_where_the_stock_call_does(name, strength):
    pipe, arguments = call_of(name, strength)
    used, plainly_used = seed(), seed()
    plain = plain_images(pipe, arguments.pop("prompt"), **{**arguments, "generator": plainly_used})
    with one_global_stream():
        output = as_class(pipe)(prompt="a b", method=METHOD, output_type="pt", generator=used, **arguments)
    assert torch.equal(output.noise_result.initial_images, in_unit_range(plain))
    assert torch.equal(in_unit_range(output.images), output.noise_result.images)
    assert torch.equal(used.get_state(), plainly_used.get_state())


class PreparesTwice(diffusers.StableDiffusionPipeline):
    """Draws the latents of another model first."""

    def check_inputs(self, *args, **kwargs):
        self.prepare_latents(1, 4, 32, 32, torch.float32, torch.device("cpu"), seed())
        return super().check_inputs(*args, **kwargs)


def test_a_call_that_prepares_latents_twice_is_refused_before_any_step():
    pipe, steps = copy.copy(tiny_pipeline_of(diffusers.StableDiffusionPipeline)), []
    pipe.__class__ = PreparesTwice
    arguments = arguments_of(PreparesTwice)
    with pytest.raises(TypeError, match="prepares its latents once, but that of PreparesTwice"):
        optimize_noise(pipe, method=METHOD, callbacks=steps.append, generator=seed(), **arguments)
    assert not steps


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", ["StableDiffusionAttendAndExcitePipeline", "StableDiffusionPix2PixZeroPipeline"])
def test_a_call_that_detaches_its_latents_midway_is_refused_before_any_step(name):
    pipe, arguments = call_of(name)
    steps = []
    with pytest.raises(ValueError, match=f"Expected {name} to be differentiable .* carries no gradient"):
        optimize_noise(pipe, method=METHOD, callbacks=steps.append, generator=seed(), **arguments)
    assert not steps


@pytest.mark.parametrize("name", ["FluxControlPipeline", "FluxFillPipeline", "FluxControlNetPipeline"])
@pytest.mark.parametrize("several", [False, True])
def test_draws_before_the_noise_are_repeated_and_the_generator_of_the_result_draws_them_again(name, several):
    pipe, arguments = call_of(name)
    if several:
        arguments |= {"num_images_per_prompt": 2}
    method = BestOfN(rewards=Redness(), steps=3)
    plain = plain_images(pipe, prompt := arguments.pop("prompt"), **arguments)
    result = optimize_noise(pipe, prompt, method, generator=seed(), **arguments)
    again = plain_images(pipe, prompt, **{**arguments, "latents": result.latents, "generator": result.generator()})
    assert torch.equal(result.initial_images, plain)
    assert torch.equal(again, result.images)
    without = plain_images(pipe, prompt, **{**arguments, "latents": result.latents, "generator": seed().manual_seed(8)})
    assert not torch.equal(without, result.images)


def test_a_run_without_a_generator_repeats_the_draws_before_its_noise():
    pipe, arguments = call_of("FluxControlPipeline", generator=None)
    plain = plain_images(pipe, prompt := arguments.pop("prompt"), **arguments)
    with one_global_stream():
        result = optimize_noise(pipe, prompt, METHOD, **arguments)
    assert torch.equal(result.initial_images, plain)
    again = plain_images(pipe, prompt, **{**arguments, "latents": result.latents, "generator": result.generator()})
    assert torch.equal(again, result.images)


def test_chunks_are_refused_where_a_call_draws_before_its_noise_and_left_out_where_they_are_automatic():
    pipe, arguments = call_of("FluxControlPipeline", num_images_per_prompt=2)
    whole = optimize_noise(pipe, method=METHOD, generator=seed(), **arguments)
    chunks = ReNO(rewards=Redness(), steps=2, chunk_size=1)
    with pytest.raises(ValueError, match="first random numbers are its noise.*FluxControlPipeline.*chunk_size=None"):
        optimize_noise(pipe, method=chunks, generator=seed(), **arguments)
    automatic = ReNO(rewards=Redness(), steps=2, chunk_size="auto")
    assert torch.equal(optimize_noise(pipe, method=automatic, generator=seed(), **arguments).losses, whole.losses)


def test_draws_from_the_global_stream_are_repeated_in_each_evaluation_of_a_call_and_left_where_they_were():
    pipe, arguments = call_of("StableDiffusion3ControlNetPipeline")
    with pytest.raises(TypeError, match="StableDiffusion3ControlNetPipeline draws other random numbers"):
        optimize_noise(pipe, method=METHOD, generator=seed(), **arguments)
    plain = plain_images(pipe, prompt := arguments.pop("prompt"), **arguments)
    with one_global_stream():
        pipe(prompt, generator=seed(), **arguments)
        expected = torch.randn(3)
    method = BestOfN(rewards=lambda images, prompts: -(images - plain).abs().mean((1, 2, 3)), steps=3)
    with one_global_stream():
        output = as_class(pipe)(prompt, method=method, output_type="pt", generator=seed(), **arguments)
        assert torch.equal(torch.randn(3), expected)
    assert output.noise_result.losses[0] == 0  # the control latents of each evaluation are those of the call
    assert torch.equal(output.images, plain)


def test_draws_from_the_global_stream_after_the_noise_are_refused():
    stock = tiny_pipeline_of(diffusers.StableDiffusionPipeline)

    class Grainy(diffusers.StableDiffusionPipeline):
        def prepare_extra_step_kwargs(self, generator, eta):
            torch.randn(1)
            return super().prepare_extra_step_kwargs(generator, eta)

    pipe = copy.copy(stock)
    pipe.__class__ = Grainy
    with pytest.raises(ValueError, match="to come from `generator`, but Grainy draws from torch's global stream"):
        optimize_noise(pipe, method=METHOD, generator=seed(), **arguments_of(diffusers.StableDiffusionPipeline))


@pytest.mark.parametrize("name", ["Kandinsky3Pipeline", "PRXPixelPipeline", "StableCascadeDecoderPipeline"])
@pytest.mark.parametrize("mode", ["default", "parity"])  # the clamp is straight-through, or hard
def test_the_range_of_the_pixels_is_learnt_from_the_pipeline(name, mode):
    pipe, arguments = call_of(name)
    prompt = arguments.pop("prompt")
    arrays = plain_images(pipe, prompt, **{**arguments, "output_type": "np"})
    result = optimize_noise(pipe, prompt, ReNO(rewards=Redness(), steps=2, mode=mode), generator=seed(), **arguments)
    expected = torch.from_numpy(arrays).movedim(-1, 1)
    torch.testing.assert_close(result.initial_images.clamp(0, 1), expected, rtol=0, atol=1e-6)
    again = plain_images(pipe, prompt, **{**arguments, "latents": result.latents, "generator": result.generator()})
    torch.testing.assert_close(in_unit_range(again), result.images.clamp(0, 1), rtol=0, atol=1e-6)


def test_pixels_brighter_than_middle_gray_do_not_hide_their_range():
    stock, arguments = call_of("Kandinsky3Pipeline")
    pipe = copy.copy(stock)
    movq = vars(pipe)["movq"] = copy.deepcopy(stock.movq)
    torch.nn.init.constant_(movq.decoder.conv_out.bias, 0.4)
    with torch.no_grad():
        movq.decoder.conv_out.weight *= 0.05
    tensors = plain_images(pipe, **arguments)
    assert tensors.min() > 0  # in [-1, 1], though nothing is negative
    method = ReNO(rewards=Redness(), steps=1, mode="parity")
    result = optimize_noise(pipe, method=method, generator=seed(), **arguments)
    assert torch.equal(result.images, (tensors * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionAdapterPipeline", "StableDiffusionAdapterPipeline returns numpy arrays instead of tensors"),
        ("VisualClozePipeline", "the call of VisualClozePipeline takes no `prompt`"),
        ("VisualClozeGenerationPipeline", "the call of VisualClozeGenerationPipeline takes no `prompt`"),
        ("KandinskyV22Pipeline", "the call of KandinskyV22Pipeline takes no `prompt`"),
        ("ErnieImagePipeline", "ErnieImagePipeline draws its noise elsewhere"),
    ],
)
def test_a_class_without_what_a_run_needs_is_refused_by_name(name, message):
    cls = getattr(diffusers, name)
    with pytest.raises(TypeError, match=message):
        optimize_noise(object.__new__(cls), "a", METHOD)


@pytest.mark.parametrize("argument", ["denoising_end", "denoising_start"])
@pytest.mark.parametrize("method", [METHOD, CNO()])
def test_half_of_a_two_stage_call_is_refused(argument, method):
    pipe, arguments = call_of("StableDiffusionXLImg2ImgPipeline", 0.6)
    message = f"from noise to image, but `{argument}` leaves out a part"
    with pytest.raises(ValueError, match=message):
        optimize_noise(pipe, method=method, **{**arguments, argument: 0.5})
    with pytest.raises(ValueError, match=message):
        as_class(pipe)(method=method, **{**arguments, argument: 0.5})


def test_a_result_of_one_image_for_several_embeddings_is_refused():
    pipe, arguments = call_of("StableCascadeDecoderPipeline")
    arguments["image_embeddings"] = arguments["image_embeddings"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="Expected noise for 1 images.*one prompt for each image"):
        optimize_noise(pipe, method=METHOD, generator=seed(), **arguments)


def test_code_that_fails_only_where_gradients_are_recorded_is_named():
    pipe, arguments = call_of("ZImageControlNetPipeline")
    with pytest.raises(TypeError, match="ZImageControlNetPipeline to be differentiable.*gradient_checkpointing"):
        optimize_noise(pipe, method=METHOD, generator=seed(), **arguments)
    frozen = ReNO(rewards=Redness(), steps=2, gradient="frozen")
    result = optimize_noise(pipe, method=frozen, generator=seed(), **arguments)
    assert result.best_loss < result.losses[0]
