"""Noise samplers against their closed forms: the filter, the phases, the covariance; and what they refuse."""

import dataclasses
import math

import pytest
import torch
from problems import generator

from noiseopt import PinkNoise
from noiseopt.evaluation.noise_statistics import frequencies, gaussian_limits, noise_statistics
from noiseopt.schedulers import (
    BandLimitedNoise,
    BlueNoise,
    CoupledNoise,
    NoiseSampler,
    WhiteNoise,
    as_noise_sampler,
    list_noise_samplers,
    register_noise_sampler,
)

SHAPES = [(2, 4, 16, 16), (3, 2, 7, 10), (2, 1, 5, 9), (1, 3, 1, 8), (2, 1, 4, 8, 6)]
SAMPLERS = [
    WhiteNoise(),
    PinkNoise(0.2),
    PinkNoise(-0.4, reference_size=64),
    BlueNoise(),
    BandLimitedNoise(0.2, 0.9),
    CoupledNoise(),
]


def white(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def paper_pink(noise: torch.Tensor, alpha: float) -> torch.Tensor:
    """The definition on the whole spectrum: amplitudes times (1 + f)^-α, minus the mean, over the deviation."""
    spectrum = torch.fft.fft2(noise) * (1 + frequencies(*noise.shape[-2:])) ** -alpha
    pink = torch.fft.ifft2(spectrum).real
    return (pink - pink.mean((-2, -1), keepdim=True)) / pink.std((-2, -1), keepdim=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.2, 2.0])
def test_pink_noise_is_the_definition(shape, alpha):
    noise = white(*shape)
    torch.testing.assert_close(PinkNoise(alpha).color(noise), paper_pink(noise, alpha))


