"""Tiny decoders replace the VAE during the optimization; the final images are decoded by the VAE."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny
from tiny_features import build_features
from tiny_pipelines import BUILDERS, call_arguments, quiet, tiny_pipeline

from noiseopt import (
    BestOfN,
    GroupSelection,
    NeverTooLate,
    NoiseDiffusion,
    NoiseResult,
    ReNO,
    ReNOStableDiffusionPipeline,
    optimize_noise,
)
from noiseopt.pipelines.memory.tiny_decoder import FULL_DECODER
from noiseopt.rewards import DPP, SetRewardSum

FAMILIES = ["sd", "sdxl", "sd3", "flux"]


def decoder_of(channels=4, blocks=2, **config):
    """Return a tiny autoencoder with random weights; each block but the first doubles the side."""
    torch.manual_seed(5)
    shape = {"encoder_block_out_channels": (4,) * blocks, "decoder_block_out_channels": (4,) * blocks}
    shape |= {"num_encoder_blocks": (1,) * blocks, "num_decoder_blocks": (1,) * blocks}
    return AutoencoderTiny(latent_channels=channels, **shape, **config).eval()


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def run(pipe, method, prompt="a", family="sd", **arguments):
    arguments = {"generator": torch.Generator().manual_seed(0), "callbacks": [], **call_arguments(family), **arguments}
    return optimize_noise(pipe, prompt, method, **arguments)


def drawn(pipe, result, latents, family="sd", **arguments):
    arguments = {**call_arguments(family), "generator": result.generator(), "output_type": "pt", **arguments}
    return pipe("a", latents=latents, **arguments).images


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_the_result_are_those_of_the_pipeline_and_scores_of_the_loop_those_of_the_decoder(family):
    pipe, decoder = tiny_pipeline(family), decoder_of()
    result = run(pipe, ReNO(rewards=brightness, steps=3, views=0, decoder=decoder), family=family)
    full = drawn(pipe, result, result.latents, family)
    torch.testing.assert_close(result.images, full, rtol=0, atol=1e-5)
    other = copy.copy(pipe)
    vars(other)["vae"] = decoder
    approximate = drawn(other, result, result.latents, family)
    torch.testing.assert_close(result.best_scores["brightness"], brightness(approximate, None), rtol=0, atol=1e-5)
    assert (result.best_scores["brightness"] - brightness(full, None)).abs() > 1e-3
    report = result.reports[FULL_DECODER]
    expected = {"initial": result.initial_images, "best": full}
    for name, images in expected.items():
        assert report[f"{name}_scores"]["brightness"] == pytest.approx(brightness(images, None).tolist(), abs=1e-5)
        assert report[f"{name}_loss"] == pytest.approx((-brightness(images, None)).tolist(), abs=1e-5)
    assert pipe.vae is not decoder and vars(pipe) == vars(tiny_pipeline(family))


def test_the_result_says_so_also_once_it_is_saved(tmp_path):
    result = run(tiny_pipeline("sd"), ReNO(rewards=brightness, steps=2, decoder=decoder_of()))
    assert "by AutoencoderTiny" in repr(result)
    result.save(tmp_path / "found.safetensors")
    loaded = NoiseResult.load(tmp_path / "found.safetensors")
    assert loaded.provenance["decoder"]["approximation"] is True
    assert loaded.reports[FULL_DECODER] == result.reports[FULL_DECODER]
    plain = run(tiny_pipeline("sd"), ReNO(rewards=brightness, steps=2))
    assert plain.provenance["decoder"] is None and FULL_DECODER not in plain.reports and ", by" not in repr(plain)


def test_the_gradient_is_that_of_the_decoder():
    """A step equals that of a pipeline with this decoder as its VAE."""
    pipe, decoder = tiny_pipeline("sd"), decoder_of()
    other = copy.copy(pipe)
    vars(other)["vae"] = decoder
    method = {"rewards": brightness, "steps": 3, "views": 0, "checkpointing": "none"}
    beside, own = run(pipe, ReNO(**method, decoder=decoder)), run(other, ReNO(**method))
    torch.testing.assert_close(beside.noise, own.noise)
    torch.testing.assert_close(beside.losses, own.losses)
    assert (beside.noise - run(pipe, ReNO(**method)).noise).norm() > 1e-3


def test_scaling_and_shift_are_those_of_the_decoder():
    """Flux decodes `latents / scaling + shift`, which are 1 and 0 in a tiny autoencoder."""
    pipe = tiny_pipeline("flux")
    outputs = []
    for config in ({}, {"scaling_factor": 0.5, "shift_factor": 0.3}):
        decoder, seen = decoder_of(**config), []
        decode = decoder.decode
        vars(decoder)["decode"] = lambda z, *args, decode=decode, seen=seen, **kwargs: (
            seen.append(z) or decode(z, *args, **kwargs)
        )
        run(pipe, BestOfN(rewards=brightness, steps=1, decoder=decoder), family="flux")
        outputs.append(seen[-1])
    torch.testing.assert_close(outputs[1], outputs[0] / 0.5 + 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 1, "auto"])
@pytest.mark.parametrize("checkpointing", ["none", "steps"])
def test_it_works_in_chunks_and_with_checkpointing(chunk_size, checkpointing):
    pipe, decoder = tiny_pipeline("sd"), decoder_of()
    method = {"rewards": brightness, "steps": 2, "decoder": decoder, "views": 0}
    joint = run(pipe, ReNO(**method), num_images_per_prompt=2)
    found = run(pipe, ReNO(**method, chunk_size=chunk_size, checkpointing=checkpointing), num_images_per_prompt=2)
    torch.testing.assert_close(found.noise, joint.noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.images, joint.images, rtol=0, atol=1e-4)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def test_methods_have_it():
    pipe, decoder = tiny_pipeline("sd"), decoder_of()
    diversity = SetRewardSum(DPP(build_features("dinov2")))
    guarded = NeverTooLate(diversity=diversity, rewards=brightness, guard={brightness: 0.5}, steps=2, decoder=decoder)
    selection = GroupSelection(rewards=brightness, features=build_features("dinov2"), steps=2, decoder=decoder)
    noise_diffusion = NoiseDiffusion(rewards=brightness, steps=2, candidates=2, decoder=decoder)
    previews = BestOfN(rewards=brightness, steps=3, preview=True, keep=2, decoder=decoder)
    for method, count in ((guarded, 2), (selection, 2), (noise_diffusion, 1), (previews, 1)):
        result = run(pipe, method, num_images_per_prompt=count)
        full = drawn(pipe, result, result.latents, num_images_per_prompt=count)
        torch.testing.assert_close(result.images, full, rtol=0, atol=1e-5)
        found = result.reports[FULL_DECODER]["best_scores"]
        assert found["brightness"] == pytest.approx(brightness(full, None).tolist(), abs=1e-5)
        assert found.keys() == result.scores.keys()


def test_a_folder_by_name_in_the_call_of_a_pipeline(tmp_path):
    decoder_of().save_pretrained(tmp_path)
    pipe = quiet(BUILDERS["sd"](ReNOStableDiffusionPipeline))
    call = {"rewards": "brightness", "steps": 2, "output_type": "pt", **call_arguments("sd")}
    output = pipe("a", method_kwargs={"decoder": str(tmp_path)}, generator=torch.Generator().manual_seed(0), **call)
    torch.testing.assert_close(output.images, output.noise_result.images, rtol=0, atol=1e-5)
    assert output.noise_result.provenance["decoder"]["name"] == tmp_path.name
    assert output.noise_result.provenance["settings"]["decoder"] == tmp_path.name


def test_a_loaded_decoder_is_frozen_in_the_run_and_left_as_it_was():
    decoder, seen = decoder_of().train(), []

    def look(images, prompts):
        seen.append((decoder.training, any(parameter.requires_grad for parameter in decoder.parameters())))
        return images.flatten(1).mean(1)

    run(tiny_pipeline("sd"), ReNO(rewards=look, steps=2, views=0, decoder=decoder))
    assert seen[1:] and set(seen[1:]) == {(False, False)}
    assert decoder.training and all(parameter.requires_grad for parameter in decoder.parameters())


def test_an_exception_keeps_what_was_found_by_the_decoder():
    """No images are decoded by the VAE, and the result reports none."""

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(tiny_pipeline("sd"), ReNO(rewards=brightness, steps=2, decoder=decoder_of()), callbacks=[stop])
    result = vars(caught.value)["noise_result"]
    assert FULL_DECODER not in result.reports and result.provenance["decoder"]["approximation"] is True


def refused(decoder, match, pipe=None, error=ValueError):
    calls = []
    pipe = pipe or tiny_pipeline("sd")
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(error, match=match):
            run(pipe, ReNO(rewards=brightness, decoder=decoder))
    finally:
        handle.remove()
    assert not calls


def test_what_cannot_work_is_refused_before_any_model_runs():
    refused(decoder_of(channels=16), "Expected a decoder of latents with 4 channels.*got one of 16")
    refused(decoder_of(blocks=3), "Expected a decoder from 8 × 8 latents to 16 × 16 pixels.*32, 32")
    refused(decoder_of().double(), r"Expected the decoder in torch.float32 on cpu.*torch.float64.*decoder.to\(")
    refused(lambda latents: latents, "Expected `decoder` to be a Hub id.*got function", error=TypeError)


def test_pipelines_whose_latents_no_tiny_decoder_knows_are_refused_by_name():
    pipe = copy.copy(tiny_pipeline("sd"))
    vars(pipe)["vae"] = AutoencoderKLFlux2(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
    refused(decoder_of(), "`AutoencoderKL`.*StableDiffusionPipeline has AutoencoderKLFlux2.*decoder=None", pipe)
    pipe = quiet(BUILDERS["sdxl"](latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    refused(decoder_of(), "StableDiffusionXLPipeline has one that normalizes each channel", pipe)
