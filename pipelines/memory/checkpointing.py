"""What of a pipeline call is computed again in the backward pass instead of kept: a smaller graph for more time."""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..sampling.internals import block_settings, checkpoint_blocks, replace_block_settings, supports_block_checkpointing
from .graph_size import GraphTooLarge, SavedBytes, free_memory
from .module_copies import with_forward
from .restore import undoing

CheckpointPolicy = Literal["none", "blocks", "steps"]
Checkpointing = Literal["auto", "none", "blocks", "steps"]
POLICIES: tuple[CheckpointPolicy, ...] = ("none", "blocks", "steps")  # each holds less than the one before
BLOCK_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


class Checkpoints:
    """The checkpointing of one pipeline call, in force inside `with`; shared by the samplers of its parts.

    "blocks" is diffusers' own: of each block of denoiser and decoder only the input is kept. "steps" keeps the input of
    each call of the denoiser alone, and of the call that is computed again the blocks' inputs, so that the memory
    hardly grows with the number of steps. A denoiser without such blocks, and one whose LoRA is scaled by the call, is
    kept by its calls with "blocks" too: diffusers scales it around its forward pass, and a block that was computed
    again later would miss that.

    A call that was begun inside has to be passed backwards inside, as blocks look at their setting then too. Outside
    the modules are exactly as they were; what has been turned on by the user stays on throughout.

    Args:
        setting: A policy, or "auto": the first of none, blocks and steps whose graph takes at most half of the memory
            that is free. It is counted while the first graph is built, which is begun again with the next policy where
            it does not fit.
        denoisers: What is called in each step with a gradient.
        decoder: What is called once.
        scaled_lora: Whether the call scales the LoRA of its denoiser.

    Attributes:
        policy: What is in force.
    """

    policy: CheckpointPolicy = "none"

    def __init__(
        self,
        setting: Checkpointing,
        denoisers: Sequence[nn.Module] = (),
        decoder: Any = None,
        scaled_lora: bool = False,
    ) -> None:
        self.setting: Checkpointing = setting
        self.denoisers, self.scaled_lora = list(denoisers), scaled_lora
        self.decoder = decoder
        self.in_force = self.settled = False
        self.counted: set[Hashable] = set()
        self.changed: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> "Checkpoints":
        self.in_force = True
        self.take("none" if self.setting == "auto" else self.setting)
        return self

    def __exit__(self, *error: Any) -> None:
        with undoing(self.restore):
            pass

    def restore(self) -> None:
        for module, before in self.changed:
            replace_block_settings(module, before)
        self.changed = []
        self.policy, self.in_force, self.settled = "none", False, False
        self.counted.clear()

    @property
    def ladder(self) -> Sequence[CheckpointPolicy]:
        """The policies that may be taken from here on: one, unless the setting is "auto"."""
        if self.setting != "auto" or not self.in_force:
            return (self.policy,)
        within = POLICIES if self.denoisers else POLICIES[:2]  # without them there is a decoder only
        return within[within.index(self.policy) :]

    def take(self, policy: CheckpointPolicy) -> None:
        """Put a policy in force for the graphs from here on; those that exist stay as they are."""
        self.policy = policy
        if policy != "none" and not self.changed:
            kept_by_blocks = [part for part in [*self.denoisers, self.decoder] if self.has_blocks(part)]
            modules = [module for part in kept_by_blocks for module in blocks_of(part)]
            self.changed = [(module, block_settings(module)) for module in modules]
            for module in modules:
                checkpoint_blocks(module, BLOCK_CHECKPOINT)

    def has_blocks(self, part: Any) -> bool:
        """Whether a module is kept by its blocks."""
        scaled = self.scaled_lora and part is not self.decoder
        return supports_block_checkpointing(part) and not scaled

    def call_of(self, part: Any) -> Any:
        """A denoiser as it is to be called in a step."""
        whole = self.policy == "steps" or (self.policy == "blocks" and not self.has_blocks(part))
        return recomputed_whole(part) if whole and part in self.denoisers else part

    def settle(self) -> None:
        """Leave it at the policy that is in force, or that is taken by hand."""
        self.settled = True

    def fitted(self, kind: Hashable, device: torch.device, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`draw()`, which builds a graph, with the first policy of those that may be taken whose graph fits.

        Graphs are counted once of each `kind`: the images of a run are all made in the same way.
        """
        if self.settled or kind in self.counted:
            return draw()
        self.counted.add(kind)
        *others, last = self.ladder
        for policy in others:
            self.take(policy)
            try:
                with SavedBytes(limit=free_memory(device) // 2):
                    return draw()
            except GraphTooLarge:
                continue
        self.take(last)
        return draw()


def blocks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that keep their inputs alone once they are told to, and are not yet."""
    for module in part.modules():
        if getattr(module, "gradient_checkpointing", True) is False:
            yield module


def recomputed_whole(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and keeps of each call its inputs alone, where there is a gradient."""
    forward = module.forward

    @functools.wraps(forward)
    def keep_inputs(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return with_forward(module, keep_inputs)


def check_checkpointing(checkpointing: Any) -> None:
    """Raise `ValueError` unless `checkpointing` is "auto" or a policy."""
    if checkpointing not in ("auto", *POLICIES):
        raise ValueError(
            f'Expected `checkpointing` to be "auto", "none", "blocks" or "steps", but got {checkpointing!r}.'
        )


def scales_lora(request: dict[str, Any]) -> bool:
    """Whether a call scales the LoRA of its denoiser, as by `cross_attention_kwargs={"scale": 0.5}`."""
    settings = [value for value in request.values() if isinstance(value, dict)]
    return any(value.get("scale") not in (None, 1, 1.0) for value in settings)
