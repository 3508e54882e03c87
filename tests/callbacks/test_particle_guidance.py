"""Particle guidance: against a sampler whose predicted noise is changed as the paper says."""

import contextlib
import math
import statistics

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from stock_calls import FAMILIES, STEPS, draw
from tiny_pipelines import quiet, sd3_pipeline, sd_pipeline, tiny_pipeline

from noiseopt.callbacks import ParticleGuidance
from noiseopt.callbacks.particle_guidance import repulsion

STRENGTH = {"coefficient": 30.0, "min_sigma": 1.0}


def kernels(i, particles):
    """k_ij for j != i, in the paper's symbols; h without gradient."""
    others = [a for j, a in enumerate(particles) if j != i]
    distances = [float((particles[i] - a).detach().norm()) for a in others]
    h = statistics.median_low(distances) ** 2 / math.log(max(len(particles) - 1, 2))
    return [torch.exp(-((particles[i] - a) ** 2).sum() / h) for a in others]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_force_is_the_gradient_of_the_kernels(count):
    torch.manual_seed(count)
    particles = torch.randn(count, 20, dtype=torch.float64)
    for i in range(count):
        moving = [a.clone().requires_grad_(i == j) for j, a in enumerate(particles)]
        potential = -sum(kernels(i, moving))
        (expected,) = torch.autograd.grad(potential, moving[i])
        torch.testing.assert_close(repulsion(particles)[i], expected)


def test_particles_are_pushed_apart():
    particles = torch.randn(4, 20, dtype=torch.float64)
    moved = particles + 0.1 * repulsion(particles)
    assert torch.pdist(moved).mean() > torch.pdist(particles).mean()


def test_coinciding_particles_have_a_finite_force():
    assert repulsion(torch.ones(3, 5)).equal(torch.zeros(3, 5))
    assert repulsion(torch.tensor([[0.0, 0], [0, 0], [0, 0], [3, 4]])).isfinite().all()


def naive_forces(x, size, groups):
    """In float64, one prompt after another."""
    particles, found = x.double().flatten(1) / size, torch.zeros_like(x, dtype=torch.float64)
    for rows in groups:
        for place, row in enumerate(rows):
            members = [particles[r].clone().requires_grad_(r == row) for r in rows]
            (force,) = torch.autograd.grad(-sum(kernels(place, members)), members[place])
            found[row] = force.view(x[row].shape)
    return found


@contextlib.contextmanager
def steps_with_changed_prediction(pipe, groups, space):
    """The paper's rule from the second step on: ε - coefficient·σ·force of the sample that the step starts from."""
    scheduler, count = pipe.scheduler, []
    stock = scheduler.step

    def step(model_output, timestep, sample, **kwargs):
        index = len(count)
        count.append(1)
        if space == "preserving":
            alpha_bar = float(scheduler.alphas_cumprod[timestep])
            sigma, size, to_output = ((1 - alpha_bar) / alpha_bar) ** 0.5, 1.0, 1.0
        elif space == "exploding":
            sigma = float(scheduler.sigmas[index])
            size, to_output = (1 + sigma**2) ** 0.5, 1.0
        else:  # a velocity ε - x0 with x0 = (x - s·ε)/(1 - s)
            s = float(scheduler.sigmas[index])
            sigma = math.inf if s == 1 else s / (1 - s)
            size, to_output = ((1 - s) ** 2 + s**2) ** 0.5, 0.0 if s == 1 else 1 / (1 - s)
        if index > 0 and sigma >= STRENGTH["min_sigma"]:
            with torch.enable_grad():
                forces = naive_forces(sample, size, groups)
            change = -STRENGTH["coefficient"] * sigma * to_output * forces
            model_output = (model_output.double() + change).to(model_output.dtype)
        return stock(model_output, timestep, sample, **kwargs)

    scheduler.step = step
    try:
        with torch.enable_grad():
            yield
    finally:
        del scheduler.step
    assert len(count) == STEPS


def ddim():
    return quiet(sd_pipeline(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1)))


def euler():
    return quiet(sd_pipeline(scheduler=EulerDiscreteScheduler(steps_offset=1)))


SAMPLERS = {
    "ddim": (ddim, "preserving"),
    "euler": (euler, "exploding"),
    "sd3": (lambda: quiet(sd3_pipeline()), "flow"),
    "flux": (lambda: tiny_pipeline("flux"), "flow"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_the_papers_rule_in_samplers_of_first_order(name):
    make, space = SAMPLERS[name]
    pipe = make()
    call = {"prompt": ["a", "b c"], "images": 3}
    plain = draw(pipe, **call)
    with steps_with_changed_prediction(pipe, [[0, 1, 2], [3, 4, 5]], space):
        expected = draw(pipe, **call)
    found = draw(pipe, ParticleGuidance(**STRENGTH), **call)
    difference = (expected - plain).abs().max()
    assert difference > 0.01
    assert (found - expected).abs().max() < 1e-3 * difference


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_other_prompts_do_not_matter(family):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    callback = ParticleGuidance()
    alone = draw(family, callback, generator=generators(0, 1))
    among = draw(family, callback, ["a", "b"], generator=generators(0, 1, 2, 3))
    others = draw(family, callback, ["a", "b"], generator=generators(0, 1, 4, 5))
    assert among[:2].equal(others[:2]) and not among[2:].equal(others[2:])
    torch.testing.assert_close(among[:2], alone, rtol=1e-3, atol=1e-3)
    plain = draw(family, generator=generators(0, 1))
    assert (alone - plain).abs().max() > 3 * (among[:2] - alone).abs().max()


def test_groups_are_the_prompts_or_what_is_said():
    seen = {}

    class Watch(ParticleGuidance):
        def on_step(self, pipeline, index, callback_kwargs):
            seen["groups"] = sorted(rows.tolist() for rows in self.groups)

    draw("sd", Watch(), ["a", "b", "c"], images=2)
    assert seen["groups"] == [[0, 1], [2, 3], [4, 5]]
    draw("sd", Watch(), ["a", "b", "a"], images=1)
    assert seen["groups"] == [[0, 2]]
    draw("sd", Watch(images_per_prompt=3), ["a", "b", "c"], images=1)
    assert seen["groups"] == [[0, 1, 2]]
    assert Watch(images_per_prompt=3).tensor_inputs == ["latents"]


@pytest.mark.parametrize("settings", [{"coefficient": -1.0}, {"min_sigma": -1.0}, {"images_per_prompt": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="at least"):
        ParticleGuidance(**settings)


def test_single_images_are_refused():
    with pytest.raises(ValueError, match="at least 2 images of a prompt, but got 2 of as many prompts"):
        draw("sd", ParticleGuidance(), ["a", "b"], images=1)
    with pytest.raises(ValueError, match="Expected 2 images of each prompt, but got 3 in all"):
        draw("sd", ParticleGuidance(images_per_prompt=2), images=3)


def test_a_second_order_scheduler_is_refused():
    pipe = quiet(sd_pipeline(scheduler=HeunDiscreteScheduler(steps_offset=1)))
    with pytest.raises(ValueError, match="one model call per step, but got HeunDiscreteScheduler"):
        draw(pipe, ParticleGuidance())


def test_embeddings_in_lists_need_the_number_of_images():
    with pytest.raises(TypeError, match="Pass `images_per_prompt`"):
        ParticleGuidance().find_groups(tiny_pipeline("sd"), {"latents": torch.zeros(2, 1), "prompt_embeds": []})
