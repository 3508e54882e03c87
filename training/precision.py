"""Fast half precision on a CPU, where group norms and attention are slower in it than in single precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class HalfPrecision(TorchFunctionMode):
    """Computes group norms in single precision, and attention as two matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.group_norm:
            return group_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Compute `torch.nn.functional.group_norm` in single precision."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return torch.group_norm(x.float(), num_groups, weight, bias, eps).to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` without dropout."""
    if dropout_p:
        raise ValueError(f"Expected no dropout, but got {dropout_p}.")
    scores = (query * (scale or 1 / math.sqrt(query.shape[-1]))) @ key.transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e9) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


@contextlib.contextmanager
def half(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Run the matrix products of modules that are in single precision in another precision."""
    with torch.autocast(device, dtype, enabled=dtype != torch.float32), HalfPrecision():
        yield
