"""The command end to end: its files, resuming, two processes, and other models."""

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import save_tiny_clip, tiny_pipeline

import noiseopt
from noiseopt import shapes_world
from noiseopt.cli import main
from noiseopt.evaluation import evaluate as evaluation
from noiseopt.evaluation.command import FIRST_LOOK, add_evaluate, plan_of
from noiseopt.evaluation.plan import slug
from noiseopt.evaluation.unit import Studio, Unit
from noiseopt.pipelines.result_folder import only_writer
from noiseopt.rewards import TinyImage

PROMPTS = ["a cyan square below a red cross", "two green circles", "a yellow star"]
UNITS = 3 * len(PROMPTS)  # plain, best-of-N and ReNO


def command(folder: Path, prompts: Path, *others: str) -> list[str]:
    settings = ["--seeds", "2", "--method", "reno:steps=2", "--best-of", "2", "--watch", "red"]
    return ["evaluate", "--prompts", str(prompts), *settings, *others, "--device", "cpu", "--output", str(folder)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "three.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory, prompts) -> tuple[Path, str]:
    """The folder of a single-process evaluation, and the printed text."""
    folder, printed = tmp_path_factory.mktemp("alone") / "new" / "folder", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(command(folder, prompts))
    return folder, printed.getvalue()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row(folder: Path, method: str, metric: str) -> dict[str, str]:
    (found,) = (row for row in rows(folder) if (row["method"], row["metric"]) == (method, metric))
    return found


def units(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("units/*/*/*.json"))]


def test_every_file_is_there_and_named(alone):
    folder, printed = alone
    names = ["table.md", "table.csv", "cost.md", "cost.csv", "results.json", "settings.json", "accuracy.png"]
    for name in [*names, "reward_vs_seconds.png", "spectrum.png", "plane.png", "grid_turbo.png"]:
        assert (folder / name).is_file() and f"wrote {folder / name}" in printed
    assert max(len(line) for line in printed.split("\n") if str(folder) not in line) <= 80
    assert "best-of-2 for reno:steps=2" in printed and "Differences on the same prompts" in printed
    assert not list(folder.rglob(".part-*"))


@pytest.mark.parametrize(
    "name", ["accuracy.png", "reward_vs_seconds.png", "spectrum.png", "plane.png", "grid_turbo.png"]
)
def test_figures_show_something(alone, name):
    with Image.open(alone[0] / name) as picture:
        assert 500 < picture.width < 4000 and 300 < picture.height < 4000
        assert len(set(picture.convert("RGB").resize((128, 128)).get_flattened_data())) > 50


def test_the_table_is_the_mean_of_the_units(alone):
    folder, _ = alone
    every = units(folder)
    assert len(every) == UNITS
    for method in ("plain", "reno:steps=2", "best-of-N for reno:steps=2"):
        ours = [unit for unit in every if unit["method"] == method]
        shares = [sum(unit["judge"]["right"]) / 2 for unit in ours]
        assert float(row(folder, method, "right")["value"]) == pytest.approx(sum(shares) / 3, abs=1e-6)
        reds = [sum(unit["rewards"]["red"]) / 2 for unit in ours]
        assert float(row(folder, method, "red")["value"]) == pytest.approx(sum(reds) / 3, rel=1e-5)
        counting = next(share for share, unit in zip(shares, ours, strict=True) if unit["category"] == "counting")
        assert float(row(folder, method, "right: counting")["value"]) == counting
    assert {unit["category"] for unit in every} == {"position", "counting", "single"}


def test_optimized_rewards_are_marked_and_only_they(alone):
    text = (alone[0] / "table.md").read_text(encoding="utf-8")
    assert "| clip\\* (n = 3) | red (n = 3) |" in text
    results = json.loads((alone[0] / "results.json").read_text(encoding="utf-8"))
    marked = {entry["metric"] for entry in results["estimates"] if entry["optimized"]}
    assert "clip" in marked and not marked & {"red", "right", "layout spread"}


def test_costs_are_those_of_the_methods(alone):
    with (alone[0] / "cost.csv").open(encoding="utf-8") as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    calls = {method: float(row["model calls per image"]) for method, row in costs.items()}
    assert calls == {"plain": 1, "best-of-2 for reno:steps=2": 3, "reno:steps=2": 3}  # one to draw the result
    assert float(costs["reno:steps=2"]["seconds per image"]) > float(costs["plain"]["seconds per image"])
    assert costs["best-of-2 for reno:steps=2"]["time / method's"] and not costs["plain"]["time / method's"]


