"""The command line: the output of `noiseopt demo`, and its errors."""

import argparse
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import matplotlib
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

import noiseopt
from noiseopt import NoiseResult, plots, shapes_world
from noiseopt.cli import build_parser, main
from noiseopt.demo import ONE_STEP, load_pipeline, optimize_and_judge
from noiseopt.evaluation.metrics import layout_spread
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.registry import METHODS, list_methods
from noiseopt.pipelines.sampling.sampler import Gradient
from noiseopt.quiet import quiet_libraries
from noiseopt.shapes_world import embedded
from noiseopt.story import DEFAULT_PROMPTS, RECIPES, SET, Choice

PROMPT = "a red circle left of a blue star"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a short demo, and the printed text."""
    folder, printed = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["demo", "--steps", "2", "--seed", "3", "--prompt", PROMPT, "--output", str(folder)])
    return folder, printed.getvalue()


def test_demo_says_what_happened(demo):
    folder, printed = demo
    assert PROMPT in printed and "ReNO on sdxl-turbo, the one-step student of the SDXL kind" in printed
    assert len([line for line in printed.splitlines() if line.startswith(PROMPT)]) == 1
    assert "judge: " in printed and " of 1 right → " in printed
    for name in ("before_after.png", "trajectory.png", "noise.safetensors"):
        assert (folder / name).is_file() and f"wrote {folder / name}" in printed


@pytest.mark.parametrize("name", ["before_after.png", "trajectory.png"])
def test_demo_draws(demo, name):
    with Image.open(demo[0] / name) as picture:
        assert plots.WIDTH / 2 <= picture.width / plots.DPI <= plots.WIDTH
        assert picture.width / 5 < picture.height < picture.width * 2
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 50


def test_demo_saves_a_noise_that_draws_its_image(demo):
    result = NoiseResult.load(demo[0] / "noise.safetensors")
    assert result.provenance["prompts"] == [PROMPT] and result.provenance["seeds"] == [3]
    assert result.losses.shape == (2, 1)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt", **ONE_STEP).images
    found = pipe(PROMPT, latents=result.latents, output_type="pt", **ONE_STEP).images
    assert found.shape == (1, 3, 64, 64)
    assert torch.equal(found, plain) == (result.best_step.item() == 0)


def test_demo_of_another_method_and_model(tmp_path, capsys):
    arguments = ["demo", "--method", "best_of_n", "--model", "guided", "--steps", "2", "--prompt", PROMPT]
    main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "BestOfN on guided, the guided model of the SD kind" in printed and "ReNO" not in printed
    result = NoiseResult.load(tmp_path / "noise.safetensors")
    assert result.provenance["method"] == "BestOfN" and result.losses.shape == (2, 1)
    assert result.provenance["arguments"]["num_inference_steps"] == 6


@pytest.mark.slow
def test_demo_of_a_method_of_sets_with_rewards(tmp_path, capsys):
    main(["demo", "--method", "never_too_late", "--steps", "3", "--prompt", PROMPT, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{SET} images of 1 prompt, 3 steps" in printed and "NeverTooLate(learning_rate=35.0, " in printed
    assert f" of {SET} right → " in printed and "from its mean position" in printed
    result = NoiseResult.load(tmp_path / "noise.safetensors")
    assert result.provenance["objective"]["diversity"] == {"dpp": {"features": "dinov2", "weight": 72.0}}
    assert result.losses.shape == (3, SET) and result.best_scores["dpp"][0] > result.initial_scores["dpp"][0]
    assert {Path(path).name for path in Choice.of("never_too_late").weights()} == {"turbo", "clip", "dinov2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbors(NoiseOptimizer):
    """Mixes the noises of a set without evaluating images, and returns the last."""

    steps: int = 3
    gradient: Gradient = None
    returns: ClassVar = "last"

    def objective(self, pipe):
        return FunctionObjective(lambda sample: sample.x0.flatten(1).std(1))

    def step(self, run, gradient, state):
        return 0.8 * run.noise + 0.6 * run.noise.roll(1, 0)


@pytest.fixture
def neighbors(monkeypatch):
    monkeypatch.setitem(METHODS.entries, "neighbors", Neighbors)


def test_method_without_rewards_gets_sets(neighbors):
    """Images that the method did not sample are those of the stock pipeline from its noise."""
    prompts = [PROMPT, "two green circles"]
    story = optimize_and_judge(Choice.of("neighbors"), prompts, seed=3)
    assert story.prompts == [PROMPT] * SET + ["two green circles"] * SET
    assert story.images.shape == (3, 2 * SET, 3, 64, 64) and len(story.results) == 2
    assert story.measure == "layout" and story.values.shape == (3, 2)
    assert story.value(0, 1) == layout_spread(story.end_images(1)[:SET], PROMPT)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**ONE_STEP, "num_images_per_prompt": SET, "output_type": "pt"}
    for number, (prompt, result) in enumerate(zip(prompts, story.results, strict=True)):
        seeds = list(range(3 + SET * number, 3 + SET * (number + 1)))
        assert result.provenance["prompts"] == [prompt] * SET and result.provenance["seeds"] == seeds
        plain = pipe(prompt, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call).images
        found = pipe(prompt, latents=result.latents, **call).images
        ours = slice(SET * number, SET * (number + 1))
        assert torch.equal(story.end_images(0)[ours], plain) and torch.equal(story.end_images(1)[ours], found)


def test_ctrl_c_ends_the_demo_without_a_traceback(neighbors, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    monkeypatch.setattr(Neighbors, "step", lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--method", "neighbors", "--prompt", PROMPT, "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and ended.value.__suppress_context__


@pytest.mark.slow
def test_demo_of_sets(neighbors, tmp_path, capsys):
    main(["demo", "--method", "neighbors", "--prompt", PROMPT, "--prompt", PROMPT, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{SET} images of 2 prompts, 3 steps" in printed and "Neighbors on turbo" in printed
    assert f" of {2 * SET} right → " in printed and "from its mean position" in printed
    names = {"before_after.png", "trajectory.png", "noise_1.safetensors", "noise_2.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("method", sorted(RECIPES.keys() | set(list_methods())))
def test_the_method_of_each_recipe_can_be_built(method):
    choice = Choice.of(method)
    assert choice.build().steps == choice.steps


def test_an_evaluation_of_what_was_chosen_is_no_step():
    story = optimize_and_judge(Choice.of("group_selection", steps=4), [PROMPT], seed=0)
    assert len(story.images) == 5 and story.steps == 4


@pytest.mark.parametrize(
    ("method", "model", "asked", "steps"),
    [
        ("reno", "turbo", None, 50),
        ("reno", "guided", None, 20),
        ("neighbors", "turbo", None, 3),
        ("reno", "sd3", 30, 30),
        ("reno:steps=7", "turbo", None, 7),
        ("reno:steps=7", "turbo", 3, 3),
        ("never_too_late", "turbo", None, 10),
        ("reno:budget=6", "turbo", None, 6),
        ("reno:budget=6s", "turbo", None, None),
        ("reno:budget=6s", "turbo", 3, 3),
    ],
)
def test_default_steps_suit_method_and_model(method, model, asked, steps, neighbors):
    assert Choice.of(method, model, asked).steps == steps


def test_demo_in_a_time(tmp_path, capsys):
    main(["demo", "--method", "best_of_n:budget=300ms", "--prompt", PROMPT, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 prompt, 300ms, seed 0: BestOfN on turbo" in printed and "of 1 right → " in printed


def test_weights_that_are_nowhere_are_said_before_anything_runs(monkeypatch, tmp_path):
    def offline(repository):
        raise ConnectionError(f"no way to {repository}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    with pytest.raises(SystemExit, match="weights of 'sdxl' .*: no way to noiseopt/shapes-sdxl. .* use a checkout"):
        main(["demo", "--model", "sdxl", "--output", str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    main(["demo", "--steps", "1", "--output", str(tmp_path)])
    assert dict(matplotlib.rcParams) == before


def test_default_prompts_are_the_first_of_the_validation_split():
    categories = [shapes_world.category(prompt) for prompt in DEFAULT_PROMPTS]
    assert categories == ["position"] * 4 + ["binding"] * 2 + ["counting"] * 2
    for category in set(categories):
        split = [prompt for prompt in shapes_world.VALIDATION_PROMPTS if shapes_world.category(prompt) == category]
        ours = [prompt for prompt in DEFAULT_PROMPTS if shapes_world.category(prompt) == category]
        assert ours == split[: len(ours)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--steps", "0"], "Expected an integer of 1 or more, but got '0'"),
        (["demo", "--steps", "many"], "Expected an integer of 1 or more, but got 'many'"),
        (["demo", "--seed", str(2**62)], f"Expected an integer below 2**62 = {2**62}, but got '{2**62}'"),
        (["demo", "--seed", "-1"], "Expected an integer of 0 or more, but got '-1'"),
        (["demo", "--prompt", "a cat on a mat"], "It can draw 'a red circle'"),
        (["demo", "--method", "magic"], "Expected a method out of best_of_n, "),
        (["demo", "--method", "rnoe"], "Did you mean 'reno'?"),
        (["demo", "--method", "reno:step=3"], "Did you mean 'steps'"),
        (["demo", "--method", "cads"], "Expected a method that optimizes noise"),
        (["demo", "--model", "clip"], "Expected a model out of turbo, guided, sdxl, sdxl-turbo, sd3, a Hub id"),
        (["demo", "--model", "trubo"], "Did you mean 'turbo'"),
        (["demo", "--model", "stabilityai/sdxl-turbo"], "Expected an embedded model, but got 'stabilityai/sdxl-turbo'"),
    ],
)
def test_bad_arguments_are_refused(arguments, expected, capsys):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    message = capsys.readouterr().err
    assert refused.value.code == 2
    assert expected in message and "Traceback" not in message


def parsers(parser: argparse.ArgumentParser, name: str = "noiseopt") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the parser of every command and action, by what one types."""
    yield name, parser
    for action in parser._actions:
        for word, other in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            yield from parsers(other, f"{name} {word}")


