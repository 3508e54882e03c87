"""Runs that are interrupted and continued: the same result bit by bit, and files that say how far they are."""

import copy
import json
import math
import random
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Clock, generator, redness
from safetensors import safe_open
from safetensors.torch import save_file
from tiers import slow_except
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, tiny_pipeline

from noiseopt import (
    CNO,
    BestOfN,
    EarlyStopping,
    GroupSelection,
    HeldOutReward,
    NoiseResult,
    ReNO,
    TimeBudget,
    list_methods,
    optimize_noise,
)
from noiseopt.callbacks import History
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.registry import METHODS
from noiseopt.pipelines.results import noise_file
from noiseopt.pipelines.stages import SEARCH_SHARE
from noiseopt.pipelines.white_noise import WhiteNoiseSteps

CALL = {"num_images_per_prompt": 2, "num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
SETTINGS: dict[str, dict[str, Any]] = {
    "cno": {"window_size": 4},
    "never_too_late": {"diversity": {"pairwise": ("tiny_image", 5.0)}, "rewards": redness, "guard": {"red": 0.001}},
    "noise_diffusion": {
        "rewards": redness,
        "score_range": (-10.0, 10.0),
        "candidates": 3,
        "patience": 3,
        "trust_region": 0.1,
    },
    "pcn": {"rewards": redness, "acceptance": 0.5},
    "zero_order_search": {"rewards": redness, "neighbors": 2},
}
STORABLE = [name for name in list_methods() if name != "group_selection"]
STEPS = 4


class Stop(Exception):
    pass


def stop_at(step: int):
    """Return a callback that interrupts a run after a step."""

    def stop(state) -> None:
        if state.step == step:
            raise Stop

    return stop


def interrupted(pipe, method, path: Path, step: int, *callbacks, prompt: Any = "a", **call) -> NoiseResult:
    """Return the result of a run that is interrupted after a step, which it also writes to a file."""
    arguments = {**CALL, "generator": generator(), **call}
    with pytest.raises(Stop) as raised:
        optimize_noise(pipe, prompt, method, callbacks=[*callbacks, stop_at(step)], save_noise_to=path, **arguments)
    return vars(raised.value)["noise_result"]


@pytest.fixture(scope="module")
def pipe():
    return quiet(BUILDERS["sd"]())


def method_of(name: str, **changes):
    return METHODS[name](**{"steps": STEPS, **SETTINGS.get(name, {"rewards": redness}), **changes})


def assert_same(found: NoiseResult, known: NoiseResult) -> None:
    """Assert that two results are equal bit by bit, but for the time that they took."""
    for name in ("noise", "latents", "losses", "norms", "best_step", "initial_noise", "band_changes"):
        assert torch.equal(getattr(found, name).nan_to_num(9), getattr(known, name).nan_to_num(9)), name
    assert found.scores.keys() == known.scores.keys() and found.reports == known.reports
    assert all(torch.equal(found.scores[name], known.scores[name]) for name in known.scores)
    times = {"seconds": None}
    assert found.provenance | times == known.provenance | times
    assert found.complete and found.progress is None


@pytest.mark.parametrize("name", slow_except(STORABLE, "best_of_n", "cno", "never_too_late", "reno"))
def test_a_run_that_goes_on_is_one_that_was_never_interrupted(name, pipe, tmp_path):
    """Interrupted after each step, and again after the next one."""
    method, path = method_of(name), tmp_path / "noise.safetensors"
    whole = optimize_noise(pipe, "a", method, generator=generator(), **CALL)
    for step in range(STEPS):
        interrupted(pipe, method, path, step)
        if step + 1 < STEPS:
            interrupted(pipe, method, path, step + 1, resume_from=path)
        found = optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, save_noise_to=path, **CALL)
        assert_same(found, whole)
        assert_same(NoiseResult.load(path), whole)
        for images in ("images", "initial_images"):
            left, right = getattr(found, images), getattr(whole, images)
            assert (left is None and right is None) or torch.equal(left, right)