@pytest.mark.slow
def test_noise_samplers_and_features_are_dimensions_of_an_evaluation(prompts, tmp_path):
    """In the folder: each combination, measured by each of the features, from the noise of its sampler."""
    more = ["--noise-sampler", "white", "--noise-sampler", "blue:alpha=1.0", "--limit", "1", "--seeds", "3"]
    features = [part for name in ("tiny_image", "dinov2", "clip") for part in ("--features", name)]
    main([*command(tmp_path / "folder", prompts), *more, *features])
    blue = "noise_sampler={'name': 'blue', 'alpha': 1.0}"
    keys = ["plain", f"plain:{blue}", "best-of-N for reno:steps=2", "reno:steps=2"]
    keys += [f"best-of-N for reno:steps=2,{blue}", f"reno:steps=2,{blue}"]
    found = {unit["method"]: unit for unit in units(tmp_path / "folder")}
    assert sorted(found) == sorted(keys)
    for key, unit in found.items():
        assert (unit["noise"]["spectral_slope"] > 1) == (blue in key)
        assert {"mss", "vendi", "distance tiny_image", "mss clip", "vendi clip"} < unit["set"].keys()
        image = [picture(path) for path in sorted(tmp_path.glob(f"folder/units/*/{slug(key)}/*.png"))]
        pairs = [(image[a] - image[b]).square().sum().sqrt() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert unit["set"]["distance tiny_image"] == pytest.approx(float(sum(pairs)) / 3, rel=0.02)
    text = (tmp_path / "folder" / "table.md").read_text(encoding="utf-8")
    assert "| MSS (n = 1) | Vendi (n = 1) |" in text and "| distance (tiny_image) (n = 1) |" in text
    assert "On the Pareto front of right, % and 1 − MSS (dinov2), on turbo: " in text


def picture(path: Path) -> torch.Tensor:
    """Return an image as tiny features."""
    with Image.open(path) as file:
        pixels = torch.tensor(list(file.convert("RGB").tobytes())).view(1, *file.size[::-1], 3).movedim(3, 1) / 255
    return TinyImage()(pixels)


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted_with_the_same_table(alone, prompts, tmp_path, monkeypatch, capsys):
    measure, save, measured = Studio.measure, Unit.save, []

    def counted(studio, contender, index, n):
        measured.append((contender.key, index))
        return measure(studio, contender, index, n)

    def interrupted(unit, path):
        if len(measured) == 4:  # the images are written, the numbers are not
            path.with_name(f"{path.stem}-0.png").touch()
            raise KeyboardInterrupt
        save(unit, path)

    monkeypatch.setattr(Studio, "measure", counted)
    with monkeypatch.context() as interruption, pytest.raises(SystemExit) as ended:
        interruption.setattr(Unit, "save", interrupted)
        main(command(tmp_path / "folder", prompts))
    assert ended.value.code == 130 and "the same command continues" in capsys.readouterr().err
    assert len(units(tmp_path / "folder")) == 3 and not (tmp_path / "folder" / "table.md").exists()
    main(command(tmp_path / "folder", prompts))
    assert len(measured) == 4 + UNITS - 3 and set(measured[:3]).isdisjoint(measured[4:])
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "folder" / name).read_bytes() == (alone[0] / name).read_bytes()


@pytest.mark.slow
def test_a_finished_evaluation_loads_nothing(alone, prompts, tmp_path, monkeypatch):
    shutil.copytree(alone[0], tmp_path / "copy")
    for name in ("table.md", "accuracy.png"):
        (tmp_path / "copy" / name).unlink()
    monkeypatch.delattr(evaluation, "load_pipeline")
    monkeypatch.delattr(evaluation.Instruments, "load")
    main(command(tmp_path / "copy", prompts))
    assert (tmp_path / "copy" / "table.md").read_bytes() == (alone[0] / "table.md").read_bytes()
    assert (tmp_path / "copy" / "accuracy.png").is_file()


