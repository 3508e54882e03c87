"""A list of prompts, each optimized by itself, with its result in a folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import redness
from tiny_pipelines import BUILDERS, SIZE, quiet

from noiseopt import BestOfN, GroupSelection, NoiseResult, ReNO, optimize_noise
from noiseopt.pipelines.result_folder import ResultFolder, generators_of, only_writer, prompt_name

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
PROMPTS = ["a red cube", "b", "c"]
NAMES = ["0000-a-red-cube.safetensors", "0001-b.safetensors", "0002-c.safetensors"]
METHOD = ReNO(rewards=redness, steps=3, views=0)


@pytest.fixture(scope="module")
def pipe():
    return quiet(BUILDERS["sd"]())


def test_each_prompt_is_optimized_by_itself_and_kept(pipe, tmp_path):
    found = optimize_noise(pipe, PROMPTS, METHOD, folder=tmp_path / "new" / "results", generator=5, **CALL)
    assert sorted(path.name for path in (tmp_path / "new" / "results").iterdir()) == NAMES
    for index, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        alone = optimize_noise(pipe, prompt, METHOD, generator=torch.Generator().manual_seed(5 + index), **CALL)
        kept = NoiseResult.load(tmp_path / "new" / "results" / name)
        for each in (found[index], kept):
            assert each.complete and each.images is None and each.provenance["prompts"] == [prompt]
            assert torch.equal(each.noise, alone.noise) and torch.equal(each.losses, alone.losses)


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", [METHOD, GroupSelection(rewards=redness, features="tiny_image", steps=3)])
def test_a_second_start_skips_finished_prompts_and_goes_on_with_a_half_done_one(method, pipe, tmp_path, monkeypatch):
    """A method whose state cannot be stored begins the half-done prompt anew."""
    steps: list[tuple[str, int]] = []

    def note(state) -> None:
        steps.append((state.prompts[0], state.step))
        if len(steps) == 5:  # the second step of the second prompt
            raise Stop

    whole = optimize_noise(pipe, PROMPTS, method, folder=tmp_path / "whole", generator=5, **CALL)
    with pytest.raises(Stop) as raised:
        optimize_noise(pipe, PROMPTS, method, folder=tmp_path / "part", generator=5, callbacks=note, **CALL)
    error = vars(raised.value)
    assert len(error["noise_results"]) == 1 and not error["noise_result"].complete
    assert [NoiseResult.load(tmp_path / "part" / name).complete for name in NAMES[:2]] == [True, False]
    assert not (tmp_path / "part" / NAMES[2]).exists()
    found = optimize_noise(pipe, PROMPTS, method, folder=tmp_path / "part", generator=5, callbacks=note, **CALL)
    first = 1 if method is METHOD else 0
    assert steps[5:] == [("b", step) for step in range(first, 3)] + [("c", step) for step in range(3)]
    for left, right in zip(found, whole, strict=True):
        assert torch.equal(left.noise, right.noise) and torch.equal(left.losses, right.losses) and left.complete
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    again = optimize_noise(pipe, PROMPTS, method, folder=tmp_path / "part", generator=5, **CALL)
    assert all(torch.equal(left.noise, right.noise) for left, right in zip(again, whole, strict=True))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompt": ["a red cube", "b", "d"]}, r"0002-c.safetensors.*prompt was 'c' and is 'd'"),
        ({"prompt": ["b", "a red cube", "c"]}, r"0000-a-red-cube.*prompt was 'a red cube' and is 'b'"),
        ({"method": BestOfN(rewards=redness, steps=3)}, "method name was 'ReNO' and is 'BestOfN'"),
        ({"generator": 6}, "arguments generator seed was 5 and is 6"),
        ({"num_inference_steps": 2}, "arguments num_inference_steps was 1 and is 2"),
    ],
)
def test_a_folder_of_another_call_is_refused_before_any_model_runs(changes, difference, pipe, tmp_path, monkeypatch):
    call = {"prompt": PROMPTS, "method": METHOD, "generator": 5, "folder": tmp_path, **CALL}
    optimize_noise(pipe, **call)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    with pytest.raises(ValueError, match=difference):
        optimize_noise(pipe, **{**call, **changes})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_prompts_may_be_added(pipe, tmp_path):
    call = {"method": METHOD, "generator": 5, "folder": tmp_path, **CALL}
    first = optimize_noise(pipe, PROMPTS[:1], **call)
    found = optimize_noise(pipe, PROMPTS, **call)
    assert torch.equal(found[0].noise, first[0].noise) and len(list(tmp_path.iterdir())) == 3


def test_a_prompt_of_its_own_for_the_rewards_and_no_seed(pipe, tmp_path):
    call = {"reward_prompt": ["x", "y"], "folder": tmp_path, **CALL}
    found = optimize_noise(pipe, ["a", "b"], METHOD, **call)
    assert [each.provenance["reward_prompts"] for each in found] == [["x"], ["y"]]
    assert not torch.equal(found[0].initial_noise, found[1].initial_noise)
    again = optimize_noise(pipe, ["a", "b"], METHOD, **call)
    assert torch.equal(again[1].noise, found[1].noise)


def test_one_bar_over_all(pipe, tmp_path, monkeypatch):
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.n, self.closed, self.descriptions = total, 0, 0, []
            bars.append(self)

        def update(self, steps: int = 1) -> None:
            assert steps >= 0
            self.n += steps

        def set_description(self, text: str, refresh: bool = True) -> None:
            self.descriptions.append(text)

        def close(self) -> None:
            self.closed += 1

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

    optimize_noise(pipe, PROMPTS[:1], METHOD, folder=tmp_path, generator=5, **CALL)
    monkeypatch.setattr(type(pipe), "progress_bar", lambda self, total: Bar(total))
    optimize_noise(pipe, PROMPTS, METHOD, folder=tmp_path, generator=5, **CALL)
    (bar,) = [bar for bar in bars if bar.descriptions]  # the others are of denoising steps, and disabled
    assert (bar.n, bar.total, bar.closed) == (9, 9, 1) and bar.descriptions[-1] == "Optimizing noise 3 of 3"


def test_one_writer_at_a_time(pipe, tmp_path):
    with only_writer(tmp_path / "set"), pytest.raises(ValueError, match="another process is writing to .*set. Wait"):
        optimize_noise(pipe, PROMPTS, METHOD, folder=tmp_path / "set", **CALL)
    assert not list((tmp_path / "set").iterdir())
    optimize_noise(pipe, PROMPTS[:1], METHOD, folder=tmp_path / "set", **CALL)


def test_names_are_stable_and_readable(tmp_path):
    assert prompt_name(7, "A red cube, on a Blue_sphere!") == "0007-a-red-cube-on-a-blue-sphere"
    assert prompt_name(0, "../../etc/passwd\n\x1b[31m") == "0000-etc-passwd-31m"
    assert prompt_name(12345, "…") == "12345" and prompt_name(1, "ein Würfel") == "0001-ein-würfel"
    assert len(prompt_name(1, "word " * 100)) <= 45
    (tmp_path / "0003-other.safetensors").touch()
    assert ResultFolder(tmp_path).file(3, "a").name == "0003-other.safetensors"
    (tmp_path / "0003-a.safetensors").touch()
    with pytest.raises(ValueError, match=r"one file for each prompt, but .* has 0003-a.safetensors and 0003-other"):
        ResultFolder(tmp_path)


def test_seeds_by_prompt():
    def seeds(generator, count=3):
        return [each.initial_seed() for each in generators_of(generator, count)]

    assert seeds(5) == seeds(torch.Generator().manual_seed(5)) == [5, 6, 7] and seeds([4, 2, 9]) == [4, 2, 9]
    assert generators_of(None, 2) == [None, None]
    for wrong in (-1, [1, 2], [1, 1, 2], "abc", 2.0, True, [1.0, 2, 3], 2**64 - 1):
        with pytest.raises(ValueError, match="Expected `generator` to be a seed"):
            generators_of(wrong, 3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a"}, "Expected a list of prompts beside `folder`, but got 'a'"),
    ({"prompt": None}, "Expected a list of prompts"),
    ({"prompt": ["a", 3]}, "Expected a list of prompts"),
    ({"save_noise_to": "x"}, "Expected `folder` or `save_noise_to`, but got both"),
    ({"resume_from": "x"}, "Expected `folder` or `resume_from`, but got both"),
    ({"reward_prompt": ["x"]}, "Expected `reward_prompt` to be one text, or one for each of 3 prompts"),
    ({"reward_prompt": ["x", 5, "y"]}, "Expected `reward_prompt` to be one text, or one for each of 3 prompts"),
    ({"reward_prompt": 5}, "Expected `reward_prompt` to be one text, or one for each of 3 prompts"),
    ({"prompt": []}, "Expected a list of prompts"),
    ({"folder": __file__}, "is a file. Choose another name"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_refused(changes, message, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimize_noise(pipe, **{"prompt": PROMPTS, "method": METHOD, "folder": tmp_path, **CALL, **changes})


def test_a_refused_call_leaves_no_folder(pipe, tmp_path):
    with pytest.raises(ValueError, match="Expected a list of prompts"):
        optimize_noise(pipe, [], METHOD, folder=tmp_path / "new", **CALL)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["folder", "save_noise_to", "resume_from"])
@pytest.mark.parametrize("path", ["", 5])
def test_what_is_no_path_is_refused(name, path, pipe, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    with pytest.raises(TypeError, match=f"Expected `{name}` to be a path, but got {path!r}"):
        optimize_noise(pipe, PROMPTS, METHOD, **{name: path}, **CALL)


def test_the_loop_of_the_documentation_can_be_started_again(pipe, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "optimize_noise": optimize_noise, "pipe": pipe, "prompts": PROMPTS, "method": METHOD}
    exec(program, names | {"call": CALL})
    loop, folder = (
        [NoiseResult.load(path) for path in sorted(tmp_path.glob(f"{name}/*"))] for name in ("noises", "results")
    )
    assert len(loop) == 3 and all(torch.equal(a.noise, b.noise) for a, b in zip(loop, folder, strict=True))
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    exec(program, names | {"call": CALL})
