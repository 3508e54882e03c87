"""Runs that begin with a search: what is scored, where the starts are, and what is shared among them."""

import dataclasses
import itertools
from typing import Any, Literal

import pytest
import torch
from problems import Clock, generator, problem_of, redness
from tiny_pipelines import BUILDERS, SIZE, quiet, sd_pipeline

from noiseopt import EarlyStopping, NoiseDiffusion, NoiseResult, ReNO, ReNOStableDiffusionPipeline, optimize_noise
from noiseopt.pipelines import FunctionObjective, GradientOptimizer, MeanVariance, NoisePGD
from noiseopt.pipelines.noise_math import per_image
from noiseopt.pipelines.problem import CandidateNoise
from noiseopt.pipelines.stages import SEARCH_SHARE

CALL = {"num_images_per_prompt": 3, "num_inference_steps": 3, "guidance_scale": 0.0, **SIZE}
ONE_STEP = {**CALL, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe():
    return quiet(BUILDERS["sd"]())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Climb(GradientOptimizer):
    """Ascent on a reward that is linear in the noise, by steps whose size is known from the start.

    The reward is the sum of channel 0, so its gradient is 1 there, and a step of size c adds c to each of the entries.
    """

    rewards: Any = redness
    gradient: Literal["full"] = "full"

    def objective(self, pipe):
        return FunctionObjective(lambda sample: -value(sample.noise))

    def start(self, problem):
        return size_of_steps(problem.noise)

    def step(self, run, gradient, state):
        return run.noise - per_image(state, gradient) * gradient


def value(noise: torch.Tensor) -> torch.Tensor:
    return noise[:, 0].sum((1, 2))


def size_of_steps(noise: torch.Tensor) -> torch.Tensor:
    return noise[:, 1].square().mean((1, 2))


class Watch:
    """The noises of all steps, and the stages that they were in."""

    def __init__(self) -> None:
        self.noises, self.stages = [], []

    def __call__(self, state) -> None:
        self.noises.append(state.noise)
        self.stages.append(state.stage)


def test_the_best_start_of_a_linear_reward_is_the_one_of_the_closed_form(pipe):
    """Each start gains (evaluations − 1) · entries · size; the gains differ so much that not always the first wins."""
    method, seen = Climb(steps=1 + 8 + 9, search=8, starts=3), Watch()
    result = optimize_noise(pipe, "a", method, callbacks=seen, generator=generator(), **CALL)
    problem = problem_of(pipe, **CALL)
    fresh = CandidateNoise(problem)
    noises = torch.stack([problem.noise, *(fresh.draw() for _ in range(7))])
    assert torch.equal(torch.stack(seen.noises[1:9]), noises)
    assert seen.stages == ["search"] * 9 + [f"start {number}" for number in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    values = torch.stack([value(noise) for noise in noises])
    sizes = torch.stack([size_of_steps(noise) for noise in noises])
    found = values.argsort(dim=0, descending=True)[:3]
    ends = values.gather(0, found) + 2 * noises[0, 0, 0].numel() * sizes.gather(0, found)
    report = result.reports["search"]
    assert report["found_at"] == (1 + found).T.tolist() and report["first_steps"] == [9, 12, 15]
    assert report["best_start"] == (1 + ends.argmax(0)).tolist() and len(set(report["best_start"])) > 1
    torch.testing.assert_close(-result.best_loss, ends.amax(0))
    torch.testing.assert_close(torch.tensor(report["losses"]), -values.gather(0, found).T)
    assert torch.equal(torch.stack([seen.noises[step] for step in (9, 12, 15)]), picked(noises, found))
    assert result.losses[1:9].isnan().all() and -result.losses[0, 0] == value(problem.noise)[0]


def picked(noises: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return `noises[found[i, b], b]` for each start i and image b."""
    return torch.stack([noises[row, torch.arange(len(row))] for row in found])


@pytest.mark.parametrize(("steps", "expected"), [(12, [2, 1]), (13, [2, 2]), (14, [3, 2]), (16, [4, 3])])
def test_steps_are_shared_equally_among_the_starts(steps, expected, pipe):
    """After the baseline and 8 noises the rest is 3 to 7 evaluations; ⌊rest/2⌋ of them for the first start."""
    seen = Watch()
    optimize_noise(pipe, "a", Climb(budget=steps, search=8, starts=2), callbacks=seen, generator=generator(), **CALL)
    rest = steps - 9
    shares = [seen.stages.count(f"start {number}") for number in (1, 2)]
    assert len(seen.stages) == steps and shares == [rest // 2, rest - rest // 2] and sorted(shares) == sorted(expected)


def calls_and_gradients(pipe, method, call) -> tuple[int, int]:
    """Return for one image how often the denoiser was called, and how often a gradient passed it."""
    counted, gradients = [], []
    conv = pipe.unet.conv_in
    handles = [
        pipe.unet.register_forward_pre_hook(lambda *_: counted.append(1)),
        conv.register_full_backward_hook(lambda *_: gradients.append(1)),
    ]
    optimize_noise(pipe, "a", method, generator=generator(), **call, num_images_per_prompt=1)
    for handle in handles:
        handle.remove()
    return len(counted), len(gradients)


def test_the_search_costs_one_model_call_for_each_noise_and_no_gradient(pipe):
    """Of each start all evaluations but the last one need a gradient, which leads through all denoising steps."""
    call = {name: value for name, value in CALL.items() if name != "num_images_per_prompt"}
    method = ReNO(rewards=redness, steps=1 + 5 + 6, search=5, starts=2, views=0)
    assert calls_and_gradients(pipe, method, call) == (3 + 5 + 6 * 3, 2 * 2 * 3)
    single = ReNO(rewards=redness, steps=5 + 6, search=5, starts=2, views=0)
    assert calls_and_gradients(pipe, single, call | {"num_inference_steps": 1}) == (5 + 6, 2 * 2)


def test_a_single_step_searches_by_the_images_and_the_baseline_is_one_of_them(pipe):
    seen = Watch()
    method = ReNO(rewards=redness, steps=6 + 2, search=6, starts=1, learning_rate=1e-6)
    result = optimize_noise(pipe, "a", method, callbacks=seen, generator=generator(), **ONE_STEP)
    assert result.losses.isfinite().all() and seen.stages.count("search") == 6
    assert result.reports["search"]["found_at"] == result.losses[:6].argmin(0)[:, None].tolist()
    best = result.losses[:6].argmin(0)
    assert torch.equal(seen.noises[6], torch.stack([seen.noises[step][row] for row, step in enumerate(best)]))
    assert not result.reports["search"]["previews"] and torch.equal(result.losses[6], result.losses[:6].amin(0))


@pytest.mark.parametrize("method", [ReNO, NoisePGD, MeanVariance, NoiseDiffusion])
def test_each_image_searches_and_starts_by_itself(method, pipe):
    """The other image of a batch changes nothing, be it stopped or not."""
    settings = {"score_range": (-10.0, 10.0), "candidates": 3} if method is NoiseDiffusion else {}
    chosen = method(rewards=redness, steps=11, search=4, starts=2, gradient="full", **settings)
    call = {**CALL, "num_images_per_prompt": 1}

    def stop_first(state) -> None:
        if len(state.prompts) == 2 and state.step == 7:
            state.stop("enough", torch.tensor([True, False]))

    together = optimize_noise(
        pipe, ["b", "a"], chosen, callbacks=stop_first, generator=[generator(1), generator(2)], **call
    )
    alone = optimize_noise(pipe, ["a"], chosen, generator=[generator(2)], **call)
    torch.testing.assert_close(together.noise[1:], alone.noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.losses[:, 1:], alone.losses, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("found_at", "best_start"):
        assert together.reports["search"][name][1:] == alone.reports["search"][name]
    assert together.losses[8:, 0].isnan().all() and together.best_step[0] <= 7


@pytest.mark.parametrize("call", [CALL, ONE_STEP], ids=["three steps", "one step"])
def test_chunks_find_what_the_joint_run_finds(call, pipe):
    joint, split = (
        optimize_noise(
            pipe,
            "a",
            ReNO(rewards=redness, steps=10, search=4, starts=2, chunk_size=size),
            generator=generator(),
            **call,
        )
        for size in (None, 2)
    )
    torch.testing.assert_close(split.noise, joint.noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(split.losses, joint.losses, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("found_at", "first_steps", "previews"):
        assert split.reports["search"][name] == joint.reports["search"][name]


def timed(pipe, clock: Clock, method, call=ONE_STEP, seconds: float = 1.0) -> tuple[NoiseResult, list[str]]:
    """Run a method on a denoiser each of whose calls takes some seconds; return the stages of the steps too."""
    handle, seen = pipe.unet.register_forward_pre_hook(clock.after(seconds)), Watch()
    try:
        return optimize_noise(pipe, "a", method, callbacks=seen, generator=generator(), **call), seen.stages
    finally:
        handle.remove()


def test_a_time_budget_is_shared_by_search_and_starts(pipe, monkeypatch):
    """Evaluations take 1 second: the search ends after its share of 40, and each of 4 starts has as many seconds."""
    method = Climb(budget="40s", search=1000, starts=4)
    object.__setattr__(method, "objective", lambda pipe: ReNO(rewards=redness).objective(pipe))
    result, stages = timed(pipe, Clock(monkeypatch), method)
    search = int(40 * SEARCH_SHARE) + 1
    assert stages.count("search") == search and len(stages) == 40 and result.provenance["stopped"] == "time budget"
    shares = [stages.count(f"start {number}") for number in (1, 2, 3, 4)]
    assert sum(shares) == 40 - search and max(shares) - min(shares) <= 1
    assert result.reports["search"]["noises"] == search


def test_a_search_that_is_done_leaves_the_time_to_the_starts(pipe, monkeypatch):
    _, stages = timed(pipe, Clock(monkeypatch), ReNO(rewards=redness, budget="20s", search=3, starts=2))
    assert [stages.count(name) for name in ("search", "start 1", "start 2")] == [3, 9, 8]


def test_a_short_time_is_enough_for_as_many_noises_as_there_are_starts(pipe, monkeypatch):
    result, stages = timed(pipe, Clock(monkeypatch), ReNO(rewards=redness, budget="5s", search=9, starts=3))
    assert stages == ["search"] * 3 + ["start 1", "start 2"] and result.reports["search"]["noises"] == 3


@pytest.mark.parametrize("stop_at", [0, 2, 5, 7])
def test_a_run_that_is_stopped_returns_the_best_so_far(stop_at, pipe):
    method = Climb(steps=1 + 4 + 4, search=4, starts=2)
    stop = lambda state: state.step < stop_at  # noqa: E731
    result = optimize_noise(pipe, "a", method, callbacks=stop, generator=generator(), **CALL)
    losses = result.losses.nan_to_num(torch.inf)
    assert len(losses) == stop_at + 1 and torch.equal(result.best_loss, losses.amin(0))
    starts = {0: 0, 2: 0, 5: 1, 7: 2}[stop_at]
    assert len(result.reports["search"]["first_steps"]) == starts and result.complete
    if not starts:
        assert torch.equal(result.noise, result.initial_noise) and result.reports["search"]["best_start"] == [0, 0, 0]


def test_patience_neither_ends_the_search_nor_a_start_before_it_counts(pipe):
    """Nothing gets better, so each start ends after its first and 2 more steps."""

    class Stands(Climb):
        def step(self, run, gradient, state):
            return run.noise

    seen = Watch()
    method = Stands(steps=1 + 8 + 20, search=8, starts=2)
    result = optimize_noise(pipe, "a", method, callbacks=[seen, EarlyStopping(2)], generator=generator(), **CALL)
    assert [seen.stages.count(name) for name in ("search", "start 1")] == [9, 3]
    assert result.provenance["stopped"] == "patience"


@pytest.mark.parametrize(("bad", "stage"), [(3, "search"), (7, "start 1")])
def test_a_reward_that_is_not_finite_ends_the_run_with_the_best_so_far(bad, stage, pipe):
    calls = itertools.count()

    def broken(images, prompts):
        return redness(images, prompts) * (torch.nan if next(calls) == bad + 1 else 1.0)  # one call tries it out

    seen, method = Watch(), ReNO(rewards=broken, steps=16, search=6, starts=2, views=0)
    with pytest.warns(UserWarning, match=f"The run stops after step {bad - 1} and keeps the best so far"):
        result = optimize_noise(pipe, "a", method, callbacks=seen, generator=generator(), **ONE_STEP)
    assert len(result.losses) == bad and seen.stages[-1] == stage and result.losses.isfinite().all()


def test_an_image_whose_gradient_is_not_finite_stays_with_its_best_and_others_go_on(pipe):
    def steep(images, prompts):
        score = redness(images, prompts)
        if images.requires_grad and len(images) == 3:  # not when it is tried out
            score.register_hook(lambda gradient: gradient * torch.tensor([torch.inf, 1.0, 1.0]))
        return score

    method = ReNO(rewards=steep, steps=10, search=3, starts=2, views=0)
    with pytest.warns(UserWarning, match=r"gradient of sample \[0\] is not finite"):
        result = optimize_noise(pipe, "a", method, generator=generator(), **ONE_STEP)
    assert result.losses[4:, 0].isnan().all() and result.losses[:, 1:].isfinite().all()


def test_two_starts_at_one_noise_do_not_share_their_random_streams(pipe):
    """Noise Diffusion draws candidates of its own, none of which the search has drawn from the same base noise."""
    problem = problem_of(pipe, **CALL)
    streams = [CandidateNoise(each) for each in (problem, *(problem.beginning_at(problem.noise, n) for n in (1, 2)))]
    draws = [stream.draw() for stream in streams for _ in range(2)]
    assert all(not torch.equal(left, right) for left, right in itertools.combinations(draws, 2))


def test_a_pipeline_class_takes_search_and_budget_as_settings():
    pipe = quiet(sd_pipeline(cls=ReNOStableDiffusionPipeline))
    settings = {"budget": 8, "search": 3, "starts": 2}
    call = {"generator": generator(), "rewards": redness, "method_kwargs": settings, **ONE_STEP}
    result = pipe("a", **call).noise_result
    assert len(result.losses) == 8 and result.reports["search"]["first_steps"] == [3, 5]
    with pytest.raises(ValueError, match="Expected a time above 0"):
        pipe("a", rewards=redness, method_kwargs={"budget": "20"}, **ONE_STEP)


def test_a_folder_holds_results_with_a_search(pipe, tmp_path):
    call = {**ONE_STEP, "num_images_per_prompt": 1}
    method = ReNO(rewards=redness, budget=8, search=3, starts=2)
    found = optimize_noise(pipe, ["a", "b"], method, folder=tmp_path, generator=3, **call)
    alone = optimize_noise(pipe, "b", method, generator=generator(4), **call)
    assert torch.equal(found[1].noise, alone.noise) and found[1].reports == alone.reports
    assert NoiseResult.load(tmp_path / "0001-b.safetensors").reports == alone.reports


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"search": -1}, r"`search` to be an integer in \[0, inf\)"),
        ({"starts": 0}, r"`starts` to be an integer in \[1, inf\)"),
        ({"starts": 2}, "a `search` of at least as many noises as there are `starts`, but got 'auto' and 2"),
        ({"search": 3, "starts": 4}, "but got 3 and 4. Pass `search=8`"),
        ({"search": 40, "starts": 10}, "at least 51 evaluations, .* but got 50"),
        ({"search": 4, "starts": 2, "budget": 6}, "at least 7 evaluations, .* but got 6"),
    ],
)
def test_searches_that_cannot_be_are_refused_before_any_model_runs(settings, expected, pipe, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    with pytest.raises(ValueError, match=expected):
        optimize_noise(pipe, "a", ReNO(rewards=redness, **settings), **CALL)


@pytest.mark.parametrize(
    ("changes", "settings", "expected"),
    [
        ({}, {"steps": 60}, 16),
        ({}, {"steps": 50, "budget": 12}, 4),
        ({"timesteps": [999], "num_inference_steps": 3}, {"steps": 12}, 4),
        ({}, {"steps": 5}, 0),
        ({}, {"steps": 12, "mode": "parity"}, 0),
        ({"num_inference_steps": 2}, {"steps": 12}, 0),
        ({"latents": torch.randn(3, 4, 16, 16, generator=generator())}, {"steps": 12}, 0),
    ],
)
def test_renos_default_searches_a_third_of_its_evaluations_before_a_single_step(changes, settings, expected, pipe):
    """And not in the place of noise that the caller chose."""
    problem = problem_of(pipe, **{**ONE_STEP, **changes})
    assert ReNO(rewards=redness, **settings).searched(problem) == expected


def test_without_a_search_nothing_is_staged(pipe):
    seen = Watch()
    result = optimize_noise(pipe, "a", Climb(steps=3), callbacks=seen, generator=generator(), **CALL)
    assert seen.stages == [""] * 3 and not result.reports