STAGES = {
    "reno": {"views": 0},
    "noise_diffusion": {**SETTINGS["noise_diffusion"], "gradient": "full"},
    "noise_pgd": {"gradient": "full"},
    "mean_variance": {"gradient": "full"},
}


@pytest.mark.parametrize("name", slow_except(STAGES, "reno"))
@pytest.mark.parametrize("denoising_steps", [1, 2])
def test_a_run_of_several_stages_goes_on_in_each_of_them(name, denoising_steps, pipe, tmp_path):
    """Interrupted in the baseline, in the search, and within and between the starts, each of which has two steps."""
    method = METHODS[name](**{"rewards": redness, **STAGES[name]}, budget=8, search=3, starts=2)
    path, call = tmp_path / "noise.safetensors", {**CALL, "num_inference_steps": denoising_steps}

    def own() -> list[Any]:
        return [EarlyStopping(2)]

    whole = optimize_noise(pipe, "a", method, callbacks=own(), generator=generator(), **call)
    assert len(whole.losses) > 5
    for step in range(len(whole.losses)):
        interrupted(pipe, method, path, step, *own(), **call)
        again = {"callbacks": own(), "generator": generator(), "resume_from": path, "save_noise_to": path}
        found = optimize_noise(pipe, "a", method, **again, **call)
        assert_same(found, whole)
        assert_same(NoiseResult.load(path), whole)


def test_a_time_budget_of_the_method_counts_the_seconds_before_the_interrupt(pipe, tmp_path, monkeypatch):
    """Evaluations take 1 second: 7 of 12 seconds are over, of which the search took 4, and 5 are left."""
    path, clock = tmp_path / "noise.safetensors", Clock(monkeypatch)
    method = ReNO(rewards=redness, budget="12s", search=9, starts=2, views=0)
    handle, stages = pipe.unet.register_forward_pre_hook(clock.after(1.0)), []

    def look(state) -> None:
        stages.append(state.stage)

    found = interrupted(pipe, method, path, 6, look)
    clock.now = 1000.0
    result = optimize_noise(pipe, "a", method, callbacks=look, generator=generator(), resume_from=path, **CALL)
    handle.remove()
    search = math.floor(12 * SEARCH_SHARE) + 1
    assert found.provenance["seconds"] == 7.0 and stages[:7] == ["search"] * search + ["start 1"] * (7 - search)
    assert 11 <= result.provenance["seconds"] <= 12 and set(stages[7:]) == {"start 1", "start 2"}


@pytest.mark.parametrize("family", slow_except(["flux", "sdxl"], "flux"))
def test_packed_latents_and_a_generator_for_each_image(family, tmp_path):
    pipe, method, path = tiny_pipeline(family), method_of("reno"), tmp_path / "noise.safetensors"
    call = {**CALL, **call_arguments(family), "num_images_per_prompt": 1}
    if family == "flux":
        call["negative_prompt"] = ["b", "b"]

    def streams() -> dict[str, Any]:
        return {"prompt": ["a", "b"], "generator": [generator(1), generator(2)], **call}

    whole = optimize_noise(pipe, method=method, **streams())
    interrupted(pipe, method, path, 1, **streams())
    assert_same(optimize_noise(pipe, method=method, resume_from=path, **streams()), whole)


@pytest.mark.parametrize("place", ["reward", "step", "start"])
def test_an_interrupt_anywhere_in_a_step_loses_that_step_only(place, pipe, tmp_path, monkeypatch):
    path, method, calls = tmp_path / "noise.safetensors", method_of("reno", views=0), []
    whole = optimize_noise(pipe, "a", method, generator=generator(), **CALL)
    owner, name = {"reward": (ReNO, "regularizer"), "step": (WhiteNoiseSteps, "moved"), "start": (ReNO, "start")}[place]
    own = getattr(owner, name)

    def third(*args):
        calls.append(name)
        if len(calls) == (1 if place == "start" else 3):
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(owner, name, third)
    with pytest.raises(KeyboardInterrupt):
        optimize_noise(pipe, "a", method, generator=generator(), save_noise_to=path, **CALL)
    monkeypatch.undo()
    assert path.exists() == (place != "start")
    steps: list[int] = []
    found = optimize_noise(
        pipe,
        "a",
        method,
        generator=generator(),
        callbacks=lambda run: steps.append(run.step),
        save_noise_to=path,
        resume_from=path,
        **CALL,
    )
    assert_same(found, whole)
    assert steps == {"reward": [2, 3], "step": [2, 3], "start": [0, 1, 2, 3]}[place]


