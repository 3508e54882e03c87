"""What rewards and features share: models that are only measured with."""

import itertools
from typing import TypeVar

import torch
from torch import nn

FrozenT = TypeVar("FrozenT", bound="FrozenModule")


class FrozenModule(nn.Module):
    """A module of frozen parts that stays in evaluation mode: what it gives are measurements.

    Args:
        modules: the parts by name.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module.requires_grad_(False))
        self.eval()

    def train(self: FrozenT, mode: bool = True) -> FrozenT:
        """Stay in evaluation mode: the dropout of a scoring head would make the scores random."""
        return super().train(False)

    @property
    def device(self) -> torch.device | None:
        """Where the weights are, or None without any."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, float32 without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
