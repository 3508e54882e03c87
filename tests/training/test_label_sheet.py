"""Labels made by looking are read, kept beside the pictures, and compared with the judge."""

import json

import pytest
import torch

from noiseopt.shapes_world import Scene, Shape, judge, render
from training import label_sheet

PROMPTS = ["a red star", "a red circle", "a blue star"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of three pictures of red stars, for prompts of which the first is right."""
    star = render(Scene((Shape("star", "red", 32, 32, 14),)), torch.Generator().manual_seed(0), size=128)
    (tmp_path / "weights/turbo").mkdir(parents=True)
    prompts = iter(PROMPTS)
    monkeypatch.setattr(label_sheet, "request_of", lambda category, rng: next(prompts))
    monkeypatch.setattr(label_sheet, "draw_all", lambda folder, prompts, args, seed: star.expand(3, -1, -1, -1))
    label_sheet.main(["--output", str(tmp_path), "--count", "3"])
    return tmp_path / "labels"


def test_pictures_are_stored_as_the_judge_sees_them(folder):
    tiles = json.loads((folder / "pictures.json").read_text())["tiles"]
    assert sorted(tile["prompt"] for tile in tiles) == sorted(PROMPTS)
    assert {tile["source"] for tile in tiles} == {"turbo, 1 step, guidance 0"}
    assert len({tile["seed"] for tile in tiles}) == 3
    stored = label_sheet.pictures_in(folder / "pictures.webp")
    assert stored.shape == (20, 3, 128, 128)
    again = [v.correct for v in judge(stored[:3], [tile["prompt"] for tile in tiles])]
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    assert again == [verdict["right"] for verdict in verdicts] == [tile["prompt"] == "a red star" for tile in tiles]
    assert (folder / "sheet_1.png").is_file() and not (folder / "sheet_2.png").exists()


def test_labels_are_compared_with_the_judge(folder, tmp_path, capsys):
    star = [tile["prompt"] for tile in json.loads((folder / "pictures.json").read_text())["tiles"]].index("a red star")
    first, second, third = (tmp_path / f"{name}.txt" for name in ("first", "second", "third"))
    words = ["right" if i in (star, (star + 1) % 3) else "wrong" for i in range(3)]
    first.write_text("".join(f"{i + 1} {word} a note\n" for i, word in enumerate(words)))
    third.write_text("1 right\n2 right\n3 right\n")
    words[star] = "wrong?"
    second.write_text("\n".join(f"{i + 1} {words[i]}" for i in (2, 0, 1)))
    capsys.readouterr()
    label_sheet.main(["--output", str(tmp_path), "--labels", str(first), str(second), str(third)])
    assert json.loads(capsys.readouterr().out) == {
        "pictures": 3,
        "agreement with each reader": [2, 1, 1],
        "all sure of the same": 1,
        "agreement there": 0,
        "against": [(star + 1) % 3 + 1],
    }
    tile = json.loads((folder / "pictures.json").read_text())["tiles"][star]
    assert tile["right"] == [True, False, True] and tile["unsure"] == [False, True, False]
    assert tile["notes"] == ["a note", "", ""]


def test_labels_that_are_not_labels_are_refused(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("1 right\n2 maybe\n")
    with pytest.raises(ValueError, match="such as '12 wrong. a note' in .*, but got '2 maybe'"):
        label_sheet.labels_in(path, 2)
    path.write_text("1 right\n3 wrong\n")
    with pytest.raises(ValueError, match=r"each of 2 pictures in .* not so for \[2, 3\]"):
        label_sheet.labels_in(path, 2)
