"""CADS: what the denoiser is given, against the formulas restated in float64."""

import contextlib

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from stock_calls import FAMILIES, STEPS, draw
from tiny_pipelines import tiny_pipeline

from noiseopt.callbacks import CADS, DenoisingCallback

CONDITIONS = {
    "sd": ("prompt_embeds",),
    "sdxl": ("prompt_embeds", "add_text_embeds"),
    "sd3": ("prompt_embeds", "pooled_prompt_embeds"),
    "flux": ("prompt_embeds",),
}
SETTINGS = {"tau1": 0.3, "tau2": 0.8, "noise_scale": 0.4, "mixing": 0.7}


@contextlib.contextmanager
def conditions_given(family):
    """For each model call its condition and, where the family has one, its pooled condition."""
    pipe, seen = tiny_pipeline(family), []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def record(module, args, kwargs):
        pooled = (kwargs.get("added_cond_kwargs") or {}).get("text_embeds", kwargs.get("pooled_projections"))
        seen.append([kwargs["encoder_hidden_states"], pooled][: len(CONDITIONS[family])])

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def restated(y, t, noise, tau1, tau2, noise_scale, mixing):
    """The paper's algorithm on one condition, in float64."""
    y, n = y.double().flatten(), noise.double().flatten()
    gamma = 1.0 if t <= tau1 else 0.0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)
    if gamma == 1:  # also of a constant condition, as SDXL's of no prompt is, that has no deviation
        return y
    mixed = gamma**0.5 * y + noise_scale * (1 - gamma) ** 0.5 * n
    rescaled = (mixed - mixed.mean()) / mixed.var().sqrt() * y.var().sqrt() + y.mean()
    return mixing * rescaled + (1 - mixing) * mixed


