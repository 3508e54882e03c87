"""Half precision computes the stock functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.precision import HalfPrecision


def test_half_precision_computes_the_same_functions():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    keep = torch.rand(10, 10) < 0.5
    keep[:, 0] = True
    norm, x = nn.GroupNorm(4, 16), torch.randn(2, 16, 5, 5)
    cases = [
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(10.0).expand(10, 10)),
        lambda: norm(x),
    ]
    for case in cases:
        stock = case()
        with HalfPrecision():
            torch.testing.assert_close(case(), stock, atol=1e-5, rtol=1e-4)
    with HalfPrecision(), pytest.raises(ValueError, match="no dropout"):
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    half = norm.bfloat16()(x.bfloat16())
    with HalfPrecision():
        exact = norm(x.bfloat16())
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - half.float()).abs().max() < 0.05
