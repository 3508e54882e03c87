"""Ctrl-C anywhere: the pipeline is as it was, and the best noise so far is on disk, whole."""

import functools
import json
import linecache
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from problems import generator
from tiny_features import TINY_FEATURES
from tiny_pipelines import SIZE, quiet, sd_pipeline

from noiseopt import (
    CNO,
    PCN,
    BestOfN,
    GroupSelection,
    ImageSet,
    NeverTooLate,
    NeverTooLateStableDiffusionPipeline,
    NoiseDiffusion,
    NoiseResult,
    ReNO,
    ReNOStableDiffusionPipeline,
    grow_set,
    optimize_noise,
)
from noiseopt.pipelines import QualityGuard
from noiseopt.pipelines.never_too_late.image_set import SetGrowth
from noiseopt.pipelines.results import noise_file
from noiseopt.rewards import DPP

ONE = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


@functools.cache
def model():
    """A pipeline of this file's own, in a state that a run has to put back: parts in training, parts with gradients."""
    pipe = quiet(sd_pipeline(ReNOStableDiffusionPipeline))
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    pipe.vae.requires_grad_(False)
    pipe.vae.decoder.conv_out.requires_grad_(True)
    pipe.unet.enable_gradient_checkpointing()
    plain_image(pipe)  # a stock call leaves its guidance and its timesteps behind
    return pipe


def plain_image(pipe) -> torch.Tensor:
    return pipe("c d", generator=generator(5), output_type="latent", **ONE).images


def state_of(pipe) -> dict[str, Any]:
    """Everything about a pipeline that an optimisation could leave changed."""
    found: dict[str, Any] = {"attributes": {name: id(value) for name, value in vars(pipe).items() if name[0] != "_"}}
    found["names"] = sorted(vars(pipe))
    found["own"] = (pipe._noise_run, dict(pipe._progress_bar_config), type(pipe), id(pipe.scheduler))
    found["scheduler"] = sorted(vars(pipe.scheduler))
    for root in ("unet", "vae", "text_encoder"):
        for name, module in getattr(pipe, root).named_modules():
            hooks = [len(vars(module)[hooks]) for hooks in sorted(vars(module)) if hooks.endswith("_hooks")]
            flags = (module.training, getattr(module, "gradient_checkpointing", None), sorted(vars(module)))
            found[f"{root}.{name}"] = (hooks, flags)
        for name, parameter in getattr(pipe, root).named_parameters():
            found[f"{root}.{name}"] = (parameter.requires_grad, parameter.grad is None, parameter.data_ptr())
    return found