def test_a_half_done_result_is_told_from_a_finished_one(pipe, tmp_path, monkeypatch):
    """Interrupted, in mid-run, as after the death of the process, and stopped by a callback, as it was asked to."""
    path, method, seen = tmp_path / "noise.safetensors", ReNO(rewards=redness, steps=50), []
    found = interrupted(pipe, method, path, 0)
    for each in (found, NoiseResult.load(path)):
        assert not each.complete and "interrupted at step 1 of 50" in repr(each)
        assert each.provenance["stopped"] == "Stop"
    monkeypatch.setattr(noise_file, "SECONDS_BETWEEN_WRITES", 0.0)

    def look(state) -> None:
        seen.extend([NoiseResult.load(path)] if state.step else [])

    finished = optimize_noise(
        pipe, "a", method, callbacks=[look, lambda state: state.step < 2], save_noise_to=path, **CALL
    )
    assert [each.complete for each in seen] == [False, False] and "step 2 of 50" in repr(seen[1])
    for each in (finished, NoiseResult.load(path)):
        assert (
            each.complete and each.progress is None and repr(each).startswith("NoiseResult(2×4×16×16, best of 3 steps")
        )
        assert each.provenance["stopped"] == "callback"


def test_files_that_do_not_record_it_count_as_complete(pipe, tmp_path):
    result = optimize_noise(pipe, "a", BestOfN(rewards=redness, steps=1), **CALL)
    for name in ("complete", "call"):
        del result.provenance[name]
    result.save(tmp_path / "old.safetensors")
    assert NoiseResult.load(tmp_path / "old.safetensors").complete
    with pytest.raises(ValueError, match="Expected a result that records its call"):
        optimize_noise(pipe, "a", BestOfN(rewards=redness, steps=1), resume_from=tmp_path / "old.safetensors", **CALL)


def test_callbacks_go_on_too(pipe, tmp_path):
    """Patience, the scores of a held-out reward, and the seconds of a budget count from the first start."""
    path, method = tmp_path / "noise.safetensors", BestOfN(rewards=redness, steps=12)

    def own() -> list[Any]:
        return [EarlyStopping(3), HeldOutReward(lambda images, prompts: images.mean((1, 2, 3)), name="mean")]

    whole = optimize_noise(pipe, "a", method, generator=generator(), callbacks=own(), **CALL)
    assert whole.provenance["stopped"] == "patience"
    for step in (1, len(whole.losses) - 1):
        interrupted(pipe, method, path, step, *own())
        call = {"generator": generator(), "resume_from": path, **CALL}
        assert_same(optimize_noise(pipe, "a", method, callbacks=[History(), *own()], **call), whole)
    with pytest.raises(ValueError, match="same callbacks, but the run.callbacks is of another shape"):
        optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)


