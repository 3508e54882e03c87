"""What rewards share whose text tower looks at the image."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .transforms import at_least_float32


class PromptTokens:
    """Prompts -> token ids and attention mask, (B, L) each. The same prompts are tokenised once.

    Features of a text tower that attends to the image change with every image; the ids are all that can be kept.

    Args:
        tokenizer: the tokenizer of the text tower; it needs a padding token.
        max_length: longer prompts are cut to so many tokens, the special ones included.
        padding: to "max_length" or to the "longest" prompt. Masked either way.
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
    """The layer computed in float32 or more, whatever the precision of its weights.

    A scoring head costs nothing, and in bfloat16 it would round a score of 2 to steps of 0.016.
    """
    features = at_least_float32(features)
    return F.linear(features, layer.weight.to(features.dtype), layer.bias.to(features.dtype))
