"""Exact memory use of tensors, by tracking every storage from its creation until its last tensor is gone."""

import weakref
from typing import Any

import torch

from ..private_names import TorchDispatchMode, storage_key, tensors_in


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
        given = {storage_key(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            self.see(tensor.untyped_storage(), given)
        return output

    def see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage_key(storage), storage.nbytes()
        if place in self.known or place in given:  # a view, or written in place
            return
        self.known.add(place)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.release, place, size)

    def release(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.held -= size
