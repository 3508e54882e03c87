"""The command line: the output of `noiseopt demo`, and its errors."""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import matplotlib
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import noiseopt
from noiseopt import NoiseResult, plots, recipes, shapes_world
from noiseopt.arguments import progress_line
from noiseopt.cli import build_parser, main
from noiseopt.demo import following, load_pipeline, optimize_and_judge, summary
from noiseopt.evaluation.metrics import mean_pairwise_similarity
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.registry import METHODS, list_methods
from noiseopt.pipelines.sampling.sampler import Gradient
from noiseopt.quiet import quiet_libraries
from noiseopt.shapes_world import embedded
from noiseopt.story import DEFAULT_PROMPTS, RECIPES, SET, Choice, Story, decimal

PROMPT = "a red circle left of a blue star"


class Terminal(io.StringIO):
    """A terminal, as far as progress bars ask."""

    def isatty(self) -> bool:
        return True


def eager(line: tqdm) -> tqdm:
    """Let a bar show each of its ticks."""
    line.mininterval, line.miniters, line.dynamic_miniters = 0, 0, False
    return line


def ticks(shown: str) -> list[tuple[int, int]]:
    """Return the counts and totals that a bar showed, each once."""
    return list(dict.fromkeys((int(count), int(total)) for count, total in re.findall(r"\| (\d+)/(\d+) \[", shown)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, str]:
    """The output folder of a short demo, the printed text, and what the progress bar showed."""
    folder, printed, shown = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO(), Terminal()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(shown):
        patch.setattr("noiseopt.cli.progress_line", lambda: eager(progress_line()))
        main(["demo", "--steps", "2", "--seed", "3", "--prompt", PROMPT, "--output", str(folder)])
    return folder, printed.getvalue(), shown.getvalue()


def test_demo_says_what_happens(demo):
    folder, printed, _ = demo
    first, *lines, last = printed.splitlines()
    assert first.startswith("ReNO on turbo, the one-step student of the SD kind: 1 prompt, seed 3, 2 steps up ")
    assert re.search(r", about \d+ s on two idle cores\.$", first)
    assert len([line for line in lines if line.startswith(PROMPT)]) == 1
    assert any(re.fullmatch(r"right [01] → [01] of 1, in \d+ s", line) for line in lines)
    names = "before_after.png, trajectory.png, noise.safetensors"
    assert last == f"{folder}: {names}. Next: noiseopt demo --method cno"
    assert {path.name for path in folder.iterdir()} == set(names.split(", "))


def test_demo_shows_one_bar(demo):
    """It is there before the libraries are imported, counts every step, and shows the unit of the summary."""
    _, printed, shown = demo
    assert shown.lstrip("\r").startswith("Loading ...")
    assert ticks(shown) == [(0, 2), (1, 2), (2, 2)]
    (after,) = re.findall(r"^right [01] → ([01]) of 1,", printed, re.MULTILINE)
    assert re.findall(r"right [01] of 1", shown)[-1] == f"right {after} of 1"


def test_the_bar_needs_a_terminal():
    for file, there in ((Terminal(), True), (io.StringIO(), False)):
        with contextlib.redirect_stderr(file), progress_line():
            pass
        assert bool(file.getvalue()) == there


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
    pipe, call = load_pipeline("turbo"), shapes_world.MODELS["turbo"].call
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt", **call).images
    found = pipe(PROMPT, latents=result.latents, output_type="pt", **call).images
    assert torch.equal(found, plain) == (result.best_step.item() == 0)


def test_demo_of_another_method_and_model(tmp_path, capsys):
    arguments = ["demo", "--method", "best_of_n", "--model", "guided", "--steps", "2", "--prompt", PROMPT]
    main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "BestOfN on guided, the guided model of the SD kind" in printed and "ReNO" not in printed
    result = NoiseResult.load(tmp_path / "noise.safetensors")
    assert result.provenance["method"] == "BestOfN" and result.losses.shape == (2, 1)
    call = shapes_world.MODELS["guided"].call
    assert call.items() <= result.provenance["arguments"].items()


def test_noise_diffusion_is_told_by_its_own_scorer():
    """P(yes) is the answer of the embedded vision-language model to the returned image."""
    with pytest.warns(UserWarning, match="single denoising step"):
        story = optimize_and_judge(Choice.of("noise_diffusion", "turbo", 2), [PROMPT], seed=0)
    pipe, scorer = load_pipeline("turbo"), shapes_world.load("vqa")
    pipe.set_progress_bar_config(disable=True)
    call = {"output_type": "pt", **shapes_world.MODELS["turbo"].call}
    images = [pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images]
    images.append(pipe(PROMPT, latents=story.results[0].latents, **call).images)
    before, after = (decimal(float(scorer(image, PROMPT)), 2) for image in images)
    right = [int(shapes_world.judge(image, PROMPT)[0].correct) for image in images]
    assert summary(story).startswith(f"P(yes) {before} → {after}, right {right[0]} → {right[1]} of 1, in ")


@pytest.mark.slow
def test_demo_of_a_method_of_sets_with_rewards(tmp_path, capsys):
    main(["demo", "--method", "never_too_late", "--steps", "3", "--prompt", PROMPT, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{SET} images of 1 prompt, seed 0, 3 steps toward images that differ" in printed
    assert f" of {SET}, Vendi " in printed and "in held-out features (dinov2)" in printed
    result = NoiseResult.load(tmp_path / "noise.safetensors")
    assert result.provenance["objective"]["diversity"]["pairwise"]["features"] == "tiny_image"
    assert result.losses.shape == (3, SET) and result.reports["search"]["noises"] == 2
    assert result.losses[2, 0] < result.losses[:2, 0].min()  # the set that the search chose
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
    prompts, shown = [PROMPT, "two green circles"], Terminal()
    bar = eager(tqdm(file=shown, leave=False))
    story = optimize_and_judge(Choice.of("neighbors"), prompts, 3, bar)
    assert story.prompts == [PROMPT] * SET + ["two green circles"] * SET
    assert story.images.shape[:2] == (4, 2 * SET) and len(story.results) == 2 and story.steps == 3
    assert ticks(shown.getvalue()) == [(step, 8) for step in range(9)]
    assert story.choice.measure == "diversity" and story.values.shape == (4, 2)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**shapes_world.MODELS["turbo"].call, "num_images_per_prompt": SET, "output_type": "pt"}
    for number, (prompt, result) in enumerate(zip(prompts, story.results, strict=True)):
        seeds = list(range(3 + SET * number, 3 + SET * (number + 1)))
        assert result.provenance["prompts"] == [prompt] * SET and result.provenance["seeds"] == seeds
        plain = pipe(prompt, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call).images
        found = pipe(prompt, latents=result.latents, **call).images
        ours = slice(SET * number, SET * (number + 1))
        assert torch.equal(story.end_images(0)[ours], plain) and torch.equal(story.end_images(1)[ours], found)
    measured = [mean_pairwise_similarity(story.features[-1, rows.start : rows.stop]) for rows in story.sets]
    assert story.mean(story.value, 1) == pytest.approx(1 - float(sum(measured)) / 2)
    assert (
        re.findall(r"diversity \S+(?=\])", shown.getvalue())[-1]
        == f"diversity {decimal(1 - float(sum(measured)) / 2, 3)}"
    )
    with torch.no_grad():
        features = shapes_world.load("dinov2")(story.end_images(1))
    torch.testing.assert_close(story.features[-1], features)


def test_measures_of_a_set():
    """Before, four images alike; after, two pairs alike whose features are orthogonal: 4 of 6 pairs, and 2 images."""
    choice = Choice.of("cno", "turbo")
    alike, pairs = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    verdicts = [[shapes_world.Verdict(right, right, 1.0, None, "")] * 4 for right in (False, True)]
    features, images = torch.stack([alike, pairs]), torch.zeros(2, 4, 3, 64, 64)
    story = Story(choice, [PROMPT] * 4, [], images, verdicts, features)
    assert [story.value(0, end) for end in (0, 1)] == pytest.approx([0, 4 / 6])
    assert [story.vendi(0, end) for end in (0, 1)] == pytest.approx([1, 2])
    assert story.headline == "diversity .000 → .667, right 0 → 4 of 4" and story.change(story.layout, 1) == "– → –"
    assert story.right_so_far == [0, 4]


def test_best_so_far():
    """Two images: the judge's verdict is that of the highest reward so far, not of each step."""
    losses = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -5.0]])
    result = types.SimpleNamespace(losses=losses, best_step=torch.tensor([1, 2]))
    right = [[False, True], [True, False], [False, False]]
    verdicts = [[shapes_world.Verdict(each, each, 1.0, None, "") for each in row] for row in right]
    story = Story(Choice.of("reno", "turbo"), [PROMPT] * 2, [result], torch.zeros(3, 2, 3, 64, 64), verdicts)
    assert story.so_far.tolist() == [[1, 2], [3, 2], [3, 5]] and story.right_so_far == [1, 2, 1]
    assert story.headline == "right 1 → 1 of 2" and story.change(story.value, 1) == "1.5 → 4.0"


