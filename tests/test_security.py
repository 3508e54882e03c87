"""Files from strangers: whatever they say, nothing is written, loaded, run or fetched that the user did not name."""

import contextlib
import functools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from noiseopt import NeverTooLate, NoiseResult, ReNO, optimize_noise, shapes_world
from noiseopt.analysis import sampling
from noiseopt.cli import main
from noiseopt.demo import load_pipeline
from noiseopt.evaluation.command import print_problems
from noiseopt.evaluation.prompt_sets import load_prompts
from noiseopt.gallery import page
from noiseopt.generation import ImageFolder, Job
from noiseopt.pipelines.never_too_late.image_set import ImageSet, grow_set

PROMPT = "a red circle left of a blue star"
COLORS = "color_histogram"  # features without weights
ROOT = Path(__file__).parents[1]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    f"os.{what}" for what in ("remove", "rename", "mkdir", "rmdir", "link", "symlink", "chmod", "chown", "truncate")
}
CHANGES |= {"os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen", "pickle.find_class"}
RUNS |= {"socket.connect", "socket.getaddrinfo", "urllib.Request"}
watching: list[list[tuple[str, str]]] = []


def audit(event: str, arguments: tuple) -> None:
    """Record what changes the disk, runs a program or opens a connection, while somebody is watching."""
    if not watching:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and isinstance(path, str | bytes | os.PathLike):
            watching[-1].append((event, os.fsdecode(path)))
    elif event in CHANGES | RUNS:
        first = arguments[0] if arguments else ""
        watching[-1].append((event, os.fsdecode(first) if isinstance(first, str | bytes) else str(arguments)))


sys.addaudithook(audit)


@contextlib.contextmanager
def nothing_happens_outside(folder: Path) -> Iterator[None]:
    """Fail if anything outside `folder` is written, run or connected to, but for caches of Python and matplotlib."""
    watching.append([])
    try:
        yield
    finally:
        seen = watching.pop()
    places = (str(folder), os.devnull)
    outside = [event for event in seen if event[0] in RUNS or not event[1].startswith(places)]
    assert [event for event in outside if "__pycache__" not in event[1] and "matplotlib" not in event[1]] == []


def test_the_watch_sees_what_it_forbids(tmp_path):
    for harm in (
        lambda: (tmp_path / "x").write_text("x"),
        lambda: (tmp_path / "y").mkdir(),
        lambda: os.system("true"),
        lambda: os.open(tmp_path / "x", os.O_RDWR),
    ):
        with pytest.raises(AssertionError), nothing_happens_outside(tmp_path / "inside"):
            harm()
    with nothing_happens_outside(tmp_path / "inside"):
        (tmp_path / "x").read_text()


@pytest.fixture(scope="module")
def asked() -> Iterator[list[str]]:
    """The paths that were requested from a server on this machine; its URL is the first entry."""
    found: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            found.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Answer)
    found.append(f"http://127.0.0.1:{server.server_port}/evil.png")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A result of two steps on the embedded one-step model."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**shapes_world.MODELS["turbo"].call, "generator": torch.Generator().manual_seed(1)}
    result = optimize_noise(pipe, PROMPT, ReNO(rewards="red", steps=2), **call)
    path = tmp_path_factory.mktemp("honest") / "honest.safetensors"
    result.save(path)
    return path


def entry(*path: str, value: Any) -> dict[str, Any]:
    """Return nested dictionaries with one value."""
    found: Any = value
    for name in reversed(path):
        found = {name: found}
    return found


def merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{name: merged(old.get(name), value) for name, value in new.items()}}
    return new