def test_a_time_budget_counts_the_seconds_before_the_interrupt(pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", BestOfN(rewards=redness, steps=9)
    found = interrupted(pipe, method, path, 1)
    found.provenance["seconds"] = 100.0
    found.save(path)
    arguments = {"generator": generator(), "resume_from": path, **CALL}
    resumed = optimize_noise(pipe, "a", method, callbacks=TimeBudget(60.0), **arguments)
    assert len(resumed.losses) == 2 and resumed.provenance["stopped"] == "time budget"
    assert resumed.provenance["seconds"] > 100


def test_without_a_generator_the_noise_of_the_file_is_taken_up(pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", method_of("best_of_n")
    torch.manual_seed(3)
    whole = optimize_noise(pipe, "a", method, **CALL)
    torch.manual_seed(3)
    interrupted(pipe, method, path, 1, generator=None)
    torch.manual_seed(4)
    interrupted(pipe, method, path, 2, generator=None, resume_from=path)
    assert_same(optimize_noise(pipe, "a", method, resume_from=path, **CALL), whole)


def test_settings_of_the_memory_may_change(pipe, tmp_path):
    path = tmp_path / "noise.safetensors"
    whole = optimize_noise(pipe, "a", method_of("reno"), generator=generator(), **CALL)
    interrupted(pipe, method_of("reno"), path, 1)
    split = method_of("reno", chunk_size=1, checkpointing="steps")
    found = optimize_noise(pipe, "a", split, generator=generator(), resume_from=path, **CALL)
    torch.testing.assert_close(found.losses, whole.losses, rtol=1e-4, atol=1e-5)


def no_model(*_, **__):
    raise AssertionError("a model ran")


OTHERS = [
    ({"prompt": "b"}, "prompt was 'a' and is 'b'"),
    ({"method": ReNO(rewards=redness, steps=STEPS, learning_rate=1.0)}, "method learning_rate was None and is 1.0"),
    ({"method": BestOfN(rewards=redness, steps=STEPS)}, "method name was 'ReNO' and is 'BestOfN'"),
    ({"method": ReNO(rewards="red", steps=STEPS)}, "method rewards was "),
    ({"num_inference_steps": 3}, "arguments num_inference_steps was 1 and is 3"),
    ({"generator": generator(1)}, "arguments generator seed was 0 and is 1"),
    ({"generator": None}, "arguments generator was "),
    ({"noise_sampler": "pink"}, "noise_sampler was None and is "),
    ({"reward_prompt": "c"}, "reward_prompt was None and is 'c'"),
    ({"pipe": "sdxl"}, "pipeline was 'StableDiffusionPipeline' and is 'StableDiffusionXLPipeline'"),
]


@pytest.mark.parametrize("how", ["half done", "complete"])
def test_a_file_of_another_call_is_refused_with_the_differences(how, pipe, tmp_path, monkeypatch):
    path, method = tmp_path / "noise.safetensors", method_of("reno")
    if how == "complete":
        optimize_noise(pipe, "a", method, generator=generator(), save_noise_to=path, **CALL)
    else:
        interrupted(pipe, method, path, 1)
    before, families = path.read_bytes(), {"sdxl": tiny_pipeline("sdxl")}
    monkeypatch.setattr(torch.nn.Module, "__call__", no_model)
    for change, difference in OTHERS:
        call = {"pipe": pipe, "prompt": "a", "method": method, "generator": generator(), **CALL, **change}
        call["pipe"] = families.get(call["pipe"], pipe) if isinstance(call["pipe"], str) else pipe
        with pytest.raises(ValueError, match=re.escape(difference)):
            optimize_noise(**call, save_noise_to=path, resume_from=path)
    assert path.read_bytes() == before


def test_a_generator_in_another_state_and_other_latents_are_refused(pipe, tmp_path):
    path, method, moved = tmp_path / "noise.safetensors", method_of("reno"), generator()
    interrupted(pipe, method, path, 1)
    torch.randn(1, generator=moved)
    with pytest.raises(ValueError, match="arguments generator state was"):
        optimize_noise(pipe, "a", method, generator=moved, resume_from=path, **CALL)
    latents = torch.randn(2, 4, 16, 16, generator=generator(5))
    whole = optimize_noise(pipe, "a", method, latents=latents, **CALL)
    interrupted(pipe, method, path, 1, latents=latents, generator=None)
    with pytest.raises(ValueError, match="arguments latents sha256 was"):
        optimize_noise(pipe, "a", method, latents=-latents, resume_from=path, **CALL)
    assert_same(optimize_noise(pipe, "a", method, latents=latents, resume_from=path, **CALL), whole)


def test_a_complete_file_is_returned_and_no_model_runs(pipe, tmp_path, monkeypatch):
    path, other, method = tmp_path / "noise.safetensors", tmp_path / "other.safetensors", method_of("reno")
    whole = optimize_noise(pipe, "a", method, generator=generator(), save_noise_to=path, **CALL)
    monkeypatch.setattr(torch.nn.Module, "__call__", no_model)
    call = {"generator": generator(), "resume_from": path, **CALL}
    assert_same(optimize_noise(pipe, "a", method, **call), whole)
    optimize_noise(pipe, "a", method, save_noise_to=other, **call)
    assert_same(NoiseResult.load(other), whole)


def test_arguments_that_are_no_paths_are_refused(pipe, tmp_path):
    for name in ("resume_from", "folder"):
        with pytest.raises(TypeError, match=f"Expected `{name}` to be a path, but got 3"):
            optimize_noise(pipe, ["a"], method_of("best_of_n"), **{name: 3}, **CALL)


@pytest.mark.parametrize("seconds", [10**400, -1.0, float("nan"), "x"])
def test_seconds_that_cannot_be_are_none(seconds, pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", method_of("best_of_n")
    found = interrupted(pipe, method, path, 1)
    found.provenance["seconds"] = seconds
    found.save(path)
    resumed = optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)
    assert 0 < resumed.provenance["seconds"] < 100


def test_a_missing_file_is_refused_unless_it_is_the_one_to_write(pipe, tmp_path):
    path = tmp_path / "noise.safetensors"
    for arguments in ({}, {"save_noise_to": tmp_path / "other"}):
        with pytest.raises(FileNotFoundError, match="there is no"):
            optimize_noise(pipe, "a", method_of("best_of_n"), resume_from=path, **arguments, **CALL)
    optimize_noise(pipe, "a", method_of("best_of_n"), resume_from=path, save_noise_to=str(path), **CALL)
    assert NoiseResult.load(path).complete


class Generates(NoiseOptimizer):
    """Method whose state is a Python generator."""

    def objective(self, pipe):
        return FunctionObjective(lambda sample: sample.images.mean((1, 2, 3)))

    def start(self, problem):
        return iter([problem.noise * 0.5, problem.noise * 2] * STEPS)

    def step(self, run, gradient, state):
        return next(state)


def test_a_file_of_other_weights_is_refused(tmp_path):
    """As after more training, or another model under the same name."""
    pipe, path = quiet(BUILDERS["sd"]()), tmp_path / "noise.safetensors"
    interrupted(pipe, method_of("reno"), path, 1)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(1.05)
    with pytest.raises(ValueError, match="weights unet was"):
        optimize_noise(pipe, "a", method_of("reno"), generator=generator(), resume_from=path, **CALL)


def test_a_report_that_has_no_copy_ends_no_run(pipe, tmp_path):
    def report(run):
        run.reports["lock"] = threading.Lock()
        run.reports.pop("lock") if run.step == STEPS - 1 else None

    path = tmp_path / "noise.safetensors"
    with pytest.warns(UserWarning, match="cannot be written"):
        found = optimize_noise(
            pipe, "a", method_of("reno"), generator=generator(), callbacks=report, save_noise_to=path, **CALL
        )
    assert found.complete and NoiseResult.load(path).complete


def test_a_state_forged_for_a_method_that_stores_none_is_refused(pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", UNSTORABLE["candidates"]()
    interrupted(pipe, method, path, 1)
    rewritten(path, lambda header, tensors: header | {"progress": {"run": {"dict": {"step": 1}}, "reports": {}}})
    with pytest.raises(ValueError, match="Expected the state of an interrupted run"):
        optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)


UNSTORABLE = {
    "candidates": lambda: GroupSelection(rewards=redness, features="tiny_image", steps=STEPS),
    "previews": lambda: BestOfN(rewards=redness, steps=STEPS, preview=True, keep=2),
    "an iterator": lambda: Generates(steps=STEPS),
}


@pytest.mark.parametrize("case", UNSTORABLE)
def test_a_method_whose_state_cannot_be_stored_is_refused_by_name_or_starts_anew(case, pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", UNSTORABLE[case]()
    whole = optimize_noise(pipe, "a", method, generator=generator(), **CALL)
    found = interrupted(pipe, method, path, 1)
    assert not found.complete and found.progress is None
    with pytest.raises(ValueError, match=f"the state of {type(method).__name__} is not stored"):
        optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)
    steps: list[int] = []
    arguments = {"generator": generator(), "callbacks": lambda run: steps.append(run.step), **CALL}
    assert_same(optimize_noise(pipe, "a", method, resume_from=path, save_noise_to=path, **arguments), whole)
    assert steps[0] == 0


def leaves(value: Any, way: tuple = ()) -> list[tuple]:
    """Return the ways to all values of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for name, each in items for found in leaves(each, (*way, name)))]


def changed(value: Any, way: tuple, to: Any) -> Any:
    if not way:
        return to
    value = copy.copy(value)
    value[way[0]] = changed(value[way[0]], way[1:], to)
    return value


def rewritten(path: Path, change) -> None:
    """Change the header and the tensors of a result file."""
    with safe_open(path, framework="pt") as file:
        header, tensors = (
            json.loads(file.metadata()["noiseopt"]),
            {name: file.get_tensor(name) for name in [*file.keys()]},
        )
    header = change(header, tensors) or header
    save_file({name: each.clone() for name, each in tensors.items()}, path, metadata={"noiseopt": json.dumps(header)})


ODD: list[Any] = [None, True, -1, 10**30, "x", [], {}, {"tensor": "0"}, {"list": []}, {"own": True}, {"object": {}}]


@pytest.mark.parametrize("name", slow_except(["cno", "never_too_late", "pcn", "mean_variance"]))
def test_a_hostile_state_is_refused_or_harmless(name, pipe, tmp_path):
    """Each value of the stored state replaced: the call either refuses the file, or ends with a whole result."""
    original, path, method = tmp_path / "original.safetensors", tmp_path / "noise.safetensors", method_of(name)
    interrupted(pipe, method, original, 1, EarlyStopping(9))
    chance, texts = random.Random(0), []
    with safe_open(original, framework="pt") as file:
        ways = leaves(json.loads(file.metadata()["noiseopt"])["progress"])
    for way in chance.sample(ways, min(40, len(ways))):
        path.write_bytes(original.read_bytes())
        value = chance.choice(ODD)
        rewritten(path, lambda header, tensors, way=way, value=value: changed(header, ("progress", *way), value))
        try:
            found = optimize_noise(
                pipe, "a", method, generator=generator(), callbacks=EarlyStopping(9), resume_from=path, **CALL
            )
        except ValueError as error:
            texts.append(str(error))
        else:
            assert found.complete and found.noise.isfinite().all()
    assert len(texts) > 15 and all(text.startswith("Expected ") and len(text) < 1000 for text in texts)


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "not finite", "step"])
def test_hostile_tensors_of_the_state_are_refused(what, pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", method_of("reno")
    interrupted(pipe, method, path, 1)
    with safe_open(path, framework="pt") as file:
        run = json.loads(file.metadata()["noiseopt"])["progress"]["run"]["dict"]
    noise, step = (f"progress.{each['tensor']}" for each in (run["noise"], run["best"]["dict"]["step"]))

    def change(header, tensors) -> None:
        if what == "missing":
            del tensors[noise]
        elif what == "step":
            tensors[step] += 7
        else:
            kinds = {"shape": tensors[noise][:1], "dtype": tensors[noise].double(), "not finite": tensors[noise] / 0}
            tensors[noise] = kinds[what]

    rewritten(path, change)
    with pytest.raises(ValueError, match="Expected the state of an interrupted run"):
        optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)


def test_cno_refuses_estimates_of_another_size(pipe, tmp_path):
    path, method = tmp_path / "noise.safetensors", CNO(steps=3, window_size=4)
    interrupted(pipe, method, path, 1)

    def change(header, tensors) -> None:
        name = header["progress"]["run"]["dict"]["objective"]["dict"]["reference"]["tensor"]
        tensors[f"progress.{name}"] = tensors[f"progress.{name}"][:, :1]

    rewritten(path, change)
    with pytest.raises(ValueError, match="Expected first estimates of shape"):
        optimize_noise(pipe, "a", method, generator=generator(), resume_from=path, **CALL)
