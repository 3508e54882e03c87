"""The cost of a call: denoiser calls, seconds, and peak memory."""

import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_pipelines import call_arguments, tiny_pipeline

from noiseopt import BestOfN, ReNO, optimize_noise
from noiseopt.evaluation import measure
from noiseopt.evaluation.measure import measured

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_every_image_of_every_pass_is_counted(family):
    pipe, call = tiny_pipeline(family), call_arguments(family)
    with measured(pipe, CPU) as cost:
        pipe("a", num_images_per_prompt=3, output_type="latent", **call)
    assert cost.model_calls == 3 * 2 * 2  # images, steps, with and without the prompt


@pytest.mark.parametrize(
    "method",
    [
        BestOfN(rewards="red", steps=3),
        ReNO(rewards="red", steps=3),
        ReNO(rewards="red", steps=3, gradient="frozen"),
        ReNO(rewards="red", steps=6, preview=True),
    ],
)
def test_passes_of_a_method_are_counted(method):
    pipe = tiny_pipeline("sd")
    with measured(pipe, CPU) as cost:
        optimize_noise(pipe, "a", method, **call_arguments("sd"))
    assert cost.model_calls == 3 * 2 * 2  # evaluations, steps (one for a preview), with and without the prompt


def test_no_hook_stays_behind():
    pipe = tiny_pipeline("sd")
    before = len(pipe.unet._forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt), measured(pipe, CPU):
        raise KeyboardInterrupt
    assert len(pipe.unet._forward_pre_hooks) == before


def test_seconds_are_those_on_the_wall():
    with measured(tiny_pipeline("sd"), CPU) as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5


PEAKS = """
import torch
from tiny_pipelines import tiny_pipeline
from noiseopt.evaluation.measure import measured

for mebibytes in (64, 256):
    held = torch.ones(128 * 2**20, dtype=torch.uint8)
    with measured(tiny_pipeline("sd"), torch.device("cpu")) as cost:
        del held
        first = torch.ones((mebibytes + 128) * 2**20, dtype=torch.uint8)
        del first
        torch.ones(2**20, dtype=torch.uint8)
    print(cost.memory)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is kept by the kernel of Linux")
def test_memory_is_the_peak_above_what_was_held(processes, tmp_path):
    """In a fresh process: elsewhere `held` could reuse freed blocks and not be returned."""
    done = processes.run(PEAKS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx([64, 256], abs=16)


def test_memory_is_not_known_where_the_system_does_not_tell(monkeypatch):
    def refuse(self, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert measure.reset_resident_peak() is None
    with measured(tiny_pipeline("sd"), CPU) as cost:
        pass
    assert cost.memory is None
