"""Runs that were interrupted: their call, where they stopped, and how they go on."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...schedulers.noise_samplers import as_noise_sampler, describe_noise_sampler
from .noise_result import NoiseResult, Progress
from .pipeline_description import describe_pipeline, portable
from .result_file import FLOAT_DTYPES
from .settings_diff import plain_description, settings_diff

HOW_NOT_WHAT = ("chunk_size", "checkpointing", "reward_device")  # settings that do not change what a run finds
PLAIN = (bool, int, float, str, type(None))
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}
DEEPEST = 8
MOST_DIFFERENCES = 5  # that are named
MOST_SECONDS = 1e9


class NotStorable(Exception):
    """Reason why the state of a run cannot be stored."""


class NotTheState(Exception):
    """Reason why a stored state does not fit a run."""


def call_description(
    pipe, method: Any, request: Mapping[str, Any], noise_sampler: Any, reward_prompt: Any
) -> dict[str, Any]:
    """Return the call of a run as JSON values that are equal for equal calls: model, method, prompt and arguments."""
    names = [field.name for field in dataclasses.fields(method) if field.name not in HOW_NOT_WHAT]
    chosen = {name: getattr(method, name) for name in names}
    arguments = {name: value for name, value in request.items() if name != "prompt" and value is not None}
    found = {
        "prompt": plain_description(request.get("prompt")),
        "reward_prompt": plain_description(reward_prompt),
        "method": portable({"name": type(method).__name__, **plain_description(chosen)}),
        "arguments": plain_description(arguments),
        "noise_sampler": plain_description(describe_noise_sampler(as_noise_sampler(noise_sampler))),
        "pipeline": type(pipe).__name__,
        **describe_pipeline(pipe),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(found))


def known_run(
    path: str | os.PathLike[str], save_noise_to: str | os.PathLike[str] | None, call: dict[str, Any]
) -> NoiseResult | None:
    """Return the result in a file of the same call, whether complete or to be continued.

    A file that is missing, or of a method whose state is not stored, gives `None` if it is also `save_noise_to`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file of another call, with the differences, and for one that cannot be continued.
    """
    file = Path(path)
    replaced = save_noise_to is not None and Path(save_noise_to).absolute() == file.absolute()
    if replaced and not file.exists():
        return None
    found = NoiseResult.load(file)
    check_same_call(found, call, file)
    if found.complete or found.progress is not None:
        return found
    if replaced:
        return None
    raise ValueError(
        f"Expected a run that can be continued, but the state of {call['method']['name']} is not stored in {file}. "
        "Leave out `resume_from` to start anew."
    )


def check_same_call(found: NoiseResult, call: dict[str, Any], path: Path) -> None:
    """Raise `ValueError`, naming the differences, unless a result is of this call."""
    known = found.provenance.get("call")
    if not isinstance(known, dict):
        raise ValueError(
            f"Expected a result that records its call, but {path} does not. Choose another path, or move it away."
        )
    if changed := settings_diff(known, call):
        more = f"; and {len(changed) - MOST_DIFFERENCES} more" if len(changed) > MOST_DIFFERENCES else ""
        raise ValueError(
            f"Expected the call that {path} is of, but got another one: {'; '.join(changed[:MOST_DIFFERENCES])}{more}. "
            "Pass the same, or choose another path."
        )


def progress_of(parts: Mapping[str, Any], reports: Mapping[str, Any]) -> Progress:
    """Return a copy of the parts of a run. Raises `NotStorable` for what is neither a number nor a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    run = stored(parts, tensors, "the run")
    try:
        kept = copy.deepcopy(dict(reports))
    except Exception as error:
        raise NotStorable(f"a report has no copy: {error}") from None
    return Progress({"run": run, "reports": kept}, tensors)


def kept_attributes(part: Any) -> dict[str, Any]:
    """Return the attributes with which an objective or callback goes on: those named in its class as `continues`.

    Raises:
        NotStorable: For a class where this is `None`.
    """
    names = getattr(part, "continues", ())
    if names is None:
        raise NotStorable(f"{type(part).__name__} keeps candidates")
    return {name: getattr(part, name, None) for name in names}


