"""Size of the graphs that a gradient needs, measured rather than estimated."""

import weakref
from collections import Counter, deque
from typing import Any

import torch

from ...private_names import base_of_view, version_of


class SavedTensor:
    """Tensor saved by a graph."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # an output of the graph would refer to the graph and keep it alive
        self.version = version_of(tensor)

    def unchanged(self) -> torch.Tensor:
        """Return the tensor. Raises `RuntimeError` if it was written to, as autograd does without these hooks."""
        if version_of(self.tensor) != self.version:
            raise RuntimeError("A tensor needed for gradient computation has been modified by an inplace operation.")
        return self.tensor


class GraphTooLarge(Exception):
    """A graph under construction exceeds its limit."""


class SavedBytes:
    """Context that counts the bytes saved by the graphs built inside it: each storage once, parameters excluded.

    Args:
        limit: Upper limit in bytes, `None` for no limit.

    Attributes:
        peak: The most bytes saved at one time.

    Raises:
        GraphTooLarge: From the operation that would exceed the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.bytes = self.peak = 0
        self.holders: Counter[int] = Counter()
        self.storages: dict[weakref.ref[SavedTensor], tuple[int, int]] = {}  # address and size, by what holds them
        # A graph is freed anywhere. Code of ours that ran there could be interrupted, and Python drops exceptions from
        # finalizers: so a freed tensor is put into this list by C code alone.
        self.freed: deque[weakref.ref[SavedTensor]] = deque()

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, SavedTensor.unchanged)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def held(self) -> int:
        """Bytes saved now."""
        while self.freed:
            address, size = self.storages.pop(self.freed.popleft())
            self.holders[address] -= 1
            if not self.holders[address]:
                del self.holders[address]
                self.bytes -= size
        return self.bytes

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        if isinstance(tensor, torch.nn.Parameter) or isinstance(base_of_view(tensor), torch.nn.Parameter):
            return saved
        held, storage = self.held, tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[address]:
            if self.limit is not None and held + size > self.limit:
                raise GraphTooLarge
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.holders[address] += 1
        self.storages[weakref.ref(saved, self.freed.append)] = (address, size)
        return saved


def fitting_chunk_size(batch: int, per_image: int, free: int) -> int | None:
    """Return the number of images to process at once, `None` for the whole batch.

    Args:
        batch: B, the number of images.
        per_image: Bytes that the graph of one image saves.
        free: Free bytes. Half of them is left for what was not counted.
    """
    fitting = free // 2 // per_image if per_image else batch
    return None if fitting >= batch else max(1, fitting)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free for tensors on a device, the unused cache of the CUDA allocator included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil  # a dependency of accelerate

    return psutil.virtual_memory().available
