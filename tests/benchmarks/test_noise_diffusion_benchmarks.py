"""The Noise Diffusion benchmarks: short runs have all rows and report their measurements."""

import json
from types import SimpleNamespace

import frozen_gradient  # pyright: ignore[reportMissingImports]
import gradient_direction  # pyright: ignore[reportMissingImports]
import noise_diffusion  # pyright: ignore[reportMissingImports]
import pytest
import torch
from PIL import Image
from tiny_pipelines import call_arguments, tiny_pipeline

from noiseopt import optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import CandidateNoise


@pytest.mark.slow
def test_a_short_comparison_has_every_row_and_curve(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_diffusion, "TRIED", 2)
    output, plot = tmp_path / "found.json", tmp_path / "found.png"
    arguments = ["--limit", "2", "--rounds", "2", "--batch-size", "2", "--output", str(output), "--plot", str(plot)]
    found = noise_diffusion.main(arguments)
    printed = capsys.readouterr().out
    assert list(found) == list(noise_diffusion.methods(lambda images, prompts: images, 2))
    for name, row in found.items():
        assert f"| {name} |" in printed and len(row["score"]) == len(row["right"]) == 2
        for scores, seconds in zip(row["score"], row["seconds"], strict=True):
            assert scores == sorted(scores) and seconds == sorted(seconds)
        if name != noise_diffusion.TIMED:
            assert row["evaluations"] == [3, 3]
    starts = [[round(curve[0], 4) for curve in row["score"]] for row in found.values()]
    assert all(start == starts[0] for start in starts)
    assert json.loads(output.read_text())["rows"].keys() == found.keys()
    with Image.open(plot) as picture:
        assert picture.width > picture.height > 400


def test_the_oracle_takes_the_candidate_whose_image_scores_highest():
    """One step from z: the best of the displacements √(1−γ)·z + √γ·σ − z with the same draws σ."""

    def score(images, prompts):
        return images[:, 0].mean((1, 2))

    def look(problem):
        fresh, z = CandidateNoise(problem), problem.noise
        with torch.no_grad():
            s = score(problem.sampler.images(z), None)
            gamma = (1 - s.sqrt()).view(-1, 1, 1, 1)
            tried = [(1 - gamma).sqrt() * z + gamma.sqrt() * fresh.draw() for _ in range(5)]
            scores = torch.stack([score(problem.sampler.images(each), None) for each in tried])
        found.extend([s, scores, torch.stack(tried)[scores.argmax(0), torch.arange(len(z))]])

    found = []
    call = {**call_arguments("sd"), "num_images_per_prompt": 3}
    generators = [[torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2)]
    optimize_noise(tiny_pipeline("sd"), "a", Looking(look), generator=generators[0], **call)
    oracle = noise_diffusion.Oracle(rewards=score, steps=2, selection="random", candidates=5)
    result = optimize_noise(tiny_pipeline("sd"), "a", oracle, generator=generators[1], **call)
    s, scores, best = found
    torch.testing.assert_close(-result.losses, torch.stack([s, scores.amax(0)]), rtol=1e-4, atol=1e-5)
    better = scores.amax(0) > s
    assert better.any()
    torch.testing.assert_close(result.noise[better], best[better], rtol=1e-4, atol=1e-5)


def test_the_direction_of_a_gradient_is_compared_with_the_truth():
    """Of a score that is linear in the noise, a gradient predicts the rise exactly, whatever the length of the step."""
    z = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
    flat = weights / weights.square().mean().sqrt() + 1.0  # what held outputs tell instead

    def images(noise, gradient=None):
        return noise * flat / weights if gradient == "frozen" else noise

    def draw_noise(shape, streams, device, dtype):
        return torch.cat([torch.randn(1, *shape[1:], generator=stream) for stream in streams])

    sampler, space = SimpleNamespace(images=images), SimpleNamespace(draw_noise=draw_noise)
    problem = SimpleNamespace(noise=z, sampler=sampler, space=space, prompts=["a"] * 2, seeds=[3, 4])
    direction = gradient_direction.Direction(lambda x, prompts: 0.5 + 1e-3 * (x * weights).flatten(1).sum(1), 12)
    direction(problem)
    found = direction.found
    for step in gradient_direction.STEPS:
        assert found[f"correlation, full, {step}"] == pytest.approx([1.0, 1.0], abs=1e-3)
        assert found[f"rank of the chosen, full, {step}"] == [1.0, 1.0]
    cosine = torch.nn.functional.cosine_similarity(flat.flatten(), weights.flatten(), dim=0).item()
    assert found["cosine"] == pytest.approx([cosine, cosine], abs=1e-5) and 0.2 < cosine < 0.9
    assert all(value < 0.999 for value in found["correlation, frozen, a tenth of it"])


@pytest.mark.slow
def test_a_short_measurement_of_the_gradient(capsys, tmp_path):
    arguments = ["--limit", "2", "--candidates", "3", "--batch-size", "2", "--output", str(tmp_path / "found.json")]
    found = gradient_direction.main(arguments)
    printed = capsys.readouterr().out
    assert list(found) == ["guided", "turbo"] and "| | guided | turbo |" in printed
    assert all(len(values) == 2 for numbers in found.values() for values in numbers.values())
    assert json.loads((tmp_path / "found.json").read_text())["models"] == found


def test_curves_end_where_the_shortest_does():
    assert noise_diffusion.mean_curve([[1.0, 2.0, 3.0], [3.0, 4.0]]) == [2.0, 3.0]


@pytest.mark.slow
def test_a_denoiser_held_constant_keeps_no_activations(capsys):
    found = frozen_gradient.main(["--steps", "6", "--images", "8", "--rounds", "1"])
    memory = {name: costs[0].memory for name, costs in found.items()}
    if None in memory.values():
        pytest.skip("this system does not tell the peak of its memory")
    plain, tail, held, full = memory.values()
    assert held < 1.3 * (plain + tail) and held < full / 2
    assert "a round, denoiser held constant" in capsys.readouterr().out
