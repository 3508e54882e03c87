"""Training: models get the conditioning of the stock pipelines, and one command trains them all."""

import random

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from noiseopt import shapes_world
from noiseopt.rewards import VQAScorer
from noiseopt.shapes_world import Scene, Shape
from training import train
from training.export import export_vqa
from training.families import SD3Generator, SDXLGenerator, from_noise
from training.gallery import silent_encoder
from training.models import Generator, new_vae
from training.optimization import Run
from training.readers import SHOWS
from training.train_readers import Seen, VLMTraining, tower_targets

PROMPTS = ["a red circle", "a blue star left of a green cross"]


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_sdxl_is_told_what_the_stock_pipeline_tells_it():
    model = SDXLGenerator()
    pipe = StableDiffusionXLPipeline(
        new_vae(),
        model.text_encoder,
        model.text_encoder_2,
        model.tokenizer,
        model.tokenizer,
        model.unet,
        model.scheduler,
        add_watermarker=False,
    )
    told, free, pooled, free_pooled = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    context, summary = model.embed(["", "", *PROMPTS])
    torch.testing.assert_close(context, torch.cat((free, told)))
    torch.testing.assert_close(summary, torch.cat((free_pooled, pooled)))


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
    model = SD3Generator()
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=model.scheduler,
        vae=new_vae(),
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    told, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, device="cpu", max_sequence_length=5)
    context, summary = model.embed(PROMPTS)
    torch.testing.assert_close(told[:, :16], context[:, :16])
    torch.testing.assert_close(summary, pooled)
    assert told.shape == (2, 21, 224) and not told[:, 16:].any() and not context[:, 16:].any()
    noise, t = torch.randn(2, 8, 8, 8), torch.full((2,), 700.0)
    many = model.transformer(noise, told, pooled, t).sample
    torch.testing.assert_close(model.predict(noise, t, (context, summary), empty=5), many, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sdxl_begins_as_the_u_net_it_takes_over():
    base, model = Generator().eval(), SDXLGenerator().eval()
    model.begin_with(base.unet.state_dict(), base.text_encoder.state_dict())
    noise, t = torch.randn(2, 8, 8, 8), torch.full((2,), 500.0)
    context = base.embed(PROMPTS)
    wide = torch.cat((context, torch.randn(2, 16, 128)), -1)
    assert torch.equal(
        base.text_encoder.encoder.layers[1].mlp.fc1.weight, model.text_encoder.encoder.layers[1].mlp.fc1.weight
    )
    torch.testing.assert_close(model.predict(noise, t, (wide, torch.randn(2, 128))), base.predict(noise, t, context))


@pytest.mark.parametrize("kind", [Generator, SDXLGenerator, SD3Generator])
def test_from_pure_noise_the_target_leads_to_the_picture(kind):
    model, z, noise = kind(), torch.randn(3, 8, 8, 8), torch.randn(3, 8, 8, 8)
    noisy, target = model.corrupt(z, noise, torch.full((3,), model.last))
    assert torch.equal(noisy, noise)
    torch.testing.assert_close(model.picture(noise, target), z, rtol=1e-4, atol=1e-4)
    assert from_noise(model, noise, model.embed([*PROMPTS, ""])).shape == z.shape


def test_many_questions_at_once_are_answered_as_one_at_a_time():
    model, images = VLMTraining().eval(), torch.rand(2, 3, 64, 64)
    asked = [[(SHOWS.format(prompt), 1) for prompt in ("a red circle", PROMPTS[1], "two blue stars")]] * 2
    logits = model.questions(model.vlm, images, asked)
    for j, tail in enumerate(model.questions.tails(asked)[0]):
        ids = torch.tensor([model.questions.head + tail] * 2)
        alone = model.vlm(input_ids=ids, pixel_values=images * 2 - 1, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(logits[:, j], alone[:, -2:], rtol=1e-4, atol=1e-5)


def test_the_exported_vqa_answers_as_it_did_in_training(tmp_path):
    training = VLMTraining().eval()
    images, asked = torch.rand(2, 3, 64, 64), [[(SHOWS.format(prompt), 1)] for prompt in PROMPTS]
    for parameter in training.vlm.parameters():  # what half precision keeps exactly
        parameter.data = parameter.data.half().float()
    with torch.no_grad():
        expected = training.questions(training.vlm, images, asked)[:, 0, 0].softmax(-1)[
            :, training.questions.answers[1]
        ]
    export_vqa(training, tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"dtype": "float16"', '"dtype": "float32"'))
    reward = VQAScorer.from_pretrained(str(tmp_path))
    pixels = images.clone().requires_grad_()
    scores = reward(pixels, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)
    scores.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_the_exported_vqa_is_an_ordinary_image_text_to_text_model(tmp_path):
    training = VLMTraining().eval()
    export_vqa(training, tmp_path)
    processor, model = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SHOWS.format(PROMPTS[0])}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = (torch.rand(64, 64, 3) * 255).byte().numpy()
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    assert (
        inputs.input_ids[0].tolist()
        == training.questions.head + training.questions.tails([[(SHOWS.format(PROMPTS[0]), 0)]])[0][0][:-1]
    )
    assert model.float().generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs.input_ids.shape[1]


def test_questions_have_the_answers_of_the_judge():
    scene = Scene((Shape("star", "red", 16, 32, 12), Shape("cross", "blue", 48, 32, 12)))
    images = (shapes_world.render([scene] * 2, torch.Generator().manual_seed(0)) * 255).byte()
    seen, rng = Seen(images, ["a red star left of a blue cross", "a red star"]), random.Random(0)
    asked = {seen.ask(row, rng) for row in (0, 1) for _ in range(300)}
    mirrored = {seen.ask(row, rng) for row in (2, 3) for _ in range(300)}
    assert seen.prompts[2:] == ["a red star right of a blue cross", "a red star"]
    assert ('does this figure show "a red star right of a blue cross" ? please answer yes or no .', 1) in mirrored
    assert ('does this figure show "a red star left of a blue cross" ? please answer yes or no .', 1) in asked
    assert ('does this figure show "a red star" ? please answer yes or no .', 0) in asked, "there is a cross too"
    assert ('is there "a red star" in this figure ? please answer yes or no .', 1) in asked
    assert {question for question, answer in asked if answer}.isdisjoint(q for q, answer in asked if not answer)


def test_targets_of_the_tower_say_what_is_where():
    scene = Scene((Shape("square", "red", 16, 16, 14), Shape("square", "red", 48, 48, 14)))
    shown, counts, where = tower_targets([scene])
    red_square = shapes_world.OBJECTS.index(("red", "square"))
    assert counts[0, red_square] == 2 and counts.sum() == 2
    grid, place = shown.view(8, 8), where.view(8, 8)
    assert (grid[:3, :3] == red_square).all() and (grid[5:, 5:] == red_square).all()
    assert (grid[:4, 4:] == len(shapes_world.OBJECTS)).all() and place[4:, :4].sum() == 0


def test_a_stage_continues_where_it_was_interrupted(tmp_path):
    def go(stop: int | None) -> Run:
        model = nn.Linear(4, 4)
        run = Run(model, tmp_path / "stage.pt", samples=4000, batch=8, lr=1e-3, look=lambda model, path: path.touch())
        for seen in run:
            if seen == stop:
                break
            run.step({"error": model(torch.randn(8, 4)).square().mean()})
        return run

    go(stop=2000)
    again = go(stop=None)
    assert again.seen == 4000
    assert [point["samples"] for point in again.curve] == [800, 1600, 2400, 3200, 4000]
    seconds = [point["seconds"] for point in again.curve]
    assert seconds == sorted(seconds)
    assert len(list(tmp_path.glob("stage_*.png"))) == 10
    assert go(stop=None).seen == 4000


@pytest.mark.slow
def test_one_command_trains_and_exports_everything(tmp_path):
    small = [
        "--pictures",
        "100",
        "--failures",
        "64",
        "--gallery",
        "64",
        "--report-prompts",
        "2",
        "--report-pictures",
        "16",
    ]
    for stage, samples in {**dict.fromkeys(train.SAMPLES, 64), "vqa": 48}.items():
        small += [f"--{stage}-samples", str(samples)]
    stages = [stage for stage in train.STAGES if stage not in ("harden", "refine")]  # they need a model that can draw
    train.main(["--output", str(tmp_path), "--stages", *stages, *small])
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == set(shapes_world.MODELS)
    for name in names:
        assert (tmp_path / "weights" / name / "training.json").exists()
        assert (tmp_path / "weights" / name / "metrics.json").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "weights/sd3")
    images = pipe(PROMPTS[0], num_inference_steps=2, max_sequence_length=16, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
