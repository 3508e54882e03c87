from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from noiseopt import shapes_world
from noiseopt.shapes_world import VALIDATION_PROMPTS, judge
from noiseopt.shapes_world.captions import WORDS

WEIGHTS = Path(shapes_world.path("turbo")).parent


@pytest.fixture(scope="module")
def turbo():
    pipe = DiffusionPipeline.from_pretrained(shapes_world.path("turbo"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_path_refuses_other_names():
    with pytest.raises(ValueError, match='"turbo", "guided" or "clip"'):
        shapes_world.path("base")


def test_weights_are_small_and_in_half_precision():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 15e6
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 7
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


@pytest.mark.parametrize("name", ["turbo", "clip"])
def test_each_word_is_one_token(name, turbo):
    tokenizer = turbo.tokenizer if name == "turbo" else AutoTokenizer.from_pretrained(shapes_world.path("clip"))
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    assert len(tokenizer.tokenize("dog")) == 3


def test_turbo_draws_in_one_step(turbo):
    prompts = list(VALIDATION_PROMPTS[:64])
    generator = torch.Generator().manual_seed(0)
    images = turbo(prompts, num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="pt").images
    assert images.shape == (64, 3, 64, 64)
    verdicts = judge(images, prompts)
    assert 0.1 < sum(v.correct for v in verdicts) / 64 < 0.9
    assert sum(v.shape_bound for v in verdicts) / 64 > 0.4


def test_guided_draws_in_six_steps():
    pipe = DiffusionPipeline.from_pretrained(shapes_world.path("guided"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(VALIDATION_PROMPTS[:32])
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=6, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert sum(v.correct for v in judge(images, prompts)) / 32 > 0.1


@torch.no_grad()
def test_autoencoder_keeps_what_the_judge_sees(turbo, pictures):
    images, prompts = pictures
    again = turbo.vae.decode(turbo.vae.encode(images * 2 - 1).latents).sample / 2 + 0.5
    assert sum(v.correct for v in judge(again.clamp(0, 1), prompts)) / len(prompts) >= 0.9


@torch.no_grad()
def test_clip_knows_which_prompt_fits(pictures):
    images, prompts = pictures
    clip = CLIPModel.from_pretrained(shapes_world.path("clip"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shapes_world.path("clip"))
    processor = AutoImageProcessor.from_pretrained(shapes_world.path("clip"))
    pixels = processor([image.permute(1, 2, 0).mul(255).byte().numpy() for image in images], return_tensors="pt")
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    logits = clip(input_ids=tokens.input_ids, pixel_values=pixels.pixel_values).logits_per_image
    own = logits.diagonal()
    others = torch.tensor([[a != b for b in prompts] for a in prompts])
    assert (own[:, None] > logits)[others].float().mean() > 0.95
