"""The table of what makes seeds differ: which rows a model has, and how they are compared."""

import pytest
import seeds_that_differ  # pyright: ignore[reportMissingImports]
import sets  # pyright: ignore[reportMissingImports]

from noiseopt import shapes_world

PROMPTS = ("a", "b", "c")


def made_up(**rows: tuple[float, float]):
    """A report of rows with (MSS, share right), equal for all prompts but for a little."""
    shifts = dict(zip(PROMPTS, (-0.02, 0.0, 0.02), strict=True))
    found = {
        name.replace("_", " "): {
            prompt: {"MSS": mss + shift, "right": right, "seconds": 1.0} for prompt, shift in shifts.items()
        }
        for name, (mss, right) in rows.items()
    }
    kinds = [
        sets.Row(name, make=None if name.startswith(("plain", "embedding")) else lambda bench: None) for name in found
    ]
    return sets.Report(found, kinds, PROMPTS)


def test_a_model_of_one_step_has_no_rows_of_callbacks():
    one, many = ({row.name for row in seeds_that_differ.rows(model)} for model in ("turbo", "guided"))
    assert {"CADS", "particle guidance"} <= many - one and "It's Never Too Late" in one - many
    common = {"plain", "DiversityBoost", "pink", "coupled", "CNO"}
    common |= {f"embedding noise {strength:g}" for strength in seeds_that_differ.STRENGTHS}
    assert len(seeds_that_differ.STRENGTHS) >= 3 and common <= one & many
    boosts = [
        next(row for row in seeds_that_differ.rows(model) if row.name == "DiversityBoost")
        for model in ("turbo", "guided")
    ]
    assert [boost.steer([]).attenuation for boost in boosts] == [0.0, 1.0]


def test_a_row_is_compared_with_the_weakest_embedding_noise_whose_images_are_as_different():
    found = made_up(
        plain=(0.7, 0.4), embedding_noise_4=(0.6, 0.3), embedding_noise_8=(0.4, 0.1), CNO=(0.5, 0.35), ours=(0.3, 0.8)
    )
    sentences = {row.name: seeds_that_differ.beside_embedding_noise(found, row) for row in found.rows[3:]}
    assert sentences["CNO"] == "CNO against embedding noise 8: right +25 points [+25, +25]"
    assert sentences["ours"] == "ours: MSS 0.30, which no embedding noise here reaches"


def test_the_plane_is_drawn_with_its_front(tmp_path):
    found = made_up(plain=(0.7, 0.4), embedding_noise_4=(0.6, 0.3), CNO=(0.5, 0.35), ours=(0.3, 0.8))
    expected = [(0.3, 40), (0.4, 30), (0.5, 35), (0.7, 80)]
    assert seeds_that_differ.points(found) == [pytest.approx(each) for each in expected]
    seeds_that_differ.plot(found, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_short_comparison_has_all_rows_from_the_same_noise(capsys, monkeypatch):
    rows = [row for row in seeds_that_differ.rows("turbo") if row.make is None]
    monkeypatch.setattr(seeds_that_differ, "rows", lambda model: rows)
    found = seeds_that_differ.main(["--limit", "1", "--images", "2"])
    prompt = shapes_world.VALIDATION_PROMPTS[0]
    norms = {name: row[prompt]["norm"] for name, row in found.found.items()}
    assert len({norms[row.name] for row in rows if row.noise is None}) == 1
    assert norms["pink"] != norms["plain"] != norms["coupled"]
    images = {(row[prompt]["MSS"], row[prompt]["patches"]) for row in found.found.values()}
    assert len(images) == len(rows)  # no two draw the same
    assert "Pareto front: " in capsys.readouterr().out
