"""Stages resume where they were interrupted, and keep weights in single precision."""

import torch
from torch import nn

from training.optimization import Run


def test_a_stage_continues_where_it_was_interrupted(tmp_path):
    def go(stop: int | None) -> Run:
        model = nn.Linear(4, 4)
        run = Run(model, tmp_path / "stage.pt", samples=4000, batch=8, lr=1e-3, look=lambda model, path: path.touch())
        for seen in run:
            if seen == stop:
                break
            run.step({"error": model(torch.randn(8, 4)).square().mean()})
        return run

    go(stop=2000)
    again = go(stop=None)
    assert again.seen == 4000
    assert [point["samples"] for point in again.curve] == [800, 1600, 2400, 3200, 4000]
    seconds = [point["seconds"] for point in again.curve]
    assert seconds == sorted(seconds)
    assert len(list(tmp_path.glob("stage_*.png"))) == 10
    assert go(stop=None).seen == 4000


def test_half_precision_trains_weights_in_single_precision(tmp_path):
    model = nn.Linear(4, 1)
    target = torch.tensor([[0.1, -0.2, 0.3, 0.4]])
    run = Run(model, tmp_path / "run.pt", samples=16_000, batch=16, lr=1e-2, dtype=torch.bfloat16)
    for _ in run:
        x = torch.randn(16, 4)
        run.step({"error": (run.fast(x.bfloat16()).float() - x @ target.T).square().mean()})
    assert model.weight.dtype == torch.float32 and run.fast.weight.dtype == torch.bfloat16
    assert (model.weight - target).abs().max() < 0.02
    assert not torch.equal(model.weight, model.weight.bfloat16().float())
    torch.testing.assert_close(run.fast.weight, model.weight.bfloat16())
