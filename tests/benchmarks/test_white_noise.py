"""The benchmark of the steps on white noise: its default is ReNO's, and its other orders are the paper's set."""

import types
from typing import Any

import pytest
import torch
import white_noise  # pyright: ignore[reportMissingImports]

from noiseopt import ReNO
from noiseopt.callbacks import NoiseState


def moved(method: ReNO, gradients: list[torch.Tensor]) -> torch.Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    problem: Any = types.SimpleNamespace(noise=noise, is_white=True)
    state = method.start(problem)
    for gradient in gradients:
        noise = method.step(NoiseState(None, ["", ""], 2, noise), gradient, state)
    return noise


def test_the_first_row_is_the_default_of_reno():
    gradients = list(torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(
        moved(white_noise.Steps(rewards="red"), gradients), moved(ReNO(rewards="red"), gradients)
    )


@pytest.mark.parametrize(
    ("order", "flatten"),
    [
        ("channels first", lambda noise: noise.flatten(1)),
        ("channels last", lambda noise: noise.permute(0, 2, 3, 1).flatten(1)),
        ("packed", lambda noise: torch.nn.functional.unfold(noise, 2, stride=2).permute(0, 2, 1).flatten(1)),
    ],
)
def test_the_other_orders_are_those_of_one_dimension(order, flatten):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).square()
    found = flatten(white_noise.Steps(rewards="red", order=order).project(noise))
    sizes = torch.fft.rfft(found.double(), norm="ortho").abs()[:, 1:-1]
    second = sizes[:, 15:31]  # the first block has the mean and the highest frequency as its first coefficient
    torch.testing.assert_close(second.square().sum(1), torch.full((2,), 16.0).double(), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    found = white_noise.main(
        ["--limit", "2", "--steps", "3", "--batch-size", "2", "--row", "Adam", "--output", str(tmp_path / "found.json")]
    )
    assert list(found) == ["default", "Adam"] and found["Adam"].at("right", 3).shape == (2,)
    assert "| Adam | " in capsys.readouterr().out and (tmp_path / "found.json").is_file()