@pytest.mark.parametrize("statistics", ["image", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoiser_is_given_the_condition_of_the_paper(family, statistics):
    seed = torch.Generator()
    callback = CADS(**SETTINGS, conditions=CONDITIONS[family], statistics=statistics, generator=seed)
    with conditions_given(family) as seen:
        draw(family, callback, seed=seed, prompt=["a", "b c"], images=1)
    noise, scheduler = torch.Generator().manual_seed(7), tiny_pipeline(family).scheduler
    plain, levels = seen[0], []
    for call, timestep in list(zip(seen, scheduler.timesteps, strict=True))[1:]:
        t = float(timestep) / 1000
        levels.append("plain" if t <= 0.3 else "noise" if t >= 0.8 else "between")
        for y, given in zip(plain, call, strict=True):
            drawn = torch.randn(y.shape, generator=noise) if t > 0.3 else torch.zeros(y.shape)
            parts = zip(y, drawn, strict=True) if statistics == "image" else [(y, drawn)]
            expected = torch.stack([restated(*each, **SETTINGS) for each in ((p, t, n) for p, n in parts)])
            torch.testing.assert_close(given.double().flatten(), expected.flatten(), rtol=1e-4, atol=1e-4)
            assert t > 0.3 or given.equal(y)
    assert len(seen) == STEPS and {"plain", "between"} <= set(levels)


def test_rescaling_keeps_mean_and_deviation_of_each_embedding():
    y = 3 + 2 * torch.randn(2, 7, 16)
    for gamma in (0.0, 0.3, 0.9):
        found = CADS().anneal(y, gamma)
        torch.testing.assert_close(found.mean((1, 2)), y.mean((1, 2)))
        torch.testing.assert_close(found.std((1, 2)), y.std((1, 2)))


def test_without_rescaling_the_whole_condition_is_noise_at_first():
    callback = CADS(mixing=0.0, noise_scale=0.5, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    assert callback.anneal(torch.full((2, 7, 16), 9.0), 0.0).equal(expected)


def test_an_image_does_not_depend_on_its_batch():
    """With statistics of each embedding and a generator of each image."""
    y = torch.randn(4, 7, 16)  # unconditional embeddings of two images, then conditional ones

    def anneal(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return CADS(generator=generators).anneal(y[rows], 0.2)

    assert anneal([0, 1, 2, 3], [5, 6])[[1, 3]].equal(anneal([1, 3], [6]))


def test_the_same_generator_state_gives_the_same_images_and_another_gives_others():
    seed = torch.Generator()
    callback = CADS(generator=seed)
    first = draw("sd", callback, seed=seed)
    assert not draw("sd", callback).equal(first)  # the generator went on
    assert draw("sd", callback, seed=seed).equal(first)


def test_no_condition_is_kept_after_a_call():
    callback = CADS()
    draw("sd", callback)
    assert callback.conditions == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau1": 0.9, "tau2": 0.6}, "tau1 < tau2 <= 1, but got 0.9 and 0.6"),
        ({"tau2": 1.1}, "tau1 < tau2"),
        ({"noise_scale": -0.1}, "noise_scale >= 0"),
        ({"mixing": 1.5}, "mixing in"),
        ({"conditions": "prompt_embeds"}, "names of tensors"),
        ({"conditions": ()}, "names of tensors"),
        ({"statistics": "all"}, "statistics"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CADS(**settings)


def test_generators_that_do_not_fit_the_batch_are_refused():
    with pytest.raises(ValueError, match="one for each image, but got 3 for 4 embeddings"):
        draw("sd", CADS(generator=[torch.Generator() for _ in range(3)]))


def test_a_condition_in_lists_is_refused():
    with pytest.raises(TypeError, match="prompt_embeds of StableDiffusionPipeline as one tensor, but got list"):
        CADS().on_call_start(tiny_pipeline("sd"), {"prompt_embeds": [torch.zeros(3, 4)]})


class Louder(DenoisingCallback):
    """Callback that multiplies the condition once, after a given step."""

    def __init__(self, index: int) -> None:
        super().__init__(["prompt_embeds"])
        self.index = index

    def on_step(self, pipeline, index, callback_kwargs):
        if index == self.index:
            callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"] * 2


@pytest.mark.parametrize("settings", [{"noise_scale": 0.0}, {"tau1": 0.95, "tau2": 1.0}], ids=["off", "past"])
@pytest.mark.parametrize("first", [True, False])
def test_where_nothing_is_annealed_the_condition_of_another_callback_stays(settings, first):
    both = [CADS(**settings), Louder(3)]
    found = draw("sd", MultiPipelineCallbacks(both[::-1] if first else both))
    assert found.equal(draw("sd", Louder(3))) and not found.equal(draw("sd"))


def test_the_condition_of_another_callback_is_the_one_that_is_annealed():
    callback = CADS(**SETTINGS, generator=(seed := torch.Generator()))
    with conditions_given("sd") as seen:
        draw("sd", MultiPipelineCallbacks([Louder(3), callback]), seed=seed, images=1, guidance_scale=1.0)
    noise, (y, *_), times = torch.Generator().manual_seed(7), seen[0], tiny_pipeline("sd").scheduler.timesteps / 1000
    drawn = [torch.randn(y.shape, generator=noise) for _ in times[1:4]]
    assert (times[1:4] > SETTINGS["tau1"]).all()
    annealed = 2 * seen[2][0]  # Louder is given what CADS made before
    expected = restated(annealed, times[3], drawn[-1], **SETTINGS)
    torch.testing.assert_close(seen[3][0].double().flatten(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_a_cut_of_the_guidance_cuts_the_condition(order):
    seed = torch.Generator()
    callbacks = [CADS(**SETTINGS, generator=seed), SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)]
    with conditions_given("sd") as seen:
        draw("sd", MultiPipelineCallbacks(callbacks[::order]), seed=seed, images=1)
    sizes = [len(given[0]) for given in seen]
    assert sizes == [2, 2, 2, 1, 1, 1]
    assert seen[-1][0].equal(seen[0][0][1:])  # past τ1 the clean condition, without the unconditional one
