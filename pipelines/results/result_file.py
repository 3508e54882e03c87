"""Result files: safetensors with JSON in the header. Files are untrusted and checked completely before use."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic_write import atomic_write

RESULT_FORMAT = "noiseopt-result-1"
RESULT_HEADER = {"format": str, "provenance": dict, "generator_devices": list, "reports": dict}
RESULT_HEADER |= {"progress": dict}  # of a run that was interrupted, else empty
RESULT_TENSORS = ("noise", "latents", "losses", "norms", "best_step")
PROVENANCE: dict[str, type] = {"method": str, "pipeline": str, "generators": str, "dtype": str}
PROVENANCE |= {"settings": dict, "scheduler": dict, "arguments": dict, "prompts": list, "seeds": list}
PROVENANCE |= {"complete": bool, "call": dict}
LATER_TENSORS = ("initial_noise", "band_changes")  # missing in files of older versions
PER_SCORE, PER_STREAM, PER_PROGRESS = "scores.", "generator_states.", "progress."
NOISE_DTYPES = (torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, *NOISE_DTYPES)
CUDA_STATE_BYTES, MOST_STATE_BYTES = 16, 1024  # accelerators have counters; the CPU state has 5056 bytes
TORCH_FILES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(6)))  # zip and pickle

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class UnusableResult(Exception):
    """Reason why a file is unusable, phrased to follow its name."""


def write_result_file(path: Path, tensors: Tensors, header: Header) -> None:
    """Write tensors and header atomically; the format is added to the header."""
    metadata = {"noiseopt": json.dumps({"format": RESULT_FORMAT, **header})}
    # cloned, since safetensors refuses tensors that share memory, as noise and latents do in float32
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: save_file(copies, temporary, metadata=metadata))


def read_result_file(path: Path) -> tuple[Header, Tensors]:
    """Read a file of `write_result_file` to the CPU. Nothing is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no valid result file, with the reason.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a file that `NoiseResult.save` wrote, but there is no {path}.")
    try:
        header, tensors = read_checked(path)
    except UnusableResult as problem:
        raise ValueError(f"Expected a file that `NoiseResult.save` wrote, but {path} {problem}.") from None
    return header, tensors


