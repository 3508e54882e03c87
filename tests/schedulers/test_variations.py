"""Variations of a noise: how near, how Gaussian, of which seed, and in pipelines."""

import pytest
import torch
from problems import generator, redness
from tiny_features import TINY_FEATURES
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import (
    AutoReward,
    BestOfN,
    NeverTooLate,
    NeverTooLateStableDiffusionPipeline,
    Vary,
    grow_set,
    optimize_noise,
    shapes_world,
)
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines.results.frequency_bands import band_energies
from noiseopt.rewards import DPP
from noiseopt.schedulers import as_noise_sampler
from noiseopt.schedulers.noise_samplers import describe_noise_sampler

SHAPE = (3, 4, 32, 32)


def white(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=generator(seed))


def a1111(strength, low, high):
    """The web UI's interpolation of two noises (C, H, W), written out entry by entry of the columns."""
    mixed = torch.empty_like(low)
    for channel in range(low.shape[0]):
        for column in range(low.shape[2]):
            one, other = low[channel, :, column].double(), high[channel, :, column].double()
            angle = torch.arccos(one @ other / one.norm() / other.norm())
            value = torch.sin((1 - strength) * angle) * one + torch.sin(strength * angle) * other
            mixed[channel, :, column] = (value / torch.sin(angle)).float()
    return mixed


@pytest.mark.parametrize("keep", [None, "layout", "detail"])
def test_no_strength_gives_the_same_bits_and_full_strength_nothing_of_them(keep):
    base = white()
    assert torch.equal(Vary(0.0, base, keep=keep).color(white(1)), base)
    assert torch.equal(Vary(0.0, seed=3, keep=keep).color(white(1))[0], white(1)[0])
    if keep is None:
        other = Vary(1.0, base).color(white(1))
        assert torch.cosine_similarity(other.flatten(1), base.flatten(1)).abs().max() < 0.08


@pytest.mark.parametrize("keep", [None, "layout", "detail"])
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.7, 1.0])
def test_variations_are_gaussian_at_every_strength(keep, strength):
    noise = Vary(strength, white(shape=(64, 4, 32, 32)), keep=keep).color(white(1, (64, 4, 32, 32)))
    scores = gaussian_limits(tuple(noise.shape)).z_scores(noise_statistics(noise))
    assert max(abs(z) for z in (scores.norm, scores.variance, scores.excess_kurtosis, scores.spectral_slope)) < 4


@pytest.mark.parametrize("seed", [None, 0])
def test_a_noise_of_the_same_seed_is_no_nearer_and_stays_gaussian(seed):
    """z₀, the draw of the call and the variation all have seed 0; and each variation is varied again."""
    base = torch.cat([torch.randn(1, *SHAPE[1:], generator=generator(image)) for image in range(3)])
    for _ in range(3):
        noise = Vary(0.5, base, seed=seed).color(base)
        assert noise.std((1, 2, 3)).sub(1).abs().max() < 0.05
        cosine = torch.cosine_similarity(noise.flatten(1), base.flatten(1))
        torch.testing.assert_close(cosine, torch.full((3,), 0.5**0.5), rtol=0, atol=0.05)
        base = noise


