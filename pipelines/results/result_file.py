"""Result files: safetensors with JSON in the header. Files are untrusted and checked completely before use."""

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ...shown_text import shown
from .atomic_write import atomic_write

RESULT_FORMAT = "noiseopt-result-1"
RESULT_HEADER = {"format": str, "provenance": dict, "generator_devices": list, "reports": dict, "progress": dict}
RESULT_TENSORS = ("noise", "latents", "losses", "norms", "best_step")
PROVENANCE: dict[str, type] = {
    **dict.fromkeys(("method", "pipeline", "generators", "dtype"), str),
    **dict.fromkeys(("settings", "scheduler", "arguments", "call"), dict),
    **dict.fromkeys(("prompts", "seeds"), list),
    "complete": bool,
}
NAMES_OR_NONE = ("model", "revision")
CLASS_NAMES = ("method", "pipeline")  # and the entry "class" of the scheduler and the decoder
LATER_TENSORS = ("initial_noise", "band_changes")  # missing in files of older versions
PER_SCORE, PER_STREAM, PER_PROGRESS = "scores.", "generator_states.", "progress."
NOISE_DTYPES = (torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, *NOISE_DTYPES)
CUDA_STATE_BYTES, MOST_STATE_BYTES = 16, 1024  # accelerators have counters; the CPU state has 5056 bytes
TORCH_FILES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(6)))  # zip and pickle
MOST_NAME_CHARACTERS = 100
MOST_LEVELS = 100  # of lists and dicts in one another
LENGTH_BYTES = 8  # of the length of the header, at the start of a safetensors file
MOST_HEADER_BYTES = 4 * 2**20  # a header of one second's parsing
MOST_BYTES = 2 * 2**30  # the noises of 2700 images at 1024 px

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class UnusableResult(Exception):
    """Reason why a file is unusable, phrased to follow its name."""


def write_result_file(path: Path, tensors: Tensors, header: Header) -> None:
    """Write tensors and header atomically; the format is added to the header.

    Raises:
        ValueError: For a header that is no JSON, a result that is too large to be read again, and a path where there is
            something that is not a file.
        OSError: If the file cannot be written.
    """
    metadata = {"noiseopt": json_of({"format": RESULT_FORMAT, **header})}
    # cloned, since safetensors refuses tensors that share memory, as noise and latents do in float32
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = save_tensors(copies, metadata=metadata)
    if header_length(content) > MOST_HEADER_BYTES or len(content) > MOST_BYTES:
        raise ValueError(
            f"Expected a result of at most {MOST_BYTES:,} bytes with provenance and reports of {MOST_HEADER_BYTES:,}, "
            f"but got {len(content):,} and {header_length(content):,}. Put less into `reports`, or fewer images into a "
            "run."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda part: part.write_bytes(content))


def json_of(header: Header) -> str:
    """Return a header as JSON, with the numbers and arrays of numpy and torch as numbers and lists."""
    try:
        text = json.dumps(header, default=lambda value: value.tolist())
        check_levels(json.loads(text))
        return text
    except UnusableResult as problem:
        raise ValueError(f"Expected reports that can be read again, but the result {problem}.") from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected provenance and reports as JSON values, but got others: {error}. Convert what a callback puts "
            "into `reports` to numbers, texts, lists and dicts."
        ) from None


def read_result_file(path: Path) -> tuple[Header, Tensors]:
    """Read a file of `write_result_file` to the CPU. Nothing is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no valid result file or cannot be read, with the reason.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a file that `NoiseResult.save` wrote, but there is no {path}.")
    try:
        if not path.is_file():
            raise UnusableResult("is a folder" if path.is_dir() else "is not a regular file")
        with path.open("rb") as file:  # once: another process may replace the file at any time
            header, tensors = read_checked(file)
    except OSError as error:
        raise ValueError(f"Expected a file that can be read, but got {path}: {error.strerror}.") from None
    except UnusableResult as problem:
        raise ValueError(f"Expected a file that `NoiseResult.save` wrote, but {path} {problem}.") from None
    return header, tensors


def is_result_file(path: Path) -> bool:
    """Return whether the header of a file identifies a result, even of a newer version."""
    try:
        with path.open("rb") as file:
            found = metadata_of(tensor_index(read_index(file)))
    except (OSError, UnusableResult):
        return False
    return "noiseopt-result-" in found.get("noiseopt", "")


def read_checked(file: BinaryIO) -> tuple[Header, Tensors]:
    """Read and check an open file, its header first."""
    start = read_index(file)
    index = tensor_index(start)
    header = parsed_header(metadata_of(index))
    check_names(index.keys() - {"__metadata__"}, header)
    if os.fstat(file.fileno()).st_size > MOST_BYTES:
        raise UnusableResult(f"has more than the {MOST_BYTES:,} bytes that a result may have")
    try:
        tensors = load_tensors(start + file.read())
    except (SafetensorError, LookupError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnusableResult(f"is not a complete safetensors file ({shown(error).rstrip('.')})") from None
    check_tensors(tensors)
    check_provenance(header["provenance"], tensors)
    check_streams(tensors, header)
    return header, tensors


def header_length(start: bytes) -> int:
    return int.from_bytes(start[:LENGTH_BYTES], "little")


def read_index(file: BinaryIO) -> bytes:
    """Read the first part of a safetensors file: the length of its header, and the header."""
    start = file.read(LENGTH_BYTES)
    size, length = os.fstat(file.fileno()).st_size, header_length(start)
    if not start:
        raise UnusableResult("is empty")
    if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        if start.startswith(TORCH_FILES):
            raise UnusableResult(
                "is a pickle or a file of `torch.save`, which can run arbitrary code and is not loaded"
            )
        raise UnusableResult("is not a complete safetensors file (its header is longer than the file)")
    if length > MOST_HEADER_BYTES:
        raise UnusableResult(f"has a header of {length:,} bytes, where a result has at most {MOST_HEADER_BYTES:,}")
    return start + file.read(length)


def tensor_index(start: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file: the entry of each tensor by name, and `__metadata__`."""
    try:
        index = json.loads(start[LENGTH_BYTES:].decode("utf-8"))
    except (ValueError, RecursionError):
        raise UnusableResult("is not a complete safetensors file (its header is not JSON)") from None
    if not isinstance(index, dict):
        raise UnusableResult("is not a complete safetensors file (its header is no JSON object)")
    return index


