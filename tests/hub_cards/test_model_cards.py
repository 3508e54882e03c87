"""The cards of the trained models: what they say, what is pushed, and that their programs run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from noiseopt import shapes_world
from noiseopt.cli import main
from noiseopt.hub import build, models
from noiseopt.hub.push import push

PROMPT = "a red circle left of a blue star"
TRAINING = {
    "stages": [
        {"stage": "vae", "samples": 1000, "batch": 16, "seconds": 90.0, "parameters": 366_891, "curve": []},
        {
            "stage": "base",
            "samples": 24_000,
            "batch": 64,
            "seconds": 354.0,
            "parameters": 3_081_096,
            "curve": [{"samples": 6400, "seconds": 90.1, "last": 0.03, "between": 0.12}],
        },
    ],
    "pictures": 30_000,
    "seed": 5,
    "device": "cpu",
    "threads": 2,
    "torch": "2.13.0",
}
METRICS = {
    "prompts": "validation",
    "count": 1700,
    "call": {"num_inference_steps": 6},
    "right": {"all": 0.5, "counting": 0.4},
    "two objects": 0.45,
    "calibration": [{"low": 0.0, "high": 0.1, "mean": 0.03, "count": 812}],
}


@pytest.fixture
def weights(tmp_path) -> Path:
    """A folder of weights: the embedded turbo and clip with records, and guided without."""
    for name in ("turbo", "clip", "guided"):
        shutil.copytree(shapes_world.path(name), tmp_path / "weights" / name)
        for record in ("training.json", "metrics.json", "learning_curve.png", "reliability.png"):
            (tmp_path / "weights" / name / record).unlink(missing_ok=True)
    for name in ("turbo", "clip"):
        (tmp_path / "weights" / name / "training.json").write_text(json.dumps(TRAINING))
        (tmp_path / "weights" / name / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "weights/turbo/learning_curve.png").write_bytes(b"a picture")
    return tmp_path / "weights"


@pytest.fixture
def cards(weights):
    return {card.model: card for card in models.recorded(weights)}


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_model_that_draws_nothing_has_words_of_its_own():
    assert set(models.READERS) == {name for name, model in shapes_world.MODELS.items() if not model.is_pipeline}


def test_only_recorded_models_have_a_card(cards):
    assert list(cards) == ["turbo", "clip"]


def test_every_weight_in_the_repository_has_a_card():
    folders = {path.name for path in (models.WEIGHTS).iterdir()}
    assert folders == {card.model for card in models.recorded()}


@pytest.mark.parametrize(("name", "library"), [("turbo", "diffusers"), ("clip", "transformers")])
def test_front_matter(name, library, cards):
    data = ModelCard(cards[name].files()["README.md"]).data.to_dict()
    task = {"turbo": "text-to-image", "clip": "zero-shot-image-classification"}[name]
    assert set(data.pop("tags")) == {library, "shapes-world", "noise-optimization"}
    assert data == {"library_name": library, "pipeline_tag": task, "license": "apache-2.0"}


def test_card_tells_the_training(cards):
    text = cards["turbo"].files()["README.md"]
    assert "| `vae` | autoencoder, on windows of pictures | 366,891 | 1,000 | 16 | 1.5 |" in text
    assert "| `base` | U-Net of the SD kind, on true captions | 3,081,096 | 24,000 | 64 | 5.9 |" in text
    assert "| all |  |  | 25,000 |  | 7.4 |" in text
    assert "30,000 rendered pictures. Seed 5, device `cpu` with 2 threads, torch 2.13.0." in text
    assert "python -m training.train --output DIR\n" in text


def test_card_tells_the_measurements(cards):
    text = cards["turbo"].files()["README.md"]
    rows = {"prompts": "validation", "count": "1,700", "call: num_inference_steps": "6", "two objects": "0.45"}
    for name, value in {**rows, "right: all": "0.5", "right: counting": "0.4"}.items():
        assert f"\n| {name} | {value} |\n" in text
    calibration = text.partition("Calibration:\n\n")[2].splitlines()
    assert calibration[:3] == [
        "| low | high | mean | count |",
        "| --- | --- | --- | --- |",
        "| 0.0 | 0.1 | 0.03 | 812 |",
    ]


def test_card_shows_the_pictures_that_exist(cards):
    text, other = (cards[name].files()["README.md"] for name in ("turbo", "clip"))
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["learning_curve.png"]
    assert "![" not in other


def test_stages_have_words():
    """All stages that any model of the package went through."""
    from training.export import STAGES_OF

    shipped = [json.loads((card.folder / "training.json").read_text())["stages"] for card in models.recorded()]
    gone_through = {record["stage"] for stages in shipped for record in stages}
    assert {stage for stages in STAGES_OF.values() for stage in stages} | gone_through == set(models.STAGES)


@pytest.mark.parametrize("name", ["turbo", "clip"])
def test_parameters_are_those_of_the_weights(name, weights):
    for path in (weights / name).rglob("*.safetensors"):
        tensors = load_file(path).values()
        assert models.parameters(path) == sum(t.numel() for t in tensors if t.is_floating_point())


def test_parameters_count_no_integers(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.arange(11)}
    save_file(tensors, path, metadata={"format": "pt"})
    assert models.parameters(path) == 3 * 5 + 7


def test_programs_compile_in_every_kind_of_card(cards):
    """Also of the models that are not there: their texts are made from the same templates."""
    for name in models.MODELS:
        twin = models.ModelCard(name, cards["turbo"].weights)
        if twin.model not in cards:
            shutil.copytree(cards["turbo"].folder, twin.folder, dirs_exist_ok=True)
        found = programs(models.readme(twin, "noiseopt"))
        assert len(found) == 2
        for program in found:
            compile(program, name, "exec")
            assert max(map(len, program.splitlines())) <= 120


def test_card_folders_hold_the_readme_only(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "CARDS", ())
    monkeypatch.setattr(build, "BLOCKS", ())
    monkeypatch.setattr(build, "recorded", lambda: models.recorded(weights))
    monkeypatch.setattr(build, "HUB_CARDS", tmp_path / "hub_cards")
    for card in build.all_cards():
        (tmp_path / "hub_cards" / card.name).mkdir(parents=True)
    main(["hub", "build"])
    main(["hub", "check"])
    files = [path.relative_to(tmp_path / "hub_cards") for path in (tmp_path / "hub_cards").rglob("*.*")]
    assert sorted(map(str, files)) == ["shapes-clip/README.md", "shapes-turbo/README.md"]
    (weights / "turbo/metrics.json").write_text(json.dumps({**METRICS, "two objects": 0.46}))
    with pytest.raises(SystemExit, match="1"):
        main(["hub", "check"])
    assert "hub_cards/shapes-turbo/README.md is out of date" in capsys.readouterr().err


@pytest.mark.slow
def test_pushed_models_load_and_run_as_their_cards_say(cards, hub, processes, api, tmp_path):
    """The first program of each card, in one process that sees the loopback Hub only; and `shapes_world.path`."""
    for card in cards.values():
        assert push(card, "noiseopt", api=api).url == f"{hub.url}/noiseopt/{card.name}"
        pushed = {path.relative_to(hub.root / "noiseopt" / card.name).as_posix() for path in folder_files(card, hub)}
        assert pushed == {"README.md", *card.uploads()}
    texts = [(hub.root / "noiseopt" / card.name / "README.md").read_text(encoding="utf-8") for card in cards.values()]
    checks = f"""