def evil_file(
    honest: Path, path: Path, changes: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write the honest result with other entries in its header, and more tensors."""
    with safe_open(honest, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["noiseopt"])
    save_file({**found, **(tensors or {})}, path, metadata={"noiseopt": json.dumps(merged(header, changes))})
    return path


def argument(name: str, value: Any) -> dict[str, Any]:
    return entry("provenance", "arguments", name, value=value)


def provenance(*path: str, value: Any) -> dict[str, Any]:
    return entry("provenance", *path, value=value)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"
MARKUP = "</td><script>alert(1)</script>![x](http://evil/x.png)|`a`|$\\frac{$"
REFUSED_ARGUMENT = "but the file has others: "
# case: what the file says, and what `--draw` with a model that the user named answers; None draws the images
HOSTILE: dict[str, tuple[dict[str, Any], str | None]] = {
    "a file to write": (argument("save_noise_to", "{victim}"), f"{REFUSED_ARGUMENT}.'save_noise_to'"),
    "a file in a new folder": (argument("save_noise_to", "{folder}/new/deep/file"), REFUSED_ARGUMENT),
    "a callback": (argument("callbacks", ["os.system"]), f"{REFUSED_ARGUMENT}.'callbacks'"),
    "a callback of the pipeline": (argument("callback_on_step_end", "os.system"), None),  # not handed on
    "settings of a method": (argument("method_kwargs", {"decoder": "{folder}"}), f"{REFUSED_ARGUMENT}.'method_kwargs'"),
    "a noise sampler": (argument("noise_sampler", "{folder}"), f"{REFUSED_ARGUMENT}.'noise_sampler'"),
    "a method": (argument("method", "reno"), f"{REFUSED_ARGUMENT}.'method'"),
    "a pipeline": (argument("pipe", "{folder}"), f"{REFUSED_ARGUMENT}.'pipe'"),
    "a picture to fetch": (argument("ip_adapter_image", "{url}"), f"{REFUSED_ARGUMENT}.'ip_adapter_image'"),
    "an argument of another call": (argument("image", "{url}"), f"{REFUSED_ARGUMENT}.'image'"),
    "code as timesteps": (argument("timesteps", ["__import__('os').system('touch {victim}')"]), REFUSED_ARGUMENT),
    "keyword arguments": (argument("cross_attention_kwargs", {"scale": "{victim}"}), REFUSED_ARGUMENT),
    "steps without end": (argument("num_inference_steps", 10**12), f"{REFUSED_ARGUMENT}.'num_inference_steps'"),
    "a side without end": (argument("height", 2**40), f"{REFUSED_ARGUMENT}.'height'"),
    "a number beyond all": (argument("guidance_scale", 10**4000), f"{REFUSED_ARGUMENT}.'guidance_scale'"),
    "a million sigmas": (argument("sigmas", [1.0] * 100_000), f"{REFUSED_ARGUMENT}.'sigmas'"),
    "a model that is a folder": (provenance("model", value="{folder}"), "Expected `--model`"),
    "a model that is a URL": (provenance("model", value="{url}"), "Expected `--model`"),
    "a model on the Hub": (provenance("model", value="evil/model"), "Expected `--model`.*'evil/model'"),
    "a model that climbs": (provenance("model", value="../../../{folder}"), "Expected `--model`"),
    "a model of an own account": (provenance("model", value="evil-noiseopt/shapes-turbo"), "Expected `--model`"),
    "a revision": (provenance("revision", value="refs/pr/1"), None),  # of a local folder
    "another pipeline": (provenance("pipeline", value="StableDiffusionXLPipeline"), "Expected a StableDiffusionXLPipe"),
    "a pipeline that is a function": (provenance("pipeline", value="optimize_noise"), "Expected a optimize_noise"),
    "a pipeline that is a path": (provenance("pipeline", value="../x"), "provenance whose pipeline"),
    "a scheduler that is a path": (provenance("scheduler", "class", value="../x"), "provenance whose scheduler"),
    "a scheduler that is a pipeline": (provenance("scheduler", "class", value="DiffusionPipeline"), "Expected a sched"),
    "a scheduler without end": (provenance("scheduler", "num_train_timesteps", value=10**12), "num_train_timesteps"),
    "a scheduler with code": (provenance("scheduler", "trained_betas", value={"x": "{victim}"}), "trained_betas"),
    "a scheduler with an unknown setting": (provenance("scheduler", "path", value="{victim}"), None),  # not handed on
    "a decoder": (provenance("decoder", value={"class": "AutoencoderTiny", "name": "{folder}"}), None),
    "a dtype that is a function": (provenance("dtype", value="load"), "provenance whose dtype"),
    "adapters": (provenance("adapters", value={"unet": {"{victim}": {"weight": 1.0}}}), "adapters .* was"),
    "what was not recorded": (provenance("unrecorded", value=["{victim}"]), "which are not stored"),
    "settings": (provenance("settings", value={"decoder": "{folder}", "rewards": "{url}"}), None),
    "reports": (entry("reports", value={"full_decoder": "{victim}", "held out x": {"best": "{url}"}}), None),
    "escapes in the model": (provenance("model", value=f"x{ESCAPE}"), "Expected `--model`"),
    "escapes in the method": (provenance("method", value=f"x{ESCAPE}"), "provenance whose method"),
    "escapes in the prompt": (provenance("prompts", value=[f"a red circle {ESCAPE}"]), None),
    "escapes in an argument": (argument(ESCAPE, 1), REFUSED_ARGUMENT),
    "markup in the model": (provenance("model", value=MARKUP), "Expected `--model`"),
    "markup in the method": (provenance("method", value=MARKUP), "provenance whose method"),
    "markup in the prompt": (provenance("prompts", value=[MARKUP]), None),
    "half a character": (provenance("model", value="\ud800"), "Expected `--model`"),
}


def filled(value: Any, texts: dict[str, str]) -> Any:
    """Return nested values with the places of the test in their texts and names."""
    if isinstance(value, dict):
        return {filled(name, texts): filled(each, texts) for name, each in value.items()}
    if isinstance(value, list) and len(value) < 100:
        return [filled(each, texts) for each in value]
    if isinstance(value, str):
        for name, text in texts.items():
            value = value.replace(f"{{{name}}}", text)
    return value


class Scene:
    """A folder with a file of the user, a model with code in it, and an evil result."""

    def __init__(self, home: Path, honest: Path, url: str, case: str) -> None:
        self.home, self.output = home, home / "output"
        self.victim, self.model = home / "victim", home / "model"
        self.victim.write_text("precious")
        self.model.mkdir()
        (self.model / "model_index.json").write_text('{"_class_name": ["pipeline", "Evil"]}')
        (self.model / "pipeline.py").write_text(f"open({str(self.victim)!r}, 'w')")
        texts = {"victim": str(self.victim), "folder": str(self.model), "url": url}
        self.file = evil_file(honest, home / "evil.safetensors", filled(HOSTILE[case][0], texts))
        self.before = self.content()

    def content(self) -> dict[str, bytes]:
        """Return all files but those of the output folder."""
        paths = (path for path in self.home.rglob("*") if not path.is_relative_to(self.output))
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture(params=HOSTILE)
def scene(request, tmp_path, honest, asked, monkeypatch) -> Iterator[Scene]:
    """A hostile file, whose readers change nothing outside the output folder, ask no server, and take no time."""
    monkeypatch.chdir(tmp_path)
    found, seen, start = Scene(tmp_path, honest, asked[0], request.param), len(asked), time.perf_counter()
    with nothing_happens_outside(found.output):
        yield found
    assert found.content() == found.before and len(asked) == seen
    assert time.perf_counter() - start < 20


def told(arguments: list[str], capsys) -> str:
    """Return what a command printed and the message it ended with: short, and without control characters."""
    message = ""
    try:
        main(arguments)
    except SystemExit as error:
        message = str(error.code)
    printed = capsys.readouterr()
    text = printed.out + printed.err + message
    assert "\n" not in message and len(message) < 5000
    assert all(each.isprintable() or each == "\n" for each in text), text
    return text


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.mark.parametrize("named", [False, True], ids=["as the file says", "with a model of the user"])
def test_a_hostile_file_changes_nothing_when_its_images_are_drawn(scene, request, named, capsys, monkeypatch):
    """The figures are those of `test_tables_and_figures_of_hostile_files_are_text`."""
    monkeypatch.setattr("noiseopt.analysis.figures.draw_analyses", lambda *_: [])
    monkeypatch.setattr(sampling, "load_pipeline", loaded_once)
    answer = HOSTILE[request.node.callspec.params["scene"]][1]
    model = ["--model", shapes_world.path("turbo")] * named
    text = told(["analyze", str(scene.file), "--draw", "--output", str(scene.output), *model], capsys)
    assert re.search(answer or "L2: initial noise, its image", text)


loaded_once = functools.cache(sampling.load_pipeline)


def test_a_hostile_file_is_read_without_harm(scene, pipe):
    with contextlib.suppress(ValueError):
        found = NoiseResult.load(scene.file)
        assert repr(found).isprintable() and found.generator() is not None
        assert all(each.isprintable() for each in found.differences(pipe))


EVIL_RECORD = {"prompt": f"a{ESCAPE}", "settings": {"model": ESCAPE * 1000, "method": "{victim}"}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"values": [{ESCAPE: 1.0, "x" * 10_000: 2.0}]},
        {"seeds": [1] * 2, "values": [{}] * 2},
        {"seeds": ["{victim}"]},
        {"seeds": list(range(10**6)), "values": [{}] * 10**6},
        {"settings": [[]] * 6_000_000},
        {"values": [{"x": {"y": "z"}}]},
        {ESCAPE: "x"},
    ],
    ids=["settings", "names of values", "two images", "seeds that are text", "a million", "lists", "values", "keys"],
)
def test_a_folder_of_a_stranger_is_written_to_only_if_its_set_is_the_one_asked_for(changes, honest, pipe, tmp_path):
    """Its record names settings that nobody asked for, and its second picture is a link to a file of the user."""
    victim, folder = tmp_path / "victim", tmp_path / "set"
    victim.write_text("precious")
    folder.mkdir()
    shutil.copy(honest, folder / "image_000.safetensors")
    Image.new("RGB", (shapes_world.SIZE, shapes_world.SIZE)).save(folder / "image_000.png")
    (folder / "image_001.png").symlink_to(victim)
    record = {"format": "noiseopt-image-set-1", **EVIL_RECORD, "seeds": [1], "values": [{}], **changes}
    (folder / "image_set.json").write_text(json.dumps(record))
    before, start = {path: path.read_bytes() for path in folder.iterdir()}, time.perf_counter()
    with nothing_happens_outside(folder):
        with contextlib.suppress(ValueError):
            assert repr(ImageSet.load(folder)).isprintable()
        with pytest.raises(ValueError, match="cannot be used|other settings") as error:
            grow_set(pipe, "a", 2, NeverTooLate(diversity={"dpp": (COLORS, 1.0)}), folder=folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 10_000
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and (folder / "image_001.png").is_symlink()
    assert time.perf_counter() - start < 10


def test_a_hostile_file_is_continued_only_with_the_call_of_the_user(scene, pipe):
    """A complete one is returned, with what it says as text; one of another call is refused."""
    call = {**shapes_world.MODELS["turbo"].call, "generator": torch.Generator().manual_seed(1)}
    with contextlib.suppress(ValueError):
        known = optimize_noise(pipe, PROMPT, ReNO(rewards="red", steps=2), resume_from=scene.file, **call)
        assert repr(known).isprintable() and len(known.losses) == 2
    with pytest.raises(ValueError, match="Expected") as error:
        optimize_noise(pipe, PROMPT, ReNO(rewards="red", steps=3), resume_from=scene.file, **call)
    assert str(error.value).isprintable()


def test_a_set_is_not_written_through_a_link(honest, pipe, tmp_path):
    """A folder with the settings that are asked for, in which the next picture is a link to a file of the user."""
    victim, folder = tmp_path / "victim", tmp_path / "set"
    victim.write_text("precious")
    call = dict(shapes_world.MODELS["turbo"].call)
    method = NeverTooLate(diversity={"dpp": (COLORS, 1.0)}, steps=1)
    first = grow_set(pipe, "a red circle", 1, method, generator=1, folder=folder, **call)
    (folder / "image_001.png").symlink_to(victim)
    (folder / "image_001.safetensors").symlink_to(victim)
    assert len(grow_set(pipe, "a red circle", 2, method, generator=1, folder=folder, **call)) == 2
    assert len(first) == 1 and victim.read_text() == "precious" and len(ImageSet.load(folder)) == 2


def test_tables_and_figures_of_hostile_files_are_text(honest, tmp_path, capsys):
    """All files that can be read, one group for each name of a model: without HTML, links, pictures and formulas."""
    files, victim = tmp_path / f"files{ESCAPE}", tmp_path / "victim"
    files.mkdir()
    texts = {"victim": str(victim), "folder": str(tmp_path), "url": "http://127.0.0.1:1"}
    for number, (changes, _) in enumerate(HOSTILE.values()):
        path = evil_file(honest, files / f"{number}.safetensors", filled(changes, texts), {f"scores.{MARKUP}": rows(2)})
        try:
            NoiseResult.load(path)
        except ValueError:
            path.unlink()
    assert len(list(files.iterdir())) > len(HOSTILE) / 2
    with nothing_happens_outside(tmp_path / "out"):
        text = told(["analyze", str(files), "--output", str(tmp_path / "out")], capsys)
    table = (tmp_path / "out/table.md").read_text()
    assert table in text and r"\$\\frac{\$" in table
    page = MarkdownIt("commonmark").enable("table").render(table)
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert "evil-noiseopt" not in page and "shapes-turbo" in page
    with Image.open(tmp_path / "out/bands.png") as picture:
        assert picture.width > 500


def rows(steps: int) -> torch.Tensor:
    return torch.zeros(steps, 1)


def test_names_of_files_and_entries_of_prompt_files_are_printed_as_text(tmp_path, capsys):
    """The name of a picture, that of a prompt file, its categories, and an entry that is none."""
    pictures = tmp_path / f"pictures{ESCAPE[:-1]}"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / f"one{ESCAPE[:-1]}.png")
    assert r"one\x1b]0;owned" in told(["score", str(pictures), "--reward", "red"], capsys)
    (pictures / "broken.png").write_bytes(b"x")
    assert r"pictures\x1b]0;owned" in told(["score", str(pictures), "--reward", "red"], capsys)
    prompts = tmp_path / f"prompts{ESCAPE[:-1]}.jsonl"
    entries = [{"prompt": "a red circle", "category": ESCAPE}, {"prompt": " "}, {ESCAPE: 1}]
    prompts.write_text("".join(json.dumps(each) + "\n" for each in entries))
    found = load_prompts(str(prompts))
    assert found.name.isprintable() and all((each.category or "").isprintable() for each in found.prompts)
    print_problems(found.problems)
    text = told(["evaluate", "--prompts", str(prompts), "--format", "coco", "--output", str(tmp_path / "o")], capsys)
    assert "Skipped: " in text and "Expected" in text


def test_a_record_of_generated_images_counts_only_if_it_is_whole(tmp_path):
    """Missing and foreign images are generated anew; the page of the folder shows files of the folder alone."""
    job, folder = Job("a red circle", 0, (1, 2), "prompt 1"), ImageFolder(tmp_path)
    rewards = {"red": [0.5, None]}
    whole = {"prompt": job.prompt, "seeds": [1, 2], **folder.files(job), "rewards before": rewards, "rewards": rewards}
    folder.record_path(job).parent.mkdir()

    def known(record: Any) -> bool:
        folder.record_path(job).write_text(json.dumps(record))
        return folder.record(job) is not None

    assert (
        known(whole) and "<img" in page([whole], "x") and known({"prompt": job.prompt, "seeds": [1, 2], "error": "x"})
    )
    for name in whole:
        assert not known({key: value for key, value in whole.items() if key != name})
    for changes in (
        {"images": ["http://evil/x.png"] * 2},
        {"before": ["../../../x.png"] * 2},
        {"noise": "/x"},
        {"rewards": {"red": [0.5]}},
        {"rewards": {"red": ["x", "y"]}},
        {"rewards": []},
        {"error": ["x"]},
    ):
        assert not known({**whole, **changes})


def test_a_model_with_code_is_not_run_although_it_is_named(honest, tmp_path, capsys):
    """diffusers asks for `trust_remote_code`, which no option gives."""
    model = tmp_path / "turbo"
    shutil.copytree(shapes_world.path("turbo"), model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Evil"]}))
    (model / "pipeline.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    text = told(["analyze", str(honest), "--draw", "--model", str(model), "--output", str(tmp_path / "out")], capsys)
    assert "Cannot sample the images of" in text and not (tmp_path / "harm").exists()


def test_every_line_of_the_policy_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`?(?:::|, )`?(test_\w+)`", text)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
