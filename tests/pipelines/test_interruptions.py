"""Interrupted runs: the pipeline is as it was, and the best noise so far is in the exception and on disk."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import generator
from tiny_features import TINY_FEATURES
from tiny_pipelines import SIZE, quiet, sd_pipeline

from noiseopt import (
    BestOfN,
    NeverTooLate,
    NeverTooLateStableDiffusionPipeline,
    NoiseResult,
    ReNO,
    ReNOStableDiffusionPipeline,
    optimize_noise,
)
from noiseopt.pipelines import QualityGuard
from noiseopt.pipelines.results import noise_file
from noiseopt.rewards import DPP

ONE = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


@functools.cache
def model():
    """Return a pipeline in a state that runs change and restore: training, trainable and checkpointed modules."""
    pipe = quiet(sd_pipeline(ReNOStableDiffusionPipeline))
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    pipe.vae.requires_grad_(False)
    pipe.vae.decoder.conv_out.requires_grad_(True)
    pipe.unet.enable_gradient_checkpointing()
    plain_image(pipe)  # a stock call sets attributes such as its guidance
    return pipe


def plain_image(pipe) -> torch.Tensor:
    return pipe("c d", generator=generator(5), output_type="latent", **ONE).images


def state_of(pipe) -> dict[str, Any]:
    """Return everything about a pipeline that a run could leave changed."""
    found: dict[str, Any] = {"attributes": {name: id(value) for name, value in vars(pipe).items() if name[0] != "_"}}
    found["names"] = sorted(vars(pipe))
    found["own"] = (dict(pipe._progress_bar_config), type(pipe), id(pipe.scheduler))
    found["scheduler"] = sorted(vars(pipe.scheduler))
    for root in ("unet", "vae", "text_encoder"):
        for name, module in getattr(pipe, root).named_modules():
            hooks = [len(vars(module)[hooks]) for hooks in sorted(vars(module)) if hooks.endswith("_hooks")]
            flags = (module.training, getattr(module, "gradient_checkpointing", None), sorted(vars(module)))
            found[f"{root}.{name}"] = (type(module), hooks, flags)
        for name, parameter in getattr(pipe, root).named_parameters():
            found[f"{root}.{name}"] = (parameter.requires_grad, parameter.grad is None, parameter.data_ptr())
    return found


class Events:
    """Context that records the calls of models, rewards and callbacks, and interrupts one of them."""

    def __init__(self, pipe, interrupt_at: int | None = None) -> None:
        self.pipe, self.interrupt_at = pipe, interrupt_at
        self.kinds: list[str] = []
        self.steps_seen = 0

    def __enter__(self) -> "Events":
        models = {"text": self.pipe.text_encoder, "denoiser": self.pipe.unet, "decoder": self.pipe.vae.decoder}
        self.handles = [
            model.register_forward_pre_hook(lambda *_, kind=kind: self.happen(kind)) for kind, model in models.items()
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

    def callback(self, run) -> None:
        self.steps_seen = run.step + 1
        self.happen("callback")


METHODS: dict[str, Callable[[Events], Any]] = {
    "reno in chunks": lambda events: ReNO(rewards=events.redness, steps=2, views=0, chunk_size=1),
    "best of previews": lambda events: BestOfN(rewards=events.redness, steps=3, preview=True, keep=2),
    "never too late": lambda events: NeverTooLate(
        diversity={DPP(TINY_FEATURES["dinov2"]()): 15.0},
        steps=3,
        guard=QualityGuard(reward=events.redness, drop=0.01),
    ),
}


def call(pipe, how: str, events: Events, path: Path):
    """Run a method in the call of a pipeline, the final image included."""
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
    """Return the middle event of each kind, and the last denoiser call, that of the final image."""
    found = {len(kinds) - 1 - kinds[::-1].index("denoiser")}
    for kind in dict.fromkeys(kinds):
        events = [index for index, each in enumerate(kinds) if each == kind]
        found.add(events[len(events) // 2])
    return sorted(found)


def check_file(path: Path, error: BaseException, steps_seen: int) -> None:
    """Assert that the file holds the best of at least the steps that the callback saw, as the exception does."""
    if steps_seen == 0 and not path.exists():
        return
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    found, known = NoiseResult.load(path), vars(error)["noise_result"]
    assert len(found.losses) >= max(steps_seen, 1) and found.noise.shape == (2, 4, 16, 16)
    assert torch.equal(found.noise, known.noise)
    torch.testing.assert_close(found.losses, known.losses, equal_nan=True)


@pytest.mark.parametrize("how", METHODS)
def test_an_interrupt_in_any_model_reward_or_callback(how, tmp_path):
    pipe = model()
    before, image = state_of(pipe), plain_image(pipe)
    with Events(pipe) as complete:
        call(pipe, how, complete, tmp_path / "complete.safetensors")
    assert {"text", "denoiser", "decoder", "callback", "reward"} <= set(complete.kinds)
    for point in points(complete.kinds):
        path = tmp_path / str(point) / "noise.safetensors"
        with pytest.raises(KeyboardInterrupt) as raised, Events(pipe, point) as events:
            call(pipe, how, events, path)
        assert events.kinds == complete.kinds[: point + 1]
        assert state_of(pipe) == before and torch.equal(plain_image(pipe), image)
        check_file(path, raised.value, events.steps_seen)
    assert NoiseResult.load(tmp_path / "complete.safetensors").provenance["stopped"] is None


def test_an_interrupt_while_the_noise_is_written(tmp_path, monkeypatch):
    """The exception carries the noise, and the file of an earlier step stays complete."""
    pipe, path, writes = model(), tmp_path / "noise.safetensors", []
    replace = os.replace

    def interrupted(source, target):
        writes.append(target)
        if len(writes) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(noise_file, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(os, "replace", interrupted)
    before = state_of(pipe)
    with pytest.raises(KeyboardInterrupt) as raised:
        optimize_noise(pipe, "a b", ReNO(rewards="red", steps=4), save_noise_to=path, **ONE)
    assert state_of(pipe) == before and [each.name for each in tmp_path.iterdir()] == [path.name]
    assert torch.equal(NoiseResult.load(path).noise, vars(raised.value)["noise_result"].noise)


PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT
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
    say = lambda run: print("step", flush=True)
    optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=10**6), callbacks=say, save_noise_to=path, **call)

before = plain()
try:
    run(sys.argv[1])
except KeyboardInterrupt as error:
    print(json.dumps({"same": torch.equal(plain(), before), "steps": len(error.noise_result.losses)}), flush=True)
run(sys.argv[2])
"""


@pytest.mark.slow
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
    """It is written after the first step, then every few seconds, and at the end."""
    path, clock, steps = tmp_path / "new" / "noise.safetensors", [100.0], []
    monkeypatch.setattr(noise_file.time, "monotonic", lambda: clock[0])

    def watch(run):
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
    """A failed write is a warning, and at the end an error that carries the result."""

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
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
    with Events(model(), 0), pytest.raises((TypeError, ValueError), match="Expected `save_noise_to` to be"):
        optimize_noise(model(), "a b", ReNO(rewards="red"), save_noise_to=place, **ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("cls", [ReNOStableDiffusionPipeline, NeverTooLateStableDiffusionPipeline])
def test_a_file_without_anything_to_optimize_is_refused(cls, tmp_path):
    pipe = quiet(cls(**model().components))
    with Events(model(), 0), pytest.raises(ValueError, match="Expected a method beside `save_noise_to`"):
        pipe("a b", save_noise_to=tmp_path / "noise.safetensors", **ONE)
    assert not list(tmp_path.iterdir())
    with Events(model(), 0), pytest.raises(ValueError, match="Expected a method beside `callbacks`"):
        pipe("a b", callbacks=[print], **ONE)
