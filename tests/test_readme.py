"""The README: its examples run, on tiny models in place of the large ones, and its commands are commands."""

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from tiny_pipelines import tiny_pipeline

from noiseopt.cli import build_parser
from noiseopt.pipelines.loop import OptimizationLoop
from noiseopt.rewards import AutoFeatures, AutoReward, CallableReward, TinyImage
from noiseopt.rewards.contract.registry import find_reward
from noiseopt.rewards.features.auto_features import find_features

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAMILIES = {
    "stabilityai/sdxl-turbo": "sdxl",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def smaller(code: str) -> str:
    """Return an example without an accelerator, and with sets of 3 images instead of 16."""
    return code.replace('"cuda"', '"cpu"').replace("=16", "=3").replace(", 16,", ", 3,")


@pytest.fixture
def tiny_models(tmp_path, monkeypatch):
    """Let the models of the README be tiny: pipelines of the same class, and rewards and features of the same name."""
    saved: dict[str, Path] = {}

    def local(name: str) -> str:
        if name not in FAMILIES:
            return name
        family = FAMILIES[name]
        if family not in saved:
            saved[family] = tmp_path / "models" / family
            tiny_pipeline(family).save_pretrained(saved[family])
        return str(saved[family])

    for cls in (DiffusionPipeline, AutoPipelineForText2Image):
        load = cls.from_pretrained.__func__

        def from_pretrained(cls, name, *args, load=load, dtype=None, **kwargs):
            missing = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if FAMILIES.get(name) == "sd3" else {}
            return load(cls, local(name), *args, dtype=torch.float32, **missing, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
    load_reward, load_features = AutoReward.from_pretrained, AutoFeatures.from_pretrained

    def reward(name, **kwargs):
        if find_reward(name) is None:
            return load_reward(name, **kwargs)
        made = CallableReward(lambda images, prompts: images.mean((1, 2, 3)))
        made.name = name
        return made

    def features(name, **kwargs):
        return load_features(name, **kwargs) if find_features(name) is None else TinyImage()

    monkeypatch.setattr(AutoReward, "from_pretrained", staticmethod(reward))
    monkeypatch.setattr(AutoFeatures, "from_pretrained", staticmethod(features))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(OptimizationLoop, "moves_after", lambda loop, step: step < min(1, loop.method.steps - 1))
    (tmp_path / "hub_cards").symlink_to(ROOT / "hub_cards")
    monkeypatch.chdir(tmp_path)


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(smaller(code), "README.md", "exec"), names)


@pytest.mark.slow
def test_the_examples_run(tiny_models):
    """One after the other, as a reader would paste them; only the card's code has rewards that would be downloaded."""
    other = tiny_pipeline("sd")
    names: dict[str, Any] = {"other_pipe": other}
    examples = blocks("python")
    assert len(examples) > 7
    for code in examples:
        downloads = contextlib.nullcontext()
        if "custom_pipeline" in code:
            downloads = pytest.raises(OSError, match="connect|offline|cached")
        with downloads:
            run(code, names)
    assert Path("scooter.safetensors").is_file() and Path("dogs.safetensors").is_file()


@pytest.mark.slow
def test_the_offline_examples_need_nothing(tmp_path, monkeypatch):
    """As they are written, with nothing replaced."""
    monkeypatch.chdir(tmp_path)
    (offline,) = (code for code in blocks("python") if "shapes_world" in code)
    exec(compile(offline, "README.md", "exec"), {})


def test_the_commands_are_accepted():
    found = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in found]
    ours = [words for words in commands if words[:1] == ["noiseopt"]]
    assert len(ours) >= 5
    parser = build_parser()
    for words in ours:
        parser.parse_args(words[1:])
    scripts = re.findall(r"python (benchmarks/\S+\.py|tests/\S+\.py)", README)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_files_and_names_that_the_readme_mentions_exist():
    import noiseopt
    from noiseopt import callbacks, evaluation, pipelines, rewards, schedulers, shapes_world

    paths = re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(r"`((?:benchmarks|tests)/[\w/]+\.\w+)`", README)
    assert len(paths) >= 10 and all((ROOT / path).exists() for path in paths)
    named = re.findall(r"from noiseopt(?:\.\w+)? import ([\w, ]+)", README)
    places = (noiseopt, callbacks, evaluation, pipelines, rewards, schedulers, shapes_world)
    for name in {name.strip() for names in named for name in names.split(",")}:
        assert any(hasattr(place, name) for place in places), name
