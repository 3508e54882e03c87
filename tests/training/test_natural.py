"""Training with natural noise: schedules, half precision, distillation, and the measures of naturalness."""

import argparse
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from noiseopt import shapes_world
from noiseopt.rewards import AutoReward
from training.natural import autoencoder, distillation, readers, report, train
from training.natural.data import OTHER_GROUND, OTHER_LAYOUT, sample_pictures
from training.natural.generators import SD3Generator, SDGenerator, SDXLGenerator
from training.natural.precision import HalfPrecision
from training.optimization import Run

PROMPTS = ["a red circle", "a blue star left of a green cross"]


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def test_most_pictures_are_usual():
    rng = random.Random(0)
    requests = [shapes_world.parse(PROMPTS[1])] * 2000
    scenes, looks, usual = sample_pictures(requests, rng)
    assert usual.float().mean(0).tolist() == pytest.approx([1 - OTHER_LAYOUT, 1 - OTHER_GROUND], abs=0.04)
    places = torch.tensor([[s.shapes[0].x, s.shapes[0].y] for s in scenes])
    assert (places[usual[:, 0]].std(0) < 2).all() and (places[~usual[:, 0]].std(0) > 2).all()
    assert (looks[usual[:, 1]].std(0) < 0.03).all() and (looks[~usual[:, 1]].std(0) > 0.25).all()


@pytest.mark.parametrize("kind", [SDGenerator, SDXLGenerator])
def test_noise_levels_are_those_of_stable_diffusion(kind):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    signal = (1 - betas).log().cumsum(0).exp()
    z, noise = torch.randn(2, 2, 4, 32, 32)
    noisy, v = kind().corrupt(z, noise, torch.tensor([999, 499]))
    a, b = signal[[999, 499]].sqrt().view(2, 1, 1, 1).float(), (1 - signal[[999, 499]]).sqrt().view(2, 1, 1, 1).float()
    torch.testing.assert_close(noisy, a * z + b * noise)
    torch.testing.assert_close(a * noisy - b * v, z)


def test_velocity_leads_from_noise_to_picture():
    z, noise = torch.randn(2, 2, 4, 32, 32)
    noisy, velocity = SD3Generator().corrupt(z, noise, torch.tensor([1000.0, 250.0]))
    torch.testing.assert_close(noisy - torch.tensor([1.0, 0.25]).view(2, 1, 1, 1) * velocity, z)


@torch.no_grad()
def test_sdxl_is_told_what_the_stock_pipeline_tells_it():
    model = SDXLGenerator()
    pipe = model.pipeline(autoencoder.new_vae())
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


def test_half_precision_computes_the_same_functions():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    keep = torch.rand(10, 10) < 0.5
    keep[:, 0] = True
    norm, x = nn.GroupNorm(4, 16), torch.randn(2, 16, 5, 5)
    cases = [
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(10.0).expand(10, 10)),
        lambda: norm(x),
    ]
    for case in cases:
        stock = case()
        with HalfPrecision():
            torch.testing.assert_close(case(), stock, atol=1e-5, rtol=1e-4)
    with HalfPrecision(), pytest.raises(ValueError, match="no dropout"):
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    half = norm.bfloat16()(x.bfloat16())
    with HalfPrecision():
        exact = norm(x.bfloat16())
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - half.float()).abs().max() < 0.05


def test_half_precision_trains_weights_in_single_precision(tmp_path):
    model = nn.Linear(4, 1)
    target = torch.tensor([[0.1, -0.2, 0.3, 0.4]])
    run = Run(model, tmp_path / "run.pt", samples=16_000, batch=16, lr=1e-2, dtype=torch.bfloat16)
    for _ in run:
        x = torch.randn(16, 4)
        run.step({"error": (run.fast(x.bfloat16()).float() - x @ target.T).square().mean()})
    assert model.weight.dtype == torch.float32 and run.fast.weight.dtype == torch.bfloat16
    assert (model.weight - target).abs().max() < 0.02
    assert not torch.equal(model.weight, model.weight.bfloat16().float())
    torch.testing.assert_close(run.fast.weight, model.weight.bfloat16())


@torch.no_grad()
def test_normalized_latents_have_zero_mean_and_unit_covariance(tmp_path):
    raw = autoencoder.new_vae().eval()
    torch.save({"average": raw.state_dict()}, tmp_path / "vae.pt")
    vae = autoencoder.normalized(argparse.Namespace(output=tmp_path, device="cpu"))
    rng = random.Random(1)
    scenes, looks, _ = sample_pictures([shapes_world.captions.sample_request(rng) for _ in range(100)], rng)
    images = shapes_world.render(scenes, torch.Generator().manual_seed(1), looks, 128) * 2 - 1
    z = vae.encoder(images).movedim(1, -1).flatten(0, 2)
    assert z.mean(0).abs().max() < 0.3
    assert (z.T.cov() - torch.eye(4)).abs().max() < 0.4
    inside = slice(1, -1)
    small, first = raw.encoder(images), raw.decoder.layers[0]
    same = vae.decoder.layers[0](vae.encoder(images))
    torch.testing.assert_close(same[..., inside, inside], first(small)[..., inside, inside], atol=1e-3, rtol=1e-3)


def test_windows_are_cut_where_shapes_are():
    images = torch.zeros(64, 3, 128, 128, dtype=torch.uint8)
    images[:, :, 96:, 96:] = 200
    masks = images[:, :1]
    cut = autoencoder.crops(images, masks, 64)
    assert cut.shape == (64, 3, 64, 64)
    assert (cut.flatten(1).amax(1) == 200).float().mean() > 0.7


