"""Noise Diffusion against its loop written down by hand, its noise against Gaussian limits, and what it refuses."""

import dataclasses
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from problems import Walk, generator
from tiny_pipelines import call_arguments, quiet, sd3_pipeline, sd_pipeline, tiny_pipeline

from noiseopt import NoiseDiffusion, NoiseDiffusionStableDiffusionPipeline, optimize_noise
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines import MeanVariance, NoisePGD, WhiteNoiseProjection
from noiseopt.pipelines.problem import seed_from
from noiseopt.rewards import NonDifferentiableReward, Reward


def redness(images, prompts):
    """A score in [0, 1] that bends."""
    red, green, blue = images.unbind(1)
    return torch.sigmoid(8 * (2 * red - green - blue).mean((1, 2)))


def find(method, family="sd", prompt="a", **arguments):
    settings = {"generator": generator(3), **call_arguments(family), **arguments}
    return optimize_noise(tiny_pipeline(family), prompt, method, **settings)


def by_hand(rounds: int, accept: str, candidates: int = 7):
    """The paper's loop on the latents of the stock pipeline: sample without a graph, differentiate at z0."""
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    noise = torch.randn(1, 4, 16, 16, generator=generator(3))
    stream = torch.Generator().manual_seed(seed_from(noise[0]))
    scores, anchor = [], None
    for _ in range(rounds):
        with torch.no_grad():
            z0 = pipe("a", latents=noise, output_type="latent", **arguments).images
        z0 = z0.clone().requires_grad_()
        image = pipe.vae.decode(z0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        image = image + (image.clamp(0, 1) - image).detach()
        score = redness(image, ["a"])
        (gradient,) = torch.autograd.grad(score.sum(), z0)
        scores.append(score.item())
        if accept == "always" or anchor is None or scores[-1] > anchor[1]:
            anchor = (noise, scores[-1], gradient)
        z, s, g = anchor
        gamma = 1 - s**0.5
        best, highest = None, -float("inf")
        for _ in range(candidates):
            sigma = torch.randn(1, 4, 16, 16, generator=stream)
            v = ((1 - gamma) ** 0.5 - 1) * z + gamma**0.5 * sigma
            rate = ((g * v).sum() / (v * v).sum()).item()
            if rate > highest:
                best, highest = sigma, rate
        noise = (1 - gamma) ** 0.5 * z + gamma**0.5 * best
    return scores


@pytest.mark.parametrize("accept", ["always", "better"])
def test_the_loop_is_the_papers_with_the_gradient_at_z0(accept):
    result = find(NoiseDiffusion(rewards=redness, steps=5, candidates=7, accept=accept))
    torch.testing.assert_close(-result.losses[:, 0], torch.tensor(by_hand(5, accept)), rtol=0, atol=2e-4)
    assert result.best_step.item() == (-result.losses[:, 0]).argmax().item()


def test_scores_rise_and_the_best_noise_redraws_its_image():
    result = find(NoiseDiffusion(rewards=redness, steps=12))
    assert result.best_scores["redness"] > result.initial_scores["redness"] + 0.01
    pipe = tiny_pipeline("sd")
    images = pipe("a", latents=result.latents, output_type="pt", **call_arguments("sd")).images
    assert redness(images, ["a"]).item() == pytest.approx(result.best_scores["redness"].item(), abs=1e-4)


def test_no_graph_passes_the_denoiser_and_the_scorer_sees_pixels():
    pipe, graphs, seen = tiny_pipeline("sd"), [], []

    def scorer(images, prompts):
        seen.append((images.min().item(), images.max().item()))
        return redness(images, prompts)

    handle = pipe.unet.conv_out.register_forward_hook(lambda *arguments: graphs.append(arguments[-1].requires_grad))
    find(NoiseDiffusion(rewards=scorer, steps=3))
    handle.remove()
    assert len(graphs) == 6 and not any(graphs)
    assert all(low >= 0 and high <= 1 for low, high in seen)


def test_each_image_is_its_own_problem():
    latents = torch.randn(3, 4, 16, 16, generator=generator(5))
    method = NoiseDiffusion(rewards=redness, steps=4, candidates=5)
    together = find(method, prompt=["a", "b", "c"], latents=latents)
    alone = find(method, prompt="b", latents=latents[1:2])
    torch.testing.assert_close(together.noise[1:2], alone.noise, rtol=0, atol=2e-3)
    torch.testing.assert_close(together.losses[:, 1:2], alone.losses, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("selection", ["pool", "exact", "random"])
def test_all_families_and_rules_find_better_noise(family, selection):
    result = find(NoiseDiffusion(rewards=redness, steps=8, selection=selection), family)
    assert result.best_loss < result.losses[0]
    again = find(NoiseDiffusion(rewards=redness, steps=8, selection=selection), family)
    assert torch.equal(result.noise, again.noise)


def test_one_candidate_is_random_diffusion():
    one = find(NoiseDiffusion(rewards=redness, steps=5, candidates=1))
    random = find(NoiseDiffusion(rewards=redness, steps=5, selection="random"))
    torch.testing.assert_close(one.losses, random.losses, rtol=0, atol=1e-5)


def test_a_black_box_needs_no_gradient():
    def counter(images, prompts):
        return (images > 0.5).float().mean((1, 2, 3))

    setattr(counter, "differentiable", False)  # noqa: B010
    result = find(NoiseDiffusion(rewards=counter, steps=6, selection="random"))
    assert result.best_scores["counter"] >= result.initial_scores["counter"]
    with pytest.raises(
        NonDifferentiableReward, match=r"\['counter'\] have none.*VQAScorer.*llava.*selection=\"random\""
    ):
        find(NoiseDiffusion(rewards=counter))


@pytest.mark.parametrize(
    ("settings", "steps", "warned"),
    [({}, 1, True), ({"gradient": "full"}, 1, False), ({"selection": "random"}, 1, False), ({}, 2, False)],
)
def test_a_gradient_with_the_only_output_held_constant_warns(settings, steps, warned):
    method = NoiseDiffusion(rewards="red", score_range=(-10.0, 10.0), candidates=2, steps=2, **settings)
    call = {**call_arguments("sd"), "num_inference_steps": steps}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimize_noise(tiny_pipeline("sd"), "a", method, **call)
    told = [str(each.message) for each in caught if "single denoising step" in str(each.message)]
    assert len(told) == warned and all('Pass `gradient="full"`' in each for each in told)


def test_the_pipeline_class_and_a_search_warn_too():
    pipe = NoiseDiffusionStableDiffusionPipeline(**tiny_pipeline("sd").components)
    settings = {"score_range": (-10.0, 10.0), "candidates": 2, "search": 2}
    call = {**call_arguments("sd"), "num_inference_steps": 1}
    with pytest.warns(UserWarning, match="single denoising step"):
        pipe("a", rewards="red", steps=5, method_kwargs=settings, output_type="pt", **call)


def test_another_reward_is_placed_in_a_range():
    def raw(images, prompts):
        return 17 + 7 * redness(images, prompts)

    placed = find(NoiseDiffusion(rewards=raw, steps=5, score_range=(17, 24)))
    plain = find(NoiseDiffusion(rewards=redness, steps=5))
    torch.testing.assert_close(placed.noise, plain.noise, rtol=0, atol=2e-3)
    torch.testing.assert_close(placed.scores["raw"], 17 + 7 * plain.scores["redness"], rtol=0, atol=1e-2)


def test_an_image_stops_at_the_threshold_and_out_of_patience():
    plain = find(NoiseDiffusion(rewards=redness, steps=12))
    threshold = plain.scores["redness"][:, 0].sort().values[6].item()
    first = int((plain.scores["redness"][:, 0] >= threshold).nonzero()[0])
    stopped = find(NoiseDiffusion(rewards=redness, steps=12, threshold=threshold))
    assert len(stopped.losses) == first + 1 and stopped.provenance["stopped"] == "threshold"
    torch.testing.assert_close(stopped.losses, plain.losses[: first + 1])
    patient = find(NoiseDiffusion(rewards=lambda images, prompts: 0 * redness(images, prompts) + 0.5, patience=3))
    assert len(patient.losses) == 4 and patient.provenance["stopped"] == "patience"


@pytest.mark.parametrize("selection", ["pool", "exact"])
def test_the_white_geometry_chooses_by_the_projected_gradient(selection):
    noise, gradient = torch.randn(2, 1, 4, 16, 16, generator=generator()).unbind(0)
    gradient = gradient.cumsum(-1).cumsum(-2)  # hardly more than its lowest frequencies
    settings = {"rewards": "red", "selection": selection, "candidates": 100}
    white, projected, usual = (
        Walk(NoiseDiffusion(**settings, geometry=geometry), noise) for geometry in ("white", None, None)
    )
    for steps, given in ((white, gradient), (projected, -WhiteNoiseProjection()(-gradient)), (usual, gradient)):
        steps.step(0.3, given)
    assert torch.equal(white.noise, projected.noise) and not torch.equal(white.noise, usual.noise)


def worst_z_score(noise: torch.Tensor) -> float:
    """The largest deviation of norm, mean, variance, kurtosis and spectrum, in standard errors of Gaussian noise."""
    found = dataclasses.asdict(gaussian_limits(tuple(noise.shape)).z_scores(noise_statistics(noise)))
    values = [found[name] for name in ("norm", "mean", "variance", "skewness", "excess_kurtosis", "spectral_slope")]
    return max(map(abs, [*values, *found["spectrum"]]))


def after_fifty_rounds(method) -> torch.Tensor:
    """48 noises after 50 rounds: scores from .05 to .95, and a smooth gradient that turns with every round."""
    walk = Walk(method, torch.randn(48, 4, 16, 16, generator=generator(1)))
    for round_ in range(50):
        coarse = torch.randn(48, 4, 4, 4, generator=generator(100 + round_))
        gradient = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
        walk.step(0.05 + 0.9 * round_ / 49, -gradient)
    return walk.noise


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["pool", "exact", "random"])
def test_noise_is_gaussian_after_fifty_rounds(selection):
    assert worst_z_score(after_fifty_rounds(NoiseDiffusion(selection=selection))) < 4


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "along"), [("exact", (1.1, 1.3)), ("random", (0.97, 1.06))])
def test_noise_that_was_kept_for_its_gain_is_shifted_only_along_what_the_score_depends_on(selection, along):
    """50 rounds within the trust region, under a score that waves along 64 of 1024 directions, by its true gradient."""
    noise = torch.randn(48, 4, 16, 16, generator=generator(1))
    waves = torch.randn(64, 4 * 16 * 16, generator=generator(2)) / 16
    walk, kept = Walk(NoiseDiffusion(selection=selection, gradient="full", trust_region=1.0), noise), []
    for _ in range(50):
        leaf = walk.noise.clone().requires_grad_()
        score = 0.5 + 0.4 * torch.sin(leaf.flatten(1) @ waves.T).mean(1)
        (gradient,) = torch.autograd.grad(-score.sum(), leaf)
        before = walk.noise
        walk.step(score.detach(), gradient)
        kept.append((walk.memory.noise == before).flatten(1).all(1).float().mean())
    assert 0.2 < torch.stack(kept).mean() < 0.97
    found, span = walk.memory.noise, torch.linalg.svd(waves, full_matrices=False)[2]
    inside = found.flatten(1) @ span.T
    outside = found.flatten(1) - inside @ span
    assert along[0] < inside.square().mean().sqrt() < along[1]
    assert abs(outside.square().sum() / (48 * 960) - 1) < 4 * (2 / (48 * 960)) ** 0.5
    limits = gaussian_limits((1, *found.shape[1:]))  # of a single noise, whose norm has a wider error
    single = torch.tensor([limits.z_scores(noise_statistics(each[None])).norm for each in found])
    assert abs(single.mean()) < 1


