"""Best-of-N with previews: what is looked at, what is drawn wholly, and what it costs."""

import pytest
import torch
from problems import redness
from tiny_pipelines import SIZE, call_arguments, tiny_pipeline

from noiseopt import BestOfN, optimize_noise
from noiseopt.pipelines.searches.previews import Candidates

CALL = {"guidance_scale": 0.0, **SIZE}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Steps:
    """All noises that were evaluated, and their scores, step by step."""

    def __init__(self) -> None:
        self.noises, self.scores = [], []

    def __call__(self, state) -> None:
        self.noises.append(state.noise)
        self.scores.append(state.scores["redness"])


def search(callbacks=None, steps=8, num_inference_steps=3, prompts=("a", "b"), **settings):
    method, call = BestOfN(rewards=redness, steps=steps, **settings), {**CALL, "generator": generators(3, 4)}
    call["num_inference_steps"] = num_inference_steps
    return optimize_noise(tiny_pipeline("sd"), list(prompts), method, callbacks=callbacks, **call)


def test_the_previews_of_the_highest_rewards_are_drawn_wholly():
    """Each image has its own ones, the best first; told from what a callback saw."""
    seen = Steps()
    result = search(seen, preview=True, keep=4)
    assert result.losses.isnan().all(1).tolist() == [False, *[True] * 7, *[False] * 3]
    previews = torch.stack(seen.scores[1:8])
    for row in range(2):
        order = previews[:, row].argsort(descending=True)[:3]
        expected = torch.stack([seen.noises[1 + index][row] for index in order])
        assert torch.equal(torch.stack([noise[row] for noise in seen.noises[8:]]), expected)
        drawn = [-result.losses[step, row].item() for step in (0, 8, 9, 10)]
        assert -result.best_loss[row].item() == max(drawn)


def test_the_same_noises_are_drawn_with_and_without_previews():
    looked, whole = Steps(), Steps()
    search(looked, preview=True)
    search(whole)
    assert torch.equal(torch.stack(looked.noises[:8]), torch.stack(whole.noises))


def test_a_preview_is_the_reward_of_the_x0_estimate():
    seen, samplers = Steps(), []

    class Watching(BestOfN):
        def start(self, problem):
            samplers.append(problem.sampler)
            return super().start(problem)

    method = Watching(rewards=redness, steps=2, preview=True)
    call = {**CALL, "generator": generators(3), "num_inference_steps": 3}
    optimize_noise(tiny_pipeline("sd"), "a", method, callbacks=seen, **call)
    expected = redness(samplers[0].images(seen.noises[1], preview=True), None)
    assert torch.equal(seen.scores[1], expected) and not torch.equal(seen.scores[2], expected)
    assert torch.equal(seen.scores[2], redness(samplers[0].images(seen.noises[1]), None))


def test_previews_cost_one_model_call():
    pipe, counted = tiny_pipeline("sd"), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    for settings, expected in (({}, 2 * 5 * 8), ({"preview": True, "keep": 3}, 2 * (5 + 7 + 2 * 5))):
        counted.clear()
        search(num_inference_steps=5, **settings)
        assert sum(counted) == expected
    handle.remove()


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_for_a_single_step_all_are_drawn_whatever_the_call_before_had(family):
    """Flux tells its scheduler how many steps there are only after the noise is there."""
    pipe, call = tiny_pipeline(family), call_arguments(family)
    for steps, drawn in ((1, 6), (2, 3), (1, 6)):
        call["num_inference_steps"] = steps
        pipe("a", output_type="latent", **{**call, "num_inference_steps": 3 - steps})
        result = optimize_noise(pipe, "a", BestOfN(rewards=redness, steps=6, preview=True, keep=3), **call)
        assert (~result.losses.isnan()).sum() == drawn


@pytest.mark.parametrize(("stop_at", "drawn"), [(0, [0]), (2, [0, 3]), (7, [0, 8]), (8, [0, 8])])
def test_a_run_that_is_stopped_draws_the_best_preview_it_has_seen(stop_at, drawn):
    seen = Steps()

    def stop(state):
        seen(state)
        return state.step < stop_at

    result = search(stop, preview=True, keep=4)
    assert (~result.losses.isnan().any(1)).nonzero().flatten().tolist() == drawn
    if stop_at == 2:
        best = torch.stack(seen.scores[1:3]).argmax(0)
        expected = torch.stack([seen.noises[1 + index][row] for row, index in enumerate(best)])
        assert torch.equal(seen.noises[3], expected)


def test_an_image_that_is_stopped_has_one_preview_drawn_and_the_others_go_on():
    seen = Steps()

    def stop(state):
        seen(state)
        if state.step == 2:
            state.stop("enough", torch.tensor([True, False]))

    result = search(stop, preview=True, keep=4)
    assert len(result.losses) == 11 and result.losses[8:].isfinite().all()
    best = torch.stack(seen.scores[1:3])[:, 0].argmax()
    assert torch.equal(seen.noises[8][0], seen.noises[1 + best][0])
    for noise in seen.noises[9:]:
        assert any(torch.equal(noise[0], seen.noises[step][0]) for step in (0, 8))


def test_few_previews_are_kept_in_memory_and_of_equals_the_first():
    seen = Candidates(limit=2)
    noises = torch.randn(5, 2, 1, 2, 2, generator=generators(0)[0])
    for step, rewards in enumerate([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [3.0, 9.0], [0.0, 9.0]]):
        seen.add(step, noises[step], torch.tensor(rewards))
    assert len(seen.noises) == len(seen.unary) == len(seen.features) == 4
    assert [seen.origins[index] for index in seen.highest(seen.of([0]))] == [(1, 0), (3, 0)]
    assert [seen.origins[index] for index in seen.highest(seen.of([1]))] == [(3, 1), (4, 1)]
    assert torch.equal(seen.noises[seen.of([0])[0]], noises[1, 0])


@pytest.mark.parametrize("keep", [1, 2.0, True])
def test_bad_settings_are_refused(keep):
    with pytest.raises(ValueError, match="`keep` to be an integer in"):
        search(preview=True, keep=keep)