import json, pathlib, tempfile
from noiseopt.shapes_world import embedded
embedded.WEIGHTS = pathlib.Path(tempfile.mkdtemp())
downloaded = embedded.path("turbo")
again = DiffusionPipeline.from_pretrained(downloaded, dtype=torch.float32)
settings = dict(num_inference_steps=1, guidance_scale=0.0, output_type="pt", generator=torch.Generator().manual_seed(0))
torch.save(again({PROMPT!r}, **settings).images, "again.pt")
print(json.dumps([downloaded, image.size]))
"""
    run = processes.run("\n".join([*(programs(text)[0] for text in texts), checks]), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    folder, size = json.loads(run.stdout.splitlines()[-1])
    assert size == [128, 128] and (tmp_path / "shapes.png").is_file()
    assert Path(folder).is_relative_to(hub.cache)
    assert {path.name for path in Path(folder).iterdir()} >= {"README.md", "unet", "training.json"}
    pipe = build_pipeline(cards["turbo"].folder)
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
    ours = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images
    # another process may use another number of threads, on which the last digits depend
    torch.testing.assert_close(ours, torch.load(tmp_path / "again.pt"), rtol=0, atol=1e-3)


def folder_files(card, hub):
    return [path for path in (hub.root / "noiseopt" / card.name).rglob("*") if path.is_file()]


def build_pipeline(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_are_nowhere_are_said_to_be(offline, hub, root, tmp_path):
    """In offline mode, and where the Hub has no such repository: the module alone, with no weights beside it."""
    (tmp_path / "alone/shapes_world").mkdir(parents=True)
    for module in ("registry.py", "shapes_world/embedded.py"):
        shutil.copy(root / "src/noiseopt" / module, tmp_path / "alone" / module)
    program = """
from alone.shapes_world import embedded
try:
    embedded.path("sd3")
except FileNotFoundError as error:
    print(error)
"""
    environment = hub.environment | {"PYTHONPATH": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    (message,) = run.stdout.splitlines()
    places = f"in {tmp_path / 'alone/shapes_world/weights/sd3'} or on the Hub as noiseopt/shapes-sd3"
    assert f"Expected the weights of 'sd3' {places}" in message
    assert "use a checkout of the repository" in message and "`hf download noiseopt/shapes-sd3`" in message
    assert bool(hub.requests) != offline
