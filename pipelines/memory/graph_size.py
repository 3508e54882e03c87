"""Size of the graphs that a gradient needs, measured rather than estimated."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ...private_names import base_of_view


class SavedTensor:
    """Tensor saved by a graph; calls `release` when the graph is freed."""

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None]) -> None:
        # detached: an output of the graph would refer to the graph and keep it alive
        self.tensor, self.release = tensor.detach(), release

    def __del__(self) -> None:
        self.release()


class GraphTooLarge(Exception):
    """A graph under construction exceeds its limit."""


class SavedBytes:
    """Context that counts the bytes saved by the graphs built inside it: each storage once, parameters excluded.

    Args:
        limit: Upper limit in bytes, `None` for no limit.

    Attributes:
        held: Bytes saved now.
        peak: The most bytes saved at one time.

    Raises:
        GraphTooLarge: From the operation that would exceed the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(base_of_view(tensor), torch.nn.Parameter):
            return SavedTensor(tensor, lambda: None)
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[address]:
            if self.limit is not None and self.held + size > self.limit:
                raise GraphTooLarge
            self.held += size
            self.peak = max(self.peak, self.held)
        self.holders[address] += 1
        return SavedTensor(tensor, lambda: self.release(address, size))

    def release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.held -= size


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
