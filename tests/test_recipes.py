"""The recipes of `docs/recipes.md`: their calls on tiny pipelines of the same classes, scheduler and timestep."""

import ast
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDPMScheduler, LCMScheduler, PixArtAlphaPipeline
from problems import generator, redness
from tiny_families import pixart_sigma_pipeline
from tiny_pipelines import SIZE, quiet, sd3_pipeline, sdxl_pipeline

from noiseopt import ReNO, RewardGuidance, optimize_noise

TEXT = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
PROGRAMS = [each for each in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "\ncall = " in each]  # of models


def hyper_sdxl():
    pipe = sdxl_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def pixart_dmd():
    parts = pixart_sigma_pipeline().components
    return PixArtAlphaPipeline(**{**parts, "scheduler": DDPMScheduler()})


def call_of(program: str) -> dict:
    """Return the dict `call` of a program."""
    (found,) = re.findall(r"^call = (.*)$", program, re.MULTILINE)
    return ast.literal_eval(found)


@pytest.mark.parametrize(("program", "build"), [*zip(PROGRAMS[1:3], (hyper_sdxl, pixart_dmd), strict=True)])
def test_a_recipe_starts_at_its_timestep_rises_and_redraws(program, build):
    pipe, seen = quiet(build()), []
    assert f"{type(pipe).__name__}.from_pretrained" in program and type(pipe.scheduler).__name__ in program
    call = {**call_of(program), **SIZE}
    if isinstance(pipe, PixArtAlphaPipeline):
        call["use_resolution_binning"] = False  # to the sizes of the published models
    denoiser = pipe.components.get("unet") or pipe.transformer
    denoiser.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named.get("timestep", inputs[-1])), with_kwargs=True
    )
    result = optimize_noise(pipe, "a b", ReNO(rewards=redness, steps=4), generator=generator(), **call)
    assert {int(torch.as_tensor(each).flatten()[0]) for each in seen} == set(call["timesteps"]) and len(seen) == 4
    assert result.scores["redness"].max() > result.scores["redness"][0].max()
    again = pipe("a b", latents=result.latents, generator=generator(), output_type="pt", **call).images
    torch.testing.assert_close(redness(again, None), result.scores["redness"].max(0).values, rtol=1e-4, atol=1e-5)
    plain = pipe("a b", generator=generator(), output_type="pt", **call).images
    torch.testing.assert_close(redness(plain, None), result.scores["redness"][0], rtol=1e-4, atol=1e-5)


def test_the_recipe_of_budgets_runs_and_keeps_them(monkeypatch):
    """On a tiny pipeline, with a reward that needs no weights and a shorter time."""
    pipe, found = quiet(sdxl_pipeline()), {}
    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pipe)
    program = PROGRAMS[0].replace('.to("cuda")', "").replace('"hpsv2.1"', '"red"').replace('"20s"', '"1500ms"')
    assert program.count('"red"') == 2 and "1500ms" in program
    exec(program, found)
    timed, searched = found["result"], found["searched"]
    assert timed.provenance["stopped"] == "time budget" and timed.provenance["seconds"] < 5 and len(timed.losses) > 1
    assert len(searched.losses) == 60 and searched.reports["search"]["noises"] == 16
    assert len(searched.reports["search"]["first_steps"]) == 2


def test_the_recipe_of_guidance_steers_its_pipeline():
    (program,) = PROGRAMS[3:]
    pipe = quiet(sd3_pipeline())
    assert f"{type(pipe).__name__}.from_pretrained" in program
    call = {**call_of(program), **SIZE, "num_inference_steps": 4, "output_type": "pt"}
    (settings,) = re.findall(r"RewardGuidance\(rewards=\{.*?\}, (.*)\)$", program, re.MULTILINE)
    strength = float(settings.removeprefix("strength="))
    moved = RewardGuidance(rewards=redness, strength=strength).generate(pipe, "a b", generator=generator(), **call)
    assert redness(moved.images, None) > redness(pipe("a b", generator=generator(), **call).images, None)
