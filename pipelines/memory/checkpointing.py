"""Gradient checkpointing for one pipeline call."""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...private_names import block_settings, checkpoint_blocks, replace_block_settings, supports_block_checkpointing
from .graph_size import GraphTooLarge, SavedBytes, free_memory
from .module_copies import with_forward

CheckpointPolicy = Literal["none", "blocks", "steps"]
Checkpointing = Literal["auto", "none", "blocks", "steps"]
POLICIES: tuple[CheckpointPolicy, ...] = ("none", "blocks", "steps")  # each stores less than the one before
BLOCK_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


class Checkpoints:
    """Gradient checkpointing of one pipeline call, shared by the samplers of its chunks.

    * "none": store all activations.
    * "blocks": store the input of each block of denoiser and decoder, as diffusers' own checkpointing does.
    * "steps": store the input of each denoiser call, and the block inputs of the one call that is being recomputed, so
      that the memory hardly grows with the number of steps.

    A decoder without such blocks that decodes a video in chunks of frames, as Wan's, is checkpointed chunk by chunk.
    Denoisers without such blocks are checkpointed call by call with "blocks" too. So are denoisers whose LoRA the call
    scales: diffusers resets the scale after the forward pass, and a block that is recomputed later would miss it.

    A graph that is built inside the context must be backpropagated inside it, as blocks read their setting then too. On
    exit the modules are as they were. Checkpointing that the user has enabled stays on throughout. A replaced
    `forward` with a state of its own, such as a cache of steps, needs "none", as it may not compute the same again.

    Args:
        setting: A policy, or "auto": the first of "none", "blocks" and "steps" whose graph takes at most half of the
            free memory. The graph is measured while it is built, and built again with the next policy if it is too
            large.
        denoisers: Modules called in each step with a gradient.
        decoder: Module called once.
        scaled_lora: Whether the call scales the LoRA of its denoiser.

    Attributes:
        policy: The policy in force.
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
        self.measured: set[Hashable] = set()
        self.changed: list[tuple[nn.Module, dict[str, Any]]] = []
        self.replaced: list[nn.Module] = []

    def __enter__(self) -> "Checkpoints":
        self.in_force = True
        self.take("none" if self.setting == "auto" else self.setting)
        return self

    def __exit__(self, *error: Any) -> None:
        for module, settings in self.changed:
            replace_block_settings(module, settings)
        for module in self.replaced:
            del module.forward
        self.changed, self.replaced = [], []
        self.policy, self.in_force, self.settled = "none", False, False
        self.measured.clear()

    @property
    def ladder(self) -> Sequence[CheckpointPolicy]:
        """The policies that may be used from here on: one, unless the setting is "auto"."""
        if self.setting != "auto" or not self.in_force:
            return (self.policy,)
        policies = POLICIES if self.denoisers else POLICIES[:2]  # "steps" is for denoisers
        return policies[policies.index(self.policy) :]

    def take(self, policy: CheckpointPolicy) -> None:
        """Use a policy for the graphs built from here on."""
        self.policy = policy
        if policy != "none" and not self.changed:
            models = [model for model in [*self.denoisers, self.decoder] if self.has_blocks(model)]
            blocks = [block for model in models for block in unchecked_blocks(model)]
            self.changed = [(block, block_settings(block)) for block in blocks]
            for block in blocks:
                checkpoint_blocks(block, BLOCK_CHECKPOINT)
        if policy != "none" and not self.replaced:
            self.replaced = chunk_decoders(self.decoder)
            for module in self.replaced:
                vars(module)["forward"] = recomputed_by_chunk(module.forward)

    def has_blocks(self, model: Any) -> bool:
        """Return whether a model is checkpointed block by block."""
        return supports_block_checkpointing(model) and (model is self.decoder or not self.scaled_lora)

    def call_of(self, model: Any) -> Any:
        """Return a denoiser as it is called in a step under the policy."""
        whole = self.policy == "steps" or (self.policy == "blocks" and not self.has_blocks(model))
        return checkpointed(model) if whole and model in self.denoisers else model

    def settle(self) -> None:
        """Measure no more graphs: the policy is set by `take` from here on."""
        self.settled = True

    def fitted(self, kind: Hashable, device: torch.device, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return `build()`, which builds a graph, under the first policy of the `ladder` whose graph fits.

        Only the first graph of each `kind` is measured: those of later steps have the same size.
        """
        if self.settled or kind in self.measured:
            return build()
        self.measured.add(kind)
        *others, last = self.ladder
        for policy in others:
            self.take(policy)
            try:
                with SavedBytes(limit=free_memory(device) // 2):
                    return build()
            except GraphTooLarge:
                continue
        self.take(last)
        return build()


def unchecked_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a diffusers model whose checkpointing is off."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", True) is False:
            yield module


def chunk_decoders(decoder: Any) -> list[nn.Module]:
    """Return the part of a decoder that it calls for one chunk of frames after another, if it has no blocks."""
    inner = getattr(decoder, "decoder", None)
    whole = supports_block_checkpointing(decoder) or not isinstance(inner, nn.Module) or "forward" in vars(inner)
    return [] if whole else [inner]


def recomputed_by_chunk(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a forward pass that is recomputed in the backward pass, with the lists that it is given as they were.

    Causal video decoders keep the last frames of a chunk in lists, for the next chunk.
    """

    @functools.wraps(forward)
    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        lists = {id(each): each for each in (*args, *kwargs.values()) if isinstance(each, list)}
        before, done = {key: list(each) for key, each in lists.items()}, []

        def run() -> torch.Tensor:
            own = {key: list(each) for key, each in before.items()}
            given = [own.get(id(each), each) for each in args]
            output = forward(*given, **{name: own.get(id(each), each) for name, each in kwargs.items()})
            for key, each in lists.items() if not done else ():
                each[:] = own[key]
            done.append(True)
            return output

        return BLOCK_CHECKPOINT(run)

    return recomputed


def checkpointed(module: nn.Module) -> nn.Module:
    """Return a shallow copy whose forward pass stores its inputs only and is recomputed in the backward pass."""
    forward = module.forward

    @functools.wraps(forward)
    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return with_forward(module, recomputed)


def scales_lora(request: dict[str, Any]) -> bool:
    """Return whether a call scales the LoRA of its denoiser, as `cross_attention_kwargs={"scale": 0.5}` does."""
    settings = [value for value in request.values() if isinstance(value, dict)]
    return any(value.get("scale") not in (None, 1, 1.0) for value in settings)
