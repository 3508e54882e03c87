"""`noiseopt generate`: its files, resuming after anything, bad prompts, and two processes."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import tiny_pipeline

import noiseopt
from noiseopt import NoiseResult, generation
from noiseopt.cli import main
from noiseopt.demo import ONE_STEP, load_pipeline, seeded
from noiseopt.gallery import page
from noiseopt.generate import duration
from noiseopt.pipelines.result_folder import only_writer
from noiseopt.pipelines.results import atomic_write

PROMPTS = ["a red circle left of a blue star", "two green circles"]
BAD = "a <b>cat</b> & $dog$"


def command(prompts: Path, folder: Path, *others: str) -> list[str]:
    settings = ["--method", "reno:steps=2", "--images", "2", "--device", "cpu", *others]
    return ["generate", "--prompts", str(prompts), *settings, "--output", str(folder)]


def write_prompts(folder: Path, *prompts: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return file


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The pictures, the noises without their provenance, which has seconds, and the page."""
    found = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".html")}
    noises = {path.name: NoiseResult.load(path).noise.numpy().tobytes() for path in folder.rglob("*.safetensors")}
    return found | noises


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> tuple[Path, Path, str]:
    """The file of prompts, the folder of images, and the printed text."""
    prompts, printed = write_prompts(tmp_path_factory.mktemp("prompts"), *PROMPTS, PROMPTS[1]), io.StringIO()
    folder = prompts.parent / "new" / "folder"
    with contextlib.redirect_stdout(printed):
        main(command(prompts, folder))
    return prompts, folder, printed.getvalue()


def test_images_are_those_of_the_stock_pipeline(generated):
    """Before from the seeds, and after from the noise in the file beside them."""
    _, folder, printed = generated
    pipe, found = load_pipeline(), records(folder)
    pipe.set_progress_bar_config(disable=True)
    assert [record["prompt"] for record in found] == [*PROMPTS, PROMPTS[1]]
    assert [record["seeds"] for record in found] == [[0, 1], [0, 1], [2, 3]]  # a repeated prompt is drawn anew
    for record in found:
        result, call = NoiseResult.load(folder / record["noise"]), {**ONE_STEP, "num_images_per_prompt": 2}
        before = pipe(record["prompt"], generator=seeded(record["seeds"][0], 2), **call).images
        after = pipe(record["prompt"], latents=result.latents, **call).images
        for names, images in ((record["before"], before), (record["images"], after)):
            for name, image in zip(names, images, strict=True):
                assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(image))
        assert record["rewards"]["clip"] == pytest.approx(result.best_scores["clip"].tolist())
        assert all(np.array(record["rewards"]["clip"]) >= record["rewards before"]["clip"])
    means = (np.mean([record[key]["clip"] for record in found]) for key in ("rewards before", "rewards"))
    assert "clip: {:.4g} → {:.4g}, mean of 6 images".format(*means) in printed and "wrote 3 of 3 prompts" in printed