def metadata_of(index: dict[str, Any]) -> dict[str, str]:
    found = index.get("__metadata__", {})
    texts = isinstance(found, dict) and all(isinstance(text, str) for text in found.values())
    if not texts:
        raise UnusableResult("is not a complete safetensors file (its metadata are not texts)")
    return found


def parsed_header(metadata: dict[str, str]) -> Header:
    try:
        header = json.loads(metadata.get("noiseopt", "{}"))
    except (ValueError, RecursionError):
        raise UnusableResult("has a header that is not JSON") from None
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, str) and re.fullmatch(r"noiseopt-result-([2-9]|[1-9]\d{1,5})", found, re.ASCII):
        raise UnusableResult(f"was written by a newer noiseopt, in the format {found}. Update noiseopt")
    if found != RESULT_FORMAT:
        raise UnusableResult(f"has no {RESULT_FORMAT} header")
    check_levels(header)
    unknown = sorted((metadata.keys() - {"noiseopt"}) | (header.keys() - RESULT_HEADER.keys()))
    if unknown:
        raise UnusableResult(f"has unknown metadata {brief(unknown)}")
    for name in ("reports", "progress"):  # missing in older files
        header.setdefault(name, {})
    wrong = [name for name, kind in RESULT_HEADER.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise UnusableResult(f"has metadata that is missing or of the wrong type: {brief(wrong)}")
    return header


def check_levels(header: Header) -> None:
    """Require a limited depth: other code walks through these values by recursion."""
    level: list[Any] = [header]
    for _ in range(MOST_LEVELS):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for each in parts for part in each if isinstance(part, dict | list)]
    if level:
        raise UnusableResult(f"has a header of more than {MOST_LEVELS} levels")


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
        raise UnusableResult(
            f"has a noise of shape {shape_of(noise)} and losses of shape {shape_of(tensors['losses'])}"
        )
    batch, rows = noise.shape[:1], (*steps, *noise.shape[:1])
    shapes = {"losses": rows, "norms": rows, "best_step": batch, "initial_noise": noise.shape}
    shapes |= {"band_changes": (*rows, 3)} | {name: rows for name in tensors if name.startswith(PER_SCORE)}
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != torch.Size(shapes[name]):
            expected = shown(tuple(shapes[name]))
            raise UnusableResult(f"has '{shown(name)}' of shape {shape_of(tensor)}, where {expected} is expected")
        if not name.startswith((PER_STREAM, PER_PROGRESS)) and tensor.dtype not in dtypes_of(name):
            raise UnusableResult(f"has '{shown(name)}' of {tensor.dtype}")
    latents = tensors["latents"]
    if latents.shape[:1] != batch or latents.ndim < 2 or not latents.numel():
        raise UnusableResult(f"has latents of shape {shape_of(latents)} for noise of {shape_of(noise)}")
    check_values(tensors, steps[0])


def shape_of(tensor: torch.Tensor) -> str:
    return shown(tuple(tensor.shape))


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
            raise UnusableResult(f"has a generator state that is invalid on {shown(repr(device))}")


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
    wrong += [name for name in NAMES_OR_NONE if not isinstance(provenance.get(name), str | None)]
    if not wrong:
        prompts, seeds = provenance.get("prompts", [""] * batch), provenance.get("seeds", [])
        checks = {
            "prompts": len(prompts) == batch and all(isinstance(each, str) for each in prompts),
            "seeds": len(seeds) in (0, 1, batch) and all(type(each) is int for each in seeds),
            "dtype": isinstance(getattr(torch, provenance.get("dtype", "float32"), None), torch.dtype),
            "generators": provenance.get("generators", "list") in ("list", "single"),
            "scheduler": is_class_name(provenance.get("scheduler", {}).get("class", "unknown")),
            "decoder": is_described(provenance.get("decoder")),
        }
        checks |= {name: is_class_name(provenance.get(name, "unknown")) for name in CLASS_NAMES}
        wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise UnusableResult(f"has a provenance whose {brief(wrong)} does not match its noise")


def is_class_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and len(name) <= MOST_NAME_CHARACTERS


def is_described(decoder: Any) -> bool:
    """Return whether a value is what `describe_decoder` returns."""
    if decoder is None:
        return True
    return (
        isinstance(decoder, dict)
        and is_class_name(decoder.get("class"))
        and isinstance(decoder.get("name"), str | None)
    )


def brief(values: list[Any]) -> str:
    """Return the first few values as text of limited length, since the file is untrusted."""
    return shown(", ".join(shown(value) for value in values[:5]))