@pytest.mark.slow
def test_a_plan_grows_in_its_folder(alone, prompts, tmp_path, monkeypatch, capsys):
    """Only what is new is measured, and the table is that of the whole plan in a new folder."""
    measure, measured = Studio.measure, []

    def counted(studio, contender, index, n):
        measured.append((contender.key, index))
        return measure(studio, contender, index, n)

    monkeypatch.setattr(Studio, "measure", counted)
    shutil.copytree(alone[0], tmp_path / "grown")
    (tmp_path / "four.txt").write_text("\n".join([*PROMPTS, "a red circle"]))
    more = ["--method", "best_of_n:steps=1,noise_sampler=pink"]
    main(command(tmp_path / "grown", tmp_path / "four.txt", *more))
    old = ["plain", "best-of-N for reno:steps=2", "reno:steps=2"]
    new = "best_of_n:steps=1,noise_sampler=pink"
    assert sorted(measured) == sorted([(key, 3) for key in old] + [(new, index) for index in range(4)])
    main(command(tmp_path / "new", tmp_path / "four.txt", *more))
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    measured.clear()
    main(command(tmp_path / "grown", prompts))
    assert not measured and (tmp_path / "grown" / "table.md").read_bytes() == (alone[0] / "table.md").read_bytes()


def test_an_evaluation_does_not_start_in_a_folder_that_another_is_writing_to(alone, prompts):
    with only_writer(alone[0]), pytest.raises(SystemExit, match="another process is writing to .*Wait until it"):
        main(command(alone[0], prompts))


def test_a_damaged_unit_is_named_before_anything_is_loaded(alone, prompts, tmp_path, monkeypatch):
    shutil.copytree(alone[0], tmp_path / "copy")
    path = sorted(tmp_path.glob("copy/units/turbo/plain/*.json"))[1]
    path.write_text(path.read_text().replace('"rewards"', '"reward"'))
    monkeypatch.delattr(evaluation, "load_pipeline")
    with pytest.raises(SystemExit, match=f"{path.name} has wrong values: rewards. Delete"):
        main(command(tmp_path / "copy", prompts, "--method", "cno"))


def test_a_method_that_the_last_model_cannot_run_is_named_before_the_first_is_measured(tmp_path, monkeypatch):
    def refuse(studio, contender):
        if studio.model.name == "guided":
            raise ValueError("Expected\nanother method.")

    monkeypatch.delattr(Studio, "measure")
    monkeypatch.setattr(Studio, "check", refuse)
    options = ["--model", "turbo", "--model", "guided", "--limit", "1", "--features", "none", "--best-of", "1"]
    with pytest.raises(SystemExit, match="Cannot run plain on guided: Expected another method."):
        main(["evaluate", *options, "--output", str(tmp_path / "folder")])


def test_a_method_that_needs_a_set_is_refused_for_single_images(tmp_path, monkeypatch):
    monkeypatch.delattr(Studio, "measure")
    options = ["--method", "cno", "--limit", "1", "--seeds", "1", "--features", "none", "--best-of", "1"]
    with pytest.raises(SystemExit, match="Cannot run cno on turbo: Expected at least 2 images of each prompt"):
        main(["evaluate", *options, "--output", str(tmp_path / "folder")])


def test_another_command_is_refused_with_the_difference(alone, prompts):
    before = {path: path.stat().st_mtime_ns for path in alone[0].rglob("*")}
    with pytest.raises(SystemExit, match=r"threads was 1 and is 2.*Choose another --output, or delete that folder"):
        main(command(alone[0], prompts, "--threads", "2"))
    assert {path: path.stat().st_mtime_ns for path in alone[0].rglob("*")} == before


