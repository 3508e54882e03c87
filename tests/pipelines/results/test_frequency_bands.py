"""Spectrum of changes: closed forms, and the record of a run."""

import math

import pytest
import torch
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import CNO, NoiseResult, ReNO, optimize_noise
from noiseopt.pipelines.results.frequency_bands import band_energies, frequency_bands

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def wave(rows: float, columns: float, side: int = 24) -> torch.Tensor:
    """Return a plane wave `(1, 2, side, side)` with these cycles down and across in the second channel."""
    at = torch.arange(side, dtype=torch.float64)
    plane = torch.cos(2 * math.pi * (rows * at[:, None] + columns * at) / side + 0.3)
    return torch.stack([torch.zeros_like(plane), plane])[None]


@pytest.mark.parametrize(
    ("rows", "columns", "band"),
    [(0, 0, 0), (3, 0, 0), (2, 5, 0), (0, 6, 1), (8, -7, 1), (12, 3, 2), (12, 12, 2)],  # the largest radius is √2·12
)
def test_a_wave_is_in_the_third_of_its_radial_frequency(rows, columns, band):
    change = wave(rows, columns)
    energies = band_energies(change)[0]
    torch.testing.assert_close(energies[band], change.square().sum())
    assert energies.sum() - energies[band] < 1e-20 * energies.sum() + 1e-18


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (2, 1, 5, 9, 12), (1, 2, 7, 5)])
def test_bands_add_up_to_the_squared_change(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(band_energies(change).sum(1), change.flatten(1).square().sum(1))
    assert torch.equal(frequency_bands(*shape[-2:]).sum(0), torch.ones(shape[-2:]).long())


def test_thirds_hold_the_shares_of_a_disc_in_a_square():
    """The shares are areas of discs with radius √½/3 and 2√½/3 in the unit square of frequencies."""
    shares = frequency_bands(256, 256).double().mean((1, 2))
    lowest, two = math.pi / 18, 4 * math.pi / 18
    torch.testing.assert_close(shares, torch.tensor([lowest, two - lowest, 1 - two]).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_run_records_the_bands_of_each_step(family):
    noises = []
    arguments = dict(ARGUMENTS) if family == "sd" else {"num_inference_steps": 1, **SIZE}
    method = ReNO(rewards="red", steps=3)
    watch = lambda state: noises.append(state.noise)  # noqa: E731
    result = optimize_noise(tiny_pipeline(family), "a", method, callbacks=watch, **arguments)
    assert torch.equal(result.initial_noise, noises[0])
    assert result.band_changes.shape == (3, 1, 3) and not result.band_changes[0].any()
    for step, noise in enumerate(noises):
        expected = (noise - result.initial_noise).square().sum()
        torch.testing.assert_close(result.band_changes[step].sum(), expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(result.band_shares[1:].sum(-1), torch.ones(2, 1))
    assert result.band_shares[0].isnan().all()


def test_a_stopped_sample_is_not_recorded():
    def stop_first(state):
        state.stop(samples=torch.tensor([state.step == 1, False]))

    method = ReNO(rewards="red", steps=4)
    result = optimize_noise(tiny_pipeline("sd"), ["a", "b"], method, callbacks=stop_first, **ARGUMENTS)
    assert torch.equal(result.band_changes.isnan().all(-1), result.losses.isnan())
    assert result.band_changes[2:, 0].isnan().all() and result.band_changes[:, 1].isfinite().all()


def test_initial_noise_is_saved_and_old_files_still_load(tmp_path):
    path = tmp_path / "result.safetensors"
    call = {**ARGUMENTS, "num_images_per_prompt": 2}
    result = optimize_noise(tiny_pipeline("sd"), "a", CNO(steps=2), **call)
    result.save(path)
    loaded = NoiseResult.load(path)
    assert torch.equal(loaded.initial_noise, result.initial_noise)
    assert torch.equal(loaded.band_changes, result.band_changes)
    result.initial_noise = result.band_changes = None
    result.save(path)
    old = NoiseResult.load(path)
    assert old.initial_noise is None and old.band_changes is None and old.band_shares is None
    assert torch.equal(old.noise, loaded.noise)