def test_gradient_ascent_leaves_the_gaussian_in_fifty_rounds():
    assert worst_z_score(after_fifty_rounds(NoisePGD(rewards="red", step_size=0.05))) > 20


def test_pgd_takes_steps_of_one_length_within_its_ball():
    start = torch.randn(2, 4, 8, 8, generator=generator())
    walk = Walk(NoisePGD(rewards="red", step_size=0.1), start)
    gradient = torch.randn(2, 4, 8, 8, generator=generator(1))
    walk.step(0.5, gradient)
    way = (walk.noise - start).flatten(1)
    torch.testing.assert_close(way.norm(dim=1), torch.full((2,), 0.1 * 16))
    torch.testing.assert_close(torch.cosine_similarity(way, -gradient.flatten(1)), torch.ones(2))
    held = Walk(NoisePGD(rewards="red", step_size=0.1, radius=0.15), start)
    held.step(0.5, gradient)
    torch.testing.assert_close(held.noise, walk.noise)  # inside the ball
    for _ in range(4):
        held.step(0.5, gradient)
    torch.testing.assert_close((held.noise - start).flatten(1).norm(dim=1), torch.full((2,), 0.15 * 16))


def test_mean_and_variance_stay_within_their_divergence():
    start = torch.randn(2, 4, 8, 8, generator=generator())
    walk = Walk(MeanVariance(rewards="red"), start)
    gradient = torch.randn(2, 4, 8, 8, generator=generator(1)) + 0.5
    walk.step(0.5, gradient)
    assert ((walk.noise - start) * gradient).flatten(1).sum(1).lt(0).all()
    for _ in range(30):
        walk.step(0.5, gradient)
    for part in walk.memory.parts:
        mean, log_variance = part.detach()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        assert 9e-4 < divergence <= 1.001e-3
    assert torch.cosine_similarity(walk.noise.flatten(1), start.flatten(1)).min() > 0.99


