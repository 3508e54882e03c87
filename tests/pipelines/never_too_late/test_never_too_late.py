"""Never Too Late against the released loop written down naively, its guard and its sets, and inside whole calls."""

import dataclasses
import inspect
import math
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from problems import generator, redness
from tiers import slow_except
from tiny_clip_rewards import build_clip_score, build_hpsv2
from tiny_features import TINY_FEATURES, publish_dinov2
from tiny_pipelines import (
    BUILDERS,
    SIZE,
    call_arguments,
    flux_pipeline,
    quiet,
    save_tiny_clip,
    sd_pipeline,
    sdxl_pipeline,
    tiny_pipeline,
)

from noiseopt import (
    NeverTooLate,
    NeverTooLateFluxPipeline,
    NeverTooLateStableDiffusionPipeline,
    NeverTooLateTurboPipeline,
    NoiseResult,
    PinkNoise,
    optimize_noise,
    shapes_world,
)
from noiseopt.callbacks import NoiseState
from noiseopt.demo import ONE_STEP, load_pipeline
from noiseopt.pipelines import QualityGuard, WhiteNoiseProjection
from noiseopt.pipelines.never_too_late.image_set import sequential_settings
from noiseopt.pipelines.never_too_late.method import NeverTooLateState
from noiseopt.pipelines.never_too_late.quality_guard import GUARD_REPORT
from noiseopt.rewards import (
    DPP,
    AutoFeatures,
    DPPPatch,
    ImageTransform,
    NonDifferentiableReward,
    PadTransform,
    PairwiseDiversity,
    SetRewardSum,
)
from noiseopt.rewards.sets.hinged_set_reward import HingedSetReward

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
PAPER_SIZE = 64 / 16  # of the side of the noise: with this factor learning rates are those of 64 × 64
PIPELINES = {
    NeverTooLateTurboPipeline: sdxl_pipeline,
    NeverTooLateStableDiffusionPipeline: sd_pipeline,
    NeverTooLateFluxPipeline: flux_pipeline,
}
FAMILIES = {
    NeverTooLateTurboPipeline: "sdxl",
    NeverTooLateStableDiffusionPipeline: "sd",
    NeverTooLateFluxPipeline: "flux",
}
FEATURES = TINY_FEATURES["dinov2"]()
CLS = {DPP(FEATURES): 150.0}


def black_box(images, prompts):
    return torch.tensor([image.mean().item() for image in images])


def method(**changes) -> NeverTooLate:
    return NeverTooLate(**{"diversity": CLS, "steps": 6, **changes})


def find(how: NeverTooLate, prompt="a b", count=4, seed=0, **arguments):
    """The result, and the noises that were evaluated."""
    noises = []
    call = {"num_images_per_prompt": count, "generator": generator(seed), **ARGUMENTS, **arguments}
    result = optimize_noise(
        tiny_pipeline("sd"), prompt, how, callbacks=lambda state: noises.append(state.noise), **call
    )
    return result, noises


def naive_dpp(features) -> torch.Tensor:
    count, directions = len(features), F.normalize(features.double(), dim=-1)
    return torch.logdet((1 + 1e-6) * torch.eye(count) + directions @ directions.T) / (count * math.log(2))


def released_loop(pipe, value, quality: float, diversity: float, steps: int, warm_up: int):
    """The loop of divgen as documented: one set, one leaf, one clip; the losses, the noises, the best."""
    noise = torch.randn(4, 4, 16, 16, generator=generator(3)).requires_grad_()
    optimizer = torch.optim.SGD([noise], lr=6.0, momentum=0.9)
    stock = inspect.unwrap(StableDiffusionPipeline.__call__)
    call = {"num_images_per_prompt": 4, "output_type": "pt", "return_dict": False, **ARGUMENTS}
    losses, noises = [], []
    for step in range(steps):
        images = stock(pipe, "a b", latents=noise, generator=generator(3), **call)[0]
        rewards = redness(images, None)
        loss = quality * (1 - (rewards.detach() if step < warm_up else rewards)).mean() - diversity * value(images)
        losses.append(loss.item())
        noises.append(noise.detach().clone())
        norms = torch.stack([each.norm() for each in noise])
        loss = loss + 0.01 * (norms**2 / 2 - (noise[0].numel() - 1) * norms.log()).mean()
        if step < steps - 1:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([noise], 0.1)
            optimizer.step()
    return losses, noises, noises[losses.index(min(losses))]


def released_patches(images) -> torch.Tensor:
    """As released: the whole image resized without antialiasing, here to 36 pixels, and the patches after the class."""
    resized = F.interpolate(images, (36, 36), mode="bilinear")
    return TINY_FEATURES["dinov2_patch"]().model((resized - 0.4) / 0.3).last_hidden_state[:, 1:]


