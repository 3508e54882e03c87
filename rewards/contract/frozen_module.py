"""Base class of rewards and features: frozen models in evaluation mode."""

import itertools
from typing import TypeVar

import torch
from torch import nn

FrozenT = TypeVar("FrozenT", bound="FrozenModule")


class FrozenModule(nn.Module):
    """Module that freezes its submodules and stays in evaluation mode.

    Args:
        modules: The submodules by name.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module.requires_grad_(False))
        self.eval()

    def __repr__(self) -> str:
        """Return one line instead of the tree of submodules, which would bury what contains this one."""
        device = self.device
        weights = "" if device is None else f", {str(self.dtype).removeprefix('torch.')} on {device}"
        return f"{type(self).__name__}({getattr(self, 'name', '')!r}{weights})"

    def train(self: FrozenT, mode: bool = True) -> FrozenT:
        """Stay in evaluation mode, because the dropout of a scoring head would make scores random."""
        return super().train(False)

    @property
    def device(self) -> torch.device | None:
        """The device of the weights; None if there are none."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; float32 if there are none."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
