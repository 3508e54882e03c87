"""The search before the steps of Never Too Late: which noises are scored, chosen and begun with."""

import itertools

import pytest
import torch
from problems import Clock, generator, redness
from tiny_features import TINY_FEATURES
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import NeverTooLate, optimize_noise
from noiseopt.callbacks import EarlyStopping, NoiseCallback
from noiseopt.pipelines import QualityGuard
from noiseopt.pipelines.never_too_late.quality_guard import GUARD_REPORT
from noiseopt.pipelines.never_too_late.set_search import best_set
from noiseopt.pipelines.stages import SEARCH_SHARE
from noiseopt.rewards import DPP, PairwiseDiversity, SetRewardSum

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
FEATURES = TINY_FEATURES["dinov2"]()


class Watched(NoiseCallback):
    """What was evaluated at each step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.noises, self.images, self.stages, self.stop_after = [], [], [], stop_after

    def on_step_end(self, state):
        self.noises.append(state.noise)
        self.images.append(state.images)
        self.stages.append(state.stage)
        if state.step == self.stop_after:
            raise KeyboardInterrupt


def find(prompt="a b", count=3, watched=None, pipe=None, seed=0, **settings):
    """The result, and what was evaluated."""
    settings = {"diversity": {DPP(FEATURES): 150.0}, "rewards": [(redness, 3.0)], "steps": 7, "search": 4} | settings
    call = {"num_images_per_prompt": count, "generator": generator(seed), **ARGUMENTS}
    kept = {name: settings.pop(name) for name in ("save_noise_to", "resume_from") if name in settings}
    watched = watched or Watched()
    pipe = pipe or tiny_pipeline("sd")
    callbacks = [*settings.pop("callbacks", []), watched]
    return optimize_noise(pipe, prompt, NeverTooLate(**settings), callbacks=callbacks, **kept, **call), watched


def loss_of(images, settings) -> float:
    total = SetRewardSum(settings["diversity"])
    known = settings.get("references")
    quality = sum(weight * (1 - reward(images, ["a b"] * len(images))).mean() for reward, weight in settings["rewards"])
    return float(quality - total(images, known).total)


@pytest.mark.parametrize("reward", [DPP, PairwiseDiversity])
def test_the_steps_begin_from_the_best_set_of_all_candidates(reward):
    """By brute force over all sets of three of twelve candidates."""
    settings = {"diversity": {reward(FEATURES): 150.0}, "rewards": [(redness, 3.0)]}
    found, watched = find(**settings)
    pool = torch.cat(watched.images[:4])
    losses = {rows: loss_of(pool[list(rows)], settings) for rows in itertools.combinations(range(12), 3)}
    begun = {int((torch.cat(watched.noises[:4]) == noise).flatten(1).all(1).nonzero()) for noise in watched.noises[4]}
    assert losses[tuple(sorted(begun))] == pytest.approx(min(losses.values()), abs=1e-3)
    assert found.losses[4, 0] == pytest.approx(min(losses.values()), abs=1e-3)
    assert (found.losses[4] < found.losses[:4].amin(0)).all()
    assert watched.stages == ["search"] * 4 + ["start 1"] * 3
    report = found.reports["search"]
    assert report["noises"] == 4
    for noise, step, row in zip(watched.noises[4], report["from_step"], report["from_image"], strict=True):
        assert torch.equal(noise, watched.noises[step][row])
    assert not torch.equal(watched.noises[5], watched.noises[4]), "the gradient moves them"


def test_exchanges_find_the_best_set_and_refuse_what_is_not_allowed():
    values = torch.randn(12, 12, generator=generator(1))
    values = values + values.T

    def loss(rows: torch.Tensor) -> float:
        return torch.inf if 7 in rows else float(-values[rows][:, rows].sum())

    group = best_set(loss, 12, 2)
    assert loss(torch.tensor(group)) == min(loss(torch.tensor(pair)) for pair in itertools.combinations(range(12), 2))


def test_the_given_noises_come_first_and_the_others_are_fresh():
    found, watched = find()
    without, plain = find(search=0, steps=3)
    assert torch.equal(watched.noises[0], plain.noises[0]) and torch.equal(found.losses[0], without.losses[0])
    assert len({noise.sum().item() for noises in watched.noises[:4] for noise in noises}) == 12
    assert without.reports.get("search") is None and plain.stages == [""] * 3


def test_a_search_of_one_noise_begins_from_the_given_ones():
    found, watched = find(search=1, steps=4)
    _, plain = find(search=0, steps=3)
    for one, other in zip(watched.noises[1:], plain.noises, strict=True):
        rows = found.reports["search"]["from_image"]
        torch.testing.assert_close(one, other[rows], rtol=0, atol=1e-6)


def test_the_sets_of_two_prompts_do_not_mix():
    settings = {"steps": 4, "search": 3}
    both, watched = find(prompt=["a b", "c d"], **settings)
    assert {row // 3 for row in both.reports["search"]["from_image"][:3]} == {0}
    assert {row // 3 for row in both.reports["search"]["from_image"][3:]} == {1}
    assert not torch.equal(watched.noises[3][:3], watched.noises[3][3:])


def test_references_count_and_warm_up_begins_after_the_search():
    references = torch.rand(2, 3, *[SIZE["height"]] * 2, generator=generator(5))
    settings = {"diversity": {DPP(FEATURES): 150.0}, "rewards": [(redness, 3.0)], "references": references}
    found, watched = find(**settings)
    pool = torch.cat(watched.images[:4])
    best = min(loss_of(pool[list(rows)], settings) for rows in itertools.combinations(range(12), 3))
    assert found.losses[4, 0] == pytest.approx(best, abs=1e-3)
    settings = {"rewards": [(redness, 100.0)], "steps": 6, "search": 3}
    _, warm = find(**settings, warm_up=1)
    _, cold = find(**settings)
    assert torch.equal(warm.noises[3], cold.noises[3]) and not torch.equal(warm.noises[4], cold.noises[4])


def test_a_guard_excludes_candidates_but_never_the_given_noises():
    free, watched = find()
    assert any(free.reports["search"]["from_step"])
    values = torch.stack([redness(images, []) for images in watched.images[:4]])
    drop = float(values[0].min() - values[1:].min()) / 2
    found, guarded = find(guard=[QualityGuard(reward=redness, drop=drop)])
    places = list(zip(found.reports["search"]["from_step"], found.reports["search"]["from_image"], strict=True))
    allowed = (values > values[0] - drop) | (torch.arange(4)[:, None] == 0)
    assert not allowed.all() and all(allowed[place] for place in places)
    assert torch.equal(guarded.noises[4], torch.stack([guarded.noises[step][row] for step, row in places]))
    times = itertools.count()

    def falling(images, prompts):
        return torch.full((len(images),), -float(next(times)))

    with pytest.warns(UserWarning, match="accepted no step .* as they began, from the baseline or the search"):
        fallen = find(guard=[QualityGuard(reward=falling, drop=0.5)])[0]
    assert fallen.reports[GUARD_REPORT]["accepted_steps"] == [0] * 3
    assert fallen.reports["search"]["from_step"] == [0, 0, 0]
    assert fallen.reports[GUARD_REPORT]["frozen"] == [True] * 3 and len(fallen.losses) == 5  # and so the run ends


def test_a_threshold_counts_from_the_chosen_set_on():
    """The given noises are below it, which freezes them without a search; candidates above it may move."""
    _, watched = find(search=0, steps=1)
    _, searched = find()
    values = torch.stack([redness(images, []) for images in searched.images[:4]])
    threshold = float(max(redness(watched.images[0], []).min() + 1e-4, values.flatten().sort().values[4]))
    found, guarded = find(guard=[QualityGuard(reward=redness, threshold=threshold)])
    report = found.reports[GUARD_REPORT]
    begun = redness(guarded.images[4], [])
    assert report["frozen"] == (begun <= threshold).tolist() and not all(report["frozen"])
    moved = (guarded.noises[5] != guarded.noises[4]).flatten(1).any(1)
    assert moved.tolist() == (begun > threshold).tolist()


def test_only_the_steps_have_a_gradient_and_features_are_computed_once():
    differentiated, encoded = [], []

    def red(images, prompts):
        differentiated.append(images.requires_grad)
        return redness(images, prompts)

    handle = FEATURES.register_forward_hook(lambda *_: encoded.append(len(differentiated)))
    found, _ = find(rewards=[(red, 3.0)], search=3, steps=6, chunk_size=None)
    handle.remove()
    assert differentiated[-6:] == [False, False, False, True, True, False]  # the last noise does not move
    assert len(encoded) == len(set(encoded)) == len(found.losses) == 6


@pytest.mark.parametrize(("seconds", "searched"), [(20, int(20 * SEARCH_SHARE) + 1), (2, 1)])
def test_a_time_budget_is_shared(seconds, searched, monkeypatch):
    """Evaluations take 1 second: the search ends after its share, and has at least the given noises."""
    clock, pipe = Clock(monkeypatch), tiny_pipeline("sd")
    handle = pipe.unet.register_forward_pre_hook(clock.after(1.0))
    found, watched = find(pipe=pipe, search=1000, chunk_size=None, budget=f"{seconds}s")
    handle.remove()
    assert watched.stages == ["search"] * searched + ["start 1"] * (seconds - searched)
    assert found.reports["search"]["noises"] == searched


GUARDED = {"prompt": ["a b", "c d"], "geometry": "white", "guard": [QualityGuard(reward=redness, drop=0.02)]}


@pytest.mark.parametrize("settings", [{}, GUARDED], ids=["plain", "guarded"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_search_goes_on_to_the_same_result(stop, settings, tmp_path):
    whole, _ = find(**settings)
    path = tmp_path / "noise.safetensors"
    with pytest.raises(KeyboardInterrupt):
        find(watched=Watched(stop), save_noise_to=path, **settings)
    found, _ = find(resume_from=path, **settings)
    assert torch.equal(found.noise, whole.noise) and torch.equal(found.losses, whole.losses)
    assert found.reports == whole.reports


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_resumed_run_knows_its_stage(stop, tmp_path):
    """Patience ends the run three steps after the first one, interrupted or not."""

    def run(**more):
        return find(steps=12, callbacks=[EarlyStopping(3, min_delta=1000.0)], **more)

    whole, watched = run()
    assert watched.stages == ["search"] * 4 + ["start 1"] * 4
    path = tmp_path / "noise.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(watched=Watched(stop), save_noise_to=path)
    found, again = run(resume_from=path)
    assert again.stages == watched.stages[stop:] and torch.equal(found.losses, whole.losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": -1}, "`search` to be an integer in"),
        ({"search": 7}, "at least 8 evaluations, for `search=7` and a step, but got 7"),
        ({"search": 7, "budget": 7}, "at least 8 evaluations"),
    ],
)
def test_a_search_that_leaves_no_step_is_refused_before_anything_runs(settings, message, monkeypatch):
    monkeypatch.setattr(tiny_pipeline("sd").text_encoder, "forward", None)
    with pytest.raises(ValueError, match=message):
        find(**settings)


def test_limits_follow_the_noises_to_their_new_positions():
    free, watched = find(seed=1, search=7, steps=8)
    rows = free.reports["search"]["from_image"]
    found, _ = find(seed=1, search=7, steps=8, guard=[QualityGuard(reward=redness, drop=1.0)])
    limits = (redness(watched.images[0], []) - 1.0)[rows]
    assert rows != [0, 1, 2] and found.reports["search"]["from_image"] == rows
    (reported,) = found.reports[GUARD_REPORT]["limits"].values()
    torch.testing.assert_close(torch.tensor(reported), limits)


def test_targets_count_once_the_search_is_over():
    """A threshold that every set passes ends the run at the chosen set, whose search is reported."""
    found, watched = find(stop_at={"dpp": -100.0})
    assert watched.stages == ["search"] * 4 + ["start 1"] and found.reports["search"]["noises"] == 4


def test_a_gradient_that_is_lost_is_reported_after_a_search(monkeypatch):
    def refuse(pipe, gradient):
        raise ValueError("no gradient")

    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, **_: (torch.zeros_like(inputs),))
    monkeypatch.setattr("noiseopt.pipelines.loop.refuse_lost_gradient", refuse)
    for search in (0, 3):
        with pytest.raises(ValueError, match="no gradient"):
            find(search=search)
