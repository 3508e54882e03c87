"""The Noise Diffusion benchmarks: short runs have all rows and report their measurements."""

import json
from types import SimpleNamespace

import frozen_gradient  # pyright: ignore[reportMissingImports]
import gradient_direction  # pyright: ignore[reportMissingImports]
import noise_diffusion  # pyright: ignore[reportMissingImports]
import pytest
import torch
from PIL import Image

ROWS = (noise_diffusion.BEST, noise_diffusion.RANDOM, noise_diffusion.OURS, "PGD")


@pytest.mark.slow
def test_a_short_comparison_has_every_row_and_curve_and_goes_on(capsys, tmp_path, monkeypatch):
    output, plot = tmp_path / "found.json", tmp_path / "found.png"
    arguments = ["--limit", "2", "--rounds", "2", "--batch-size", "2", "--output", str(output), "--plot", str(plot)]
    named = [each for row in ROWS for each in ("--row", row)]
    found = noise_diffusion.main([*arguments, *named])
    printed = capsys.readouterr().out
    assert list(found) == ["P(yes)", "pixels"] and json.loads(output.read_text())["parts"] == found
    for rows in found.values():
        assert tuple(rows) == ROWS
        for name, row in rows.items():
            assert f"| {name} |" in printed and len(row["score"]) == len(row["right"]) == len(row["clip"]) == 2
            evaluations = 9 if name == noise_diffusion.BEST else 3
            for scores, seconds in zip(row["score"], row["seconds"], strict=True):
                assert scores == sorted(scores) and seconds == sorted(seconds) and len(scores) == evaluations
        starts = [[round(curve[0], 4) for curve in row["score"]] for row in rows.values()]
        assert all(start == starts[0] for start in starts)
    with Image.open(plot) as picture:
        assert picture.width > 1000 and picture.height > 1000
    ran = []
    run = noise_diffusion.Bench.run
    monkeypatch.setattr(noise_diffusion.Bench, "run", lambda self, *part: ran.append(part) or run(self, *part))
    again = noise_diffusion.main([*arguments, *named, "--row", "mean/variance", "--score", "pixels"])
    assert ran == [("pixels", "mean/variance")] and again["P(yes)"] == found["P(yes)"]
    with pytest.raises(SystemExit, match="of the same settings as --output"):
        noise_diffusion.main([*arguments, "--rounds", "3"])


def row_of(scores, seconds):
    """A row of two prompts whose images are right once their score is above 1/2."""
    right = [[float(score > 0.5) for score in curve] for curve in scores]
    noise = {"norm": 1.0, "norm z": 0.0, "kurtosis z": 0.0}
    return {"score": scores, "right": right, "seconds": seconds, "clip": [1.0, 2.0], "noise": noise}


def test_rows_are_compared_with_best_of_n_after_as_many_rounds_and_seconds():
    """Two rounds of ours take the seconds of four evaluations of best-of-N on one prompt, of one on the other."""
    best = row_of([[0.1, 0.2, 0.3, 0.4, 0.6], [0.1, 0.2, 0.2, 0.8, 0.9]], [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2)
    ours = row_of([[0.1, 0.5, 0.7], [0.1, 0.3, 0.4]], [[1.0, 2.5, 4.0], [0.1, 0.5, 0.9]])
    torch.testing.assert_close(noise_diffusion.after(best, "score", 2), torch.tensor([0.3, 0.2]))
    seconds = noise_diffusion.after(ours, "seconds", 2)
    torch.testing.assert_close(noise_diffusion.within(best, "score", seconds), torch.tensor([0.4, 0.1]))
    table = noise_diffusion.markdown({noise_diffusion.BEST: best, noise_diffusion.OURS: ours}, 2).splitlines()
    cells = [cell.strip() for cell in table[-3].split("|")]
    assert cells[5].startswith("+0.300 [") and cells[6].startswith("+0.300 [") and cells[7] == ""
    assert cells[8].startswith("50.0%") and cells[9].startswith("+50.0 [")


def test_the_score_of_the_pixels_tells_left_from_right():
    images = torch.full((2, 3, 4, 6), 0.4)
    images[0, :, :, :3] += 0.1
    found = noise_diffusion.left_brightness(images, ["", ""])
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor([1.0, 0.0])))


class Line:
    """A noise problem whose images are the noise, and seem to be another multiple of it where outputs are held."""

    def __init__(self, seeming: torch.Tensor) -> None:
        self.noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.seeming, self.prompts, self.seeds = seeming, ["a"] * 4, [3, 4, 5, 6]
        self.sampler = SimpleNamespace(images=self.images)
        self.space = SimpleNamespace(further_draw=lambda drawn: self.draw_noise)

    def images(self, noise, gradient=None):
        if gradient != "frozen":
            return noise
        return noise.detach() + (noise - noise.detach()) * self.seeming

    def draw_noise(self, shape, streams, device, dtype):
        return torch.cat([torch.randn(1, *shape[1:], generator=stream) for stream in streams])


WEIGHTS = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))


def weighed(images, prompts):
    return (images * WEIGHTS).flatten(1).sum(1)


def test_directions_of_gradients_known_in_closed_form():
    seeming = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = gradient_direction.directions(Line(seeming), {"line": weighed})
    cosine = torch.cosine_similarity((WEIGHTS * seeming).flatten(), WEIGHTS.flatten(), dim=0).item()
    share = 64 * WEIGHTS.mean((1, 2)).square().sum().item() / WEIGHTS.square().sum().item()
    assert found["line: cosine"] == pytest.approx([cosine] * 4, abs=1e-5) and 0.3 < cosine < 0.95
    assert found["line: share of the channel means"] == pytest.approx([share] * 4, abs=1e-5)
    held = gradient_direction.directions(Line(torch.zeros(3, 8, 8)), {"line": weighed})
    assert held["line: cosine"] == [0.0] * 4


def test_a_linear_score_is_reached_at_any_gamma():
    """The best of 50 by either gradient is 2.25 standard deviations above a random one, also if γ is large."""
    found = gradient_direction.reach(
        Line(torch.ones(3, 8, 8)), {"line": weighed}, [0.01, 0.5], draws=400, candidates=50
    )
    for gamma in (0.01, 0.5):
        spread = gamma**0.5 * WEIGHTS.norm().item()
        for gradient in gradient_direction.GRADIENTS:
            more = torch.tensor(found[f"line, γ = {gamma:g}, {gradient}"]) / spread
            torch.testing.assert_close(more, torch.full((4,), 2.249), rtol=0, atol=0.25)
        plain = torch.tensor(found[f"line, γ = {gamma:g}, random"])
        assert plain.std(1).mean().item() == pytest.approx(spread, rel=0.1)
    assert "| line, γ = 0.01 | +2." in gradient_direction.reach_table(found, 50)


@pytest.mark.slow
def test_a_short_measurement_of_the_gradient(capsys, tmp_path):
    output = tmp_path / "found.json"
    arguments = ["--limit", "2", "--batch-size", "2", "--output", str(output), "--reach", "--draws", "1"]
    calls = ["--steps", "1", "2", "--guidance", "1", "3", "--gamma", ".1"]
    found = gradient_direction.main([*arguments, *calls])
    printed = capsys.readouterr().out
    assert list(found["direction"]) == [gradient_direction.key(t, w) for w in (1.0, 3.0) for t in (1, 2)]
    assert "| P(yes): cosine, by steps and guidance | 1 | 3 |" in printed and "| pixels, γ = 0.1 |" in printed
    assert all(len(values) == 2 for numbers in found["direction"].values() for values in numbers.values())
    assert json.loads(output.read_text())["parts"] == found


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
