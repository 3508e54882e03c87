"""Exact memory use of tensors, by tracking every storage from its creation until its last tensor is gone."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created inside the context, including those of graphs and backward passes.

    On a CPU this is exact, unlike the resident memory of the process. Temporary buffers inside kernels are not counted.
    Operations are slower inside the context, so time must be measured without it.

    Attributes:
        held: Bytes alive now.
        peak: Maximum of `held`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(tensor)._cdata for tensor in tensors_in((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            self.see(storage_of(tensor), given)
        return output

    def see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known or place in given:  # a view, or written in place
            return
        self.known.add(place)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.release, place, size)

    def release(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.held -= size


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
