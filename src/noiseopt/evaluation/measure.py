"""The cost of generating an image: seconds, model calls, and memory on top of the models."""

import contextlib
import ctypes
import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..callbacks.early_stopping import synchronize
from ..pipelines.sampling.module_state import DENOISERS

MEBIBYTE = 2**20


@dataclasses.dataclass
class Cost:
    """The cost of a call, for all its images.

    Attributes:
        seconds: Wall-clock time.
        model_calls: Images passed through the denoiser; guidance counts twice.
        memory: Peak in MiB above the memory in use before, or `None` where the system does not report it.
    """

    seconds: float = 0.0
    model_calls: int = 0
    memory: float | None = None


@contextlib.contextmanager
def measured(pipe, device: torch.device) -> Iterator[Cost]:
    """Measure the cost of the code inside the context, which runs `pipe` or copies of it on `device`."""
    cost, memory = Cost(), PeakMemory(device)
    with counted_calls(pipe, cost):
        memory.start()
        synchronize(device)
        started = time.perf_counter()
        yield cost
        synchronize(device)
        cost.seconds = time.perf_counter() - started
        cost.memory = memory.peak()


@contextlib.contextmanager
def counted_calls(pipe, cost: Cost) -> Iterator[None]:
    """Count the images passed through the denoisers of a pipeline. Shallow copies of a module share its hooks."""

    def count(module, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states") if name in kwargs)
        cost.model_calls += len(sample)

    parts = [part for name in DENOISERS if (part := getattr(pipe, name, None)) is not None]
    handles = [part.register_forward_pre_hook(count, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PeakMemory:
    """The peak memory between `start` and `peak`, above that at the start.

    On CUDA from torch's allocator; on Linux from the resident memory of the process, whose peak the kernel tracks and
    resets (`/proc/self/clear_refs`, see proc(5)).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: float | None = None

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / MEBIBYTE
        elif self.device.type == "cpu":
            self.before = reset_resident_peak()

    def peak(self) -> float | None:
        """Return MiB, or `None` if unknown."""
        if self.before is None:
            return None
        on_cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self.device) / MEBIBYTE if on_cuda else resident("VmHWM")
        return None if held is None else max(0.0, held - self.before)


def reset_resident_peak() -> float | None:
    """Reset the kernel's peak and return the resident memory in MiB, or `None` where unsupported."""
    with contextlib.suppress(OSError, AttributeError):  # return freed memory first; it would hide new allocations
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def resident(field: str) -> float | None:
    """Return a field of `/proc/self/status` in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) / 1024 if found else None
