"""ReNO against the released loop written down naively, and against closed forms."""

import copy
import inspect
import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from problems import generator, redness
from tiny_clip_rewards import build_clip_score, build_hpsv2
from tiny_pipelines import SIZE, call_arguments, save_tiny_clip, tiny_pipeline

from noiseopt import AutoReward, BestOfN, ReNO, optimize_noise
from noiseopt.callbacks import NoiseState
from noiseopt.evaluation.noise_statistics import gaussian_limits, noise_statistics
from noiseopt.pipelines import ChiPrior, WhiteNoiseProjection
from noiseopt.pipelines.noise_math import clip_per_sample
from noiseopt.pipelines.objective import on_released_pixels
from noiseopt.rewards import RewardSum
from noiseopt.schedulers import PinkNoise

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
PAPER_SIZE = 64 / 16  # of the side of the noise: with this factor learning rates are those of 64 × 64


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return AutoReward.from_pretrained(save_tiny_clip(tmp_path_factory.mktemp("clip")))


def released_loop(pipe, prompt, reward, weight, steps, seed):
    """The loop of ExplainableML/ReNO as documented: one image, norms over the whole tensor."""
    latents = torch.randn(1, 4, 16, 16, generator=generator(seed)).requires_grad_()
    optimizer = torch.optim.SGD([latents], lr=5.0, momentum=0.9, nesterov=True)
    stock = inspect.unwrap(StableDiffusionPipeline.__call__)
    losses, best_loss, best_latents = [], math.inf, None
    for step in range(steps):
        again = generator(seed)
        image = stock(pipe, prompt, latents=latents, generator=again, output_type="pt", return_dict=False, **ARGUMENTS)[
            0
        ]
        loss = weight * (100 - reward(image, [prompt]).sum())
        norm = torch.linalg.vector_norm(latents)
        penalty = 0.01 * (norm**2 / 2 - (latents.numel() - 1) * norm.log())
        losses.append(loss.item())
        if loss.item() < best_loss:
            best_loss, best_latents = loss.item(), latents.detach().clone()
        if step < steps - 1:
            optimizer.zero_grad()
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_([latents], 0.1)
            optimizer.step()
    return losses, best_latents, latents.detach()