class Events:
    """Counts what runs, a model, a reward or a callback, and interrupts at the one that is asked for."""

    def __init__(self, pipe, interrupt_at: int | None = None) -> None:
        self.pipe, self.interrupt_at = pipe, interrupt_at
        self.kinds: list[str] = []
        self.steps_seen = 0

    def __enter__(self) -> "Events":
        parts = {"text": self.pipe.text_encoder, "denoiser": self.pipe.unet, "decoder": self.pipe.vae.decoder}
        self.handles = [
            part.register_forward_pre_hook(lambda *_, kind=kind: self.happen(kind)) for kind, part in parts.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def happen(self, kind: str) -> None:
        self.kinds.append(kind)
        if len(self.kinds) - 1 == self.interrupt_at:
            raise KeyboardInterrupt

    def redness(self, images, prompts):
        self.happen("reward")
        return (images[:, 0] - images[:, 1]).mean((1, 2)) * 10

    def bounded(self, images, prompts):
        return torch.sigmoid(self.redness(images, prompts))

    def callback(self, state) -> None:
        self.steps_seen = state.step + 1
        self.happen("callback")


FEATURES = TINY_FEATURES["dinov2"]()
METHODS: dict[str, Callable[[Events], Any]] = {
    "reno": lambda events: ReNO(rewards=events.redness, steps=3, views=1),
    "reno in chunks": lambda events: ReNO(rewards=events.redness, steps=2, views=0, chunk_size=1),
    "frozen": lambda events: NoiseDiffusion(rewards=events.bounded, steps=3),
    "cno": lambda events: CNO(steps=2),
    "best of n": lambda events: BestOfN(rewards=events.redness, steps=2),
    "best of previews": lambda events: BestOfN(rewards=events.redness, steps=3, preview=True, keep=2),
    "pcn": lambda events: PCN(rewards=events.redness, steps=3, beta=0.5, acceptance=0.3),
    "group selection": lambda events: GroupSelection(rewards=events.redness, features=FEATURES, steps=2),
    "never too late": lambda events: NeverTooLate(
        diversity={DPP(FEATURES): 15.0}, steps=3, guard=QualityGuard(reward=events.redness, drop=0.01)
    ),
}


def call(pipe, how: str, events: Events, path: Path):
    """The pipeline's own call, with the image at the end."""
    return pipe(
        "a b",
        method=METHODS[how](events),
        callbacks=events.callback,
        save_noise_to=str(path),
        generator=generator(),
        num_images_per_prompt=2,
        output_type="pt",
        **ONE | {"num_inference_steps": 2 if "previews" in how else 1},
    )


def points(kinds: list[str]) -> list[int]:
    """Of each kind of event one between, and the first and the last denoiser and reward: the last image at the end."""
    found: set[int] = set()
    for kind in dict.fromkeys(kinds):
        places = [index for index, each in enumerate(kinds) if each == kind]
        found |= {places[len(places) // 2], *((places[0], places[-1]) if kind in ("denoiser", "reward") else ())}
    return sorted(found)


def check_file(path: Path, error: BaseException, steps_seen: int, pipe) -> None:
    """The file is whole and holds the best of at least the steps that were seen: the images of that best come back."""
    if steps_seen == 0 and not path.exists():
        return
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    found = NoiseResult.load(path)
    assert len(found.losses) >= max(steps_seen, 1) and found.noise.shape == (2, 4, 16, 16)
    if (known := vars(error).get("noise_result")) is not None:
        assert torch.equal(found.noise, known.noise)
        torch.testing.assert_close(found.losses, known.losses, equal_nan=True)
    if "redness" in found.scores and not found.provenance["settings"].get("preview"):
        again = pipe("a b", latents=found.latents, num_images_per_prompt=2, output_type="pt", **ONE).images
        drawn = (again[:, 0] - again[:, 1]).mean((1, 2)) * 10
        torch.testing.assert_close(drawn, found.best_scores["redness"], rtol=1e-4, atol=1e-4)
        losses = found.losses.nan_to_num(torch.inf)
        assert found.provenance["method"] == "NeverTooLate" or torch.equal(found.best_loss, losses.amin(0))


@pytest.mark.parametrize("how", METHODS)
def test_an_interrupt_in_any_model_reward_or_callback(how, tmp_path):
    pipe = model()
    before, image = state_of(pipe), plain_image(pipe)
    with Events(pipe) as whole:
        call(pipe, how, whole, tmp_path / "whole.safetensors")
    assert {"text", "denoiser", "decoder", "callback"} <= set(whole.kinds)
    for place in points(whole.kinds):
        path = tmp_path / str(place) / "noise.safetensors"
        with pytest.raises(KeyboardInterrupt) as raised, Events(pipe, place) as events:
            call(pipe, how, events, path)
        assert events.kinds == whole.kinds[: place + 1]
        assert state_of(pipe) == before and torch.equal(plain_image(pipe), image)
        check_file(path, raised.value, events.steps_seen, pipe)
    assert NoiseResult.load(tmp_path / "whole.safetensors").provenance["stopped"] is None


@functools.cache
def waits_for_signals(file: str, line: int) -> bool:
    """Whether Ctrl-C can come before a line: Python looks for signals after calls and at the ends of loops only, never
    at a bare `try:` or `finally:`, nor where a `with` begins to end."""
    return not linecache.getline(file, line).strip().startswith(("try:", "finally:", "else:", "with "))


class Lines:
    """Follows the lines of ours that run, and interrupts before one of them: Ctrl-C may come between any two.

    Args:
        modules: The ends of the names of modules to follow.
        interrupt_at: A line, as module and number, and how many times it runs before.
    """

    def __init__(self, modules: tuple[str, ...], interrupt_at: tuple[str, int, int] | None = None) -> None:
        self.modules, self.interrupt_at = modules, interrupt_at
        self.seen: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "Lines":
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def on_call(self, frame: FrameType, event: str, _) -> Callable[..., Any] | None:
        name = frame.f_globals.get("__name__", "")
        return self.on_line if name.startswith("noiseopt.") and name.endswith(self.modules) else None

    def on_line(self, frame: FrameType, event: str, _) -> Callable[..., Any]:
        if event == "line" and waits_for_signals(frame.f_code.co_filename, frame.f_lineno):
            place = (frame.f_globals["__name__"], frame.f_lineno)
            self.seen[place] = self.seen.get(place, 0) + 1
            if self.interrupt_at == (*place, self.seen[place]):
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.on_line

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Each line that ran, the last time; those that ran several times also at another of them."""
        for (name, line), count in self.seen.items():
            yield from ((name, line, nth) for nth in sorted({1 + line % count, count}))


MODULES = {  # and one place of how many is taken, for the time that it takes
    "the call": (("module_state", "noise_hook"), 1),
    "the loop": (("method",), 3),
    "the file": (("noise_file", "whole_file", "result_file", "noise_result"), 2),
}


@pytest.mark.parametrize("part", MODULES)
def test_an_interrupt_between_any_two_lines(part, tmp_path):
    modules, every = MODULES[part]
    pipe, how = model(), "best of n"
    with Events(pipe) as events, Lines(modules) as whole:
        call(pipe, how, events, tmp_path / "whole.safetensors")
    before, image = state_of(pipe), plain_image(pipe)
    places = list(whole.places())[::every]
    assert len(places) > 15
    for index, place in enumerate(places):
        path = tmp_path / str(index) / "noise.safetensors"
        with pytest.raises(KeyboardInterrupt) as raised, Events(pipe) as events, Lines(modules, place):
            call(pipe, how, events, path)
        assert state_of(pipe) == before, place
        check_file(path, raised.value, events.steps_seen, pipe)
    assert torch.equal(plain_image(pipe), image)


def sets(pipe, **arguments) -> ImageSet:
    method = NeverTooLate(diversity={DPP(FEATURES): 15.0}, steps=2)
    return grow_set(pipe, "a b", 3, method, generator=3, **ONE, **arguments)


def test_an_interrupt_while_a_set_grows(tmp_path):
    """Between any two lines in which an image joins: in memory and on disk there is a set, which can be continued."""
    pipe = model()
    with Events(pipe), Lines(("image_set",)) as whole:
        complete = sets(pipe, folder=tmp_path / "whole")
    before = state_of(pipe)
    inside = [place for place in whole.places() if place[1] > SetGrowth.add_image.__code__.co_firstlineno]
    assert len(inside) > 20
    folder = tmp_path / "whole"
    for index, place in enumerate(inside[::2]):
        folder = tmp_path / str(index)
        with pytest.raises(KeyboardInterrupt) as raised, Events(pipe), Lines(("image_set",), place):
            sets(pipe, folder=folder)
        assert state_of(pipe) == before
        found = vars(raised.value).get("image_set")
        if found is not None:
            assert len(found) == len(found.seeds) == len(found.results) == len(found.values)
            assert len(found) - 1 <= len(ImageSet.load(folder)) <= len(found)
    again = sets(pipe, folder=folder)
    assert torch.equal(again.images, complete.images) and again.values == complete.values


PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
import torch
from tiny_pipelines import SIZE, tiny_pipeline
from noiseopt import ReNO, optimize_noise
from noiseopt.pipelines.results import noise_file

noise_file.SECONDS_BETWEEN_WRITES = 0.0
pipe, call = tiny_pipeline("sd"), {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}

def redness(images, prompts):
    return (images[:, 0] - images[:, 1]).mean((1, 2)) * 10

def plain():
    return pipe("c", generator=torch.Generator().manual_seed(5), output_type="latent", **call).images

def run(path):
    say = lambda state: print("step", flush=True)
    optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=10**6), callbacks=say, save_noise_to=path, **call)

before = plain()
try:
    run(sys.argv[1])
except KeyboardInterrupt as error:
    print(json.dumps({"same": torch.equal(plain(), before), "steps": len(error.noise_result.losses)}), flush=True)
run(sys.argv[2])
"""


def test_a_real_ctrl_c_and_a_process_that_is_killed(processes, tmp_path):
    interrupted, killed = tmp_path / "interrupted.safetensors", tmp_path / "killed.safetensors"
    program, said, errors = tmp_path / "program.py", tmp_path / "said", tmp_path / "errors"
    program.write_text(PROGRAM)
    os.mkfifo(said)
    errors.touch()
    process = processes.start(program, interrupted, killed, folder=tmp_path, out=said, err=errors)
    with said.open() as lines:
        try:
            steps = [lines.readline() for _ in range(3)]
            os.kill(process.pid, signal.SIGINT)
            while (line := lines.readline()) == "step\n":
                steps.append(line)
            facts = json.loads(line)
            more = [lines.readline() for _ in range(3)]
        finally:
            process.kill()
            process.join()
    found, left = NoiseResult.load(interrupted), NoiseResult.load(killed)
    assert facts["same"] and len(found.losses) == facts["steps"] >= len(steps)
    assert found.provenance["stopped"] == "KeyboardInterrupt" and left.provenance["stopped"] is None
    assert torch.equal(found.best_loss, found.losses.amin(0)) and len(left.losses) >= len(more) - 1


def test_a_file_for_the_noise_is_kept_while_a_run_goes_on(tmp_path, monkeypatch):
    """From the first step on, then no more often than every few seconds, and at the end what is returned."""
    path, clock, steps = tmp_path / "new" / "noise.safetensors", [100.0], []
    monkeypatch.setattr(noise_file.time, "monotonic", lambda: clock[0])

    def watch(state):
        steps.append(len(NoiseResult.load(path).losses) if path.exists() else 0)
        clock[0] += 4.0

    method = ReNO(rewards=lambda images, prompts: images.mean((1, 2, 3)), steps=8)
    result = optimize_noise(model(), "a b", method, callbacks=watch, save_noise_to=path, **ONE)
    assert steps == [0, 1, 1, 1, 4, 4, 4, 7]
    found = NoiseResult.load(path)
    assert torch.equal(found.noise, result.noise) and torch.equal(found.losses, result.losses)
    assert found.provenance == result.provenance


def test_an_error_of_the_final_image_hands_out_the_noise_too(tmp_path):
    def refuse(pipe, index, timestep, tensors):
        raise RuntimeError("the image")

    arguments = {"rewards": "red", "steps": 2, "callback_on_step_end": refuse}
    with pytest.raises(RuntimeError, match="the image") as raised:
        model()("a b", save_noise_to=str(tmp_path / "x.safetensors"), **arguments, **ONE)
    found = NoiseResult.load(tmp_path / "x.safetensors")
    assert torch.equal(found.noise, raised.value.noise_result.noise) and len(found.losses) == 2


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path, monkeypatch):
    """It is warned of; the error at the end, when the result cannot be written at all, carries the result."""

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("noiseopt.pipelines.results.result_file.save_file", full)
    method = ReNO(rewards="red", steps=3)
    with pytest.warns(UserWarning, match="cannot be written"), pytest.raises(OSError, match="no space") as raised:
        optimize_noise(model(), "a b", method, save_noise_to=tmp_path / "x", **ONE)
    assert len(raised.value.noise_result.losses) == 3 and not list(tmp_path.iterdir())


def places_without_files(folder: Path) -> dict[str, Any]:
    (folder / "file").touch()
    return {
        "a folder": folder,
        "no name": "",
        "a number": 3,
        "below a file": folder / "file" / "noise.safetensors",
        "a name that is too long": folder / ("x" * 300),
    }


@pytest.mark.parametrize("case", ["a folder", "no name", "a number", "below a file", "a name that is too long"])
def test_a_place_where_no_file_can_be_is_refused_before_any_model_runs(case, tmp_path):
    place = places_without_files(tmp_path)[case]
    with Events(model(), 0), pytest.raises(ValueError, match="Expected `save_noise_to` to be"):
        optimize_noise(model(), "a b", ReNO(rewards="red"), save_noise_to=place, **ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("cls", [ReNOStableDiffusionPipeline, NeverTooLateStableDiffusionPipeline])
def test_a_file_without_anything_to_optimise_is_refused(cls, tmp_path):
    pipe = quiet(cls(**model().components))
    with Events(model(), 0), pytest.raises(ValueError, match="something to optimise beside `save_noise_to`"):
        pipe("a b", save_noise_to=tmp_path / "noise.safetensors", **ONE)
    assert not list(tmp_path.iterdir())
