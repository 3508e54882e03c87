"""Generators get the conditioning of the stock pipelines, and predict what leads from noise to picture."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline

from noiseopt import shapes_world
from training.autoencoder import new_vae
from training.generators import SD3Generator, SDGenerator, SDXLGenerator, silent_encoder

PROMPTS = ["a red circle", "a blue star left of a green cross"]


@pytest.mark.parametrize("kind", [SDGenerator, SDXLGenerator])
def test_noise_levels_are_those_of_stable_diffusion(kind):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    signal = (1 - betas).log().cumsum(0).exp()[[999, 499]].view(2, 1, 1, 1)
    a, b = signal.sqrt().float(), (1 - signal).sqrt().float()
    z, noise = torch.randn(2, 2, 4, 32, 32)
    noisy, v = kind().corrupt(z, noise, torch.tensor([999, 499]))
    torch.testing.assert_close(noisy, a * z + b * noise)
    torch.testing.assert_close(a * noisy - b * v, z)


def test_velocity_leads_from_noise_to_picture():
    z, noise = torch.randn(2, 2, 4, 32, 32)
    noisy, velocity = SD3Generator().corrupt(z, noise, torch.tensor([1000.0, 250.0]))
    torch.testing.assert_close(noisy - torch.tensor([1.0, 0.25]).view(2, 1, 1, 1) * velocity, z)


@torch.no_grad()
def test_sdxl_is_told_what_the_stock_pipeline_tells_it():
    model = SDXLGenerator()
    pipe = model.pipeline(new_vae())
    assert isinstance(pipe, StableDiffusionXLPipeline)
    told, free, pooled, free_pooled = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    context, summary = model.embed(["", "", *PROMPTS])
    torch.testing.assert_close(context, torch.cat((free, told)))
    torch.testing.assert_close(summary, torch.cat((free_pooled, pooled)))


@torch.no_grad()
def test_sdxl_starts_as_its_origin_on_the_same_text():
    first = SDGenerator().eval()
    model = SDXLGenerator().eval()
    model.begin_with(first)
    context, x, t = torch.randn(2, 16, 96), torch.randn(2, 4, 32, 32), torch.tensor([999.0, 400.0])
    wide = F.pad(context, (0, 128))
    torch.testing.assert_close(
        model.predict(x, t, (wide, torch.randn(2, 128))), first.predict(x, t, context), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_the_third_text_encoder_of_sd3_is_zero_and_as_embedded():
    encoder, tokenizer = silent_encoder(224)
    embedded = shapes_world.load("sd3")
    kept, made = (each.state_dict() for each in (embedded.text_encoder_3, encoder))
    assert kept.keys() == made.keys() and all(torch.equal(kept[name], made[name]) for name in made)
    ids = [each(PROMPTS).input_ids for each in (tokenizer, embedded.tokenizer_3)]
    assert ids[0] == ids[1]
    assert not encoder(torch.tensor(ids[0][:1])).last_hidden_state.any()


@torch.no_grad()
def test_sd3_is_told_what_the_stock_pipeline_tells_it():
    model = SD3Generator().eval()
    pipe = model.pipeline(new_vae())
    told, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, device="cpu", max_sequence_length=16)
    context, summary = model.embed(PROMPTS)
    torch.testing.assert_close(told[:, :16], context[:, :16])
    torch.testing.assert_close(summary, pooled)
    assert told.shape == (2, 32, 224) and not told[:, 16:].any() and not context[:, 16:].any()
    noise, t = torch.randn(2, 4, 32, 32), torch.full((2,), 700.0)
    many = model.transformer(noise, told, pooled, t).sample
    torch.testing.assert_close(model.predict(noise, t, (context, summary)), many, rtol=1e-4, atol=1e-5)
