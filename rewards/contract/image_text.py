"""Utilities of rewards whose text tower attends to the image."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .transforms import at_least_float32


class PromptTokens:
    """Cached tokenization: prompts -> token ids and attention mask, (B, L) each.

    The features of a text tower that attends to the image depend on the image, so only the ids can be cached.

    Args:
        tokenizer: The tokenizer of the text tower, with a padding token.
        max_length: The number of tokens, special ones included, to which longer prompts are truncated.
        padding: Pad to "max_length" or to the "longest" prompt. Padding is masked in both cases.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        padding: Literal["longest", "max_length"] = "max_length",
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.padding = padding
        self.batches: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        key = tuple(prompts)
        if key not in self.batches:
            tokens = self.tokenizer(list(key), padding=self.padding, truncation=True, max_length=self.max_length)
            self.batches[key] = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
        ids, mask = self.batches[key]
        return ids.to(device), mask.to(device)


def precise_linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """Apply a linear layer in float32 or more, whatever the dtype of its weights.

    A scoring head is cheap, and bfloat16 would round scores near 2 to steps of 0.016.
    """
    features = at_least_float32(features)
    return F.linear(features, layer.weight.to(features.dtype), layer.bias.to(features.dtype))