def test_the_distance_grows_with_the_strength():
    base, fresh = white(), white(1)
    far = [float((Vary(s, base).color(fresh) - base).norm()) for s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert far == sorted(far) and far[0] == 0.0
    cosine = torch.cosine_similarity(Vary(1 / 3, base).color(fresh).flatten(), base.flatten(), dim=0)
    assert cosine == pytest.approx(3**0.5 / 2, abs=0.02)  # cos 30°


@pytest.mark.parametrize(("keep", "still"), [("layout", 0), ("detail", 2)])
def test_the_kept_frequencies_stay(keep, still):
    changed = band_energies(Vary(1.0, white(), keep=keep).color(white(1)) - white())
    assert changed[:, still].max() < 1e-4 and changed[:, 2 - still].min() > 100


def test_a_seed_names_a_variation_whatever_the_batch():
    three, one = (Vary(0.4, white()[:1], seed=5).color(white(9, (count, *SHAPE[1:]))) for count in (3, 1))
    assert torch.equal(three[:1], one) and not torch.equal(three[0], three[1])
    assert torch.equal(Vary(0.4, white()[:1], seed=6).color(white(9)[:1]), three[1:2])


def test_without_a_noise_the_first_image_of_each_prompt_is_varied():
    noise = Vary(0.0, seed=1).within([0, 0, 1]).color(white())
    assert torch.equal(noise[1], noise[0]) and torch.equal(noise[2], white()[2])


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_the_variation_seed_of_the_web_ui(strength):
    base = white()
    found = Vary(strength, base, seed=11, interpolation="a1111").color(base)
    for image, noise in enumerate(found):
        fresh = torch.randn(SHAPE[1:], generator=generator(11 + image))
        torch.testing.assert_close(noise, a1111(strength, base[image], fresh), rtol=1e-4, atol=1e-5)
    same = Vary(strength, torch.randn(SHAPE[1:], generator=generator(11))[None], seed=11, interpolation="a1111")
    torch.testing.assert_close(same.color(base[:1])[0], torch.randn(SHAPE[1:], generator=generator(11)))


def test_variations_of_a_result_in_a_pipeline_and_the_best_of_them():
    pipe = tiny_pipeline("sd")
    call = {"num_inference_steps": 2, **SIZE}
    found = optimize_noise(pipe, "a b", BestOfN(rewards=redness, steps=2), generator=generator(), **call)
    more = {"num_images_per_prompt": 4, "generator": generator(1), **call}
    near = optimize_noise(pipe, "a b", BestOfN(rewards=redness, steps=4), noise_sampler=Vary(0.1, found), **more)
    cosine = torch.nn.functional.cosine_similarity(near.noise.flatten(1), found.noise.flatten(1))
    assert (cosine > 0.95).all() and len({noise.sum().item() for noise in near.noise}) == 4
    assert near.scores["redness"].std() > 0 and (near.scores["redness"][1:] != near.scores["redness"][0]).all()
    assert near.provenance["call"]["noise_sampler"]["strength"] == 0.1


@pytest.mark.parametrize("given", [True, False], ids=["of a result", "of what the call draws"])
@pytest.mark.parametrize("seed", [None, 7])
def test_each_candidate_of_a_search_is_another_variation(given, seed):
    if not given and seed is None:
        pytest.skip("refused")
    noises: list[torch.Tensor] = []
    sampler = Vary(0.2, white(shape=(1, 4, 16, 16)) if given else None, seed=seed)
    call = {"generator": generator(3), "num_inference_steps": 1, **SIZE}
    optimize_noise(
        tiny_pipeline("sd"),
        "a b",
        BestOfN(rewards=redness, steps=4),
        noise_sampler=sampler,
        callbacks=lambda state: noises.append(state.noise),
        **call,
    )
    center = sampler.noise if given else noises[0]
    cosines = torch.cat([torch.cosine_similarity(noise.flatten(1), center.flatten(1)) for noise in noises[1:]])
    assert (cosines > 0.9).all() and len({noise.sum().item() for noise in noises}) == 4


def test_the_images_of_a_growing_set_are_different_variations():
    pipe, call = tiny_pipeline("sd"), {"num_inference_steps": 1, "generator": 0, **SIZE}
    method = NeverTooLate(diversity={DPP(TINY_FEATURES["dinov2"]()): 1.0}, steps=1)
    grown = grow_set(pipe, "a b", 3, method, noise_sampler=Vary(0.2, white(shape=(1, 4, 16, 16)), seed=7), **call)
    assert len({result.noise.sum().item() for result in grown.results}) == 3
    with pytest.raises(ValueError, match="draws one image at a time"):
        grow_set(pipe, "a b", 3, method, noise_sampler=Vary(0.2, seed=7), **call)


@pytest.mark.slow
def test_variations_under_a_guard_keep_the_reward_of_the_picture():
    """Of the embedded one-step model; without the guard some of them lose it."""
    pipe, call = shapes_world.load("turbo"), dict(shapes_world.MODELS["turbo"].call)
    prompt, reward = "a yellow cross right of a cyan cross", AutoReward.from_pretrained(shapes_world.path("clip"))
    found = optimize_noise(pipe, prompt, BestOfN(rewards=reward, steps=16), generator=generator(), **call)
    floor = 0.9 * found.scores[reward.name].max().item()
    kept = NeverTooLate(
        search=8,
        steps=9,
        rewards=reward,
        diversity={"pairwise": ("tiny_image", 1.0)},
        guard={shapes_world.path("clip"): {"threshold": floor}},
    )
    near, more = Vary(0.4, found), {"num_images_per_prompt": 4, "generator": generator(5), **call}
    plain = optimize_noise(pipe, prompt, BestOfN(rewards=reward, steps=1), noise_sampler=near, **more)
    guarded = optimize_noise(pipe, prompt, kept, noise_sampler=near, **more)
    scores = [reward(result.images, prompt) for result in (plain, guarded)]
    assert (scores[0] < floor).any() and (scores[1] >= floor).all()
    verdicts = shapes_world.judge(guarded.images, prompt)
    assert all(verdict.correct for verdict in verdicts)


def test_a_variation_of_half_precision_keeps_its_dtype_and_the_given_noise():
    given = white()[:1]
    for strength in (0.0, 0.5):
        noise = Vary(strength, given, seed=1, keep="layout").color(white(1).half())
        assert noise.dtype == torch.float16 and noise.isfinite().all()
        noise.zero_()
    assert torch.equal(given, white()[:1])


def test_a_pipeline_takes_a_variation_seed_and_strength():
    pipe = NeverTooLateStableDiffusionPipeline.from_pipe(tiny_pipeline("sd"))
    call = {"num_inference_steps": 2, "output_type": "pt", **SIZE}

    def images(count=2, **arguments):
        return pipe("a b", num_images_per_prompt=count, generator=generator(), **arguments, **call).images

    plain, same, near = images(), images(variation_strength=0.0), images(variation_seed=4)
    torch.testing.assert_close(same, plain[:1].expand_as(plain), rtol=0, atol=1e-5)
    assert torch.equal(near, images(noise_sampler=Vary(0.2, seed=4)))
    assert 0 < (near[0] - plain[0]).square().mean() < (near[1] - plain[1]).square().mean()
    assert not torch.equal(near[0], near[1])
    for argument in ("variation_seed", "variation_strength"):
        with pytest.raises(ValueError, match=f"`noise_sampler` or `{argument}`, but got both"):
            images(noise_sampler="pink", **{argument: 1})
    with pytest.raises(ValueError, match="`variation_strength` to be a number in"):
        images(variation_strength=2.0)
    with pytest.raises(ValueError, match="`variation_seed` to be an integer in"):
        images(variation_seed=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.5}, "`strength` to be a number in"),
        ({"strength": 0.5, "seed": -1}, "`seed` to be"),
        ({"strength": 0.5, "seed": 2**63}, "`seed` to be"),
        ({"strength": True, "seed": 1}, "`strength` to be a number in"),
        ({}, "`noise` or `seed`, but got neither"),
        ({"seed": 1, "keep": "colors"}, "`keep` to be"),
        ({"seed": 1, "keep": "layout", "interpolation": "a1111"}, "but got both"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Vary(**settings)
    with pytest.raises(ValueError, match=message):
        as_noise_sampler({"name": "vary", **settings})


def test_its_description_tells_noises_apart():
    one, other, same = (Vary(0.2, white(seed)).describe() for seed in (0, 1, 0))
    assert one == same != other and one["strength"] == 0.2 and one["noise"]["shape"] == list(SHAPE)
    described = Vary(0.3, seed=4, keep="detail").describe()
    assert describe_noise_sampler(as_noise_sampler(described)) == described


def test_what_is_no_noise_or_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="Load a file with"):
        Vary(0.2, "result.safetensors")
    for refused in (Vary(0.2, white()[:2]).color, lambda noise: Vary(0.2, white()[:2]).within([0, 0, 1])):
        with pytest.raises(ValueError, match="of 1 or 3 images, as the call has, but got 2. Select one"):
            refused(white())
    with pytest.raises(ValueError, match=r"of shape \(3, 4, 16, 16\)"):
        Vary(0.2, white()).color(white(shape=(3, 4, 16, 16)))