def read_checked(path: Path) -> tuple[Header, Tensors]:
    if not path.is_file():
        raise UnusableResult("is a folder" if path.is_dir() else "is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            header = parsed_header(file.metadata() or {})
            check_names(set(file.keys()), header)  # before reading tensors, which may be large
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnusableResult(unreadable_reason(path, error)) from None
    check_tensors(tensors)
    check_streams(tensors, header)
    check_provenance(header["provenance"], tensors)
    return header, tensors


def unreadable_reason(path: Path, error: Exception) -> str:
    """Return the reason why a file cannot be read, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start.startswith(TORCH_FILES) and isinstance(error, SafetensorError):
        return "is a pickle or a file of `torch.save`, which can run arbitrary code and is not loaded"
    return f"is not a complete safetensors file ({str(error).strip().partition(chr(10))[0].rstrip('.')})"


def parsed_header(metadata: dict[str, str]) -> Header:
    try:
        header = json.loads(metadata.get("noiseopt", "{}"))
    except (ValueError, RecursionError):
        raise UnusableResult("has a header that is not JSON") from None
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, str) and re.fullmatch(r"noiseopt-result-[2-9]|noiseopt-result-[1-9]\d+", found):
        raise UnusableResult(f"was written by a newer noiseopt, in the format {found}. Update noiseopt")
    if found != RESULT_FORMAT:
        raise UnusableResult(f"has no {RESULT_FORMAT} header")
    unknown = sorted((metadata.keys() - {"noiseopt"}) | (header.keys() - RESULT_HEADER.keys()))
    if unknown:
        raise UnusableResult(f"has unknown metadata {brief(unknown)}")
    for name in ("reports", "progress"):  # missing in older files
        header.setdefault(name, {})
    wrong = [name for name, kind in RESULT_HEADER.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise UnusableResult(f"has metadata that is missing or of the wrong type: {brief(wrong)}")
    return header


def check_names(names: set[str], header: Header) -> None:
    """Require the tensors of a result, with one state for each random stream."""
    streams = {f"{PER_STREAM}{index}" for index in range(len(header["generator_devices"]))}
    if missing := sorted((streams | set(RESULT_TENSORS)) - names):
        raise UnusableResult(f"lacks the tensors {brief(missing)}")
    known = {*RESULT_TENSORS, *LATER_TENSORS, *streams}
    if unknown := sorted(name for name in names - known if not name.startswith((PER_SCORE, PER_PROGRESS))):
        raise UnusableResult(f"has unknown tensors {brief(unknown)}")


def check_tensors(tensors: Tensors) -> None:
    """Require dtypes and shapes that agree on the number of images and steps, and finite noise."""
    noise, steps = tensors["noise"], tensors["losses"].shape[:1]
    if noise.ndim < 2 or not noise.numel() or not steps or not steps[0]:
        losses = tuple(tensors["losses"].shape)
        raise UnusableResult(f"has a noise of shape {tuple(noise.shape)} and losses of shape {losses}")
    batch, rows = noise.shape[:1], (*steps, *noise.shape[:1])
    shapes = {"losses": rows, "norms": rows, "best_step": batch, "initial_noise": noise.shape}
    shapes |= {"band_changes": (*rows, 3)} | {name: rows for name in tensors if name.startswith(PER_SCORE)}
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != torch.Size(shapes[name]):
            raise UnusableResult(
                f"has '{name}' of shape {tuple(tensor.shape)}, where {tuple(shapes[name])} is expected"
            )
        if not name.startswith((PER_STREAM, PER_PROGRESS)) and tensor.dtype not in dtypes_of(name):
            raise UnusableResult(f"has '{name}' of {tensor.dtype}")
    latents = tensors["latents"]
    if latents.shape[:1] != batch or latents.ndim < 2 or not latents.numel():
        raise UnusableResult(f"has latents of shape {tuple(latents.shape)} for noise of {tuple(noise.shape)}")
    check_values(tensors, steps[0])


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    if name == "best_step":
        return (torch.int64,)
    return NOISE_DTYPES if name in ("noise", "initial_noise") else FLOAT_DTYPES


def check_values(tensors: Tensors, steps: int) -> None:
    """Require finite noise and latents, and best steps in range; losses of a stopped sample may be NaN."""
    for name in ("noise", "latents", "initial_noise"):
        if name in tensors and not tensors[name].isfinite().all():
            raise UnusableResult(f"has '{name}' with values that are not finite")
    best = tensors["best_step"]
    if best.min() < 0 or best.max() >= steps:
        raise UnusableResult(f"has best steps {brief(best.tolist())} out of {steps} steps")


def check_streams(tensors: Tensors, header: Header) -> None:
    """Require one random stream, or one for each image, with valid generator states."""
    devices, several = header["generator_devices"], header["provenance"].get("generators") == "list"
    expected = len(tensors["noise"]) if several else 1
    if devices and len(devices) != expected:
        raise UnusableResult(f"has {len(devices)} generator states, where {expected} are expected")
    for index, device in enumerate(devices):
        state = tensors[f"{PER_STREAM}{index}"]
        if not isinstance(device, str) or not fits_generator(device, state):
            raise UnusableResult(f"has a generator state that is invalid on {device!r}")


def fits_generator(device: str, state: torch.Tensor) -> bool:
    """Return whether a state is valid for a type of device, which need not be available."""
    if state.dtype != torch.uint8 or state.ndim != 1 or not re.fullmatch("[a-z_]{1,16}", device):
        return False
    if device != "cpu":
        sizes = (CUDA_STATE_BYTES,) if device == "cuda" else range(1, MOST_STATE_BYTES + 1)
        return is_device(device) and len(state) in sizes
    try:
        torch.Generator().set_state(state.clone())
    except RuntimeError:
        return False
    return True


def is_device(name: str) -> bool:
    """Return whether torch knows a type of device, which need not be available."""
    try:
        return torch.device(name).index is None
    except RuntimeError:
        return False


def check_provenance(provenance: dict[str, Any], tensors: Tensors) -> None:
    """Require the types and lengths that `provenance_of` writes for those entries that are present."""
    batch = len(tensors["noise"])
    wrong = [name for name, kind in PROVENANCE.items() if not isinstance(provenance.get(name, kind()), kind)]
    wrong += [name for name in ("model", "revision") if not isinstance(provenance.get(name), str | None)]
    if not wrong:
        prompts, seeds = provenance.get("prompts", [""] * batch), provenance.get("seeds", [])
        checks = {
            "prompts": len(prompts) == batch and all(isinstance(each, str) for each in prompts),
            "seeds": len(seeds) in (0, 1, batch) and all(type(each) is int for each in seeds),
            "dtype": isinstance(getattr(torch, provenance.get("dtype", "float32"), None), torch.dtype),
        }
        wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise UnusableResult(f"has a provenance whose {brief(wrong)} does not match its noise")


def brief(values: list[Any]) -> str:
    """Return the first few values as text of limited length, since the file is untrusted."""
    text = ", ".join(str(value) for value in values[:5])
    return text if len(text) <= 200 else text[:200] + "…"