class Sources(HTMLParser):
    """Reads the sources of the pictures, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.text, self.tags = [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_every_image_that_is_there(generated):
    _, folder, _ = generated
    shown = Sources((folder / "index.html").read_text(encoding="utf-8"))
    assert len(shown.sources) == 12 and all((folder / source).is_file() for source in shown.sources)
    assert {path.name for path in (folder / "images").glob("*.png")} == {Path(each).name for each in shown.sources}


@pytest.mark.parametrize(
    ("prompt", "words"), [("!!!", ""), (" A_red  cube!", "a-red-cube-"), ("x" * 39 + " y", "x" * 39 + "-")]
)
def test_names_of_files_begin_with_words_and_never_with_a_dash(prompt, words):
    assert re.fullmatch(re.escape(words) + "[0-9a-f]{10}", generation.Job(prompt, 0, (0,), "").name)


def test_text_of_others_is_text_on_the_page():
    prompt = '<script>alert("&")</script><img src=x onerror=alert(1)>'
    numbers = {"seeds": [0], "rewards before": {"<i>": [None]}, "rewards": {"<i>": [1.0]}}
    record = {"prompt": prompt, "images": ["images/%61 b.png"], "before": ["images/b.png"], **numbers}
    shown = Sources(page([record, {"prompt": prompt, "error": prompt}], "<h1>"))
    assert shown.text.count(prompt) == 3 and shown.sources == ["images/b.png", "images/%2561%20b.png"]
    assert not {"script", "i"} & shown.tags


def test_a_finished_folder_loads_nothing_and_writes_the_report_anew(generated, monkeypatch, capsys):
    prompts, folder, _ = generated
    before, page_before = records(folder), (folder / "index.html").read_bytes()
    for name in ("results.jsonl", "index.html"):
        (folder / name).unlink()
    monkeypatch.delattr(generation, "load_pipeline")
    capsys.readouterr()
    main(command(prompts, folder))
    assert records(folder) == before and (folder / "index.html").read_bytes() == page_before
    assert "wrote 0 of 3 prompts, 3 were finished before" in capsys.readouterr().out
    main(command(prompts, folder, "--limit", "1"))
    assert records(folder)[0] == before[0] and sorted(map(str, records(folder))) == sorted(map(str, before))
    printed = capsys.readouterr().out
    assert "wrote 0 of 1 prompts, 1 were finished before" in printed and "also shown: 2 more of this folder" in printed


def test_bad_prompts_are_named_with_their_line_and_the_others_go_on(generated, tmp_path, capsys, monkeypatch):
    """A new line does not move the others to other seeds: what is known of them is kept."""
    _, folder, _ = generated
    prompts = write_prompts(tmp_path, "a yellow star", "", BAD, *PROMPTS)
    drawn, optimize = [], generation.optimize_noise
    monkeypatch.setattr(
        generation,
        "optimize_noise",
        lambda pipe, prompt, *args, **kwargs: drawn.append(prompt) or optimize(pipe, prompt, *args, **kwargs),
    )
    with pytest.raises(SystemExit) as ended:
        main(command(prompts, folder))
    assert ended.value.code == 1 and drawn == ["a yellow star"]
    assert f"{prompts}:3: Expected a prompt of the shapes world, but got '{BAD}'" in capsys.readouterr().err
    assert [("error" in record) for record in records(folder)] == [False, True, False, False, False]
    assert records(folder)[-1]["seeds"] == [2, 3]  # of the repeated prompt, which this run does not ask for
    assert BAD in Sources((folder / "index.html").read_text(encoding="utf-8")).text


def test_a_line_that_is_no_prompt_is_named(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "{PROMPTS[0]}"}}\n{{"prompt": \n')
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path / "prompts.jsonl", tmp_path / "folder"))
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "Expected JSON in" in printed.err and "prompts.jsonl:2" in printed.err
    assert "wrote 1 of 2 prompts" in printed.out
    drawn, unread = records(tmp_path / "folder")
    assert drawn["prompt"] == PROMPTS[0] and unread["prompt"] is None and "prompts.jsonl:2" in unread["error"]
    assert unread["error"] in Sources((tmp_path / "folder" / "index.html").read_text(encoding="utf-8")).text


def test_a_prompt_that_fails_is_tried_again(tmp_path, capsys, monkeypatch):
    prompts = write_prompts(tmp_path, *PROMPTS)

    def broken(pipe, prompt, *args, **kwargs):
        raise RuntimeError("out of\nmemory") if prompt == PROMPTS[0] else ValueError("no")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(generation, "optimize_noise", broken)
        main(command(prompts, tmp_path / "folder"))
    printed = capsys.readouterr()
    assert f"{prompts}:1: out of memory" in printed.err and "wrote 0 of 2 prompts" in printed.out
    main(command(prompts, tmp_path / "folder"))
    assert all("error" not in record for record in records(tmp_path / "folder"))


def test_other_settings_are_refused_with_the_difference(generated, tmp_path):
    prompts, folder, _ = generated
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*")}
    with pytest.raises(SystemExit, match=r"seed was 0 and is 5. Choose another --output, or delete that folder"):
        main(command(prompts, folder, "--seed", "5"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*")} == before


def test_it_does_not_start_in_a_folder_that_another_is_writing_to(tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path, *PROMPTS)
    (tmp_path / "folder").mkdir()
    monkeypatch.delattr(generation, "load_pipeline")
    with only_writer(tmp_path / "folder"), pytest.raises(SystemExit, match="another process is writing to .*Wait"):
        main(command(prompts, tmp_path / "folder"))
    assert not list((tmp_path / "folder").iterdir())


class Killed(BaseException):
    """Raised where a process would be killed."""


def killed_at(point: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process die before it replaces a file for the `point`-th time, from 0."""
    replace, calls = os.replace, itertools.count()

    def dying(part, path):
        if next(calls) == point:
            raise Killed
        replace(part, path)

    patch.setattr(atomic_write.os, "replace", dying)


@pytest.mark.slow
def test_nothing_is_lost_wherever_it_is_killed(tmp_path, monkeypatch):
    """At each replacement of a file: the next start ends with the files of a run in one piece."""
    prompts, whole = write_prompts(tmp_path, *PROMPTS), tmp_path / "whole"
    main(command(prompts, whole, "--images", "1"))
    expected, point, kept = contents(whole), 0, {}
    for point in itertools.count():
        folder = tmp_path / str(point)
        try:
            with monkeypatch.context() as patch:
                killed_at(point, patch)
                main(command(prompts, folder, "--images", "1"))
            break
        except Killed:
            kept = {path: path.stat().st_mtime_ns for path in folder.rglob("images/*.json")}
        main(command(prompts, folder, "--images", "1"))
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
        assert contents(folder) == expected and [record["prompt"] for record in records(folder)] == PROMPTS
    assert point > len(PROMPTS) * 4 and len(kept) == len(PROMPTS)