def test_numbers_are_short():
    assert [decimal(value, 2) for value in (0.421, -0.5, 1.0, 10.004, math.nan)] == [
        ".42",
        "-.50",
        "1.00",
        "10.00",
        "–",
    ]


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
    assert f"{SET} images of 2 prompts, seed 0, 3 steps" in printed and "Neighbors on turbo" in printed
    assert f" of {2 * SET}, Vendi " in printed and f"{tmp_path}: before_after.png" in printed.splitlines()[-1]
    names = {"before_after.png", "trajectory.png", "noise_1.safetensors", "noise_2.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("method", sorted(RECIPES.keys() | set(list_methods())))
def test_each_method_fits_into_a_minute(method):
    choice = Choice.of(method)
    steps = choice.build().steps
    assert choice.steps == steps
    assert choice.cost * choice.count * len(choice.prompts) * steps <= recipes.MOST
    build_parser().parse_args(shlex.split(following(choice))[1:])


@pytest.mark.parametrize("method", list_methods())
def test_the_wheel_carries_what_a_demo_needs(method):
    names = {Path(path).name for path in Choice.of(method).weights()}
    assert names <= {model.name for model in shapes_world.MODELS.values() if model.in_wheel}


def test_an_evaluation_of_what_was_chosen_is_no_step():
    story = optimize_and_judge(Choice.of("group_selection", steps=4), [PROMPT], seed=0)
    assert len(story.images) == 5 and story.steps == 4


@pytest.mark.parametrize(
    ("method", "model", "asked", "steps", "prompts"),
    [
        ("reno", "turbo", None, 50, 8),  # 2·(8 + 15) ms for each image: 18 s
        ("noise_diffusion", "guided", None, 20, 8),  # 40·8 + 2·15 ms: 56 s
        ("noise_diffusion", "guided", 30, 30, 4),  # 84 s with 8
        ("noise_pgd:gradient=full", "guided", None, 20, 4),  # 2·40·8 + 2·15 ms: 11 steps with 8, which are too few
        ("noise_pgd:gradient=full", "guided", 100, 100, 2),  # 134 s with 2, as asked
        ("cno", "guided", None, 3, 4),  # 2·8 + 40·8 + 10 ms for each of 16 images: 17 s
        ("neighbors", "turbo", None, 3, 4),
        ("reno:steps=7", "turbo", None, 7, 8),
        ("reno:steps=7", "turbo", 3, 3, 8),
        ("reno:budget=6", "turbo", None, 6, 8),
        ("reno:budget=6s", "turbo", None, None, 8),
        ("reno:budget=6s", "turbo", 3, 3, 8),
    ],
)
def test_steps_and_prompts_by_their_cost(method, model, asked, steps, prompts, neighbors, monkeypatch):
    """Of a model with 20 guided steps, and of one with a single step."""
    for name, call in (("guided", (20, 3.0)), ("turbo", (1, 0.0))):
        call = dict(zip(("num_inference_steps", "guidance_scale"), call, strict=True))
        monkeypatch.setitem(shapes_world.MODELS, name, dataclasses.replace(shapes_world.MODELS[name], call=call))
    choice = Choice.of(method, model, asked)
    assert (choice.steps, len(choice.prompts)) == (steps, prompts)
    assert set(choice.prompts) <= set(DEFAULT_PROMPTS)


@pytest.mark.parametrize(
    ("method", "model", "asked", "steps", "search"),
    [
        ("never_too_late", None, None, 36, 26),
        ("never_too_late", "guided", None, 17, 12),
        ("never_too_late", None, 5, 5, 3),
        ("never_too_late", None, 1, 1, 0),
        ("never_too_late:budget=10", None, None, 10, 7),
        ("never_too_late:budget=3s", None, None, None, 26),
        ("never_too_late:search=3,steps=9", None, None, 9, 3),
    ],
)
def test_a_search_keeps_its_share_of_the_evaluations(method, model, asked, steps, search):
    choice = Choice.of(method, model, asked)
    assert (choice.steps, choice.settings["search"]) == (steps, search)


def test_demo_in_a_time(tmp_path, capsys):
    main(["demo", "--method", "best_of_n:budget=300ms", "--prompt", PROMPT, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "BestOfN on turbo" in printed and "1 prompt, seed 0, 300ms of steps." in printed and " of 1, in " in printed


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