def test_mean_and_variance_follow_adam_on_both(monkeypatch):
    """The first step of Adam is one learning rate against the sign, for gradients far above its epsilon."""
    start = torch.randn(1, 4, 8, 8, generator=generator())
    walk = Walk(MeanVariance(rewards="red", max_kl=1.0), start)
    gradient = 100 * torch.randn(1, 4, 8, 8, generator=generator(1))
    walk.step(0.5, gradient)
    mean, spread = -0.01 * gradient.sign(), -0.01 * (gradient * start).sign()
    torch.testing.assert_close(walk.noise, start * (spread / 2).exp() + mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [NoisePGD(rewards=redness, steps=5), MeanVariance(rewards=redness, steps=5)])
def test_the_rows_of_comparison_raise_the_score(method):
    result = find(method)
    assert result.best_scores["redness"] > result.initial_scores["redness"]


class Square(Reward):
    name, range = "square", (0.0, 1.0)

    def check_size(self, prompt, height, width):
        if height != width:
            raise ValueError(f"Expected square images for {prompt!r}, but got {height} x {width}.")

    def score(self, images, prompts):
        return redness(images, prompts)


def test_a_size_that_the_scorer_cannot_take_is_refused_before_sampling():
    pipe = tiny_pipeline("sd")
    handle = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser was called"))
    try:
        with pytest.raises(ValueError, match="Expected square images for 'a', but got 32 x 16"):
            find(NoiseDiffusion(rewards=Square()), width=16)
    finally:
        handle.remove()
    assert find(NoiseDiffusion(rewards=Square(), steps=2)).losses.shape == (2, 1)


