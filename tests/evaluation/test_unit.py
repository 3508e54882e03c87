"""A unit has the images of the stock pipeline from a method's noise, and is written completely or not at all."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from noiseopt import shapes_world
from noiseopt.evaluation.evaluate import load_pipeline
from noiseopt.evaluation.instruments import Instruments, render_references
from noiseopt.evaluation.plan import PLAIN, Contender, MethodChoice, ModelChoice, Plan, control_of
from noiseopt.evaluation.prompt_sets import Prompt, PromptSet
from noiseopt.evaluation.unit import Studio, Unit, write_json, write_whole
from noiseopt.schedulers import PinkNoise

PROMPT = "a red circle left of a blue star"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def studio() -> Studio:
    plan = Plan(
        models=(ModelChoice.parse("turbo", {}),),
        methods=(MethodChoice.parse("reno:steps=1"),),
        prompts=PromptSet("two", (Prompt("a green cross"), Prompt(PROMPT))),
        seeds=2,
        rewards=(("red", 2.0),),
        watched=("blue",),
        features="clip",
    )
    model = plan.models[0]
    return Studio(plan, model, load_pipeline(model, None, CPU), Instruments.load(plan, CPU), CPU)


@pytest.fixture(scope="module")
def plain(studio) -> torch.Tensor:
    """The output of the stock pipeline alone."""
    generators = [torch.Generator().manual_seed(studio.plan.seed(1, image)) for image in range(2)]
    call = {"generator": generators, "num_images_per_prompt": 2, "output_type": "pt"}
    return studio.pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, **call).images


def test_every_contender_starts_from_the_noise_of_plain_sampling(studio, plain):
    method = studio.plan.methods[0]
    for contender in studio.plan.contenders:
        generation = studio.generate(studio.method(contender, best_of=1), 1)
        assert torch.equal(generation.images, plain), contender.key
    assert [contender.method for contender in studio.plan.contenders] == [None, method, method]


def test_a_unit_holds_what_its_images_are_measured_as(studio, plain):
    unit = studio.measure(PLAIN, 1, None)
    numbers = unit.numbers
    assert torch.equal(unit.images, plain)
    assert numbers["judge"]["right"] == [verdict.correct for verdict in shapes_world.judge(plain, PROMPT)]
    for channel, name in ((0, "red"), (2, "blue")):
        others = [other for other in range(3) if other != channel]
        expected = plain[:, channel] - plain[:, others].sum(1)
        assert numbers["rewards"][name] == pytest.approx(expected.mean((1, 2)).tolist(), abs=1e-5)
    first, second = torch.nn.functional.normalize(unit.tensors["features"].double(), dim=1)
    assert numbers["set"]["mss"] == pytest.approx(float(first @ second))
    assert numbers["noise"]["norm"] == pytest.approx(float(unit.tensors["noise"][:, :].flatten(1).norm(dim=1).mean())
                                                     / unit.tensors["noise"][0].numel() ** 0.5)  # fmt: skip
    assert (numbers["category"], numbers["cost"]["model_calls"]) == ("position", 2)


def test_best_of_n_is_the_best_by_the_reward_of_more_noises(studio):
    control = control_of(studio.plan.methods[0])
    one, many = (studio.measure(control, 1, n).numbers for n in (1, 12))
    pairs = zip(one["rewards"]["red"], many["rewards"]["red"], strict=True)
    assert all(few <= more for few, more in pairs) and one["rewards"]["red"] != many["rewards"]["red"]
    assert many["cost"]["model_calls"] == 2 * (12 + 1) and many["evaluations"] == 12


def test_references_show_the_prompt_and_are_the_same_for_everyone():
    references = render_references(PROMPT)
    assert all(verdict.correct for verdict in shapes_world.judge(references, PROMPT))
    assert torch.equal(references, render_references(PROMPT.upper()))
    assert len({image.numpy().tobytes() for image in references}) == len(references)


def test_a_saved_unit_is_whole(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    path = tmp_path / "new" / "00003.json"
    Unit({"set": {"mss": float("nan")}, "right": [True]}, {"noise": torch.ones(2, 4)}, images).save(path)
    assert json.loads(path.read_text()) == {"set": {"mss": None}, "right": [True]}
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["noise"], torch.ones(2, 4))
    with Image.open(path.with_name("00003-1.png")) as picture:
        pixels = torch.tensor(list(picture.tobytes())).view(8, 8, 3).movedim(2, 0) / 255
    assert (pixels - images[1]).abs().max() <= 0.5 / 255 + 1e-6
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "00003-0.png", "00003-1.png", "00003.json", "00003.safetensors",
    ]  # fmt: skip


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def half(part):
        part.write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_noise_sampler_of_a_method_is_that_of_its_control_too(studio, plain):
    """Pink noise of the same generators: white noise whose spectrum is colored."""
    method = MethodChoice.parse("reno:steps=1,noise_sampler={'name': 'pink', 'alpha': 0.3}")
    pink = [studio.run(contender, 1, 1) for contender in (Contender("pink", method), control_of(method))]
    expected = PinkNoise(0.3).color(studio.run(PLAIN, 1, None).result.noise)
    for generation in pink:
        torch.testing.assert_close(generation.result.noise, expected)
        assert torch.equal(generation.images, pink[0].images) and not torch.equal(generation.images, plain)
    call = ModelChoice.parse("turbo", {"noise_sampler": {"name": "pink", "alpha": 0.3}})
    everywhere = dataclasses.replace(studio, model=call)
    assert torch.equal(everywhere.run(PLAIN, 1, None).images, pink[0].images)


@pytest.mark.slow
def test_a_callback_steers_the_stock_pipeline_from_plain_noise():
    methods = ("cads:noise_scale=0.5", "particle_guidance", "interval_guidance:high=1.0", "cads:noise_scale=0")
    methods += ("embedding_noise:strength=4.0", "diversity_boost", "embedding_noise:strength=0")
    plan = Plan(
        models=(ModelChoice.parse("guided", {}),),
        methods=tuple(MethodChoice.parse(text) for text in methods),
        prompts=PromptSet("one", (Prompt(PROMPT),)),
        seeds=2,
        rewards=(("red", 1.0),),
    )
    pipe = load_pipeline(plan.models[0], None, CPU)
    studio = Studio(plan, plan.models[0], pipe, Instruments.load(plan, CPU), CPU)
    plain = studio.measure(PLAIN, 0, None)
    for contender in plan.contenders[1:]:
        studio.check(contender)
        unit = studio.measure(contender, 0, None)
        assert torch.equal(unit.images, studio.measure(contender, 0, None).images)
        assert torch.equal(unit.tensors["noise"], plain.tensors["noise"])
        assert torch.equal(unit.images, plain.images) == contender.key.endswith("=0")
        assert unit.numbers["cost"]["model_calls"] == plain.numbers["cost"]["model_calls"]


@pytest.mark.slow
def test_reward_guidance_steers_the_stock_pipeline_from_plain_noise_by_the_rewards_of_the_plan():
    methods = ("reward_guidance:strength=0.0", "reward_guidance:strength=0.2")
    plan = Plan(
        models=(ModelChoice.parse("guided", {}),),
        methods=tuple(MethodChoice.parse(text) for text in methods),
        prompts=PromptSet("one", (Prompt(PROMPT),)),
        seeds=2,
        rewards=(("red", 1.0),),
    )
    pipe = load_pipeline(plan.models[0], None, CPU)
    studio = Studio(plan, plan.models[0], pipe, Instruments.load(plan, CPU), CPU)
    plain, off, on = (studio.measure(Contender("", method), 0, None) for method in (None, *plan.methods))
    assert torch.equal(off.images, plain.images) and torch.equal(on.tensors["noise"], plain.tensors["noise"])
    assert all(a > b for a, b in zip(on.numbers["rewards"]["red"], plain.numbers["rewards"]["red"], strict=True))
    assert on.numbers["cost"]["model_calls"] == plain.numbers["cost"]["model_calls"]
    assert torch.equal(studio.measure(plan.contenders[1], 0, 1).images, plain.images)  # the control


def test_a_callback_is_refused_by_a_model_of_one_step(studio):
    with pytest.raises(ValueError, match="at least 2 denoising steps"):
        studio.check(Contender("cads", MethodChoice.parse("cads")))