def patch_distance(images) -> torch.Tensor:
    patches = F.normalize(released_patches(images), dim=-1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    return torch.stack([1 - (patches[i] * patches[j]).sum(-1) for i, j in pairs]).mean()


@pytest.mark.parametrize("mode", ["parity", "default"])
def test_parity_mode_sees_the_released_pixels_in_every_part(mode):
    """In features, also under a hinge, in optimized rewards, and in rewards that only a guard needs."""
    images = torch.rand(1, 3, 100, 140, generator=generator())
    parts = {"diversity": {DPPPatch(TINY_FEATURES["dinov2_patch"]()): 1.0}, "hinge": 0.99}
    parts |= {"rewards": {build_hpsv2(): 1.0}, "guard": [QualityGuard(reward=build_clip_score(), drop=0.1)]}
    objective: Any = NeverTooLate(mode=mode, **parts).objective(tiny_pipeline("sd"))
    (features,) = objective.diversity.features(images).values()
    assert torch.allclose(features, released_patches(images), atol=1e-3) is (mode == "parity")
    own = {"hpsv2.1": PadTransform(32), "clipscore": ImageTransform(size=32, crop=(32, 32))}
    for rewards in (objective.quality.rewards, objective.watched.rewards):
        transform = own[rewards.names[0]]
        expected = transform.as_in_reno() if mode == "parity" else transform
        assert rewards.rewards[0].image_transform == expected


OBJECTIVES = {
    "dpp": (lambda: DPP(FEATURES), lambda images: naive_dpp(FEATURES(images))),
    "dino": (lambda: PairwiseDiversity(TINY_FEATURES["dinov2_patch"]()), patch_distance),
}


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parity_mode_follows_the_released_loop_step_by_step(name, warm_up):
    reward, value = OBJECTIVES[name]
    settings = {"diversity": {reward(): 150.0}, "rewards": [(redness, 3.0)], "mode": "parity", "warm_up": warm_up}
    result, seen = find(NeverTooLate(steps=8, learning_rate=6.0 * PAPER_SIZE, **settings), seed=3)
    losses, noises, best = released_loop(tiny_pipeline("sd"), value, 3.0, 150.0, 8, warm_up)
    torch.testing.assert_close(result.losses, torch.tensor(losses)[:, None].expand(8, 4), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.stack(seen), torch.stack(noises), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.noise, best, rtol=0, atol=1e-4)
    assert result.best_step.tolist() == [losses.index(min(losses))] * 4
    assert (noises[-1] - noises[0]).norm() > 1


def test_the_best_ignores_the_prior():
    far = 3 * torch.randn(4, 4, 16, 16, generator=generator())
    result, noises = find(method(regularization=10.0, steps=2, mode="parity", learning_rate=PAPER_SIZE), latents=far)
    move = (noises[1] - noises[0]).flatten()
    assert move.norm().item() == pytest.approx(0.1, rel=1e-3)
    assert torch.cosine_similarity(move, -far.flatten(), dim=0) > 0.99  # the prior alone fills the clip
    assert result.best_step.unique().tolist() == [int(result.losses[:, 0].argmin())]


@pytest.mark.parametrize("mode", ["parity", "default"])
def test_the_step_is_in_units_of_the_size_of_the_noise_and_clipped_for_each_set(mode):
    def moves(prompt, count):
        _, noises = find(method(mode=mode, steps=2), prompt, count)
        return [move.norm().item() for move in (noises[1] - noises[0]).split(count)]

    assert moves("a b", 4) == pytest.approx([0.6 / PAPER_SIZE], rel=1e-4)
    assert moves(["a", "b"], 2) == pytest.approx([0.6 / PAPER_SIZE] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("channels", "count", "settings"),
    [
        (4, 4, {"learning_rate": 6.0, "max_grad_norm": 0.1}),
        (4, 4, {"learning_rate": 10.0, "max_grad_norm": 0.1}),
        (16, 4, {"learning_rate": 6.0, "max_grad_norm": 0.1}),
        (16, 4, {"learning_rate": 2.0, "max_grad_norm": 0.15}),
        (16, 1, sequential_settings(False)),
    ],
    ids=["SDXL-Turbo", "SDXL-Turbo, sweep", "FLUX.1-schnell", "FLUX.1-schnell, pink", "FLUX.1-schnell, one by one"],
)
def test_the_papers_settings_give_the_released_steps_at_512_pixels(channels, count, settings):
    how = method(**{**settings, "steps": 2})
    problem = type("Problem", (), {"groups": [0] * count, "noise": torch.zeros(count, channels, 64, 64)})
    run, gradient = NoiseState(None, [""] * count, 2, problem.noise), torch.ones_like(problem.noise)
    released = torch.zeros_like(problem.noise).requires_grad_()
    optimizer = torch.optim.SGD([released], lr=how.rate, momentum=0.9)
    released.grad = gradient / count  # of the mean over the set
    torch.nn.utils.clip_grad_norm_([released], how.max_grad_norm)
    optimizer.step()
    moved = how.step(run, gradient, how.start(problem))
    torch.testing.assert_close(moved, released.detach(), rtol=1e-5, atol=0)
    assert moved.norm().item() == pytest.approx(how.rate * how.max_grad_norm, rel=1e-3)


def test_a_set_reward_beyond_its_target_has_its_value_and_no_gradient():
    features = torch.randn(4, 8, generator=generator(), dtype=torch.float64).requires_grad_()
    value = DPP(FEATURES).score(features)
    (slope,) = torch.autograd.grad(value, features)
    for target, factor in ((value.item() + 1e-6, 1.0), (value.item(), 0.0), (value.item() - 1e-6, 0.0)):
        hinged = HingedSetReward(DPP(FEATURES), target).score(features)
        assert hinged.item() == value.item()
        torch.testing.assert_close(torch.autograd.grad(hinged, features)[0], factor * slope)


def test_hinge_is_the_linear_form_until_the_target_and_no_diversity_gradient_beyond():
    plain, linear = find(method(regularization=0.0, steps=9))
    values = plain.scores["dpp"][:, 0].tolist()
    assert values[4] > max(values[:4])
    tau = (values[3] + values[4]) / 2
    hinged, noises = find(method(regularization=0.0, steps=9, hinge=tau))
    assert all(torch.equal(*pair) for pair in zip(noises[:5], linear[:5], strict=True))
    for step in range(5, 8):  # only momentum is left
        momentum = 0.9 * (noises[step] - noises[step - 1])
        torch.testing.assert_close(noises[step + 1] - noises[step], momentum, rtol=0, atol=2e-6)
    expected = 150 * (tau - hinged.scores["dpp"]).clamp(min=0)
    torch.testing.assert_close(hinged.losses, expected, rtol=0, atol=1e-4)
    assert hinged.best_step.unique().tolist() == [4]  # the first of those with nothing left to gain
    assert hinged.provenance["objective"]["hinge"] == {"dpp": tau}


def test_beyond_the_hinge_rewards_go_on():
    settings = {"regularization": 0.0, "steps": 3, "momentum": 0.0}
    _, both = find(method(rewards=[(redness, 1.0)], hinge=0.1, **settings))
    _, rewards = find(method(diversity={DPP(FEATURES): 0.0}, rewards=[(redness, 1.0)], **settings))
    torch.testing.assert_close(both[-1], rewards[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["stop_at", "stop_ratio"])
def test_a_set_ends_at_the_first_step_that_reaches(by):
    free, noises = find(method(steps=10), ["a", "b"])
    values = free.scores["dpp"][:, [0, 4]]
    reference = values[0] if by == "stop_ratio" else torch.ones(2)
    given = (values[5] / reference).mean().item()  # which one of the two sets has reached by then
    first = [int((column >= given * unit).nonzero()[0]) for column, unit in zip(values.T, reference, strict=True)]
    assert first[0] != first[1] and min(first) > 0
    stopped, _ = find(method(steps=10, **{by: given}), ["a", "b"])
    assert len(stopped.losses) == max(first) + 1
    for rows, end in zip((slice(4), slice(4, 8)), first, strict=True):
        assert stopped.losses[: end + 1, rows].isfinite().all() and stopped.losses[end + 1 :, rows].isnan().all()
        best = stopped.best_step[rows].unique().item()
        assert best == int(free.losses[: end + 1, rows.start or 0].argmin())
        torch.testing.assert_close(stopped.noise[rows], noises[best][rows])
    assert stopped.provenance["stopped"] == "diversity reached"


def test_of_several_targets_all_must_be_reached():
    diversity = {DPP(FEATURES): 150.0, PairwiseDiversity(FEATURES): 0.0}
    free, _ = find(method(steps=8, diversity=diversity))
    early, late = free.scores["dpp"][2, 0].item(), free.scores["pairwise"][5, 0].item()
    first = int(((free.scores["dpp"] >= early) & (free.scores["pairwise"] >= late))[:, 0].nonzero()[0])
    assert first > int((free.scores["dpp"] >= early)[:, 0].nonzero()[0])
    stopped, _ = find(method(steps=8, diversity=diversity, stop_at={"dpp": early, "pairwise": late}))
    assert len(stopped.losses) == first + 1


@pytest.mark.parametrize("argument", ["stop_at", "hinge"])
def test_an_absolute_target_out_of_reach_is_refused_before_any_model_runs(argument, monkeypatch):
    monkeypatch.setattr(tiny_pipeline("sd").text_encoder, "forward", None)
    with pytest.raises(ValueError, match=rf"`{argument}` of 'dpp' to be at most 1, as 4 images .* but got 1.1"):
        find(method(**{argument: 1.1}))
    vendi = {"vendi_2": ("tiny_image", 1.0)}
    with pytest.raises(ValueError, match=r"to be at most 3, as 3 images have at most 3, but got 3.5"):
        find(method(diversity=vendi, **{argument: {"vendi_2": 3.5}}), count=3)
    known = torch.rand(1, 3, 32, 32, generator=generator())
    with pytest.raises(ValueError, match="at most 4, as 4 images"):  # the reference is one of them
        find(method(diversity=vendi, references=known, **{argument: 4.5}), count=3)


def test_a_ratio_out_of_reach_is_refused_at_the_first_evaluation_with_the_largest():
    plain, _ = find(method(steps=1))
    largest = 1 / plain.scores["dpp"][0, 0].item()
    with pytest.raises(ValueError, match=rf"`stop_ratio` of 'dpp' to be at most {largest:.4g}, .* but got 4:"):
        find(method(stop_ratio=4.0))  # the default of the released code
    assert find(method(stop_ratio=0.999 * largest, steps=2))[0].losses.shape == (2, 4)


# the guard


class Script:
    """A black box that gives image after image what is written for each step."""

    def __init__(self, *steps: list[float]) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, images, prompts):
        if len(images) != len(self.steps[0]):
            return torch.zeros(len(images))  # tried out
        self.calls += 1
        return torch.tensor(self.steps[min(self.calls, len(self.steps)) - 1])


class Watched(NeverTooLate):
    """Keeps the momentum after each step."""

    velocities: list[torch.Tensor] = []  # noqa: RUF012  emptied by each test that reads it

    def step(self, run, gradient, state):
        moved = super().step(run, gradient, state)
        self.velocities.append(state.velocity.clone())
        return moved


GOOD = [1.0, 1.0, 1.0, 1.0]


def test_a_rejected_image_goes_back_without_momentum_and_the_others_go_on():
    Watched.velocities.clear()
    script = Script(GOOD, GOOD, [1.0, 0.0, 1.0, 1.0], GOOD)
    settings = {"regularization": 0.0, "learning_rate": PAPER_SIZE, "mode": "parity", "steps": 5}
    result, noises = find(Watched(diversity=CLS, guard=QualityGuard(reward=script, drop=0.5), **settings))
    _, free = find(method(**settings))
    velocities = Watched.velocities
    assert all(torch.equal(*pair) for pair in zip(noises[:3], free[:3], strict=True))
    assert torch.equal(noises[3][1], noises[1][1])  # the last good one
    others = [0, 2, 3]
    torch.testing.assert_close(noises[3][others], free[3][others])
    assert not velocities[2][1].any() and velocities[2][others].flatten(1).any(1).all()
    # out of rest the next step is the clipped gradient alone, so no longer than the clip
    assert (noises[4][1] - noises[3][1]).norm() <= 0.1 + 1e-5
    torch.testing.assert_close(noises[3][1] - noises[4][1], velocities[3][1], rtol=0, atol=1e-6)
    assert result.reports[GUARD_REPORT]["rejections"] == [0, 1, 0, 0]
    assert result.reports[GUARD_REPORT]["accepted_steps"] == [3] * 4
    assert result.reports[GUARD_REPORT]["frozen"] == [False] * 4


def test_a_rejected_step_is_never_the_best_and_image_and_noise_belong_together():
    free, _ = find(method(steps=6))
    assert free.best_step.unique().tolist() == [5]
    bad = [1.0, 1.0, 0.0, 1.0]
    result, noises = find(method(steps=6, guard=QualityGuard(reward=Script(*[GOOD] * 5, bad), drop=0.5)))
    assert result.losses[5, 0] < result.losses[:5, 0].min()
    assert result.best_step.tolist() == [4] * 4 and torch.equal(result.noise, noises[4])
    redrawn = tiny_pipeline("sd")(
        "a b", num_images_per_prompt=4, latents=result.latents, output_type="pt", **ARGUMENTS
    ).images
    assert torch.equal(redrawn, result.images)


def test_a_guard_that_never_accepts_says_so_and_returns_the_plain_images():
    guard = QualityGuard(reward=Script(GOOD, [1.0, 1.0, 1.0, 0.0]), drop=0.5)
    with pytest.warns(UserWarning, match=r"accepted no step of the sets of images \[0, 1, 2, 3\].*larger drop"):
        result, noises = find(method(guard=guard))
    assert torch.equal(result.noise, noises[0]) and torch.equal(result.images, result.initial_images)
    assert len(result.losses) == 6 and result.reports[GUARD_REPORT]["kept_baseline"] == [True] * 4


def test_freezing_holds_an_image_for_good_and_ends_when_all_are_held():
    guard = QualityGuard(reward=Script(GOOD, GOOD, [1.0, 0.0, 1.0, 1.0], GOOD), drop=0.5, mode="freeze")
    result, noises = find(method(guard=guard))
    assert all(torch.equal(noise[1], noises[1][1]) for noise in noises[3:])
    assert not torch.equal(noises[4][0], noises[3][0])
    assert result.reports[GUARD_REPORT]["frozen"] == [False, True, False, False]
    assert result.reports[GUARD_REPORT]["accepted_steps"] == [4] * 4
    guard = QualityGuard(reward=Script(GOOD, GOOD, [0.0] * 4), drop=0.5, mode="freeze")
    result, noises = find(method(guard=guard))
    assert len(result.losses) == 3 and result.provenance["stopped"] == "guard holds all images"
    assert torch.equal(result.noise, noises[1])


def test_an_image_below_its_threshold_from_the_start_is_held_at_its_plain_noise():
    guard = QualityGuard(reward=Script([0.3, 0.9, 0.9, 0.9], [0.9] * 4), threshold=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The quality guard")
        result, noises = find(method(guard=guard))
    assert result.best_step.unique().tolist() == [5]
    assert torch.equal(result.noise[0], noises[0][0]) and not torch.equal(result.noise[1], noises[0][1])
    assert result.reports[GUARD_REPORT]["frozen"] == [True, False, False, False]
    assert result.reports[GUARD_REPORT]["limits"]["guard Script"] == [0.5] * 4


def test_sets_that_are_held_from_the_start_end_there_and_say_so():
    guard = QualityGuard(reward=Script([0.3] * 4 + [0.9] * 4), threshold=0.5)
    with pytest.warns(UserWarning, match=r"of the sets of images \[0, 1, 2, 3\]:"):
        result, noises = find(method(guard=guard, steps=3), ["a", "b"])
    assert torch.equal(result.noise[:4], noises[0][:4]) and result.losses[1:, :4].isnan().all()
    assert result.best_step[4:].unique().tolist() == [2]


def test_a_set_that_was_diverse_enough_at_once_was_not_rejected():
    plain, _ = find(method(steps=1), ["a", "b"])
    values = plain.scores["dpp"][0, [0, 4]]
    target = values.mean().item()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The quality guard")
        guard = QualityGuard(reward=black_box, drop=10.0)
        result, _ = find(method(guard=guard, stop_at=target, steps=3), ["a", "b"])
    done = int(values.argmax()) * 4
    assert result.reports[GUARD_REPORT]["accepted_steps"][done] == 0
    assert not any(result.reports[GUARD_REPORT]["kept_baseline"])


def test_limits_in_closed_form():
    plain = torch.tensor([0.2, 0.4])
    for settings, expected in (
        ({"drop": 0.05}, [0.15, 0.35]),
        ({"keep": 0.8}, [0.16, 0.32]),
        ({"threshold": 0.31}, [0.31, 0.31]),
        ({"drop": 0.01, "keep": 0.8, "threshold": 0.31}, [0.16, 0.31]),
    ):
        limits = QualityGuard(reward="sharpness", **settings).limits(plain)
        torch.testing.assert_close(limits, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"rewards of 0 or more for a guard with `keep`.*Use `drop`"):
        QualityGuard(reward="red", keep=0.5).limits(torch.tensor([0.1, -0.1]))


def test_a_guard_keeps_what_the_optimization_would_lose():
    free, _ = find(method(steps=12, learning_rate=60.0))
    plain = black_box(free.initial_images, None)
    lost = (plain - black_box(free.images, None)).max().item()
    assert lost > 0
    guard = {black_box: {"drop": lost / 2}}
    guarded, _ = find(method(steps=12, learning_rate=60.0, guard=guard))
    assert (black_box(guarded.images, None) > plain - lost / 2).all()
    assert sum(guarded.reports[GUARD_REPORT]["rejections"]) > 0 and guarded.best_step.max() > 0


class Counted:
    """A reward with a name that counts its calls on the images of a set."""

    name = "counted"

    def __init__(self) -> None:
        self.__name__, self.calls = "counted", 0

    def __call__(self, images, prompts):
        self.calls += len(images) > 1
        return redness(images, prompts)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_guard_by_the_name_of_a_reward_shares_it(weight):
    counted = Counted()
    how = method(rewards=[(counted, weight), (black_box, 0.0), (redness, 1.0)], guard={"counted": 100.0}, steps=3)
    result, _ = find(how)
    assert counted.calls == 3
    assert set(result.scores) == {"counted", "black_box", "redness", "dpp"}
    limits = torch.tensor(result.reports[GUARD_REPORT]["limits"]["counted"])
    torch.testing.assert_close(limits, result.scores["counted"][0] - 100)
    own = find(method(guard={counted: 100.0}, steps=3))[0]
    assert counted.calls == 6 and set(own.scores) == {"guard counted", "dpp"}


def test_rewards_that_all_have_weight_zero_leave_the_guard():
    """The setting of the released code: HPSv2 is loaded, does not count, and is guarded."""
    result, _ = find(method(rewards={"red": 0.0}, guard={"red": 0.05}))
    alone, _ = find(method(guard={"red": 0.05}))
    assert torch.equal(result.noise, alone.noise) and set(result.scores) == {"guard red", "dpp"}
    with pytest.raises(ValueError, match="all weights are 0"):
        find(method(rewards={"red": 0.0}))


def test_the_report_is_saved_with_the_result(tmp_path):
    result, _ = find(method(guard={"sharpness": {"keep": 0.9}, "complexity": {"drop": 0.5, "mode": "freeze"}}))
    result.save(tmp_path / "result.safetensors")
    loaded = NoiseResult.load(tmp_path / "result.safetensors")
    assert loaded.reports == result.reports and set(loaded.reports[GUARD_REPORT]["limits"]) == {
        "guard sharpness",
        "guard complexity",
    }
    guards = loaded.provenance["objective"]["guards"]
    assert guards["guard sharpness"]["keep"] == 0.9 and guards["guard complexity"]["mode"] == "freeze"


# sets


def test_prompts_in_one_call_are_sets_of_their_own():
    how = method(steps=4, rewards=[(redness, 1.0)])
    streams = [generator(seed) for seed in range(5)]
    both, _ = find(how, ["a", "b", "a", "b", "b"], 1, generator=streams)
    for prompt, rows in (("a", [0, 2]), ("b", [1, 3, 4])):
        alone, _ = find(how, [prompt] * len(rows), 1, generator=[generator(seed) for seed in rows])
        torch.testing.assert_close(both.losses[:, rows], alone.losses, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(both.noise[rows], alone.noise, rtol=0, atol=1e-4)
        assert both.losses[:, rows].unique(dim=1).shape[1] == 1  # every image has the loss of its set


def test_a_permutation_of_the_images_permutes_the_result():
    noise, order = torch.randn(4, 4, 16, 16, generator=generator()), [2, 0, 3, 1]
    straight, _ = find(method(steps=4), latents=noise)
    permuted, _ = find(method(steps=4), latents=noise[order])
    torch.testing.assert_close(permuted.noise, straight.noise[order], rtol=0, atol=1e-5)


def test_a_set_ends_as_a_whole():
    """A sample that is stopped alone, as by a gradient that is not finite, does not part from its set."""

    def stop_one(state):
        if state.step == 2:
            state.stop("broken", torch.tensor([False, True] + [False] * 6))

    call = {"num_images_per_prompt": 4, "generator": generator(), **ARGUMENTS}
    result = optimize_noise(tiny_pipeline("sd"), ["a", "b"], method(steps=5), callbacks=stop_one, **call)
    assert result.best_step.tolist() == [2] * 4 + [4] * 4
    assert result.losses[4, :4].isnan().all() and result.losses[4, 4:].isfinite().all()


def known_images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=generator(5))


def test_references_count_and_get_no_gradient():
    known = known_images().requires_grad_()
    result, _ = find(method(references=known, steps=3), count=2)
    value = naive_dpp(FEATURES(torch.cat([known.detach(), result.initial_images])))
    torch.testing.assert_close(result.scores["dpp"][0].double(), value.expand(2), rtol=1e-5, atol=1e-6)
    assert known.grad is None and result.scores["dpp"][-1, 0] > result.scores["dpp"][0, 0]
    without, _ = find(method(steps=3), count=2)
    assert not torch.allclose(result.noise, without.noise)


def test_features_of_references_are_as_good_as_their_images():
    total = SetRewardSum(CLS)
    by_images, _ = find(method(references=known_images(), steps=3), count=2)
    by_features, _ = find(method(diversity=total, references=total.known_features(known_images()), steps=3), count=2)
    assert torch.equal(by_images.noise, by_features.noise)
    assert by_features.provenance["objective"]["references"] == 2
    none, _ = find(method(references=known_images(0), steps=3), count=2)
    assert torch.equal(none.noise, find(method(steps=3), count=2)[0].noise)


def test_one_image_differs_from_references():
    result, _ = find(method(references=known_images(1), steps=4), count=1)
    assert result.scores["dpp"][-1] > result.scores["dpp"][0]
    assert result.noise.shape == (1, 4, 16, 16)


def test_a_set_of_one_and_references_that_do_not_fit_are_refused_before_any_model_runs(monkeypatch):
    monkeypatch.setattr(tiny_pipeline("sd").text_encoder, "forward", None)
    for prompt in ("a", ["a", "b"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="at least 2 images of each prompt.*`num_images_per_prompt=4`"):
            find(method(), prompt, 1)
    for shape in ((1, 3, 16, 32), (1, 4, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"references of shape \(M, 3, 32, 32\).*Resize them"):
            find(method(references=torch.rand(shape)))
    with pytest.raises(ValueError, match=r"Expected features of .*'dinov2'.* are missing"):
        find(method(references={"clip": torch.rand(1, 8)}))


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diversity": {"dpp": -1.0}}, "finite weight of at least 0 for the set reward 'dpp', but got -1.0"),
        ({"diversity": {"dpp": math.nan}}, "finite weight of at least 0"),
        ({"diversity": {"dpp": math.inf}}, "finite weight of at least 0"),
        ({"diversity": {"dpp": ("tiny_image", 0.0)}}, "a weight above 0, or `rewards`"),
        ({"diversity": {}}, "at least one set reward"),
        ({"diversity": {"dppp": 1.0}}, "set reward.*dppp"),
        ({"diversity": {"dpp": ("dinov3", 1.0)}}, "dinov3"),
        ({"rewards": {"red": -1.0}}, "weight of at least 0 for reward 'red'"),
        ({"rewards": {"redd": 1.0}}, "Expected a reward .*redd"),
        ({"guard": {"redd": 0.1}}, "Expected a reward .*redd"),
        ({"guard": {"red": -0.1}}, "`drop` of a guard to be a number in"),
        ({"guard": {"red": {}}}, "a limit for the guard 'red', but got none"),
        ({"guard": {"red": {"keep": 1.5}}}, "`keep` of a guard"),
        ({"guard": {"red": {"threshold": math.nan}}}, "`threshold` of a guard"),
        ({"guard": {"red": {"limit": 1}}}, r"settings of a guard out of .*but got \['limit'\]"),
        ({"guard": {"red": {"drop": 0.1, "mode": "stop"}}}, '"revert" or "freeze"'),
        ({"guard": [QualityGuard(reward="red", drop=0.1)] * 2}, "one guard for each reward, but got two for 'red'"),
        ({"steps": 0}, "`steps` to be an integer in"),
        ({"mode": "paper"}, "`mode` to be one of"),
        ({"learning_rate": -1.0}, "`learning_rate` to be a number in"),
        ({"learning_rate": math.inf}, "`learning_rate` to be a number in"),
        ({"momentum": 1.0}, "`momentum` to be a number in"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` to be a number in"),
        ({"regularization": -0.1}, "`regularization` to be a number in"),
        ({"warm_up": -1}, "`warm_up` to be an integer in"),
        ({"hinge": math.nan}, "`hinge` of 'dpp' to be a finite number"),
        ({"stop_at": {"vendi": 2.0}}, r"`stop_at` of set rewards out of \['dpp'\], but got \['vendi'\]"),
        ({"stop_ratio": True}, "`stop_ratio` of 'dpp' to be a finite number"),
        ({"diversity": ["dpp_patch", "dpp"], "stop_at": 0.9}, "`stop_at` by name"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, message, monkeypatch):
    monkeypatch.setattr(tiny_pipeline("sd").text_encoder, "forward", None)
    monkeypatch.setattr(AutoFeatures, "from_pretrained", lambda *_, **__: FEATURES)
    with pytest.raises(ValueError, match=message):
        find(method(**settings))


def test_what_is_no_guard_is_refused():
    with pytest.raises(TypeError, match=r"a guard such as .* but got 'hpsv2.1'"):
        find(method(guard="hpsv2.1"))


def test_what_has_no_gradient_is_refused_where_it_counts():
    class Blind(type(FEATURES)):
        differentiable = False

    blind = TINY_FEATURES["dinov2"]()
    blind.__class__ = Blind
    with pytest.raises(NonDifferentiableReward, match=r"the features of \['dpp'\]"):
        find(method(diversity={DPP(blind): 1.0}))
    find(method(diversity=[(DPP(FEATURES), 1.0), (DPP(blind), 0.0)], steps=1))


def test_features_whose_package_is_missing_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(tiny_pipeline("sd").text_encoder, "forward", None)
    with pytest.raises(ImportError, match=r"pip install noiseopt\[lpips\]"):
        find(method(diversity={"pairwise": ("lpips", 60.0)}))


def test_warm_up_leaves_the_rewards_out_of_the_gradient_and_in_the_loss():
    settings = {"steps": 4, "regularization": 0.0}
    warm, noises = find(method(rewards=[(redness, 100.0)], warm_up=2, **settings))
    _, without = find(method(**settings))
    _, with_it = find(method(rewards=[(redness, 100.0)], **settings))
    torch.testing.assert_close(torch.stack(noises[:3]), torch.stack(without[:3]), rtol=0, atol=1e-6)
    assert not torch.allclose(noises[3], without[3]) and not torch.allclose(noises[1], with_it[1])
    expected = 100 * (1 - warm.scores["redness"].mean(1)) - 150 * warm.scores["dpp"][:, 0]
    torch.testing.assert_close(warm.losses[:, 0], expected, rtol=1e-5, atol=1e-3)


def test_gradient_of_a_set_is_that_of_its_mean_loss_and_is_clipped_as_a_whole():
    noise, gradient = torch.randn(2, 5, 4, 3, 3, generator=generator())
    problem: Any = SimpleNamespace(noise=noise, groups=[0, 0, 1, 1, 1])
    state = NeverTooLateState(problem)
    mean = torch.cat((gradient[:2] / 2, gradient[2:] / 3))
    torch.testing.assert_close(state.clipped(gradient, max_norm=1e3), mean)
    expected = torch.cat([0.1 * rows / rows.norm() for rows in mean.split([2, 3])])
    torch.testing.assert_close(state.clipped(gradient, max_norm=0.1), expected, rtol=1e-5, atol=0)


def test_the_white_geometry_steps_from_white_noise_to_white_noise():
    """Against the mean of projected gradients written out; an image that reverts begins a mean anew."""
    noise, project = torch.randn(3, 4, 16, 16, generator=generator()), WhiteNoiseProjection()
    first, second = (torch.randn(noise.shape, generator=generator(seed)).cumsum(-1) for seed in (1, 2))
    how, problem = method(geometry="white"), SimpleNamespace(noise=noise, groups=[0, 0, 0], is_white=True)
    state, run = how.start(problem), NoiseState(None, ["a"] * 3, 6, noise)  # pyright: ignore[reportArgumentType]
    run.noise = how.step(run, first, state)
    torch.testing.assert_close(run.noise, project(noise - 0.1 * project(first)), rtol=0, atol=1e-5)
    state.guarded.good = torch.tensor([True, False, True])
    moved, mean = how.step(run, second, state), (0.9 * project(first) + project(second)) / 1.9
    expected = project(run.noise - 0.1 * mean)
    torch.testing.assert_close(moved[::2], expected[::2], rtol=0, atol=1e-5)
    assert torch.equal(moved[1], noise[1]) and state.white is not None and not state.white.mean[1].any()
    assert how.regularizer(noise) == 0.0


def test_in_the_white_geometry_a_set_becomes_diverse_and_its_noises_stay_white():
    result, noises = find(method(geometry="white"))
    assert result.best_loss.max() < result.losses[0].max()
    for noise in noises[1:]:
        torch.testing.assert_close(WhiteNoiseProjection()(noise), noise, rtol=0, atol=1e-4)


def test_pink_noise_is_where_it_starts():
    result, noises = find(method(steps=2), noise_sampler="pink")
    expected = PinkNoise(0.2)((4, 4, 16, 16), generator())
    torch.testing.assert_close(noises[0], expected)
    assert result.provenance["noise_sampler"]["name"] == "pink"
    for alpha in (math.nan, math.inf):
        with pytest.raises(ValueError, match="`alpha` to be a number in"):
            find(method(), noise_sampler={"name": "pink", "alpha": alpha})


@pytest.mark.slow
@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_comes_to_differ(family, preview):
    call = {"num_images_per_prompt": 3, "generator": generator(), **call_arguments(family)}
    how = method(steps=5, preview=preview, learning_rate=60.0)
    result = optimize_noise(tiny_pipeline(family), "a b", how, **call)
    assert result.best_loss[0] < result.losses[0, 0]
    assert result.noise.shape == result.noise[:1].expand(3, *result.noise.shape[1:]).shape


# pipelines


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """Folders of weights: what a pipeline from the Hub can be given."""
    root = tmp_path_factory.mktemp("published")
    publish_dinov2(root)
    return {"dinov2": str(root / "facebook/dinov2-base"), "clip": save_tiny_clip(root / "clip")}


def call_of(cls) -> dict:
    return {**call_arguments(FAMILIES[cls]), "num_images_per_prompt": 2, "output_type": "pt"}


@pytest.mark.parametrize("cls", slow_except(PIPELINES, NeverTooLateTurboPipeline), ids=lambda cls: cls.__name__)
def test_pipelines_optimize_sets_and_leave_everything_else_to_the_stock_class(cls, names):
    stock = quiet(PIPELINES[cls]())
    ours = quiet(cls(**stock.components))
    call, prompts = call_of(cls), ["a b", "c"]
    if "negative_prompt" in call:  # Flux wants one for each prompt
        call["negative_prompt"] = [call["negative_prompt"]] * 2
    plain = stock(prompts, generator=generator(), **call).images
    assert torch.equal(ours(prompts, generator=generator(), **call).images, plain)
    asked = {
        "diversity": {"dpp": (names["dinov2"], 150.0)},
        "rewards": {names["clip"]: 0.1},
        "guard": {"sharpness": {"keep": 0.01}},
        "steps": 3,
        "learning_rate": 60.0,
        "method_kwargs": {"hinge": 0.99},
    }
    output = ours(prompts, generator=generator(), **asked, **call)
    result = output.noise_result
    assert not torch.equal(output.images, plain) and torch.equal(result.initial_images, plain)
    again = stock(prompts, latents=result.latents, generator=result.generator(), **call)
    assert torch.equal(again.images, output.images)
    assert result.provenance["settings"]["learning_rate"] == 60.0 and result.losses.shape == (3, 4)
    bare = ours(prompts, generator=generator(), return_dict=False, **asked, **call)
    assert isinstance(bare, tuple) and torch.equal(bare[0], output.images)
    assert torch.equal(ours(prompts, generator=generator(), **call).images, plain)


def test_what_has_a_name_is_loaded_once_for_each_pipeline(names, monkeypatch):
    loaded = []
    load = AutoFeatures.from_pretrained

    def count(path, **kwargs):
        loaded.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(AutoFeatures, "from_pretrained", count)
    pipe = quiet(NeverTooLateStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False))
    call = {**call_of(NeverTooLateStableDiffusionPipeline), "steps": 1}
    folder = names["dinov2"]
    pipe("a", diversity={"dpp": (folder, 1.0), "vendi_2": (folder, 1.0)}, **call)
    pipe("a", diversity={"dpp": (folder, 2.0)}, guard={names["clip"]: 0.1}, **call)
    assert loaded == [folder]


def test_settings_of_a_call_go_together():
    pipe = quiet(NeverTooLateStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False))
    call = {**call_of(NeverTooLateStableDiffusionPipeline), "generator": generator()}
    color = {"dpp": ("color_histogram", 1.0)}
    by_kwargs = pipe("a", method_kwargs={"diversity": color, "steps": 2}, **call).noise_result
    assert by_kwargs.losses.shape == (2, 2)
    with pytest.raises(ValueError, match=r"Expected `diversity` beside \['rewards', 'steps'\]"):
        pipe("a", rewards="red", steps=3, **call)
    with pytest.raises(ValueError, match=r"\['diversity'\] as arguments and in `method_kwargs` too"):
        pipe("a", diversity=color, method_kwargs={"diversity": color}, **call)
    with pytest.raises(ValueError, match=r"`method` or \['diversity'\], but got both"):
        pipe("a", diversity=color, method=method(), **call)
    with pytest.raises(ValueError, match="at least 2 images of each prompt"):
        pipe("a", diversity=color, **{**call, "num_images_per_prompt": 1})
    zero = pipe("a", diversity=color, rewards={"red": 0.0}, guard={"red": 0.1}, steps=2, **call)
    assert set(zero.noise_result.scores) == {"dpp", "guard red"}


def test_a_guard_from_the_hub_is_no_instance_of_ours():
    twin = dataclasses.make_dataclass(
        "QualityGuard", ["reward", "drop"], namespace={"limits": lambda self, initial: initial - self.drop}, frozen=True
    )
    twin.mode = "revert"
    pipe = quiet(NeverTooLateStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False))
    call = {**call_of(NeverTooLateStableDiffusionPipeline), "generator": generator(), "steps": 2}
    result = pipe("a", diversity={"dpp": ("color_histogram", 1.0)}, guard=twin("sharpness", 0.5), **call).noise_result
    torch.testing.assert_close(
        torch.tensor(result.reports[GUARD_REPORT]["limits"]["guard sharpness"]),
        result.scores["guard sharpness"][0] - 0.5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["dinov2", "clip"])
def test_on_the_embedded_model_sets_come_to_differ(tower):
    pipe = NeverTooLateStableDiffusionPipeline(**load_pipeline("turbo").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_images_per_prompt": 4, "output_type": "pt", **ONE_STEP, "steps": 12}
    for seed, prompt in enumerate(shapes_world.VALIDATION_PROMPTS[:2]):
        asked = {"diversity": {"dpp": (shapes_world.path(tower), 150.0)}, "generator": generator(seed)}
        result = pipe(prompt, **asked, **call).noise_result
        assert result.best_scores["dpp"][0] > result.initial_scores["dpp"][0] + 0.02
        norms = result.noise.flatten(1).norm(dim=1) / math.sqrt(result.noise[0].numel())
        assert ((norms > 0.9) & (norms < 1.1)).all()