def test_a_way_keeps_the_latents_of_the_students_steps():
    noise, way = torch.zeros(1), distillation.Way(torch.zeros(1))
    pipe = SimpleNamespace(scheduler=SDGenerator().scheduler)
    pipe.scheduler.set_timesteps(distillation.TEACHER["num_inference_steps"])
    for step, t in enumerate(pipe.scheduler.timesteps):
        assert way(pipe, step, t, {"latents": noise + 1 + step}) == {}
    kept = [int(x) for x in way.kept]
    assert kept == [0, 3, 6, 9, 12], "the noise, after three, six and nine of twelve steps, and the end"
    pipe.scheduler.set_timesteps(4)
    assert tuple(pipe.scheduler.timesteps.tolist()) == distillation.KEPT


def test_a_student_that_knows_the_end_has_no_loss():
    ends = torch.randn(8, 4, 32, 32)
    ways = torch.cat((torch.randn(8, 4, 4, 32, 32), ends[:, None]), 1)
    data = {"ways": ways, "requests": [shapes_world.parse(PROMPTS[0])] * 8}
    scheduler = SDGenerator().scheduler

    def predict(x, t, context):
        which = (ways.flatten(0, 1)[:, None] - x).flatten(2).norm(dim=2).argmin(0) // 5
        level = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (level.sqrt() * x - ends[which]) / (1 - level).sqrt()

    model = SimpleNamespace(
        denoiser=SimpleNamespace(device="cpu", dtype=torch.float32), embed=lambda texts: None, predict=predict
    )
    model.scheduler = scheduler
    losses = distillation.student_losses(SimpleNamespace(batch=32, fast=model), data)
    floor = math.sqrt(1e-3)
    assert float(sum(losses.values())) == pytest.approx(floor, rel=1e-3)


class Linear:
    """A stand-in for a pipeline: the denoiser doubles the noise and adds its channel means."""

    def __init__(self) -> None:
        self.unet = nn.Identity()
        self.unet.forward = lambda x: x + x.mean((2, 3), keepdim=True)

    def __call__(self, prompt, latents, output_type, **call):
        return SimpleNamespace(images=latents + self.unet.forward(latents))


def test_shares_of_the_gradient_in_closed_form():
    pipe = Linear()
    z = torch.randn(3, 4, 8, 8)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    found = report.gradient_shares(pipe, pipe.unet, PROMPTS, z, lambda images: (images * left).sum((1, 2, 3)))
    # frozen: `left`, half of whose squared norm is in its mean; true: twice `left` plus its mean
    assert found["frozen, channel means"] == pytest.approx(0.5)
    full = 2 * left + left.mean()
    assert found["full, channel means"] == pytest.approx(float(64 * full.mean() ** 2 / full.square().sum()))
    assert found["cosine"] == pytest.approx(float((full * left).sum() / full.norm() / left.norm()), rel=1e-4)


def test_similarity_is_the_mean_cosine_of_pairs():
    same, apart = torch.ones(1, 3, 2), torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    assert report.similarity(same) == pytest.approx(1)
    assert report.similarity(apart) == pytest.approx(-1 / 3)


def test_spread_is_in_pixels():
    scenes = [shapes_world.Scene((shapes_world.Shape("square", "red", x, 32, 10),)) for x in (28, 36)]
    images = shapes_world.render(scenes, torch.Generator().manual_seed(0), size=128)
    assert report.spread(images, 1) == pytest.approx(8.0)


def test_copies_are_told_from_others():
    unit = torch.eye(4)[[0, 0, 1, 1]]
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    right, wrong = (float(readers.copies(unit, each)) for each in (same, same[:, [0, 2, 1, 3]]))
    chance = math.exp(10) / (math.exp(10) + 2)
    assert right == pytest.approx(-math.log(chance), abs=1e-5)
    assert wrong > right + 4


def test_only_usual_pictures_of_a_request_are_copies():
    a, b = map(shapes_world.parse, PROMPTS)
    usual = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]])
    same = readers.copy_labels([a, b, a, a, a], usual)
    assert torch.equal(same.int() - torch.eye(5).int(), F.one_hot(torch.tensor([2, 5, 0, 5, 5]), 6)[:, :5].int())


@pytest.mark.slow
def test_one_command_trains_every_stage(tmp_path):
    small = [
        "--output",
        str(tmp_path),
        "--pictures",
        "250",
        "--latents",
        "250",
        "--pairs",
        "64",
        "--failures",
        "64",
        "--gallery",
        "256",
    ]
    for stage in train.SAMPLES:
        small += [f"--{stage}-samples", "64"]
    distillation.PART = 64
    stages = [stage for stage in train.STAGES if stage != "refined"]  # which needs a model that can draw
    train.main([*small, "--stages", *stages])
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == set(shapes_world.MODELS)
    for name in names:
        assert (tmp_path / "weights" / name / "training.json").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "weights/sd3")
    images = pipe(PROMPTS[0], num_inference_steps=2, max_sequence_length=16, output_type="pt").images
    assert images.shape == (1, 3, 128, 128)
    reward = AutoReward.from_pretrained(tmp_path / "weights/clip")
    assert reward(images, PROMPTS[:1]).shape == (1,)
    assert list(tmp_path.glob("turbo_*.png"))
