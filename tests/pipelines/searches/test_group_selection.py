"""The choice of a set against counting all sets through, and inside whole pipeline calls."""

import itertools
import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from problems import generator, redness
from tiny_features import build_features
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import BestOfN, GroupSelection, NoiseResult, TimeBudget, optimize_noise, shapes_world
from noiseopt.callbacks import NoiseState
from noiseopt.demo import ONE_STEP, load_pipeline
from noiseopt.pipelines import select_group
from noiseopt.pipelines.searches.group_solver import group_value
from noiseopt.pipelines.searches.previews import assigned_positions
from noiseopt.rewards import DINOv2PatchFeatures, PairwiseDistance


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def instance(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian values of items, and uniform ones of pairs, symmetric."""
    unary = torch.randn(size, generator=generator(seed), dtype=torch.float64)
    pairs = torch.rand(size, size, generator=generator(seed + 1000), dtype=torch.float64)
    return unary, (pairs + pairs.T) / 2


def naive_value(unary, pairwise, chosen, weight: float) -> float:
    """The formula, item by item and pair by pair."""
    pairs = sum(float(pairwise[i, j]) for i, j in itertools.combinations(chosen, 2))
    return sum(float(unary[i]) for i in chosen) + weight * pairs


def naive_best(unary, pairwise, count: int, weight: float) -> tuple[int, ...]:
    groups = itertools.combinations(range(len(unary)), count)
    return max(groups, key=lambda group: naive_value(unary, pairwise, group, weight))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("weight", [0.0, 1.5, -0.7])
def test_the_choice_is_the_best_of_all(size, weight):
    unary, pairwise = instance(size, size)
    for count in range(1, size + 1):
        chosen = select_group(unary, pairwise, count, weight)
        assert tuple(chosen.tolist()) == naive_best(unary, pairwise, count, weight)
        expected = naive_value(unary, pairwise, chosen.tolist(), weight)
        assert group_value(unary, pairwise, chosen, weight).item() == pytest.approx(expected, abs=1e-12)


def test_neither_the_diagonal_nor_half_of_a_pair_counts_by_itself():
    unary, pairwise = instance(8, 3)
    changed = torch.triu(2 * pairwise, 1) + 9 * torch.eye(8)
    assert torch.equal(select_group(unary, changed, 3), select_group(unary, pairwise, 3))


def test_the_search_reaches_the_optimum_in_most_instances_and_is_never_worse_than_the_first_group():
    reached, lost = 0, []
    for seed in range(50):
        unary, pairwise = instance(12, seed)
        best = naive_value(unary, pairwise, naive_best(unary, pairwise, 4, 1.5), 1.5)
        found = select_group(unary, pairwise, 4)
        assert torch.equal(found, select_group(unary, pairwise, 4))
        value = group_value(unary, pairwise, found, 1.5).item()
        first = group_value(unary, pairwise, torch.arange(4), 1.5).item()
        assert first <= value <= best + 1e-9 and len(set(found.tolist())) == 4
        reached += value > best - 1e-9
        lost.append((best - value) / (best - first))
    assert reached > 40 and sum(lost) / 50 < 0.01


def test_no_exchange_improves_what_the_search_ends_with():
    for seed in range(5):
        unary, pairwise = instance(24, seed)
        found = select_group(unary, pairwise, 7).tolist()
        value = naive_value(unary, pairwise, found, 1.5)
        for out, new in itertools.product(found, set(range(24)) - set(found)):
            assert naive_value(unary, pairwise, [*(set(found) - {out}), new], 1.5) <= value + 1e-9


def test_a_first_group_that_is_the_best_is_found():
    """Three items that only pay together: each alone is worth less than any other."""
    unary, pairwise = torch.tensor([4.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0]), torch.zeros(7, 7)
    pairwise[:3, :3] = 1.0
    assert select_group(unary, pairwise, 3, weight=4.0).tolist() == [0, 1, 2]
    assert select_group(unary, torch.zeros(7, 7), 1).tolist() == [3]


def test_large_problems_are_no_matter():
    unary, pairwise = instance(128, 0)
    chosen = select_group(unary, pairwise, 64)
    assert len(chosen) == 64 and (chosen.diff() > 0).all()


@pytest.mark.parametrize(
    ("unary", "pairwise", "count", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 3), 4, "from 1 to 3 of 3 candidates, but got 4. Draw more"),
        (torch.zeros(3), torch.zeros(3, 3), 0, "but got 0"),
        (torch.zeros(3), torch.zeros(3, 2), 2, r"shape \(N, N\)"),
        (torch.zeros(0), torch.zeros(0, 0), 1, r"shape \(N,\)"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2, 2), 1, "finite values"),
        (torch.zeros(2), torch.full((2, 2), torch.inf), 1, "finite values"),
    ],
)
def test_groups_that_cannot_be_chosen_are_refused(unary, pairwise, count, message):
    with pytest.raises(ValueError, match=message):
        select_group(unary, pairwise, count)


def test_a_candidate_keeps_its_place_where_that_is_free():
    assert assigned_positions([2, 0], [0, 1, 2], 1) == [(0, 2), (0, 0)]
    assert assigned_positions([1, 1, 4], [1, 3, 4], 1) == [(0, 1), (0, 3), (0, 4)]
    assert assigned_positions([1, 1, 1, 3], [1, 3], 2) == [(0, 1), (1, 1), (1, 3), (0, 3)]


class Seen:
    """All noises that were evaluated, and their images, step by step."""

    def __init__(self) -> None:
        self.noises, self.images, self.scores = [], [], []

    def __call__(self, state) -> None:
        self.noises.append(state.noise)
        self.images.append(state.images)
        self.scores.append(state.scores)


def select(pipe, prompt="a b", count=3, seed=0, callbacks=None, **settings) -> NoiseResult:
    arguments = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    arguments |= {name: settings.pop(name) for name in list(settings) if name in (*arguments, "generator", "eta")}
    arguments.setdefault("generator", generator(seed))
    method = GroupSelection(**{"features": "tiny_image", "steps": 4, **settings})
    return optimize_noise(pipe, prompt, method, num_images_per_prompt=count, callbacks=callbacks, **arguments)


def test_the_chosen_set_is_the_best_of_all_that_were_drawn():
    """Told from images that a callback kept, by the naive formula."""
    seen, weight = Seen(), 3.0
    result = select(tiny_pipeline("sd"), rewards=redness, weight=weight, callbacks=seen)
    images = torch.cat(seen.images[:4])
    unary, distance = redness(images, None), PairwiseDistance(build_features("tiny_image"))
    expected = naive_best(unary, distance(images), 3, weight)
    noises = torch.cat(seen.noises[:4])
    assert {noise.sum().item() for noise in result.noise} == {noises[index].sum().item() for index in expected}
    origins = zip(*(result.reports["group_selection"][name] for name in ("from_step", "from_image")), strict=True)
    assert {3 * step + row for step, row in origins} == set(expected)
    assert result.reports["group_selection"]["candidates"] == [12] * 3
    value = naive_value(unary, distance(images), expected, weight)
    assert result.losses[-1].tolist() == pytest.approx([-value] * 3, rel=1e-5)
    assert result.best_step.tolist() == [4] * 3 and result.losses.shape == (5, 3)
    torch.testing.assert_close(result.best_scores["redness"], redness(result.images, None))


@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_redraw_is_what_the_result_reports_and_worth_more_than_plain_sampling(family, preview):
    pipe, call = tiny_pipeline(family), {**call_arguments(family), "num_images_per_prompt": 2}
    method = GroupSelection(rewards=redness, features="tiny_image", steps=3, preview=preview, weight=4.0)
    plain = pipe("a b", generator=generator(), output_type="pt", **call).images
    result = optimize_noise(pipe, "a b", method, generator=generator(), **call)
    assert torch.equal(result.initial_images, plain)
    again = pipe("a b", latents=result.latents, generator=result.generator(), output_type="pt", **call).images
    assert torch.equal(again, result.images)
    distance = PairwiseDistance(build_features("tiny_image"))
    values = [naive_value(redness(images, None), distance(images), (0, 1), 4.0) for images in (plain, result.images)]
    found = [-result.losses[0, 0].item(), -result.at_best(result.losses)[0].item()]
    assert found == pytest.approx(values, rel=1e-4) and values[1] >= values[0]


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler])
@pytest.mark.parametrize("listed", [False, True])
def test_samplers_that_add_noise_on_the_way(scheduler, listed):
    pipe = quiet(sd_pipeline(scheduler=scheduler()))
    call = {"num_inference_steps": 2, "num_images_per_prompt": 3, **SIZE}
    for seed in range(3):
        streams = generators(seed, 7, 8) if listed else generator(seed)
        method = GroupSelection(features="tiny_image", steps=3)
        result = optimize_noise(pipe, "a b", method, generator=streams, **call)
        again = pipe("a b", latents=result.latents, generator=result.generator(), output_type="pt", **call).images
        assert torch.equal(again, result.images)
        assert (result.at_best(result.losses) <= result.losses.min(0).values).all()


def test_prompts_do_not_compete_and_may_have_sets_of_different_sizes():
    """The candidates of a noise are those of its seed, whatever batch it is in."""
    pipe, prompts = tiny_pipeline("sd"), ["a", "b", "a", "a", "b"]
    together = select(pipe, prompts, 1, rewards=redness, generator=generators(0, 1, 2, 3, 4))
    for prompt, rows in (("a", [0, 2, 3]), ("b", [1, 4])):
        alone = select(pipe, [prompt] * len(rows), 1, rewards=redness, generator=generators(*rows))
        torch.testing.assert_close(together.noise[rows], alone.noise, rtol=0, atol=1e-6)
        torch.testing.assert_close(together.losses[:, rows], alone.losses, rtol=1e-4, atol=1e-5)
    assert together.losses[0, 0] == together.losses[0, 2] != together.losses[0, 1]


def test_one_image_is_best_of_n():
    pipe, call = tiny_pipeline("sd"), {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    result = select(pipe, ["a", "b"], 1, rewards=redness, steps=6, generator=generators(3, 4))
    best = optimize_noise(pipe, ["a", "b"], BestOfN(rewards=redness, steps=6), generator=generators(3, 4), **call)
    assert torch.equal(result.noise, best.noise) and torch.equal(result.images, best.images)
    assert torch.equal(result.best_step, best.best_step) and "distance" not in result.scores


def test_without_a_weight_the_highest_rewards_are_chosen_and_none_twice():
    seen = Seen()
    result = select(tiny_pipeline("sd"), rewards=redness, weight=0.0, callbacks=seen)
    scores = torch.cat([scores["redness"] for scores in seen.scores[:4]])
    torch.testing.assert_close(result.best_scores["redness"].sort().values, scores.topk(3).values.flip(0))


def test_the_plain_set_is_returned_where_nothing_is_better():
    """One candidate is no choice, and nothing is drawn again."""
    result = select(tiny_pipeline("sd"), steps=1)
    assert result.losses.shape == (1, 3) and result.best_step.tolist() == [0, 0, 0]
    assert result.reports["group_selection"] == {
        "candidates": [3, 3, 3],
        "from_step": [0, 0, 0],
        "from_image": [0, 1, 2],
    }
    calls = []

    def plain_is_best(images, prompts):
        calls.append(len(images))
        return torch.full((len(images),), 100.0 if len(calls) == 2 else float(-len(calls)))  # the first is a trial

    result = select(tiny_pipeline("sd"), rewards=plain_is_best)
    assert result.losses.shape == (4, 3) and torch.equal(result.images, result.initial_images)


def counting_calls(pipe, **settings) -> tuple[int, NoiseResult]:
    """Images that go through the denoiser, and the result."""
    count = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: count.append(len(args[0])))
    result = select(pipe, rewards=redness, num_inference_steps=5, steps=6, count=2, **settings)
    handle.remove()
    return sum(count), result


def test_previews_cost_one_model_call_and_few_are_drawn_wholly():
    """The chosen ones are drawn again, unless they are those of a step."""
    whole, result = counting_calls(tiny_pipeline("sd"))
    assert whole == 2 * 5 * (6 + 1) and len(result.losses) == 7
    cut, result = counting_calls(tiny_pipeline("sd"), preview=True, keep=3)
    again = len(result.losses) - 8
    assert cut == 2 * (5 + 5 * 1 + 2 * 5 + again * 5) and again in (0, 1)
    assert result.losses.isnan().all(1).tolist() == [False, *[True] * 5, *[False] * (2 + again)]
    assert result.reports["group_selection"]["candidates"] == [12, 12]
    assert set(result.reports["group_selection"]["from_step"]) <= {0, 6, 7}


def test_what_is_kept_of_previews_is_the_best_group_of_them():
    seen = Seen()
    select(tiny_pipeline("sd"), num_inference_steps=3, preview=True, callbacks=seen)
    previews = torch.cat(seen.images[1:4])
    best = naive_best(torch.zeros(9), PairwiseDistance(build_features("tiny_image"))(previews), 3, 1.5)
    noises = torch.cat(seen.noises[1:4])
    assert {noise.sum().item() for noise in seen.noises[4]} == {noises[index].sum().item() for index in best}


def test_for_a_single_step_all_are_drawn():
    pipe = tiny_pipeline("sd")
    looked, drawn = (select(pipe, rewards=redness, preview=preview) for preview in (True, False))
    assert torch.equal(looked.noise, drawn.noise) and torch.equal(looked.losses, drawn.losses)


@pytest.mark.parametrize(
    ("preview", "stop_at", "seen_wholly"), [(False, 2, 3), (True, 2, 2), (True, 0, 1), (True, 5, 2)]
)
def test_a_run_that_is_stopped_chooses_among_what_it_has_seen(preview, stop_at, seen_wholly):
    """In the middle of the previews as many of them are drawn wholly as are asked for, after that no more."""
    seen = Seen()

    def stop(state):
        seen(state)
        return state.step < stop_at

    settings = {"num_inference_steps": 3, "steps": 5, "keep": 3, "preview": preview}
    result = select(tiny_pipeline("sd"), callbacks=stop, **settings)
    drawn = [step for step, row in enumerate(result.losses) if not row.isnan().any()]
    assert result.provenance["stopped"] == "callback" and len(drawn) - seen_wholly in (0, 1)
    images = torch.cat([seen.images[step] for step in drawn[:seen_wholly]])
    distances, nothing = PairwiseDistance(build_features("tiny_image"))(images), torch.zeros(len(images))
    value = naive_value(nothing, distances, naive_best(nothing, distances, 3, 1.5), 1.5)
    assert -result.at_best(result.losses)[0].item() == pytest.approx(value, rel=1e-5)


def test_a_time_budget_ends_the_search_with_the_best_set(monkeypatch):
    monkeypatch.setattr(NoiseState, "elapsed", property(lambda state: float(state.step)))
    result = select(tiny_pipeline("sd"), steps=10**6, callbacks=TimeBudget(3))
    assert result.provenance["stopped"] == "time budget" and len(result.losses) == 5
    assert result.at_best(result.losses)[0] <= result.losses[:-1].min()
    assert result.reports["group_selection"]["candidates"] == [12] * 3


def test_a_reward_that_breaks_on_the_way_leaves_a_choice_among_the_others():
    calls = []

    def breaking(images, prompts):
        calls.append(len(images))
        return redness(images, prompts) + (torch.nan if len(calls) == 4 else 0.0)  # the first is a trial

    with pytest.warns(UserWarning, match="keeps the best so far"):
        result = select(tiny_pipeline("sd"), rewards=breaking, steps=6)
    assert result.provenance["stopped"] == "non-finite reward" and result.losses.isfinite().all()
    assert result.reports["group_selection"]["candidates"] == [6] * 3
    assert result.at_best(result.losses)[0] <= result.losses.min()


def test_a_prompt_whose_search_is_stopped_chooses_among_its_own_and_no_noise_twice():
    """Its images stay as they are while those of the other prompt go on."""

    def stop(state):
        if state.step == 1:
            state.stop("enough", torch.tensor([True, True, False, False]))

    result = select(tiny_pipeline("sd"), ["a", "b"], 2, rewards=redness, weight=0.0, steps=6, callbacks=stop)
    report = result.reports["group_selection"]
    assert report["candidates"] == [4, 4, 12, 12] and max(report["from_step"][:2]) <= 1
    assert not torch.equal(result.noise[0], result.noise[1])
    assert result.losses[2:6, :2].isnan().all() and result.losses[2:].isfinite()[:, 2:].all()


def test_the_result_is_saved_with_its_choice(tmp_path):
    result = select(tiny_pipeline("sd"), rewards=redness)
    result.save(tmp_path / "set.safetensors")
    loaded = NoiseResult.load(tmp_path / "set.safetensors")
    assert loaded.reports == result.reports and loaded.provenance["method"] == "GroupSelection"
    settings = loaded.provenance["settings"]
    assert (settings["steps"], settings["weight"], settings["features"]) == (4, 1.5, "tiny_image")
    assert loaded.provenance["objective"] == {"rewards": {"redness": 1.0}, "features": "tiny_image", "weight": 1.5}


def test_features_may_be_an_object_and_rewards_need_no_gradient():
    def black_box(images, prompts):
        return torch.tensor([float(image.mean()) for image in images])

    result = select(tiny_pipeline("sd"), features=build_features("dinov2_patch"), rewards=black_box)
    assert set(result.scores) == {"black_box", "distance"}
    assert result.provenance["objective"]["features"] == "dinov2_patch"


BROKEN = build_features("tiny_image")
BROKEN.encode = lambda images: images.flatten(1) * math.nan  # pyright: ignore[reportAttributeAccessIssue]

BAD_SETTINGS = [
    ({"steps": 0}, ValueError, "`steps` to be an integer in"),
    ({"steps": 2.5}, ValueError, "`steps` to be an integer in"),
    ({"keep": 1}, ValueError, "`keep` to be an integer in"),
    ({"weight": -0.1}, ValueError, "`weight` to be a number in"),
    ({"weight": math.inf}, ValueError, "`weight` to be a number in"),
    ({"weight": 0.0}, ValueError, "`rewards` or a `weight` above 0"),
    ({"features": "dinov3"}, ValueError, "dinov3"),
    ({"features": 3}, TypeError, "`features` by name"),
    ({"rewards": "clipscor"}, ValueError, "clipscore"),
    ({"count": 1}, ValueError, "`rewards` or at least 2 images"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused_before_anything_runs(settings, error, message, monkeypatch):
    pipe = tiny_pipeline("sd")
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    with pytest.raises(error, match=message):
        select(pipe, **settings)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite features 'tiny_image'"):
        select(tiny_pipeline("sd"), features=BROKEN)


def test_sets_of_the_trained_model_differ_more():
    pipe = load_pipeline("turbo")
    pipe.set_progress_bar_config(disable=True)
    prompts = list(shapes_world.VALIDATION_PROMPTS[:4])
    features = DINOv2PatchFeatures.from_pretrained(shapes_world.path("dinov2"))
    method, call = GroupSelection(features=features, steps=6), {"num_images_per_prompt": 4, **ONE_STEP}
    result = optimize_noise(pipe, prompts, method, generator=generators(*range(16)), **call)
    before, after = (
        torch.stack([PairwiseDistance(features)(images[rows : rows + 4]).sum() for rows in range(0, 16, 4)])
        for images in (result.initial_images, result.images)
    )
    assert (after > before).all() and after.mean() > 1.25 * before.mean()
