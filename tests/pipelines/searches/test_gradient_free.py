"""Contract of the methods that choose the noise of an image without a gradient."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from problems import generator, redness
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, sd_pipeline, tiny_pipeline

from noiseopt import (
    PCN,
    BestOfN,
    BlackBox,
    EarlyStopping,
    NoiseResult,
    TimeBudget,
    ZeroOrderSearch,
    list_methods,
    optimize_noise,
)
from noiseopt.callbacks import NoiseState

METHODS = {
    "best_of_n": lambda **settings: BestOfN(**settings),
    "best_of_previews": lambda **settings: BestOfN(preview=True, keep=3, **settings),
    "zero_order_search": lambda **settings: ZeroOrderSearch(neighbors=2, **settings),
    "pcn": lambda **settings: PCN(beta=0.5, acceptance=0.3, **settings),
}
CALL = {"num_inference_steps": 2, "guidance_scale": 0.0, **SIZE}
every_method = pytest.mark.parametrize("name", list(METHODS))


def search(name: str, prompt="a b", seed=0, pipe=None, callbacks=None, rewards=redness, **settings) -> NoiseResult:
    streams = [generator(each) for each in seed] if isinstance(seed, list) else generator(seed)
    method = METHODS[name](rewards=rewards, **{"steps": 6, **settings})
    return optimize_noise(pipe or tiny_pipeline("sd"), prompt, method, callbacks=callbacks, generator=streams, **CALL)


@every_method
@pytest.mark.parametrize("family", list(BUILDERS))
def test_the_first_is_plain_the_best_is_no_worse_and_a_redraw_is_what_is_reported(family, name):
    pipe, call = tiny_pipeline(family), call_arguments(family)
    plain = pipe("a b", generator=generator(), output_type="pt", **call).images
    result = optimize_noise(pipe, "a b", METHODS[name](rewards=redness, steps=5), generator=generator(), **call)
    assert torch.equal(result.initial_images, plain)
    again = pipe("a b", latents=result.latents, generator=result.generator(), output_type="pt", **call).images
    assert torch.equal(again, result.images)
    torch.testing.assert_close(result.best_scores["redness"], redness(again, None))
    drawn = result.losses[~result.losses.isnan()]
    assert result.best_loss.item() == drawn.min().item() and len(drawn) >= 2


@every_method
def test_samplers_that_add_noise_on_the_way_draw_the_reported_image_again(name):
    pipe = quiet(sd_pipeline(scheduler=EulerAncestralDiscreteScheduler()))
    result = search(name, pipe=pipe)
    again = pipe("a b", latents=result.latents, generator=result.generator(), output_type="pt", **CALL).images
    assert torch.equal(again, result.images)


@every_method
@pytest.mark.parametrize("patience", [None, 2])
def test_images_are_independent_problems_also_when_one_stops_early(name, patience):
    """A noise has the candidates of its own seed, whatever batch it is in, and its own patience."""
    together, single = (
        search(name, prompts, seeds, callbacks=EarlyStopping(patience) if patience else None, steps=9)
        for prompts, seeds in ((["a", "b", "c"], [2, 0, 4]), ("b", [0]))
    )
    torch.testing.assert_close(together.noise[1], single.noise[0], rtol=0, atol=1e-5)
    steps = slice(0, min(len(together.losses), len(single.losses)) - (3 if name == "best_of_previews" else 0))
    pair = (together.losses[steps, 1], single.losses[steps, 0])
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(together.best_loss[1], single.best_loss[0], rtol=1e-4, atol=1e-5)


@every_method
def test_a_time_budget_ends_the_search_with_the_best_so_far(name, monkeypatch):
    monkeypatch.setattr(NoiseState, "elapsed", property(lambda state: float(state.step)))
    result = search(name, callbacks=TimeBudget(3), steps=10**6)
    assert result.provenance["stopped"] == "time budget"
    assert len(result.losses) == (5 if name == "best_of_previews" else 4)
    assert result.best_loss <= result.losses[0]


@every_method
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_hands_out_its_best(name, error):
    def interrupt(state):
        if state.step == 2:
            raise error("stop")

    with pytest.raises(error) as raised:
        search(name, callbacks=interrupt)
    assert len(raised.value.noise_result.losses) == 3


@every_method
def test_a_reward_that_breaks_on_the_way_leaves_the_best_so_far(name):
    calls = []

    def breaking(images, prompts):
        calls.append(1)
        return redness(images, prompts) + (torch.nan if len(calls) == 4 else 0.0)  # the first is a trial

    with pytest.warns(UserWarning, match="keeps the best so far"):
        result = search(name, rewards=breaking)
    assert result.provenance["stopped"] == "non-finite reward"
    assert result.best_loss <= result.losses[0]


@every_method
def test_black_boxes_are_taken_and_the_provenance_names_them(name, tmp_path):
    def person(image, prompt):
        red, green, _ = image.resize((1, 1)).getpixel((0, 0))
        return (red - green) / 255

    result = search(name, rewards={BlackBox(person): 2.0})
    result.save(tmp_path / "found.safetensors")
    loaded = NoiseResult.load(tmp_path / "found.safetensors")
    assert loaded.provenance["objective"] == {"person": 2.0} and loaded.reports == result.reports
    settings = {**METHODS[name](rewards=redness).settings(), "steps": 6}
    assert loaded.provenance["settings"] == {key: each for key, each in settings.items() if key != "rewards"}
    assert (result.best_scores["person"] >= result.initial_scores["person"]).all()


def test_they_are_known_by_name():
    assert {"best_of_n", "zero_order_search", "pcn"} <= set(list_methods())
    for name in ("best_of_n", "zero_order_search", "pcn"):
        settings = {"rewards": redness, "steps": 2}
        result = optimize_noise(tiny_pipeline("sd"), "a", name, method_kwargs=settings, **CALL)
        assert len(result.losses) == 2
