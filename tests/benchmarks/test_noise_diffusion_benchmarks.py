"""The Noise Diffusion benchmarks: short runs have all rows and report their measurements."""

import json

import frozen_gradient  # pyright: ignore[reportMissingImports]
import noise_diffusion  # pyright: ignore[reportMissingImports]
import pytest
from PIL import Image


@pytest.mark.slow
def test_a_short_comparison_has_every_row_and_curve(capsys, tmp_path):
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