@pytest.mark.slow
def test_two_processes_write_the_same_table(alone, prompts, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", port, "-m", "noiseopt", *command(tmp_path / "folder", prompts)]
    paths = [str(Path(noiseopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == alone[1].count("wrote ")
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "folder" / name).read_bytes() == (alone[0] / name).read_bytes()


@pytest.mark.slow
def test_models_and_prompts_of_the_real_world(tmp_path, capsys):
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    reward = save_tiny_clip(tmp_path / "reward")
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a cat", "category": "animals"}\n{"prompt": "a dog on a mat"}\n'
    )
    (tmp_path / "references").mkdir()
    for index in range(6):
        noise = torch.randint(256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.numpy()).save(tmp_path / "references" / f"{index}.png")
    options = ["--call", "num_inference_steps=1,guidance_scale=0.0,height=32,width=32", "--watch", "red"]
    options += ["--reward", f"{reward}=2", "--features", reward, "--references", str(tmp_path / "references")]
    options += ["--method", "reno:steps=2", "--seeds", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
    main(["evaluate", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), *options])
    assert "takes as long as reno:steps=2" in capsys.readouterr().out
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "judge" not in text and "layout" not in text and "Coverage" in text
    assert (tmp_path / "out" / "rewards.png").is_file() and not (tmp_path / "out" / "accuracy.png").exists()
    covered = row(tmp_path / "out", "plain", "Coverage")
    assert 0 <= float(covered["value"]) <= 1 and covered["low"] == ""
    assert float(row(tmp_path / "out", "reno:steps=2 − plain", reward)["value"]) >= 0
    (calibrated,) = json.loads((tmp_path / "out" / "calibration.json").read_text()).values()
    n = calibrated["n"]
    assert (calibrated["model"], calibrated["method"]) == (str(tmp_path / "model"), "reno:steps=2")
    assert f"best-of-{n} for reno:steps=2" in text and n >= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "trubo"], "Expected a model out of turbo"),
        (["--method", "renoir"], "Expected a method out of"),
        (["--method", "reno:step=2"], "Expected settings of reno out of steps"),
        (["--method", "reno:learning_rate=-1"], "Expected `learning_rate`"),
        (["--reward", "clipscor"], "Did you mean 'clipscore'"),
        (["--reward", "red=many"], "Expected a reward as NAME or NAME=WEIGHT"),
        (["--model", "org/model", "--reward", "clip"], "Did you mean 'clipscore'"),
        (["--model", "org/model", "--reward", "red", "--watch", "vqa"], "Did you mean 'vqascore'"),
        (["--reward", "red=inf"], "Expected a finite weight, but got 'red=inf'"),
        (["--reward", "red=-1"], "Expected weights above 0"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompts", "{file}"], "prompts.txt:2: Expected a prompt of the shapes world, but got 'a cat'"),
        (["--seeds", "0"], "Expected an integer of 1 or more, but got '0'"),
        (["--model", "org/model", "--prompts", "{file}"], "at least one `--reward`"),
        (["--noise-sampler", "pinc"], "Did you mean 'pink'"),
        (["--noise-sampler", "pink", "--call", "noise_sampler=blue"], "Expected no noise_sampler in `--call`"),
        (["--features", "clip", "--features", "none"], "Expected `--features none` alone"),
        (["--call", "steps"], "Expected settings such as"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na cat\n")
    monkeypatch.delattr(evaluation, "load_pipeline")
    filled = [argument.format(file=tmp_path / "prompts.txt") for argument in arguments]
    with pytest.raises(SystemExit) as refused:
        main(["evaluate", *filled, "--output", str(tmp_path / "folder")])
    message = capsys.readouterr().err
    assert refused.value.code == 2 and expected in message and "Traceback" not in message
    assert not (tmp_path / "folder").exists()


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path):
    (tmp_path / "empty").mkdir()
    options = ["--reward", "red", "--features", "none", "--seeds", "1", "--output", str(tmp_path / "folder")]
    with pytest.raises(SystemExit, match="Cannot run the model .*empty: ") as refused:
        main(["evaluate", "--model", str(tmp_path / "empty"), *options])
    assert "\n" not in str(refused.value)
    with pytest.raises(SystemExit, match=r"Cannot run the model turbo: Expected arguments of .*, but got 'guidance'"):
        main(["evaluate", "--call", "guidance=1.0", *options[:-1], str(tmp_path / "other")])


def test_a_method_that_cannot_climb_the_reward_is_refused_by_name(tmp_path):
    options = [
        "--method",
        "noise_diffusion",
        "--limit",
        "1",
        "--features",
        "none",
        "--output",
        str(tmp_path / "folder"),
    ]
    with pytest.raises(
        SystemExit, match=r"Cannot run noise_diffusion on turbo: Expected a score in \[0, 1\].*score_range"
    ):
        main(["evaluate", *options])


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="Expected a folder to write to"):
        main(["evaluate", "--output", str(tmp_path / "file")])


def test_missing_matplotlib_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install noiseopt\[plots\]"):
        main(["evaluate", "--output", str(tmp_path / "folder")])


def test_the_default_is_a_first_look():
    parser = argparse.ArgumentParser()
    add_evaluate(parser.add_subparsers())
    plan = plan_of(parser.parse_args(["evaluate"]))
    assert [prompt.text for prompt in plan.prompts.prompts] == list(shapes_world.VALIDATION_PROMPTS[:FIRST_LOOK])
    assert [model.name for model in plan.models] == ["turbo"] and plan.rewards == (("clip", 1.0),)
    assert [contender.key for contender in plan.contenders] == ["plain", "best-of-N for reno", "reno"]