def continuing(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return those callbacks that go on with some attributes, by name and number."""
    found = [callback for callback in callbacks if getattr(callback, "continues", ())]
    return {f"{type(callback).__name__} {number}": callback for number, callback in enumerate(found)}


def step_reached(known: NoiseResult) -> int:
    """Return the number of steps after which an interrupted run goes on. Raises `ValueError` for an invalid one."""
    parts = {} if known.progress is None else known.progress.parts
    run = parts.get("run")
    step = run["dict"].get("step") if isinstance(run, dict) and isinstance(run.get("dict"), dict) else None
    if type(step) is not int or not 0 <= step <= len(known.losses) or not isinstance(parts.get("reports"), dict):
        raise unfit("its number of steps or its reports are invalid")
    return step


def continued_parts(begun: dict[str, Any], known: NoiseResult, noise: torch.Tensor) -> dict[str, Any]:
    """Return the parts of an interrupted run, with its reports and seconds.

    Args:
        begun: The parts of a run of the same call that has just begun.
        known: The result of the interrupted run.
        noise: `(B, C, H, W)`, the base noise.

    Raises:
        ValueError: If the base noise is another, or the stored state does not fit the run.
    """
    if known.initial_noise is None or not torch.equal(known.initial_noise.to(noise), noise):
        raise ValueError(
            "Expected the noise that the interrupted run began with, but this call draws another. Pass the same "
            "`generator` in the same state, or the same `latents`."
        )
    step = step_reached(known)
    assert known.progress is not None
    restoration = Restoration(known.progress, noise, list(known.scores))
    try:
        parts = restoration.restored(begun, known.progress.parts["run"])
    except (NotTheState, RecursionError) as reason:
        raise unfit(str(reason)) from None
    noises, steps = (parts["noise"], parts["best"]["noise"]), parts["best"]["step"]
    if not all(each.isfinite().all() for each in noises) or not ((steps >= 0) & (steps <= max(step - 1, 0))).all():
        raise unfit("its noise or its best steps are invalid")
    if known.band_changes is None:
        raise unfit("its band changes are missing")
    seconds = known.provenance.get("seconds")
    return {
        **parts,
        "reports": copy.deepcopy(known.progress.parts["reports"]),
        "seconds": seconds if isinstance(seconds, int | float) and 0 <= seconds <= MOST_SECONDS else 0.0,
    }


def first_generator(known: NoiseResult, device: torch.device) -> dict[str, torch.Generator]:
    """Return the argument `generator` with the random stream of an interrupted run before it drew its noise."""
    assert known.progress is not None
    try:
        stream = known.progress.parts["run"]["dict"]["streams"]
        return {"generator": Restoration(known.progress, torch.empty(0), ()).restored(torch.Generator(device), stream)}
    except (KeyError, TypeError, NotTheState):
        return {}  # then another noise is drawn, which is refused


def unfit(reason: str) -> ValueError:
    return ValueError(
        f"Expected the state of an interrupted run of the same method with the same callbacks, but {reason}. Pass the "
        "same, or start anew without `resume_from`."
    )


def set_attributes(part: Any, kept: Mapping[str, Any]) -> None:
    """Set the attributes of an objective or callback."""
    for name, value in kept.items():
        setattr(part, name, value)


def stored(value: Any, tensors: dict[str, torch.Tensor], where: str, depth: int = 0) -> Any:
    """Return a value as JSON; the tensors in it are copied to `tensors`.

    Functions, bound methods included, are not stored: a resumed run has its own.
    """

    def part(each: Any, name: Any) -> Any:
        return stored(each, tensors, f"{where}.{name}", depth + 1)

    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if isinstance(value, torch.Generator):
        return {"generator": part(value.get_state(), "state")}
    if isinstance(value, torch.optim.Adam):
        return {"adam": [part(moments, "state") for moments in value.state_dict()["state"].values()]}
    if isinstance(value, list | tuple):
        return {"list": [part(each, index) for index, each in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: part(each, name) for name, each in value.items()}}
    if callable(value):
        if isinstance(value, torch.nn.Module) or not hasattr(value, "__name__"):
            raise NotStorable(f"{where} is a {type(value).__name__}")
        return {"own": True}
    if type(value).__module__ == "builtins" or not hasattr(value, "__dict__") or depth > DEEPEST:
        raise NotStorable(f"{where} is a {type(value).__name__}")
    return {"object": {name: part(each, name) for name, each in vars(value).items()}}


class Restoration:
    """The inverse of `stored`: fills the parts of a run that has just begun.

    The file is untrusted: it only says numbers, in a structure that the run itself has.

    Args:
        progress: What was stored.
        noise: `(B, ...)`: tensors that the run does not have yet are `(B, ...)` too, and on its device.
        names: The keys of dicts that are still empty: tensors `(B,)` by the name of a score.
    """

    def __init__(self, progress: Progress, noise: torch.Tensor, names: Sequence[str]) -> None:
        self.progress, self.noise, self.names = progress, noise, names

    def restored(self, begun: Any, saved: Any, where: str = "the run") -> Any:
        """Return a part with its stored values: a new value, or the object `begun` itself with other attributes.

        Raises:
            NotTheState: If the structure, a shape or a type is another.
        """
        if not isinstance(saved, dict):
            self.require(type(saved) in PLAIN and (begun is None or type(begun) is type(saved)), where)
            return saved
        ((kind, content),) = saved.items() if len(saved) == 1 else (("", None),)
        restore: Callable[..., Any] | None = getattr(self, f"restored_{kind}", None)
        if restore is None:
            raise NotTheState(f"{where} is of no known kind")
        return restore(begun, content, where)

    def require(self, condition: bool, where: str) -> None:
        if not condition:
            raise NotTheState(f"{where} is of another shape or type")

    def restored_tensor(self, begun: Any, name: Any, where: str) -> torch.Tensor:
        found = self.progress.tensors.get(name) if isinstance(name, str) else None
        if found is None:
            raise NotTheState(f"{where} is missing")
        if not isinstance(begun, torch.Tensor):
            fits = found.shape[:1] == self.noise.shape[:1] and found.dtype in (torch.int64, *FLOAT_DTYPES)
            self.require(begun is None and fits, where)
            return found.to(self.noise.device)
        self.require((found.shape, found.dtype) == (begun.shape, begun.dtype), where)
        if begun.requires_grad:  # an optimizer refers to it
            begun.data.copy_(found)
            return begun
        return found.to(begun.device)

    def restored_generator(self, begun: Any, saved: Any, where: str) -> torch.Generator:
        self.require(isinstance(begun, torch.Generator) and isinstance(saved, dict), where)
        state = self.restored(begun.get_state(), saved, where)
        try:
            begun.set_state(state)
        except RuntimeError:
            raise NotTheState(f"{where} is no state of a generator") from None
        return begun

    def restored_adam(self, begun: Any, saved: Any, where: str) -> torch.optim.Adam:
        self.require(isinstance(begun, torch.optim.Adam) and isinstance(saved, list), where)
        whole, own = begun.state_dict(), [each for group in begun.param_groups for each in group["params"]]
        self.require(len(saved) in (0, len(own)), where)
        for index, (moments, parameter) in enumerate(zip(saved, own, strict=False)):
            like = {name: torch.zeros_like(parameter, requires_grad=False) for name in ADAM_STATE - {"step"}}
            whole["state"][index] = self.restored({"step": torch.zeros(()), **like}, moments, where)
        begun.load_state_dict(whole)
        return begun

    def restored_list(self, begun: Any, saved: Any, where: str) -> list[Any] | tuple[Any, ...]:
        self.require(isinstance(begun, list | tuple | None) and isinstance(saved, list), where)
        likes = begun or [None] * len(saved)
        self.require(len(likes) == len(saved), where)
        pairs = enumerate(zip(likes, saved, strict=True))
        found = [self.restored(like, each, f"{where}.{index}") for index, (like, each) in pairs]
        return tuple(found) if isinstance(begun, tuple) else found

    def restored_dict(self, begun: Any, saved: Any, where: str) -> dict[str, Any]:
        self.require(isinstance(begun, Mapping | None) and isinstance(saved, dict), where)
        likes = begun or dict.fromkeys(saved, self.noise.new_empty(len(self.noise)))
        self.require(saved.keys() == begun.keys() if begun else saved.keys() <= set(self.names), where)
        return {name: self.restored(likes[name], each, f"{where}.{name}") for name, each in saved.items()}

    def restored_own(self, begun: Any, saved: Any, where: str) -> Any:
        self.require(callable(begun), where)
        return begun

    def restored_object(self, begun: Any, saved: Any, where: str) -> Any:
        self.require(hasattr(begun, "__dict__") and isinstance(saved, dict) and not callable(begun), where)
        self.require(saved.keys() == vars(begun).keys(), where)
        for name, each in saved.items():
            vars(begun)[name] = self.restored(vars(begun)[name], each, f"{where}.{name}")
        return begun