@pytest.mark.parametrize("sampler", [PinkNoise(0.2), PinkNoise(-3.0), PinkNoise(30.0), PinkNoise(0.5, band=(2, 3))])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_channel_of_pink_noise_has_mean_0_and_variance_1(sampler, shape):
    noise = sampler(shape, generator())
    torch.testing.assert_close(noise.mean((-2, -1)), torch.zeros(shape[:-2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(noise.var((-2, -1)), torch.ones(shape[:-2]))


def test_alpha_zero_is_white_noise_that_is_standardised():
    noise = white(4, 4, 32, 32, dtype=torch.float32)
    centered = noise - noise.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(PinkNoise(0)((4, 4, 32, 32), generator()), centered / noise.std((-2, -1), keepdim=True))
    scores = gaussian_limits((4, 4, 32, 32)).z_scores(noise_statistics(PinkNoise(0).color(noise)))
    assert abs(scores.spectral_slope) < 4 and max(map(abs, scores.spectrum[1:])) < 4


@pytest.mark.parametrize("alpha", [-0.3, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_slope_of_the_spectrum_is_minus_two_alpha(alpha, size):
    """Within 5%, which for 16 images is at least three standard errors."""
    shape = (16, 4, *size)
    assert 3 * gaussian_limits(shape).standard_error.spectral_slope < 0.05 * 2 * abs(alpha)
    slope = noise_statistics(PinkNoise(alpha)(shape, generator())).spectral_slope
    assert slope == pytest.approx(-2 * alpha, rel=0.05)


@pytest.mark.parametrize(
    ("size", "alpha", "ratio"), [(64, 0.2, 2.43), (128, 0.2, 3.16), (64, 0.5, 8.4), (128, 0.5, 16.1)]
)
def test_low_frequencies_gain_power(size, alpha, ratio):
    """At 0 < f <= 2: the mean of (1 + f)^-2α there over its mean everywhere, and so in noise."""
    f = frequencies(size, size)
    power = (1 + f) ** (-2 * alpha)
    low = (f > 0) & (f <= 2)
    assert float(power[low].mean() / power[f > 0].mean()) == pytest.approx(ratio, rel=0.01)
    noise = PinkNoise(alpha)((64, 16, size, size), generator())
    found = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))[low].mean()
    assert float(found) == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("alpha", [-0.5, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phases_are_those_of_white_noise_of_the_same_seed(alpha, dtype):
    shape = (2, 4, 16, 12)
    spectra = [
        torch.fft.fft2(sampler(shape, generator(3), dtype=dtype)) for sampler in (WhiteNoise(), PinkNoise(alpha))
    ]
    turned = (spectra[1] / spectra[0])[frequencies(16, 12).expand(shape) > 0]
    assert (turned.real > 0).all() and (turned.angle().abs() < 1e-3).all()


def test_reference_size_makes_alpha_independent_of_resolution():
    """As a function of waves per entry the spectrum is that of the reference; 8×8 block means then spread alike."""
    shaped = PinkNoise(0.3, reference_size=64)
    small, large = PinkNoise(0.3).gain(64, 64), shaped.gain(128, 128)
    kept = small[1, 1] / large[2, 2]
    torch.testing.assert_close((large[::2, ::2] * kept)[small > 0], small[small > 0])
    torch.testing.assert_close(shaped.gain(64, 64), small)
    spreads = [block_spread(sampler, size) for sampler, size in ((shaped, 64), (shaped, 128), (PinkNoise(0.3), 128))]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.02) and spreads[2] > 1.04 * spreads[0]


def block_spread(sampler: PinkNoise, size: int) -> float:
    """Deviation of the means of 8×8 blocks, 1/8 for white noise."""
    return float(torch.nn.functional.avg_pool2d(sampler((32, 16, size, size), generator()), 8).std())


def test_reference_size_is_isotropic_in_entries():
    frequency = PinkNoise(reference_size=64).frequency(32, 128)
    assert frequency[16, 0] == frequency[0, 64] == 32  # the Nyquist frequency, half a wave for each entry
    assert PinkNoise().frequency(32, 128)[16, 0] == 16


@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_without_standardising_pink_noise_is_gaussian_with_its_mean(size):
    noise = PinkNoise(0.2, standardize=False)((4000, 2, *size), generator()).double()
    power = torch.fft.fft2(noise).abs().square().mean((0, 1)) / (size[0] * size[1])
    u, v = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in size)
    wanted = (1 + torch.hypot(u[:, None], v)) ** -0.4
    torch.testing.assert_close(power, wanted / wanted.mean(), rtol=0.06, atol=0)
    assert noise.mean((-2, -1)).std() > 0.1


def test_alpha_zero_without_standardising_is_the_white_noise():
    shape = (2, 3, 8, 9)
    white = WhiteNoise()(shape, generator())
    torch.testing.assert_close(PinkNoise(0, standardize=False)(shape, generator()), white, rtol=0, atol=1e-5)


def test_a_band_limits_the_slope():
    gain, f = PinkNoise(0.5, band=(2, 5)).gain(16, 16), frequencies(16, 16)[:, :9]
    for low, high in ((0.5, 2), (5, 99)):
        flat = gain[(f >= low) & (f <= high)]
        torch.testing.assert_close(flat, flat[:1].expand_as(flat))
    torch.testing.assert_close(gain[0, 3] / gain[0, 5], torch.tensor((6 / 4) ** 0.5, dtype=torch.float64))


def test_noise_of_a_band_alone():
    noise = PinkNoise(0.2, band=(2, 5), outside="zero")((2, 3, 16, 15), generator(), dtype=torch.float64)
    power, f = torch.fft.fft2(noise).abs().square(), frequencies(16, 15).expand(2, 3, 16, 15)
    inside = (f >= 2) & (f <= 5)
    assert power[~inside].max() < 1e-20 * power[inside].mean() and power[inside].min() > 0


def blue_power(height: int, width: int, alpha: float) -> torch.Tensor:
    return (1 + frequencies(height, width)) ** (2 * alpha)


def nyquists(height: int, width: int) -> torch.Tensor:
    """Radial frequency of each entry of `fft2`, 1 for half a wave per entry."""
    u, v = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    return 2 * (u[:, None].square() + v.square()).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.5])
def test_blue_noise_is_pink_noise_of_the_other_sign(shape, alpha):
    noise = white(*shape)
    torch.testing.assert_close(BlueNoise(alpha).color(noise), paper_pink(noise, -alpha))


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (9, 7)])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_power_of_blue_noise_rises_with_frequency_by_its_closed_form(size, alpha):
    """Each of 4000 · 2 powers is exponential, so that their mean has a standard error of 1.1%."""
    noise = BlueNoise(alpha, standardize=False)((4000, 2, *size), generator()).double()
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))
    wanted = blue_power(*size, alpha)
    torch.testing.assert_close(power, wanted / wanted.mean(), rtol=0.08, atol=0)
    assert float(noise.var()) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("shape", [(3, 2, 16, 16), (2, 3, 15, 22), (2, 2, 9, 7), (2, 1, 4, 8, 6)])
