"""Token batches, and linear layers in float32."""

import pytest
import torch
from tiny_blip_rewards import build_bert_tokenizer
from torch import nn

from noiseopt.rewards.contract.image_text import PromptTokens, precise_linear

CPU = torch.device("cpu")


def test_pads_to_the_length_or_to_the_longest_and_cuts():
    prompts = ["a b", "c d e f g h"]
    ids, mask = PromptTokens(build_bert_tokenizer(), 6)(prompts, CPU)
    assert ids.shape == mask.shape == (2, 6)
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert ids[0].tolist() == [2, 8, 9, 3, 0, 0]
    assert ids[1, -1] == 3
    ids, mask = PromptTokens(build_bert_tokenizer(), 40, padding="longest")(prompts, CPU)
    assert ids.shape == (2, 8)


def test_tokenizes_the_same_prompts_once(monkeypatch: pytest.MonkeyPatch):
    tokenizer, calls = build_bert_tokenizer(), []

    def counted(prompts: list[str], **kwargs: object):
        calls.append(prompts)
        return tokenizer(prompts, **kwargs)

    tokens = PromptTokens(counted, 6)
    for _ in range(3):
        tokens(["a", "b"], CPU)
    tokens(["b", "a"], CPU)
    assert calls == [["a", "b"], ["b", "a"]]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_a_precise_layer_rounds_its_weights_only(precision: torch.dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).to(precision), torch.randn(2, 5).to(precision)
    y = precise_linear(layer, x)
    assert y.dtype == torch.promote_types(precision, torch.float32)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)
