"""How many images fit into memory at once while a gradient is taken: counted, not guessed."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..sampling.internals import base_of_view

ChunkSetting = int | Literal["auto"] | None


class KeptTensor:
    """A tensor that a graph has saved; the count is told when the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor.detach(), release  # a result that knows its graph would keep it for ever

    def __del__(self) -> None:
        self.release()


class GraphTooLarge(Exception):
    """A graph that is being built holds more than it may."""


class SavedBytes:
    """The bytes that graphs made inside this context hold, each storage once, parameters left out.

    Args:
        limit: What they may hold; `None` for anything.

    Attributes:
        held: Now.
        peak: The most at any one time.

    Raises:
        GraphTooLarge: Out of the operation that would hold more than the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> KeptTensor:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(base_of_view(tensor), torch.nn.Parameter):
            return KeptTensor(tensor, lambda: None)
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[place]:
            if self.limit is not None and self.held + size > self.limit:
                raise GraphTooLarge
            self.held += size
            self.peak = max(self.peak, self.held)
        self.holders[place] += 1
        return KeptTensor(tensor, lambda: self.release(place, size))

    def release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.held -= size


def fitting_chunk_size(batch: int, per_image: int, free: int) -> int | None:
    """How many images to have in memory at once, `None` for the whole batch.

    Args:
        batch: B, how many there are.
        per_image: The bytes that the graph of one holds.
        free: The bytes that are free; half of them is left to what was not counted.
    """
    fitting = free // 2 // per_image if per_image else batch
    return None if fitting >= batch else max(1, fitting)


def check_chunk_size(chunk_size: Any) -> None:
    """Raise `ValueError` unless `chunk_size` is an integer of 1 or more, "auto" or `None`."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1
    if not whole and chunk_size is not None and chunk_size != "auto":
        raise ValueError(f'Expected `chunk_size` to be 1 or more, "auto" or `None`, but got {chunk_size!r}.')


def free_memory(device: torch.device) -> int:
    """The bytes that tensors on a device can still take; for CUDA what its caching allocator keeps unused as well."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # accelerate brings it; not needed but here

    return psutil.virtual_memory().available
