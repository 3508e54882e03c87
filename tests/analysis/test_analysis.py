"""Groups of results and their numbers, for results with a known edit."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny_pipelines import SIZE, call_arguments, tiny_pipeline

from noiseopt import BestOfN, NoiseResult, ReNO, optimize_noise, shapes_world
from noiseopt.analysis.analysis import Analysis, changes_of, markdown
from noiseopt.analysis.groups import Group, embedded_name, load_groups
from noiseopt.analysis.sampling import final_latents, repeated
from noiseopt.pipelines.results.frequency_bands import band_energies


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def result_of(path: list[torch.Tensor], returned: torch.Tensor | None = None, **provenance) -> NoiseResult:
    """A result from one noise to another, which returns the last step unless told otherwise."""
    steps, count = len(path), len(path[0])
    return NoiseResult(
        noise=path[-1] if returned is None else returned,
        latents=path[-1],
        scores={},
        losses=torch.zeros(steps, count),
        norms=torch.ones(steps, count),
        best_step=torch.full((count,), steps - 1),
        provenance={"method": "Known", "model": "a/b", **provenance},
        initial_noise=path[0],
        band_changes=torch.stack([band_energies(noise - path[0]) for noise in path]),
    )


def analysis_of(*results: NoiseResult) -> Analysis:
    return Analysis(Group("Known", "b", (Path("x"),) * len(results), results))


def test_white_edit_changes_every_third_alike():
    z, white = normal(0, 8, 4, 64, 64), normal(1, 8, 4, 64, 64)
    analysis = analysis_of(result_of([z, z + 0.1 * white, z + 0.2 * white]))
    expected = torch.tensor([0, 0.1, 0.2]).double()[:, None].expand(3, 3)
    torch.testing.assert_close(analysis.band_changes, expected, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(analysis.band_shares, analysis.white_shares, rtol=0.02, atol=0)
    assert analysis.white == pytest.approx(1 / 1.04, rel=1e-3)
    assert analysis.mean_share == pytest.approx(1 / 4096, rel=0.6)


def test_shift_of_the_means_is_in_the_lowest_third():
    z = normal(0, 2, 4, 16, 16)
    analysis = analysis_of(result_of([z, z + 0.25]))
    torch.testing.assert_close(analysis.band_shares, torch.tensor([1.0, 0, 0]).double(), atol=1e-6, rtol=0)
    assert analysis.mean_share == pytest.approx(1) and analysis.relative_change == pytest.approx(0.25, rel=0.03)
    before, after = analysis.statistics
    assert after.mean - before.mean == pytest.approx(0.25) and after.spectrum[3] == pytest.approx(before.spectrum[3])


def test_bands_are_averaged_over_noises_that_had_not_stopped():
    short, long = normal(0, 1, 2, 8, 8), normal(1, 2, 2, 8, 8)
    results = [result_of([short, short + 0.1]), result_of([long, long + 0.3, long + 0.5])]
    results[1].band_changes[2, 0] = math.nan
    counts = torch.tensor([9, 36, 19]).double()  # entries of 8×8 in each third
    expected = torch.tensor([0, (0.01 + 2 * 0.09) / 3, 0.25]).double() * 64 / counts[0]
    changes = analysis_of(*results).band_changes
    torch.testing.assert_close(changes[:, 0], expected.sqrt(), atol=1e-6, rtol=1e-5)
    assert changes[:, 1:].max() < 1e-5


def test_last_move_of_a_method_that_returns_it_is_a_row_of_its_own():
    z = normal(0, 2, 2, 8, 8)
    assert len(changes_of(result_of([z, z + 0.1]))) == 2
    rows = changes_of(result_of([z, z + 0.1], returned=z + 0.2))
    torch.testing.assert_close(rows.sum(-1)[:, 0], torch.tensor([0, 1.28, 5.12]).double(), rtol=1e-4, atol=1e-6)


def test_results_are_grouped_by_method_model_and_shape(tmp_path):
    z, wide = normal(0, 2, 2, 8, 8), normal(0, 2, 2, 8, 12)
    embedded = "/elsewhere/noiseopt/shapes_world/weights/turbo"
    results = [
        result_of([z, z + 1]),
        result_of([wide, wide + 1]),
        result_of([z, z + 2]),
        result_of([z, z + 1], model=embedded),
        result_of([z[:, None], z[:, None] + 1], method="Other"),
    ]
    for number, result in enumerate(results):
        result.save(tmp_path / "deep" / f"{number}.safetensors")
    groups = load_groups([tmp_path, tmp_path / "deep" / "0.safetensors"])
    assert [group.title for group in groups] == [
        "Known on b, 2×8×8",
        "Known on b, 2×8×12",
        "Known on turbo, 2×8×8",
        "Other on b, 1×2×8×8",
    ]
    assert [len(group.results) for group in groups] == [2, 1, 1, 1]
    assert groups[0].initial.shape == (4, 2, 8, 8) and groups[3].optimized.shape == (2, 2, 8, 8)
    lines = markdown([Analysis(group) for group in groups]).splitlines()
    assert all(line.count("|") == len(groups) + 2 for line in lines)


@pytest.mark.parametrize(
    "model",
    [shapes_world.path("turbo"), "noiseopt/shapes-turbo", "/c/models--noiseopt--shapes-turbo/snapshots/0"],
)
def test_embedded_models_are_known_wherever_they_are(model):
    z = normal(0, 1, 2, 8, 8)
    assert embedded_name(result_of([z], model=model)) == "turbo"
    assert embedded_name(result_of([z], model="someone/turbo")) is None


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_latents_are_those_that_the_stock_pipeline_draws(family):
    """Packing only permutes, so distances to the noise are equal in either layout."""
    pipe = tiny_pipeline(family)
    arguments = call_arguments(family) | {"num_images_per_prompt": 2}
    method = BestOfN(rewards="red", steps=2)
    result = optimize_noise(pipe, "a", method, generator=torch.Generator().manual_seed(3), **arguments)
    ours = final_latents(pipe, result, result.noise)
    stock = {"latents": result.latents, "generator": result.generator(), "output_type": "latent"}
    expected = pipe("a", **arguments | stock).images
    assert ours.shape == result.noise.shape
    distance = (expected - result.latents).flatten(1).norm(dim=1)
    torch.testing.assert_close((ours - result.noise).flatten(1).norm(dim=1), distance)
    if family != "flux":
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_texts_are_repeated_for_each_image():
    assert repeated("a", 4) == ["a"] * 4 and repeated(["a", "b"], 4) == ["a", "a", "b", "b"]
    for texts in ([], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="Expected a text for each of 4 images"):
            repeated(texts, 4)


def test_a_result_of_embeddings_or_without_a_model_cannot_be_drawn():
    pipe = tiny_pipeline("sd")
    result = optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), num_inference_steps=1, guidance_scale=0.0, **SIZE)
    unknown = dataclasses.replace(result, provenance={**result.provenance, "prompts": [""]})
    with pytest.raises(ValueError, match="embeddings"):
        final_latents(pipe, unknown, result.noise)