@pytest.mark.slow
def test_it_goes_on_after_kill_9(tmp_path):
    prompts, folder = write_prompts(tmp_path, "a yellow star", *PROMPTS), tmp_path / "folder"
    arguments = command(prompts, folder, "--method", "reno:steps=15")
    launch = [sys.executable, "-m", "noiseopt", *arguments]
    running = subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.rglob("images/*.json")) and running.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("images/*.json")}
    assert 1 <= len(kept) <= 3
    main(arguments)
    assert len(records(folder)) == 3 and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not list(folder.rglob(".*"))


def test_ctrl_c_says_how_to_go_on_and_a_half_done_prompt_does(tmp_path, capsys, monkeypatch):
    prompts, folder = write_prompts(tmp_path, PROMPTS[0]), tmp_path / "folder"
    arguments = command(prompts, folder, "--method", "best_of_n:steps=6")

    class Interrupting(generation.TimeBudget):
        def on_step_end(self, state):
            if state.step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(generation, "TimeBudget", Interrupting)
        main([*arguments, "--budget", "1h"])
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    (noise,) = folder.rglob("*.safetensors")
    assert not NoiseResult.load(noise).complete and len(NoiseResult.load(noise).losses) == 3
    steps, on_step_end = [], generation.TimeBudget.on_step_end
    monkeypatch.setattr(
        generation.TimeBudget, "on_step_end", lambda self, state: steps.append(state.step) or on_step_end(self, state)
    )
    main([*arguments, "--budget", "1h"])
    assert NoiseResult.load(noise).complete and len(NoiseResult.load(noise).losses) == 6
    assert steps == [2, 3, 4, 5]  # the step that was interrupted is done again


def test_a_budget_ends_the_optimization_of_each_prompt(tmp_path, capsys):
    prompts, folder = write_prompts(tmp_path, *PROMPTS), tmp_path / "folder"
    main([*command(prompts, folder), "--method", "best_of_n:steps=100000", "--budget", "0.2s"])
    for record in records(folder):
        assert record["stopped"] == "time budget" and 0 < record["seconds"] < 5 and record["evaluations"] < 1000


def test_a_budget_is_a_setting_of_the_method_in_the_place_of_its_steps(tmp_path):
    prompts = write_prompts(tmp_path, PROMPTS[0])
    for number, (method, evaluations) in enumerate([("best_of_n:budget=200ms", None), ("reno:budget=5,search=2", 5)]):
        main([*command(prompts, tmp_path / str(number)), "--method", method])
        (record,) = records(tmp_path / str(number))
        assert evaluations in (None, record["evaluations"])
        assert record["stopped"] == (None if evaluations else "time budget")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("20", 20), ("1.5m", 90), (".5h", 1800), ("500ms", 0.5), ("2min", 120), ("2 h", 7200), ("0.2s", 0.2)],
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "method", ["cno", "group_selection:steps=4", "never_too_late:steps=2", "noise_diffusion:steps=3"]
)
def test_methods_of_sets_and_those_that_need_settings(method, tmp_path, capsys):
    prompts = write_prompts(tmp_path, PROMPTS[1])
    arguments = [*command(prompts, tmp_path / "folder"), "--method", method]
    if method.startswith("noise_diffusion"):
        with pytest.raises(SystemExit, match=r"Cannot run noise_diffusion.* on turbo: Expected a score in \[0, 1\]"):
            main([*arguments, "--reward", "clip=2"])
    warned = (
        pytest.warns(UserWarning, match="single denoising step") if "noise_d" in method else contextlib.nullcontext()
    )
    with warned:
        main([*arguments, "--output", str(tmp_path / "other")])
    (record,) = records(tmp_path / "other")
    expected = {"cno": set(), "noise_diffusion": {"vqa"}}.get(method.partition(":")[0], {"clip"})
    assert expected <= record["rewards"].keys() and ("clip" in record["rewards"]) == (expected == {"clip"})


def test_another_distribution_of_the_noise(tmp_path):
    """The image before is that of its first noise, and not that of the pipeline's own."""
    prompts, pictures = write_prompts(tmp_path, PROMPTS[0]), {}
    for setting in ("", ",noise_sampler=pink"):
        folder = tmp_path / f"folder{setting}"
        main([*command(prompts, folder), "--method", f"best_of_n:steps=1{setting}"])
        (record,) = records(folder)
        assert record["rewards"] == record["rewards before"]
        pictures[setting] = [(folder / name).read_bytes() for name in record["before"]]
        assert pictures[setting] == [(folder / name).read_bytes() for name in record["images"]]
    assert not set(pictures[""]) & set(pictures[",noise_sampler=pink"])