class Everything(Reward):
    name, range, requires_prompt = "everything", (-5.0, 5.0), False

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class Unbounded(Everything):
    name, range = "unbounded", None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"candidates": 0}, ValueError, r"`candidates` to be a number in \[1, inf\)"),
        ({"candidates": 2.5}, ValueError, "`candidates` to be an integer unless"),
        ({"candidates": 0.5, "selection": "exact"}, ValueError, "`candidates` to be a number in"),
        ({"selection": "best"}, ValueError, "`selection` to be one of"),
        ({"accept": "never"}, ValueError, "`accept` to be one of"),
        ({"threshold": 1.5}, ValueError, r"`threshold` to be a number in \[0, 1\]"),
        ({"patience": 0}, ValueError, "`patience` to be an integer"),
        ({"steps": 0}, ValueError, "`steps` to be an integer"),
        ({"score_range": (3, 2)}, ValueError, r"`score_range` as \(low, high\)"),
        ({"rewards": "red"}, ValueError, r"a score in \[0, 1\].*\['red'\] have a total from -2 to 1.*score_range"),
        ({"rewards": Everything()}, ValueError, "have a total from -5 to 5"),
        ({"rewards": Unbounded()}, ValueError, "have a total from -inf to inf"),
        ({"rewards": {redness: 3.0}}, ValueError, r"\['redness'\] gave .*score_range=\(low, high\)"),
    ],
)
def test_what_cannot_work_is_refused_before_sampling(settings, error, message):
    pipe = tiny_pipeline("sd")
    handle = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser was called"))
    try:
        with pytest.raises(error, match=message):
            find(NoiseDiffusion(**{"rewards": redness, **settings}))
    finally:
        handle.remove()


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "PNDM": PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    "DPM++": DPMSolverMultistepScheduler(**BETAS),
    "UniPC": UniPCMultistepScheduler(**BETAS),
    "Euler": EulerDiscreteScheduler(**BETAS),
    "Heun": HeunDiscreteScheduler(**BETAS),
    "flow matching": None,
    "Euler ancestral": EulerAncestralDiscreteScheduler(**BETAS),
    "DDPM": DDPMScheduler(**BETAS, clip_sample=False),
    "LCM": LCMScheduler(**BETAS),
}