def released_pixels(images):
    """Return the released loop's pixels: Resize(size), CenterCrop(size) and Normalize of a float tensor."""
    height, width = images.shape[-2:]
    scaled = (32, int(32 * width / height)) if height < width else (int(32 * height / width), 32)
    images = F.interpolate(images, scaled, mode="bicubic", antialias=True)
    top, left = (scaled[0] - 32) // 2, (scaled[1] - 32) // 2
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    return (images[..., top : top + 32, left : left + 32] - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("size", [(40, 56), (57, 33)], ids=str)
def test_parity_mode_gives_every_reward_the_released_pixels(size):
    rewards = RewardSum({build_clip_score(): 0.01, build_hpsv2(): 5.0, redness: 1.0})
    native = [reward.image_transform for reward in rewards.rewards[:2]]
    parity = on_released_pixels(rewards)
    checker = torch.rand(1, 3, *size, generator=generator()).round()
    for reward, twin in zip(rewards.rewards[:2], parity.rewards[:2], strict=True):
        torch.testing.assert_close(twin.image_transform(checker), released_pixels(checker), rtol=0, atol=1e-5)
        assert (reward.image_transform(checker) - twin.image_transform(checker)).abs().max() > 0.05
        assert twin.model is reward.model
    assert [reward.image_transform for reward in rewards.rewards[:2]] == native
    assert parity.weights == rewards.weights
    assert torch.equal(parity.rewards[2](checker, "a"), rewards.rewards[2](checker, "a"))


def test_parity_mode_follows_the_released_loop_step_by_step(clip):
    pipe, steps, weight = copy.deepcopy(tiny_pipeline("sd")), 12, 0.5  # the shared one stays as it is
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    losses, best, last = released_loop(pipe, "a b", clip, weight, steps, seed=3)
    seen = []
    method = ReNO(rewards=[(clip, weight)], mode="parity", steps=steps, learning_rate=5.0 * PAPER_SIZE)
    result = optimize_noise(
        pipe, "a b", method, generator=generator(3), callbacks=lambda state: seen.append(state.noise), **ARGUMENTS
    )
    ours = 100 * weight + result.losses[:, 0]
    torch.testing.assert_close(ours, torch.tensor(losses), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.noise, best, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[-1], last, rtol=0, atol=1e-5)
    assert result.best_step.item() == losses.index(min(losses))


class Steps:
    """A method's own updates, fed with chosen gradients."""

    def __init__(self, method: ReNO, noise: torch.Tensor):
        problem: Any = types.SimpleNamespace(noise=noise, is_white=True)
        self.method, self.noise, self.memory = method, noise, method.start(problem)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.noise = self.method.step(NoiseState(None, [""] * len(self.noise), 2, self.noise), gradient, self.memory)
        return self.noise


@pytest.mark.parametrize(
    ("side", "channels", "rate"),
    [(512, 4, 5.0), (1024, 4, 10.0), (512, 16, 5.0)],
    ids=["SD-Turbo, SDXL-Turbo and PixArt-DMD", "Hyper-SDXL", "FLUX.1-schnell"],
)
def test_the_released_step_is_that_of_the_paper_on_all_its_models(side, channels, rate):
    noise = torch.randn(1, channels, side // 8, side // 8, generator=generator())
    gradient = torch.randn(noise.shape, generator=generator(1))
    released = noise.clone().requires_grad_()
    optimizer = torch.optim.SGD([released], lr=rate, momentum=0.9, nesterov=True)
    steps = Steps(ReNO(rewards="red", mode="parity"), noise)
    kept_norm = Steps(ReNO(rewards="red", geometry="sphere"), noise)(gradient)
    for _ in range(2):
        released.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([released], 0.1)
        optimizer.step()
        torch.testing.assert_close(steps(gradient), released.detach(), rtol=0, atol=1e-6)
    assert (kept_norm - noise).norm().item() == pytest.approx(0.19 * rate, rel=1e-3)


def test_first_step_is_095_and_49_steps_travel_2047_at_most():
    start = torch.zeros(1, 4, 64, 64)
    steps = Steps(ReNO(rewards="red", mode="parity"), start)
    gradient = torch.full_like(start, 1.0)
    assert steps(gradient).norm().item() == pytest.approx(0.95, rel=1e-4)
    for _ in range(48):
        steps(gradient)
    assert steps.noise.norm().item() == pytest.approx(204.73, rel=1e-4)


def test_update_equals_torch_sgd_with_nesterov_momentum():
    gradients = torch.randn(10, 2, 4, 8, 8, generator=generator(1)) * 0.02
    expected = torch.zeros(2, 4, 8, 8, requires_grad=True)
    optimizer = torch.optim.SGD([expected], lr=3.0, momentum=0.8, nesterov=True)
    steps = Steps(ReNO(rewards="red", mode="parity", learning_rate=24.0, momentum=0.8), torch.zeros(2, 4, 8, 8))
    for gradient in gradients:
        expected.grad = clip_per_sample(gradient, 0.1)
        optimizer.step()
        steps(gradient)
    torch.testing.assert_close(steps.noise, expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [64, 128])
def test_chi_prior_has_its_minimum_value_and_curvature_where_they_must_be(size):
    dimension = 4 * size * size
    radius = math.sqrt(dimension - 1)
    prior = ChiPrior(0.01)
    direction = torch.randn(1, 4, size, size, generator=generator(), dtype=torch.float64)
    direction /= direction.norm()

    def slope(at):
        noise = (direction * at).requires_grad_()
        (gradient,) = torch.autograd.grad(prior(noise).sum(), noise)
        return (gradient * direction).sum().item()

    minimum = {64: -712.99, 128: -3306.35}[size]
    assert prior(direction * radius).item() == pytest.approx(minimum, abs=0.01)
    assert slope(radius) == pytest.approx(0.0, abs=1e-9)
    assert (slope(radius + 0.01) - slope(radius - 0.01)) / 0.02 == pytest.approx(0.02, rel=1e-4)


def test_prior_and_clip_are_per_sample_and_in_float32():
    noise = torch.randn(3, 4, 64, 64, generator=generator()) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    prior = ChiPrior(0.01)
    torch.testing.assert_close(prior(noise), torch.cat([prior(each[None]) for each in noise]))
    assert prior(noise.bfloat16()).dtype == torch.float32
    clipped = clip_per_sample(noise, 0.1).flatten(1).norm(dim=1)
    torch.testing.assert_close(clipped, torch.full((3,), 0.1), rtol=1e-4, atol=0)
    small = torch.full((1, 4, 2, 2), 1e-3)
    assert torch.equal(clip_per_sample(small, 0.1), small)


def test_the_clip_acts_on_the_sum_of_reward_and_prior_and_best_ignores_the_prior():
    pipe = tiny_pipeline("sd")
    seen = []
    latents = torch.randn(1, 4, 16, 16, generator=generator()) * 3  # far outside: the prior alone fills the clip
    method = ReNO(rewards=redness, mode="parity", steps=2, regularization=10.0, learning_rate=5.0 * PAPER_SIZE)
    result = optimize_noise(
        pipe, "a", method, latents=latents, callbacks=lambda state: seen.append(state.noise), **ARGUMENTS
    )
    move = seen[1] - seen[0]
    assert move.norm().item() == pytest.approx(0.95, rel=1e-3)
    assert torch.cosine_similarity(move.flatten(), -latents.flatten(), dim=0).item() > 0.999
    assert result.best_step.item() == int(result.losses.argmin())


def test_ties_keep_the_first():
    def constant(images, prompts):
        return images.mean((1, 2, 3)) * 0

    result = optimize_noise(
        tiny_pipeline("sd"), "a", ReNO(rewards=constant, steps=4), generator=generator(), **ARGUMENTS
    )
    assert result.best_step.item() == 0


def test_n_evaluations_and_n_minus_one_updates():
    noises, gradients = [], []

    def watched(images, prompts):
        if images.requires_grad:
            images.register_hook(lambda gradient: gradients.append(gradient))
        return redness(images, prompts)

    def keep(state: NoiseState):
        noises.append(state.noise)

    method = ReNO(rewards=watched, steps=4, views=0)
    optimize_noise(tiny_pipeline("sd"), "a", method, generator=generator(), callbacks=keep, **ARGUMENTS)
    assert len(noises) == 4 and len(gradients) == 1 + 3  # one more to try the callable out


@pytest.mark.parametrize("settings", [{"geometry": "sphere"}, {"noise_sampler": "pink"}], ids=["sphere", "pink"])
def test_the_norm_of_the_noise_is_kept(settings):
    arguments = {name: settings[name] for name in settings if name == "noise_sampler"}
    method = ReNO(rewards=redness, steps=6, search=0, geometry=settings.get("geometry"))
    result = optimize_noise(tiny_pipeline("sd"), "a", method, generator=generator(), **arguments, **ARGUMENTS)
    torch.testing.assert_close(result.norms, result.norms[:1].expand_as(result.norms), rtol=1e-5, atol=0)


def test_a_step_of_the_default_follows_the_mean_of_projected_gradients():
    """Against the sums written out, for gradients of very different sizes."""
    noise, project = torch.randn(2, 4, 16, 16, generator=generator()), WhiteNoiseProjection()
    steps = Steps(ReNO(rewards="red", learning_rate=0.2, momentum=0.8), noise)
    gradients = [torch.randn(noise.shape, generator=generator(seed)) for seed in range(1, 5)]
    expected = noise
    for count, size in enumerate([1e-6, 1.0, 1e4, 1e-3], start=1):
        weights = [0.8**age for age in reversed(range(count))]
        mean = sum(w * project(g) for w, g in zip(weights, gradients, strict=False)) / sum(weights)
        expected = project(expected - 0.2 * mean)
        torch.testing.assert_close(steps(size * gradients[count - 1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 16, 8, 8), (1, 4, 9, 13)], ids=str)
def test_ascent_on_a_quadratic_reaches_its_optimum_on_white_noise(shape):
    """For `−‖z − t‖²` the optimum is the projection of t, and on the sphere `√d·t/‖t‖`."""
    target = 30 * torch.randn(shape, generator=generator(1))
    for settings, optimum in [
        ({}, WhiteNoiseProjection()(target)),
        ({"geometry": "sphere", "learning_rate": 100.0}, target / target.square().mean().sqrt()),
    ]:
        noise = torch.randn(shape, generator=generator())
        steps = Steps(ReNO(rewards="red", momentum=0.5, **settings), noise / noise.square().mean().sqrt())
        for _ in range(200):
            steps(2 * (steps.noise - target))
        torch.testing.assert_close(steps.noise, optimum, rtol=0, atol=0.02)


def pulls() -> dict[str, torch.Tensor]:
    """Directions that no Gaussian noise has: smooth, pink, of a single entry, of one size."""
    noise = torch.randn(1, 4, 64, 64, generator=generator(1))
    point = torch.zeros_like(noise)
    point[0, 0, 3, 3] = 1
    return {
        "smooth": noise.cumsum(-1).cumsum(-2),
        "pink": PinkNoise(1.0).color(noise),
        "point": point,
        "signs": noise.sign(),
    }


@pytest.mark.parametrize("pull", pulls().values(), ids=pulls())
def test_white_noise_stays_gaussian_where_the_released_step_drifts(pull):
    """A reward that always pulls the same way, for 100 steps; in standard errors of Gaussian noise."""
    noise = torch.randn(1, 4, 64, 64, generator=generator())
    limits, found = gaussian_limits((1, 4, 64, 64)), {}
    for name, settings in {"white": {}, "parity": {"mode": "parity"}}.items():
        steps = Steps(ReNO(rewards="red", **settings), noise)
        for _ in range(100):
            steps(-pull)
        found[name] = limits.z_scores(noise_statistics(steps.noise))
    for statistic in ("norm", "mean", "variance", "skewness", "excess_kurtosis", "spectral_slope"):
        assert abs(getattr(found["white"], statistic)) < 3.1, statistic
    assert max(abs(value) for value in (found["parity"].norm, found["parity"].spectral_slope)) > 10


def test_views_leave_values_alone_and_change_the_gradient():
    def run(views):
        method = ReNO(rewards=redness, steps=2, views=views)
        return optimize_noise(tiny_pipeline("sd"), "a", method, generator=generator(), **ARGUMENTS)

    plain, views = run(0), run(4)
    assert torch.equal(plain.losses[0], views.losses[0])
    assert not torch.equal(plain.losses[1], views.losses[1])
    assert torch.equal(views.losses, run(4).losses)


@pytest.mark.parametrize(
    "settings", [{"gradient": "frozen"}, {"preview": True}, {"preview": True, "gradient": "frozen"}]
)
def test_every_kind_of_sample_and_gradient_lowers_the_loss(settings):
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    result = optimize_noise(pipe, "a", ReNO(rewards=redness, steps=4, **settings), generator=generator(), **arguments)
    assert result.losses.min() < result.losses[0]


def test_best_of_n_returns_the_best_of_independent_gaussian_noises():
    pipe = tiny_pipeline("sd")
    result = optimize_noise(pipe, "a", BestOfN(rewards=redness, steps=8), generator=generator(), **ARGUMENTS)
    plain = pipe("a", generator=generator(), output_type="pt", **ARGUMENTS).images
    assert torch.equal(result.initial_images, plain)
    assert result.losses.unique().numel() == 8
    assert result.best_loss.item() == result.losses.min().item()
    again = pipe("a", latents=result.latents, output_type="pt", **ARGUMENTS).images
    assert torch.equal(again, result.images)


def test_best_of_n_takes_a_black_box_and_its_candidates_do_not_depend_on_the_batch():
    def black_box(images, prompts):
        return torch.tensor([image.mean().item() for image in images])

    pipe, seeds = tiny_pipeline("sd"), [4, 5]
    method = BestOfN(rewards=black_box, steps=5)
    batch = optimize_noise(pipe, ["a", "b"], method, generator=[generator(seed) for seed in seeds], **ARGUMENTS)
    alone = optimize_noise(pipe, "b", method, generator=generator(5), **ARGUMENTS)
    torch.testing.assert_close(batch.noise[1], alone.noise[0])


def test_candidates_are_gaussian():
    noises = []
    method = BestOfN(rewards=redness, steps=20)
    optimize_noise(
        tiny_pipeline("sd"), "a", method, generator=generator(), callbacks=lambda s: noises.append(s.noise), **ARGUMENTS
    )
    values = torch.cat(noises[1:]).flatten()
    assert values.mean().abs() < 4 / len(values) ** 0.5
    assert abs(values.var().item() - 1) < 4 * (2 / len(values)) ** 0.5
    assert torch.corrcoef(torch.cat(noises).flatten(1)).fill_diagonal_(0).abs().max() < 0.15
