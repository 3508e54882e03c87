"""`noiseopt presets`: the table, and which of its rows a name stands for."""

import json
import re

import pytest

from noiseopt import list_presets
from noiseopt.cli import main
from noiseopt.preset_command import COLUMNS


def listed(capsys, *arguments: str) -> list[dict[str, str]]:
    main(["presets", "--json", *arguments])
    return json.loads(capsys.readouterr().out)


def test_every_preset_is_listed_with_its_reason_and_what_was_measured(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 200  # one setting is not divided
    text, rows = " ".join(" ".join(lines).split()), listed(capsys)
    assert [list(row) for row in rows] == [list(COLUMNS)] * len(list_presets())
    for row, preset in zip(rows, list_presets(), strict=True):
        assert f"{row['goal']} {row['method and settings']} {row['reason']}; {row['evidence']}" in text
        assert row["model"] == preset.model.title and row["reason"] == preset.reason
        assert row["method and settings"].startswith(preset.method)
        assert f"{row['model']} ({row['call']})" in text
        assert ("not measured on this model" in row["evidence"]) == (not preset.measured)


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("stabilityai/sdxl-turbo", ["SDXL-Turbo"]),
        ("sdxl-turbo", ["SDXL-Turbo"]),
        ("stabilityai/stable-diffusion-3.5-large-turbo", ["Stable Diffusion 3.5 Large Turbo"]),
        ("klein", ["FLUX.2 [klein]", "FLUX.2 [klein] of one step (RDM)", "FLUX.2 [klein] base"]),
        ("Krea2Pipeline", ["Krea 2 Turbo", "Krea 2"]),
        ("guided", ["shapes-guided"]),
    ],
)
def test_a_model_is_found_by_checkpoint_name_or_class(name, titles, capsys):
    rows = listed(capsys, name)
    assert list(dict.fromkeys(row["model"] for row in rows)) == titles
    assert [row["goal"] for row in rows] == ["diverse", "faithful", "best"] * len(titles)
    assert [row["goal"] for row in listed(capsys, name, "--goal", "best")] == ["best"] * len(titles)


def test_an_unknown_model_has_the_presets_of_any_by_its_steps(capsys):
    main(["presets", "org/mine\x1b[2J", "--goal", "faithful"])
    printed = capsys.readouterr()
    assert "no preset has the name org/mine\\x1b[2J. A pipeline of a known class is told by its class" in printed.err
    with pytest.raises(SystemExit, match="2"):
        main(["presets", " "])
    models = [line for line in printed.out.splitlines() if line and not line.startswith(" ")]
    kinds = {"one step": 1, "2 to 16 steps": 4, "more steps": 50}
    assert models == [f"any model of {kind} (num_inference_steps={steps})" for kind, steps in kinds.items()]


def test_an_unknown_goal_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["presets", "--goal", "fast"])
    assert re.search("invalid choice: 'fast'.*diverse.*faithful.*best", capsys.readouterr().err)
