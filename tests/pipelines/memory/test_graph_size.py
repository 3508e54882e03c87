"""Measured size of graphs, and the chunk size that follows from it."""

import dataclasses
import sys
from typing import Literal

import pytest
import torch
from tiny_pipelines import call_arguments, tiny_pipeline

from noiseopt import ReNO, optimize_noise
from noiseopt.pipelines import FunctionObjective, NoiseOptimizer
from noiseopt.pipelines.memory.graph_size import SavedBytes, fitting_chunk_size, free_memory


def test_saved_bytes_are_those_of_the_factors_of_a_product():
    a, b = (torch.rand(10, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with SavedBytes() as saved:
        product = a * b  # saves both
        assert saved.held == 1600
        again = a[:5] * b[:5]  # saves views of the same two storages
        assert saved.held == 1600
        del product
        assert saved.held == 1600
        del again
        assert (saved.held, saved.peak) == (0, 1600)


def test_parameters_are_left_out_and_gradients_are_unchanged():
    layer, x = torch.nn.Linear(4, 4, bias=False).requires_grad_(False), torch.rand(3, 4).requires_grad_()
    with SavedBytes() as saved:
        y = layer(x)
        assert saved.held == 0
        z = y.exp()  # saves its result
        assert saved.held == 3 * 4 * 4
        (gradient,) = torch.autograd.grad(z.sum(), x)
        assert saved.held == 0
    torch.testing.assert_close(gradient, y.detach().exp() @ layer.weight)


@pytest.mark.parametrize(
    ("free", "expected"),
    [(2 * 8000 * 8, None), (2 * 8000 * 8 - 1, 7), (2 * 8000 * 3, 3), (100, 1), (0, 1)],
)
def test_auto_fills_half_of_what_is_free(free, expected):
    assert fitting_chunk_size(8, 8000, free) == expected


def test_graphs_that_hold_nothing_are_not_cut():
    assert fitting_chunk_size(4, 0, 0) is None


def test_there_is_free_memory():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True, "all"])
def test_other_settings_are_refused(chunk_size):
    with pytest.raises(ValueError, match="Expected `chunk_size` to be an integer in"):
        ReNO(rewards="brightness", chunk_size=chunk_size).check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching(NoiseOptimizer):
    """Method that leaves the noise as it is and records the chunk sizes."""

    steps: int = 3
    chunk_size: int | Literal["auto"] | None = "auto"
    gradient: Literal["full", "frozen"] = "full"
    seen: list = dataclasses.field(default_factory=list)

    def objective(self, pipe):
        def look(sample):
            self.seen.append(sample.chunk_size)
            return sample.images.square().flatten(1).mean(1)

        return FunctionObjective(look)

    def step(self, run, gradient, state):
        return run.noise


@pytest.mark.parametrize(("free", "size"), [(0, 1), (2**40, None)])
def test_a_run_counts_before_its_first_step(monkeypatch, free, size):
    monkeypatch.setattr("noiseopt.pipelines.loop.free_memory", lambda device: free)
    method = Watching()
    optimize_noise(tiny_pipeline("sd"), "a", method, **call_arguments("sd"), num_images_per_prompt=3)
    assert method.seen == [size] * 3


def test_what_one_image_holds_is_a_share_of_what_the_batch_does(monkeypatch):
    counted = []
    monkeypatch.setattr("noiseopt.pipelines.loop.fitting_chunk_size", lambda batch, each, free: counted.append(each))
    optimize_noise(tiny_pipeline("sd"), "a", Watching(), **call_arguments("sd"), num_images_per_prompt=3)
    joint = Watching(chunk_size=None)
    with SavedBytes() as saved:
        optimize_noise(tiny_pipeline("sd"), "a", joint, **call_arguments("sd"), num_images_per_prompt=3)
    assert 2.5 < saved.peak / counted[0] < 3.5


@pytest.mark.parametrize(
    ("setting", "batch", "expected"), [(2, 3, 2), (3, 3, None), (4, 3, None), (None, 3, None), (1, 1, None)]
)
def test_numbers_stay_and_a_batch_of_one_is_whole(monkeypatch, setting, batch, expected):
    monkeypatch.setattr("noiseopt.pipelines.loop.free_memory", lambda device: 1 / 0)
    method = Watching(chunk_size=setting)
    optimize_noise(tiny_pipeline("sd"), "a", method, **call_arguments("sd"), num_images_per_prompt=batch)
    assert method.seen == [expected] * 3


def test_a_saved_tensor_that_is_written_to_is_noticed_as_without_the_count():
    x = torch.rand(3, requires_grad=True)
    with SavedBytes():
        y = x.exp()  # saves its result
        z = y + y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(z.sum(), x)


def test_nothing_of_ours_runs_where_a_graph_is_freed():
    """An interrupt there would be printed and dropped: so code may run before and after, but not in finalizers."""
    ran = []
    with SavedBytes() as saved:
        y = torch.rand(3, requires_grad=True).exp().exp().exp()
    assert saved.held == 36
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None)
    del y
    sys.setprofile(before)
    assert ran == [] and saved.held == 0