def test_every_command_shows_an_example_that_it_accepts():
    parser = build_parser()
    for name, each in parsers(parser):
        _, _, found = each.format_help().partition("example")
        lines = found.partition("\n")[2].replace("\\\n", " ").splitlines()
        commands = [part for line in lines if line for part in line.split("&&")]
        assert commands, name
        for command in commands:
            words = shlex.split(command)
            assert words[0] == "noiseopt"
            if "--help" not in words:
                parser.parse_args(words[1:])


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"noiseopt {noiseopt.__version__}\n"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell with the command, buffered as a shell runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = command.replace("noiseopt", f"{shlex.quote(sys.executable)} -m noiseopt")
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("command", ["noiseopt rewards", "noiseopt rewards --json", "noiseopt --help"])
def test_output_that_cannot_be_written(command):
    gone = shell(f"{command} | head -c 5; exit ${{PIPESTATUS[0]}}")
    assert len(gone.stdout) == 5 and gone.stderr == ""
    full = shell(f"{command} > /dev/full")
    assert full.returncode == 1 and full.stderr == "noiseopt: [Errno 28] No space left on device\n"


def test_rewards_are_listed_without_the_libraries():
    """So that they are there in a fraction of a second."""
    slow = {"torch", "diffusers", "transformers", "numpy"}
    code = f"import sys; from noiseopt.cli import main; main(['rewards']); assert not {slow} & sys.modules.keys()"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr


def test_missing_matplotlib_is_said_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install noiseopt\[plots\]"):
        main(["demo", "--output", str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="Expected a folder to write to"):
        main(["demo", "--output", str(tmp_path / "file")])


def test_quiet_libraries_restores_them():
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with pytest.raises(RuntimeError), quiet_libraries():
        assert not any(library.is_progress_bar_enabled() for library in libraries)
        raise RuntimeError
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before


@pytest.mark.parametrize(("landmarks", "steps", "count"), [({0}, 1, 9), ({0, 3}, 5, 9), ({0, 17, 42}, 50, 9)])
def test_film_steps_hold_the_landmarks(landmarks, steps, count):
    chosen = plots.film_steps(landmarks, steps, count)
    assert landmarks <= set(chosen) <= set(range(steps))
    assert chosen == sorted(chosen) and len(chosen) == min(count, steps)


def test_titles_are_wrapped_evenly():
    assert plots.wrapped("two green circles") == ["two green circles"]
    assert plots.wrapped("a cyan square below a red cross") == ["a cyan square", "below a red cross"]
