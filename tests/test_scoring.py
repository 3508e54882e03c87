"""`noiseopt rewards` and `noiseopt score` on files with known scores, and their errors."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from noiseopt import AutoReward, list_rewards, shapes_world
from noiseopt.cli import main
from noiseopt.evaluation.plan import EMBEDDED_REWARDS
from noiseopt.reward_table import ROWS, Row
from noiseopt.rewards import Reward, find_set_reward, list_features, list_set_rewards
from noiseopt.rewards.contract import registry
from noiseopt.rewards.contract.reward_sum import REWARD_PRESETS
from noiseopt.rewards.features.features import FEATURES


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A red image, and a wide one with a white left and a black right half."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    half = Image.new("RGB", (64, 16))
    half.paste((255, 255, 255), (0, 0, 32, 16))
    half.save(tmp_path / "half.jpg", quality=100)
    return [str(tmp_path / "red.png"), str(tmp_path / "half.jpg")]


def test_rewards_lists_every_name_with_what_it_measures(capsys):
    main(["rewards"])
    printed = capsys.readouterr().out
    names = [*list_rewards(), *list_set_rewards(), *list_features(), *REWARD_PRESETS, *EMBEDDED_REWARDS]
    assert sorted(line.split()[0] for line in printed.splitlines()[2:]) == sorted(names)
    assert "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in printed and "1.84" in printed
    main(["rewards", "--json"])
    found = {(entry["kind"], entry["name"]): entry for entry in json.loads(capsys.readouterr().out)}
    assert len(found) == len(names) and all(entry["measures"] for entry in found.values())
    red = {"checkpoint": None, "range": [-2.0, 1.0], "differentiable": True, "requires_prompt": False, "gibibytes": 0}
    assert red.items() <= found["reward", "red"].items()
    assert found["reward", "clipscore"]["gibibytes"] == pytest.approx(986_109_441 * 2 / 2**30)


FACTS = ("checkpoint", "weights_file", "license", "range", "differentiable", "requires_prompt", "parameters", "package")
ATTRIBUTES = {"checkpoint": "default_checkpoint", "parameters": "parameter_count"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind} {row.name}")
def test_the_table_agrees_with_the_classes(row):
    """A new reward brings its row to `src/noiseopt/reward_table.py`."""
    if row.kind == "preset":
        members = [f"{w:.3g} × {n}" if w != 1 else n for n, w in REWARD_PRESETS[row.name].items()]
        assert row.measures.partition(";")[0] == " + ".join(members)
        return
    if row.kind == "embedded reward":
        made = AutoReward.from_pretrained(shapes_world.path(row.name))
        assert (made.requires_prompt, made.differentiable) == (row.requires_prompt, row.differentiable)
        return
    find = {"reward": registry.REWARDS.find, "set reward": find_set_reward, "features": FEATURES.find}[row.kind]
    entry = find(row.name)
    known = entry if isinstance(entry, type) else entry()
    default = Row(row.name, "")
    for fact in FACTS:
        value = getattr(known, ATTRIBUTES.get(fact, fact), None)
        assert getattr(row, fact) == (getattr(default, fact) if value is None else value), fact


def test_score_prints_what_the_rewards_say(pictures, capsys):
    main(["score", *pictures, "--reward", "red", "--reward", "blue", "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["red"], first["blue"]) == (1.0, -1.0)
    assert second["red"] == pytest.approx(-0.5, abs=0.02)
    main(["score", *pictures, "--reward", "red"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "red"] and lines[2].split() == [pictures[0], "1.0000"]


def test_score_asks_each_image_about_its_own_prompt(pictures, capsys):
    prompts = ["a red circle", "a blue star"]
    arguments = [*pictures, "--reward", "clip", "--json", "--prompt", prompts[0], "--prompt", prompts[1]]
    main(["score", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in found] == prompts
    reward = AutoReward.from_pretrained(shapes_world.path("clip"))
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(1, 3, 30, 40)
    assert found[0]["clip"] == pytest.approx(reward(red, prompts[0]).item(), abs=1e-3)


def test_a_transparent_image_is_scored_on_white(tmp_path, capsys):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(tmp_path / "faint.png")
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "gray.png")
    main(["score", str(tmp_path), "--reward", "red", "--json"])
    found = {Path(row["image"]).name: row["red"] for row in json.loads(capsys.readouterr().out)}
    expected = {"clear.png": -1.0, "faint.png": 1 - 2 * 0.8, "gray.png": -1.0, "palette.png": -1.0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_folder_stands_for_its_images(pictures, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".noiseopt-0123456789abcdef.part.png").write_bytes(b"\x89PNG")  # still being written
    main(["score", str(tmp_path), "--reward", "red", "--json"])
    assert [row["image"] for row in json.loads(capsys.readouterr().out)] == [pictures[1], pictures[0]]


def test_a_rotated_photo_is_scored_upright(tmp_path, capsys):
    class LeftHalf(Reward):
        name, requires_prompt = "left", False

        def score(self, images, prompts):
            return images[..., : images.shape[-1] // 2].mean((1, 2, 3)) * images.shape[-1]

    picture, exif = Image.new("RGB", (40, 20)), Image.Exif()
    picture.paste((255, 255, 255), (0, 0, 40, 10))
    exif[0x0112] = 8  # stored on its side: to be turned by a quarter, counterclockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.REWARDS.entries, "left", LeftHalf)
        main(["score", str(tmp_path / "turned.png"), "--reward", "left", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["left"] == pytest.approx(20.0)


def test_a_preset_stands_for_its_rewards(pictures, capsys, monkeypatch):
    monkeypatch.setattr("noiseopt.rewards.contract.reward_sum.REWARD_PRESETS", {"warm": {"red": 5.0, "green": 1.0}})
    main(["score", pictures[0], "--reward", "warm", "--reward", "red", "--json"])
    assert json.loads(capsys.readouterr().out)[0].keys() == {"image", "prompt", "red", "green"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.png", "--reward", "red"], "Expected an image file, but .*none.png cannot be opened: No such"),
        (["{folder}/empty", "--reward", "red"], "Expected image files in .*empty, but got none of .bmp, "),
        (["{folder}/text.png", "--reward", "red"], "Expected an image that Pillow can read, but .*text.png is not one"),
        (["{folder}/cut.png", "--reward", "red"], "Expected an image that Pillow can read, but .*cut.png is not one"),
        (
            ["{folder}/huge.png", "--reward", "red"],
            "Expected an image that Pillow can read, but .*huge.png .* exceeds limit",
        ),
        (["{folder}/deep.png", "--reward", "red"], r"8 bits per channel, but .*deep.png has mode I;16"),
        (["{folder}/red.png", "--reward", "redd"], "Expected a reward out of .*Did you mean 'red'"),
        (["{folder}/red.png", "--reward", "clip"], "Expected a prompt for reward 'clip', but got none. Add --prompt"),
        (["{folder}/red.png", "--reward", "clipscore"], "Expected a prompt for reward 'clipscore'"),
        (
            ["{folder}/red.png", "--reward", "red", "--prompt", "a", "--prompt", "b"],
            "one for each of 1 images, but got 2",
        ),
        (["{folder}/red.png", "--reward", "red", "--device", "warp"], "Expected a device that this machine has"),
        (["{folder}/red.png"], "the following arguments are required: --reward"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_loaded(
    arguments, message, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Reward, "from_pretrained", lambda *_, **__: pytest.fail("a checkpoint was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("I;16", (4, 4), 30_000).save(tmp_path / "deep.png")
    Image.new("1", (16_000, 12_000)).save(tmp_path / "huge.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:-40])
    with pytest.raises(SystemExit) as stopped:
        main(["score", *(argument.format(folder=tmp_path) for argument in arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error


def test_weights_that_cannot_be_had_end_with_a_sentence(pictures, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SystemExit, match="Cannot load the weights of a reward: .*safetensors"):
        main(["score", pictures[0], "--reward", str(tmp_path), "--prompt", "a"])
