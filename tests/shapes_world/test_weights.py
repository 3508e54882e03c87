import contextlib
import functools
import io
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from noiseopt import shapes_world
from noiseopt.rewards import AutoReward, CLIPScore, ImageFeatures, VQAScorer
from noiseopt.shapes_world import VALIDATION_PROMPTS, judge
from noiseopt.shapes_world.captions import WORDS
from training.negatives import wrong_request

WEIGHTS = Path(shapes_world.path("turbo")).parent


@pytest.fixture(scope="module")
def drawn():
    """Images of validation prompts by an embedded generator, (48, 3, 128, 128) in [0, 1], and the prompts."""

    @functools.cache
    def draw(name: str) -> tuple[torch.Tensor, list[str]]:
        model = shapes_world.MODELS[name]
        pipe = shapes_world.load(name)
        pipe.set_progress_bar_config(disable=True)
        prompts = list(VALIDATION_PROMPTS[:48])
        generators = [torch.Generator().manual_seed(i) for i in range(48)]
        return pipe(prompts, generator=generators, output_type="pt", **model.call).images, prompts

    return draw


@pytest.fixture(scope="module")
def turbo():
    pipe = DiffusionPipeline.from_pretrained(shapes_world.path("turbo"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_path_refuses_other_names():
    with pytest.raises(ValueError, match="'turbo', 'guided', .*, but got 'base'"):
        shapes_world.path("base")


@pytest.fixture
def notes():
    """notes(load): load something, and return it with all that the libraries note meanwhile, bars included."""

    def listen(load: Callable[[], Any]) -> tuple[Any, list[str]]:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        for library in libraries:
            library.addHandler(handler)
        try:
            with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
                return load(), stream.getvalue().splitlines()
        finally:
            for library in libraries:
                library.removeHandler(handler)

    return listen


KINDS = {"clip": CLIPScore, "vqa": VQAScorer, "dinov2": ImageFeatures}


@pytest.mark.parametrize("name", shapes_world.MODELS)
def test_each_model_loads_by_itself_without_a_word(name, notes):
    loaded, noted = notes(lambda: shapes_world.load(name))
    assert not noted
    assert isinstance(loaded, KINDS.get(name, DiffusionPipeline)) and loaded.dtype == torch.float32


def test_each_pipeline_loads_without_arguments_and_notes_only_its_small_autoencoder(notes):
    for name in [name for name, model in shapes_world.MODELS.items() if model.is_pipeline]:
        pipe, noted = notes(lambda name=name: DiffusionPipeline.from_pretrained(shapes_world.path(name)))
        assert pipe.dtype == torch.float32
        assert not any("config attributes" in line for line in noted)
        others = ("it/s]", "Loading", "requires torchvision")  # bars, and what its import notes
        words = [line for line in noted if line and not any(other in line for other in others)]
        assert len(words) == 1 and words[0].startswith("Expected types for vae:")


def test_the_third_text_encoder_of_sd3_says_what_its_absence_says():
    pipe = shapes_world.load("sd3")
    arguments = {"prompt": ["a red circle", "two blue stars left of a square"], "device": "cpu"}
    arguments |= {"prompt_2": None, "prompt_3": None, "negative_prompt": ""}
    for length in (16, 256):
        told = pipe.encode_prompt(**arguments, max_sequence_length=length)
        encoder, pipe.text_encoder_3 = pipe.text_encoder_3, None
        untold = pipe.encode_prompt(**arguments, max_sequence_length=length)
        pipe.text_encoder_3 = encoder
        assert all(torch.equal(*pair) for pair in zip(told, untold, strict=True))
        assert told[0].shape == (2, 16 + length, 224)


def test_weights_are_small_and_in_half_precision():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 40e6
    assert {folder.name for folder in WEIGHTS.iterdir()} == set(shapes_world.MODELS)
    for file in WEIGHTS.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


@pytest.mark.parametrize("name", ["turbo", "clip"])
def test_each_word_is_one_token(name, turbo):
    tokenizer = turbo.tokenizer if name == "turbo" else AutoTokenizer.from_pretrained(shapes_world.path("clip"))
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    assert len(tokenizer.tokenize("dog")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [model.name for model in shapes_world.MODELS.values() if model.is_pipeline])
def test_each_generator_is_neither_garbage_nor_solved(name, drawn):
    images, prompts = drawn(name)
    verdicts = judge(images, prompts)
    assert images.shape == (48, 3, 128, 128)
    least = 0.3 if name in ("guided", "sdxl") else 0.2  # without guidance, and as a flow
    assert least < sum(v.correct for v in verdicts) / 48 < 0.8
    assert sum(v.correct for v in judge(images, prompts[1:] + prompts[:1])) / 48 < 0.05
    assert sum(v.shape_bound for v in verdicts) / 48 > 0.5


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_keeps_what_the_judge_sees(turbo, pictures):
    images, prompts = pictures
    again = turbo.vae.decode(turbo.vae.encode(images * 2 - 1).latents).sample / 2 + 0.5
    assert sum(v.correct for v in judge(again.clamp(0, 1), prompts)) / len(prompts) >= 0.95


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


def auc(right: torch.Tensor, wrong: torch.Tensor) -> float:
    return float((right[:, None] > wrong).float().mean())


@torch.no_grad()
def test_clip_ranks_right_above_wrong_pictures_of_the_one_step_model(drawn):
    images, prompts = drawn("turbo")
    right = torch.tensor([v.correct for v in judge(images, prompts)])
    scores = CLIPScore.from_pretrained(shapes_world.path("clip"))(images, prompts)
    assert auc(scores[right], scores[~right]) > 0.9


@pytest.mark.slow
@torch.no_grad()
def test_vqa_prefers_a_true_caption_to_a_close_but_wrong_one(pictures):
    images, prompts = pictures
    rng = random.Random(0)
    wrong = [str(wrong_request(shapes_world.parse(prompt), rng)) for prompt in prompts]
    vqa = AutoReward.from_pretrained(shapes_world.path("vqa"))
    own, other = vqa(images, prompts), vqa(images, wrong)
    assert (own > other).float().mean() > 0.9
    assert own.mean() > other.mean() + 0.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["turbo", pytest.param("guided", marks=pytest.mark.slow)])
def test_vqa_is_calibrated_on_pictures_of_a_model(name, drawn):
    images, prompts = drawn(name)
    right = torch.tensor([v.correct for v in judge(images, prompts)])
    scores = AutoReward.from_pretrained(shapes_world.path("vqa"))(images, prompts)
    assert auc(scores[right], scores[~right]) > 0.95
    assert abs(float(scores.mean() - right.float().mean())) < 0.05, "on average"


@torch.no_grad()
def test_the_held_out_tower_sees_what_differs(pictures):
    """An image is more similar to itself, shifted by two pixels, than to any other."""
    images, _ = pictures
    tower = ImageFeatures.from_pretrained(shapes_world.path("dinov2"))
    features = F.normalize(tower(images), dim=-1)
    shifted = F.normalize(tower(images.roll(2, -1)), dim=-1)
    assert ((features @ shifted.T).argmax(1) == torch.arange(len(images))).float().mean() > 0.9