@pytest.mark.parametrize("band", [(0.0, 1.0), (0.3, 0.9), (0.5, 2.0)])
def test_band_limited_noise_is_white_noise_without_the_other_frequencies(shape, band):
    noise = white(*shape)
    found, nu = BandLimitedNoise(*band).color(noise), nyquists(*shape[-2:])
    inside = (nu >= band[0]) & (nu <= band[1]) & (nu > 0)
    assert 0 < inside.sum() < inside.numel()
    kept = torch.fft.ifft2(torch.fft.fft2(noise) * inside).real
    torch.testing.assert_close(found, kept / kept.std((-2, -1), keepdim=True))
    torch.testing.assert_close(found.var((-2, -1)), torch.ones(shape[:-2], dtype=torch.float64))


@pytest.mark.parametrize("size", [(16, 16), (15, 9)])
def test_the_spectrum_of_band_limited_noise_is_flat_at_the_power_that_gives_variance_1(size):
    noise = BandLimitedNoise(0, 0.6, standardize=False)((4000, 2, *size), generator()).double()
    power, inside = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1)), nyquists(*size) <= 0.6
    wanted = torch.where(inside, inside.numel() / inside.sum(), 0.0).double()
    torch.testing.assert_close(power, wanted, rtol=0.08, atol=1e-10)
    assert inside[0, 0] and float(noise.square().mean()) == pytest.approx(1, rel=0.02)


def test_the_band_removes_the_corners_by_default_at_any_size():
    for side in (8, 16, 64, 65):
        nu, gain = nyquists(side, side), BandLimitedNoise().color(white(1, 1, side, side))
        power = torch.fft.fft2(gain).abs().square()[0, 0]
        assert (power[(nu <= 1) & (nu > 0)] > 0).all() and power[nu > 1].max() < 1e-18 * power.max()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_a_seed_gives_one_noise_and_leaves_the_generator_as_white_noise_does(sampler):
    first, second, plain = generator(5), generator(5), generator(5)
    noise = sampler((2, 4, 8, 8), first)
    assert torch.equal(noise, sampler((2, 4, 8, 8), second))
    assert not torch.equal(noise, sampler((2, 4, 8, 8), generator(6)))
    WhiteNoise()((2, 4, 8, 8), plain)
    assert torch.equal(first.get_state(), plain.get_state())