def test_a_model_and_rewards_of_the_real_world(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.csv").write_text('prompt,category\n"a cat, asleep",animals\n')
    call = "num_inference_steps=1,guidance_scale=0.0,height=32,width=32"
    arguments = command(tmp_path / "prompts.csv", tmp_path / "folder", "--model", str(tmp_path / "model"))
    main([*arguments, "--call", call, "--reward", "red=2", "--reward", "brightness"])
    (record,) = records(tmp_path / "folder")
    assert record["prompt"] == "a cat, asleep" and record["rewards"].keys() == {"red", "brightness"}
    sums = [2 * np.array(record[key]["red"]) + record[key]["brightness"] for key in ("rewards before", "rewards")]
    assert all(sums[1] >= sums[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "trubo"], "Did you mean 'turbo'"),
        (["--method", "rnoe"], "Did you mean 'reno'"),
        (["--method", "cads"], "Expected a method that optimizes noise, but got 'cads'"),
        (["--method", "cno", "--reward", "red"], "Expected no `--reward` for cno"),
        (["--reward", "red=inf"], "Expected a finite weight, but got 'red=inf'"),
        (["--reward", "red=nan"], "Expected a finite weight, but got 'red=nan'"),
        (["--reward", "red=0"], "Expected finite weights of 0 or more, and one above 0"),
        (["--reward", "red", "--reward", "brightness=-1"], "Expected finite weights of 0 or more"),
        (
            ["--method", "cno", "--images", "1"],
            "at least 2 images of each prompt for cno, which makes them differ, but got 1. Pass `--images 4`",
        ),
        (["--method", "never_too_late", "--images", "1"], "at least 2 images of each prompt for never_too_late"),
        (["--reward", "clpi"], "Did you mean 'clip'"),
        (["--reward", "rnoe"], "Did you mean 'reno'"),
        (["--reward", "clipscor"], "Did you mean 'clipscore'"),
        (["--model", "org/model"], "Expected a `--reward` for reno"),
        (["--model", "org/model", "--reward", "clip"], "Did you mean 'clipscore'"),
        (["--device", "warp"], "Expected a device that this machine has"),
        (["--budget", "soon"], "Expected a time above 0 such as '20s', '1.5min', '500ms' or '2h', but got 'soon'"),
        (["--budget", "0s"], "Expected a time above 0"),
        (["--images", "0"], "Expected an integer of 1 or more"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--call", "noise_sampler=pink"], "without noise_sampler, but got 'pink'. Pass it as a setting"),
        (["--method", "reno:noise_sampler=pnik"], "noise_sampler"),
        (["--call", "num_images_per_prompt=2"], "Expected `--call` without num_images_per_prompt"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(generation, "load_pipeline")
    prompts = write_prompts(tmp_path, PROMPTS[0])
    with pytest.raises(SystemExit) as refused:
        main([*command(prompts, tmp_path / "folder"), *arguments])
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert refused.value.code == 2 and expected in message and "Traceback" not in message
    assert not (tmp_path / "folder").exists()


def test_a_folder_without_images_takes_other_settings(tmp_path):
    prompts, folder = write_prompts(tmp_path, BAD, PROMPTS[0]), tmp_path / "folder"
    with pytest.raises(SystemExit, match="num_inference_step"):
        main(command(prompts, folder, "--call", "num_inference_step=1"))
    with pytest.raises(SystemExit, match="1"):  # the bad prompt
        main(command(prompts, folder))
    assert ["error" in record for record in records(folder)] == [True, False]
    with pytest.raises(SystemExit, match="Expected the settings that"):
        main(command(prompts, folder, "--seed", "5"))


def test_a_reward_of_weight_0_is_measured(tmp_path):
    arguments = command(write_prompts(tmp_path, PROMPTS[0]), tmp_path / "folder", "--images", "1")
    main([*arguments, "--reward", "clip", "--reward", "jpeg_compressibility=0"])
    (record,) = records(tmp_path / "folder")
    assert record["rewards"].keys() == {"clip", "jpeg_compressibility"}
    assert record["rewards"]["clip"] >= record["rewards before"]["clip"]


@pytest.mark.slow
def test_two_processes_generate_the_same(generated, tmp_path):
    prompts, whole, _ = generated
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", port, "-m", "noiseopt", *command(prompts, tmp_path / "folder")]
    paths = [str(Path(noiseopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and "wrote 3 of 3 prompts" in done.stdout
    expected = {name: data for name, data in contents(whole).items() if not name.startswith(("index", "a-yellow"))}
    found = contents(tmp_path / "folder")
    found.pop("index.html")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name.endswith(".safetensors"))
    assert len(records(tmp_path / "folder")) == 3