def pipeline_with(scheduler):
    """A pipeline in float64, and the name of its denoiser."""
    pipe = quiet(sd3_pipeline() if scheduler is None else sd_pipeline(scheduler=scheduler)).to(torch.float64)
    return pipe, "transformer" if scheduler is None else "unet"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_gradient_is_that_of_replaying_the_chain_with_its_outputs_held(name):
    """From the noise through a chain whose denoiser returns what it returned before, drawing the same noise again."""
    pipe, denoiser = pipeline_with(SCHEDULERS[name])
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32}
    found, outputs, noise = {}, [], torch.randn(1, 4, 16, 16, generator=generator(1), dtype=torch.float64)

    class Once(NoiseDiffusion):
        def start(self, problem):
            found["sampler"] = problem.sampler
            return super().start(problem)

        def step(self, run, gradient, state):
            found["gradient"] = gradient
            return super().step(run, gradient, state)

    module = getattr(pipe, denoiser)
    handle = module.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    optimize_noise(pipe, "a", Once(rewards=redness, steps=2), latents=noise, generator=generator(9), **call)
    handle.remove()
    replay = iter(outputs[: len(outputs) // 2])

    def recorded(*_, **__):
        return next(replay)

    sampler, leaf = found["sampler"], noise.clone().requires_grad_()
    handle = module.register_forward_hook(lambda *_: recorded())
    latents = sampler.run(leaf, "full", False, "latent")
    handle.remove()
    z0 = latents.detach().requires_grad_()
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    image = pipe.vae.decode(z0 / pipe.vae.config.scaling_factor + shift).sample / 2 + 0.5
    image = image + (image.clamp(0, 1) - image).detach()
    (at_z0,) = torch.autograd.grad(-redness(image, ["a"]).sum(), z0)
    (replayed,) = torch.autograd.grad(latents, leaf, at_z0)
    torch.testing.assert_close(found["gradient"], replayed, rtol=1e-6, atol=1e-9 * replayed.abs().max().item())
    ratio = replayed / at_z0
    assert (ratio - ratio.mean()).abs().max() < 1e-6 * ratio.mean() and ratio.mean() > 0
