"""The command `noiseopt vary`, and how far variations of a picture are from it."""

import pytest
import torch
from problems import generator
from scipy.stats import spearmanr

from noiseopt import BestOfN, NoiseResult, Vary, optimize_noise, shapes_world
from noiseopt.cli import main
from noiseopt.demo import load_pipeline
from noiseopt.image_files import read_image
from noiseopt.rewards import ImageFeatures
from noiseopt.vary import model_of

PROMPT = "a red circle and a blue star"
CALL = {"num_inference_steps": 1, "guidance_scale": 0.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A found noise of two images, in a file."""
    path = tmp_path_factory.mktemp("vary") / "noise.safetensors"
    pipe = load_pipeline("turbo")
    method = BestOfN(rewards=lambda images, prompts: images.mean((1, 2, 3)), steps=2)
    result = optimize_noise(pipe, PROMPT, method, num_images_per_prompt=2, generator=generator(), callbacks=[], **CALL)
    result.save(path)
    return path, result


def test_variations_of_a_file_are_images_and_noises(found, tmp_path, capsys):
    path, result = found
    arguments = ["vary", str(path), "--image", "2", "--images", "3", "--seed", "5"]
    main([*arguments, "--output", str(tmp_path / "near")])
    assert f"{PROMPT}: 3 variations at strength 0.2, seed 5." in capsys.readouterr().out
    noises = NoiseResult.load(tmp_path / "near/variations.safetensors")
    assert torch.equal(noises.noise, Vary(0.2, result.noise[1:], seed=5).color(torch.zeros(3, 4, 32, 32)))
    images = [read_image(tmp_path / f"near/variation_{number}.png")[0] for number in (1, 2, 3)]
    distances = [(image - result.images[1]).square().mean().sqrt() for image in images]
    other = (result.images[0] - result.images[1]).square().mean().sqrt()
    assert all(0 < distance < other for distance in distances) and not torch.equal(images[0], images[1])
    main([*arguments, "--strength", "0", "--output", str(tmp_path / "same")])
    same = read_image(tmp_path / "same/variation_3.png")[0]
    assert (same - result.images[1]).abs().max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "1.5"], "a number from 0 to 1, but got '1.5'"),
        (["--strength", "near"], "a number from 0 to 1"),
        (["--image", "3"], "`--image` of at most 2"),
        (["--images", "0"], "integer of 1 or more"),
        (["--model", "turboo"], "Did you mean 'turbo'"),
        (["--keep", "colors"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(arguments, message, found, monkeypatch, capsys):
    monkeypatch.setattr("noiseopt.evaluation.evaluate.load_pipeline", None)
    with pytest.raises(SystemExit):
        main(["vary", str(found[0]), *arguments])
    assert message in capsys.readouterr().err


def test_a_file_of_several_prompts_and_another_model(tmp_path, capsys):
    """The second image has its own prompt and negative prompt; another model has its own arguments."""
    pipe, path = load_pipeline("turbo"), tmp_path / "two.safetensors"
    call = {**CALL, "negative_prompt": ["a star", "a cross"], "generator": generator()}
    method = BestOfN(rewards=lambda images, prompts: images.mean((1, 2, 3)), steps=1)
    optimize_noise(pipe, [PROMPT, "two red squares"], method, callbacks=[], **call).save(path)
    result = NoiseResult.load(path)
    assert model_of(result, None, 2).arguments == {**CALL, "negative_prompt": "a cross"}
    assert model_of(result, "turbo", 1).arguments == {**CALL, "negative_prompt": "a star"}
    assert model_of(result, "guided", 2).arguments == dict(shapes_world.MODELS["guided"].call)
    main(["vary", str(path), "--image", "2", "--images", "1", "--output", str(tmp_path / "near")])
    assert "two red squares: 1 variation at" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    (tmp_path / "noise.txt").write_text("no noise")
    for path in (tmp_path / "noise.txt", tmp_path / "missing.safetensors"):
        with pytest.raises(SystemExit):
            main(["vary", str(path)])
        assert "noise" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("keep", [None, "layout", "detail"])
def test_the_distance_in_held_out_features_grows_with_the_strength(keep):
    """Rank correlation over strengths of the mean distance of 32 variations of 4 pictures."""
    pipe, tower = load_pipeline("turbo"), ImageFeatures.from_pretrained(shapes_world.path("dinov2"))
    strengths = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
    base = torch.randn(4, 4, 32, 32, generator=generator(2)).repeat(8, 1, 1, 1)

    def features(noise):
        images = pipe([PROMPT] * len(noise), latents=noise, output_type="pt", **CALL).images
        return torch.nn.functional.normalize(tower(images), dim=1)

    def distance(strength):
        return float((1 - (features(Vary(strength, base, seed=9, keep=keep).color(base)) * plain).sum(1)).mean())

    plain = features(base)
    far = [distance(strength) for strength in strengths]
    assert spearmanr(strengths, far).statistic >= 0.9, far
