"""Blocks of modular pipelines: loaded by diffusers from a folder and from a loopback Hub, and equal to the classes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from problems import generator, redness
from tiny_pipelines import SIZE, quiet, tiny_pipeline

from noiseopt import CNOStableDiffusionXLPipeline, ReNOTurboPipeline
from noiseopt.hub.blocks import BLOCKS
from noiseopt.hub.push import push
from noiseopt.pipelines.cno.block import CNOBlock
from noiseopt.pipelines.reno.block import ReNOBlock

ROOT = Path(__file__).parents[2]
CALL = {"num_inference_steps": 2, **SIZE}


@pytest.fixture(scope="module")
def hub(running, tmp_path_factory):
    running.begin(tmp_path_factory.mktemp("blocks") / "hub")
    return running


def modular():
    """A tiny modular SDXL on the components of the stock pipeline, without guidance."""
    pipe, stock = StableDiffusionXLAutoBlocks().init_pipeline(), tiny_pipeline("sdxl")
    names = [each.name for each in pipe.blocks.expected_components]
    pipe.update_components(
        **{name: part for name, part in stock.components.items() if part is not None and name in names}
    )
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0, enabled=False))
    return pipe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("card", BLOCKS, ids=lambda card: card.name)
def test_block_draws_what_the_package_draws_from_folder_and_hub(card, hub, processes, api, tmp_path):
    push(card, "someone", api=api)
    folder, repository = ROOT / "hub_cards" / card.name, f"someone/{card.name}"
    arguments = [card.cls.__name__, card.room, folder, repository, hub.root]
    run = processes.run(ROOT / "tests/hub_cards/load_block.py", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    assert any(request.startswith(f"GET /{repository}/resolve/") for request in hub.requests)


@pytest.mark.parametrize(
    ("block", "cls", "request_"),
    [
        (CNOBlock, CNOStableDiffusionXLPipeline, {"num_images_per_prompt": 2}),
        (ReNOBlock, ReNOTurboPipeline, {"rewards": "red", "steps": 3}),
    ],
)
def test_block_and_class_draw_the_same_image_bit_by_bit(block, cls, request_):
    pipe = block().into(modular())
    ours = quiet(cls(**tiny_pipeline("sdxl").components))
    call = {**CALL, **request_, "output_type": "pt"}
    found = pipe(prompt="a b", generator=generator(), output="images", **call)
    expected = ours("a b", generator=generator(), guidance_scale=0.0, **call).images
    assert torch.equal(found, expected)


def test_the_generator_of_the_call_goes_on_and_its_noise_is_another_each_time():
    pipe, stream = CNOBlock().into(modular()), generator()
    call = {"prompt": "a b", "num_images_per_prompt": 2, "output": "noise_result", "generator": stream, **CALL}
    first, second = pipe(**call), pipe(**call)
    assert not torch.equal(first.initial_noise, second.initial_noise)


def test_what_is_no_modular_pipeline_and_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="Expected a loaded modular pipeline, but got StableDiffusionXLPipeline"):
        CNOBlock().into(tiny_pipeline("sdxl"))
    pipe = ReNOBlock().into(modular())
    with pytest.raises(ValueError, match="Expected `rewards` beside .*'steps'"):
        pipe(prompt="a b", steps=3, **CALL)
    with pytest.raises(ValueError, match="Expected each setting once"):
        pipe(prompt="a b", rewards=redness, steps=3, method_kwargs={"steps": 2}, **CALL)