@pytest.mark.parametrize("sampler", SAMPLERS[:-1], ids=lambda sampler: sampler.name)
def test_a_sample_with_a_generator_of_its_own_is_independent_of_the_batch(sampler):
    batch = sampler((3, 4, 8, 10), [generator(seed) for seed in range(3)])
    for seed in range(3):
        alone = sampler((1, 4, 8, 10), [generator(seed)])
        torch.testing.assert_close(batch[seed : seed + 1], alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(sampler((1, 4, 8, 10), generator(seed)), alone, rtol=0, atol=0)


def test_white_noise_is_what_torch_draws():
    assert torch.equal(WhiteNoise()((2, 4, 8, 8), generator(1)), white(2, 4, 8, 8, seed=1, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_half_precision_is_computed_in_float32(sampler, dtype):
    noise = sampler((2, 4, 16, 16), generator(), dtype=dtype)
    exact = sampler.color(WhiteNoise()((2, 4, 16, 16), generator(), dtype=dtype).float())
    assert noise.dtype == dtype and torch.equal(noise, exact.to(dtype))


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_coupled_noises_sum_to_zero_and_have_the_covariance(count):
    """Over 60 thousand entries a covariance has a standard error below 1/√60000 · √2 = 0.006."""
    noise = CoupledNoise()((count, 4, 120, 125), generator(), dtype=torch.float64)
    torch.testing.assert_close(noise.sum(0), torch.zeros_like(noise[0]), rtol=0, atol=1e-12)
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(noise.flatten(1).cov(), expected, rtol=0, atol=0.025)


def test_each_coupled_noise_is_gaussian():
    for noise in CoupledNoise()((4, 4, 64, 64), generator()):
        scores = gaussian_limits((1, 4, 64, 64)).z_scores(noise_statistics(noise[None]))
        values = dataclasses.asdict(scores)
        assert max(map(abs, (*values.pop("spectrum"), *values.values()))) < 4.5


def test_two_coupled_noises_are_antithetic():
    noise = CoupledNoise()((2, 4, 8, 8), generator())
    torch.testing.assert_close(noise[0], -noise[1])


@pytest.mark.parametrize("rho", [-0.25, 0.0, 0.6, 1.0])
def test_a_correlation_is_the_symmetric_root_of_its_covariance(rho):
    """The map on K unit vectors is a symmetric matrix whose square is (1 − ρ)I + ρ11ᵀ."""
    root = CoupledNoise(correlation=rho).color(torch.eye(5, dtype=torch.float64))
    expected = (1 - rho) * torch.eye(5, dtype=torch.float64) + rho
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root, expected)


def test_groups_are_coupled_apart_from_each_other():
    noise = white(6, 1, 4, 4)
    in_rows, by_label = CoupledNoise(3).color(noise), CoupledNoise(groups=[0, 1, 0, 1, 0, 1]).color(noise)
    torch.testing.assert_close(in_rows[:3], CoupledNoise().color(noise[:3]))
    torch.testing.assert_close(in_rows[3:], CoupledNoise().color(noise[3:]))
    torch.testing.assert_close(by_label[1::2], CoupledNoise().color(noise[1::2]))
    bound = CoupledNoise().within([7, 7, 7, 2, 2, 2])
    assert torch.equal(bound.color(noise), in_rows) and CoupledNoise(2).within([0] * 6) == CoupledNoise(2)


def test_samplers_are_found_by_name_and_described_as_they_are_given():
    assert {"band_limited", "blue", "coupled", "pink", "white"} <= set(list_noise_samplers())
    assert as_noise_sampler(None) is None and as_noise_sampler("pink") == PinkNoise(0.2)
    for sampler in (*SAMPLERS, PinkNoise(0.1, band=[1, 8]), CoupledNoise(groups=[0, 0])):
        assert as_noise_sampler(sampler.describe()) == sampler and as_noise_sampler(sampler) is sampler
    assert as_noise_sampler({"name": "pink", "alpha": 0.3}) == PinkNoise(0.3)
    rest = {"reference_size": None, "band": None, "outside": "flat", "standardize": True, "time_dim": None}
    assert PinkNoise(0.3).describe() == {"name": "pink", "alpha": 0.3, **rest}


def test_a_sampler_may_be_registered_again_but_its_name_not_taken():
    register_noise_sampler("pink")(PinkNoise)

    class Other(NoiseSampler):
        pass

    with pytest.raises(ValueError, match="'pink' is taken by `PinkNoise`"):
        register_noise_sampler("pink")(Other)
    with pytest.raises(NotImplementedError, match="color"):
        Other()((1, 4, 8, 8))


BAD_INPUT = {
    "alpha": (lambda: PinkNoise(math.nan), ValueError, "`alpha` to be a number"),
    "text for alpha": (lambda: PinkNoise("0.2"), ValueError, "`alpha` to be a number"),
    "reference size": (lambda: PinkNoise(reference_size=0), ValueError, "`reference_size`"),
    "band": (lambda: PinkNoise(band=(3, 2)), ValueError, "0 <= low < high"),
    "band of one": (lambda: PinkNoise(band=3), ValueError, "0 <= low < high"),
    "outside": (lambda: PinkNoise(band=(1, 2), outside="none"), ValueError, "`outside`"),
    "outside of no band": (lambda: PinkNoise(outside="zero"), ValueError, "Expected a `band`"),
    "empty band": (lambda: PinkNoise(band=(40, 50), outside="zero")((1, 4, 8, 8)), ValueError, "Widen it"),
    "blue of alpha below 0": (lambda: BlueNoise(-0.2), ValueError, r"`alpha` to be a number in \[0, inf\)"),
    "reference size of blue": (lambda: BlueNoise(reference_size=-1), ValueError, "`reference_size`"),
    "turned band": (lambda: BandLimitedNoise(0.5, 0.5), ValueError, "0 <= low < high, but got .0.5, 0.5."),
    "text for low": (lambda: BandLimitedNoise("0", 1), ValueError, "0 <= low < high"),
    "band below all": (lambda: BandLimitedNoise(0.01, 0.02)((1, 4, 8, 8)), ValueError, "8×8 noise, .*Widen it"),
    "time of images": (lambda: PinkNoise(time_dim=2)((1, 4, 8, 8)), ValueError, "noise of videos with `time_dim`"),
    "time in space": (lambda: PinkNoise(time_dim=3), ValueError, "`time_dim` to be an integer"),
    "packed blue": (lambda: BlueNoise()((1, 64, 16)), ValueError, "before it is packed"),
    "packed": (lambda: PinkNoise()((1, 64, 16)), ValueError, "before it is packed"),
    "one entry": (lambda: PinkNoise()((1, 4, 1, 1)), ValueError, r"\(B, C, H, W\)"),
    "generators": (lambda: PinkNoise()((3, 4, 8, 8), [generator()] * 2), ValueError, "one for each of 3"),
    "group size": (lambda: CoupledNoise(1), ValueError, "`group_size`"),
    "group size and groups": (lambda: CoupledNoise(2, groups=[0, 0]), ValueError, "both"),
    "correlation": (lambda: CoupledNoise(correlation=1.5), ValueError, "`correlation`"),
    "correlation of many": (lambda: CoupledNoise(correlation=-0.9)((4, 1, 2, 2)), ValueError, "at least -0.3333"),
    "a batch of one": (lambda: CoupledNoise()((1, 4, 8, 8)), ValueError, "num_images_per_prompt=2"),
    "an incomplete group": (lambda: CoupledNoise(2)((3, 4, 8, 8)), ValueError, "groups of 2"),
    "groups of another batch": (lambda: CoupledNoise(groups=[0, 0])((3, 1, 2, 2)), ValueError, "`groups` of 3"),
    "unknown name": (lambda: as_noise_sampler("brown"), ValueError, "'blue', 'coupled', 'pink', 'vary', 'white'"),
    "settings in the name": (lambda: as_noise_sampler("pink:0.3"), ValueError, '"alpha": 0.3'),
    "no name": (lambda: as_noise_sampler({"alpha": 0.3}), ValueError, "Expected a noise sampler out of .*got .None."),
    "unknown setting": (lambda: as_noise_sampler({"name": "pink", "alfa": 0.3}), ValueError, r"\['alfa'\]"),
    "a class": (lambda: as_noise_sampler(PinkNoise), TypeError, "PinkNoise"),
    "a number": (lambda: as_noise_sampler(0.2), TypeError, "noise sampler"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_the_remedy(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


VIDEOS = [(2, 4, 6, 8, 5), (3, 2, 5, 7, 8), (2, 1, 1, 6, 6)]


@pytest.mark.parametrize("shape", VIDEOS)
def test_pink_noise_in_space_and_time_is_the_definition_in_three_dimensions(shape):
    noise = white(*shape)
    t, u, v = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in shape[2:])
    f = (t[:, None, None] ** 2 + u[:, None] ** 2 + v**2).sqrt()
    pink = torch.fft.ifftn(torch.fft.fftn(noise, dim=(2, 3, 4)) * (1 + f) ** -0.4, dim=(2, 3, 4)).real
    pink = (pink - pink.mean((2, 3, 4), keepdim=True)) / pink.std((2, 3, 4), keepdim=True)
    torch.testing.assert_close(PinkNoise(0.4, time_dim=2).color(noise), pink)
    frames_first = PinkNoise(0.4, time_dim=1).color(noise.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(frames_first, pink)


def test_without_standardising_pink_noise_in_time_is_gaussian_with_its_spectrum():
    shape = (3000, 1, 5, 6, 7)
    noise = PinkNoise(0.5, time_dim=2, standardize=False)(shape, generator()).double()
    power = torch.fft.fftn(noise, dim=(2, 3, 4)).abs().square().mean((0, 1)) / (5 * 6 * 7)
    t, u, v = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in shape[2:])
    wanted = 1 / (1 + (t[:, None, None] ** 2 + u[:, None] ** 2 + v**2).sqrt())
    torch.testing.assert_close(power, wanted / wanted.mean(), rtol=0.12, atol=0)


def test_frames_of_pink_noise_in_time_resemble_their_neighbors_more_than_those_of_white_noise():
    def neighbors(sampler):
        noise = sampler((8, 4, 12, 16, 16), generator())
        return float((noise[:, :, 1:] * noise[:, :, :-1]).mean())

    assert abs(neighbors(PinkNoise(0.5))) < 0.01 and neighbors(PinkNoise(0.5, time_dim=2)) > 0.08


def test_a_reference_size_counts_frames_like_pixels():
    frequency = PinkNoise(reference_size=64, time_dim=2).frequency(4, 32, 128)
    assert frequency.shape == (4, 32, 65)
    assert frequency[2, 0, 0] == frequency[0, 16, 0] == frequency[0, 0, 64] == 32


def test_coupled_noise_of_videos_sums_to_zero():
    noise = CoupledNoise()((3, 2, 4, 5, 6), generator())
    torch.testing.assert_close(noise.sum(0), torch.zeros(2, 4, 5, 6), rtol=0, atol=1e-5)
