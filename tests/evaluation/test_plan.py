"""Plans parsed from strings, and their errors before any model is loaded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from noiseopt import BestOfN, ReNO, shapes_world
from noiseopt.evaluation.command import split_features, weighted
from noiseopt.evaluation.embedded_diversity import embedded_diversity, towers_of
from noiseopt.evaluation.evaluate import Evaluation
from noiseopt.evaluation.folder import CannotEvaluate, differences
from noiseopt.evaluation.plan import (
    PLAIN,
    MethodChoice,
    ModelChoice,
    Plan,
    control_of,
    parse_settings,
    reference_files,
    slug,
    with_noise_samplers,
)
from noiseopt.evaluation.prompt_sets import Prompt, PromptSet, load_prompts
from noiseopt.pipelines.baselines.plain_sampling import PlainSampling

PROMPTS = PromptSet("two", (Prompt("a red circle"), Prompt("two blue stars", "pairs")))


def plan(**changes) -> Plan:
    settings = {"models": (ModelChoice.parse("turbo", {}),), "methods": (MethodChoice.parse("reno"),)}
    settings |= {"prompts": PROMPTS, "seeds": 2, "rewards": (("clip", 1.0),)}
    return Plan(**{**settings, **changes})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("steps=20, mode=parity", {"steps": 20, "mode": "parity"}),
        (
            "budget=20s, steps=3,b=1.5min,c=.5h , d=500ms",
            {"budget": "20s", "steps": 3, "b": "1.5min", "c": ".5h", "d": "500ms"},
        ),
        ("a='=1s',b=1e3,c=0x1f", {"a": "=1s", "b": 1000.0, "c": 31}),
        ("a=-1.5e-3,b=None,c=(1, 2),d='x,y=z'", {"a": -1.5e-3, "b": None, "c": (1, 2), "d": "x,y=z"}),
    ],
)
def test_settings_are_literals_or_words(text, expected):
    assert parse_settings(text) == expected


def test_rewards_are_read_with_their_weights_and_a_preset_with_its_members():
    assert weighted("clip") == [("clip", 1.0)] and weighted("org/model=0.5") == [("org/model", 0.5)]
    assert weighted("reno=2") == [("hpsv2.1", 10.0), ("imagereward", 2.0), ("clipscore", 0.02), ("pickscore", 0.1)]
    with pytest.raises(ValueError, match="NAME=WEIGHT, but got 'clip=much'"):
        weighted("clip=much")


@pytest.mark.parametrize("text", ["20", "steps", "steps=", "steps=f(1)", "steps=1)+(2", "**{}", "a=1;b=2"])
def test_other_settings_are_refused(text):
    with pytest.raises(ValueError, match="Expected"):
        parse_settings(text)


def test_a_method_is_built_with_its_settings_and_the_rewards():
    choice = MethodChoice.parse("reno:steps=7,mode=parity")
    method = choice.build({"red": 2.0})
    assert isinstance(method, ReNO) and (method.steps, method.mode, method.rewards) == (7, "parity", {"red": 2.0})
    assert choice.has_control and not MethodChoice.parse("best_of_n").has_control
    assert isinstance(MethodChoice.parse("best_of_n:steps=3").build("red"), BestOfN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("renoir", "Expected a method out of .*reno.*, but got 'renoir'"),
        ("reno:step=3", "Expected settings of reno out of steps, budget, .*, but got 'step'. Did you mean 'steps'"),
        ("reno:steps=0", r"Expected `steps` to be an integer in \[1, inf\)"),
        ("reno:rewards=red", "as `--reward`"),
        ("best_of_n:gradient=full", "but got 'gradient'"),
    ],
)
def test_a_method_that_cannot_be_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected):
        MethodChoice.parse(text)


def test_an_embedded_model_brings_its_call():
    assert ModelChoice.parse("turbo", {}).call == {"num_inference_steps": 1, "guidance_scale": 0.0}
    assert ModelChoice.parse("turbo", {"num_inference_steps": 2}).call["num_inference_steps"] == 2
    assert ModelChoice.parse("some/model", {"eta": 1.0}).call == {"eta": 1.0}


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("trubo", {}, "Expected a model out of turbo, guided.*, but got 'trubo'"),
        ("clip", {}, "but got 'clip'"),
        ("turbo", {"generator": None}, "without generator"),
    ],
)
def test_what_is_no_model_is_refused(name, call, expected):
    with pytest.raises(ValueError, match=expected):
        ModelChoice.parse(name, call)


def test_contenders_are_plain_sampling_and_each_method_after_its_control():
    reno, other = MethodChoice.parse("reno"), MethodChoice.parse("best_of_n:steps=2")
    contenders = plan(methods=(reno, other)).contenders
    assert contenders[:2] == (PLAIN, control_of(reno))
    assert [contender.key for contender in contenders[2:]] == ["reno", "best_of_n:steps=2"]


def test_seeds_depend_on_prompt_and_image_only():
    seeds = {plan().seed(prompt, image) for prompt in range(100) for image in range(100)}
    assert len(seeds) == 10_000
    assert plan(methods=(MethodChoice.parse("best_of_n"),)).seed(3, 1) == plan().seed(3, 1)


def test_the_world_says_the_category_where_the_source_does_not():
    assert [plan().category(index) for index in range(2)] == ["single", "pairs"]


def write_references(folder: Path, count: int = 6) -> Path:
    (folder / "below").mkdir()
    for index in range(count):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(folder / "below" / f"{index}.png")
    return folder


def test_references_are_enough_pictures_that_can_be_read(tmp_path):
    folder = write_references(tmp_path, count=5)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".noiseopt-0123456789abcdef.part.png").write_bytes(b"\x89PNG")  # still being written
    with pytest.raises(ValueError, match="Expected more than 5 images as references, but got 5 in .*Add more"):
        plan(references=str(folder), features="dinov2")
    Image.new("L", (8, 8)).save(folder / "gray.jpg")
    assert len(reference_files(plan(references=str(folder), features="dinov2").references)) == 6
    with pytest.raises(ValueError, match="Expected features beside `--references`.*but got none. Pass `--features"):
        plan(references=str(folder), features=None)
    whole = (folder / "gray.jpg").read_bytes()
    (folder / "gray.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Expected an image that Pillow can read, but .*gray.jpg is not one"):
        plan(references=str(folder), features="dinov2")


def test_references_that_are_lost_meanwhile_are_named(tmp_path):
    asked = plan(references=str(write_references(tmp_path)), features="dinov2", device="cpu")
    evaluation = Evaluation(asked, tmp_path / "output")
    (tmp_path / "below" / "0.png").write_bytes(b"")
    with pytest.raises(CannotEvaluate, match=r"below/0.png is not one or is damaged"):
        evaluation.pooled_coverage()
    (tmp_path / "below" / "0.png").unlink()
    with pytest.raises(CannotEvaluate, match="Expected more than 5 images"):
        evaluation.pooled_coverage()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": (MethodChoice.parse("reno"),) * 2}, "Expected each method once, but got 'reno' 2 times"),
        ({"methods": ()}, "Expected at least one method"),
        ({"rewards": ()}, "at least one `--reward`"),
        ({"rewards": (("clip", 0.0),)}, "weights above 0"),
        ({"watched": ("clip",)}, "Expected each reward once"),
        ({"watched": ("clipscor",)}, "Did you mean 'clipscore'"),
        ({"features": "dino"}, "Expected a feature map out of .*but got 'dino'. Did you mean"),
        ({"features": "tiny_image"}, "compared by cosine.*'tiny_image' uses the l2 distance"),
        ({"features": "clip", "more_features": ("lpips", "clip")}, "Expected each feature map once, but got 'clip' 2"),
        ({"more_features": ("sscd",)}, "Download sscd_disc_mixup.torchvision.pt from .* and pass the folder"),
        ({"more_features": ("dino",)}, "Expected a feature map out of .*but got 'dino'. Did you mean"),
        ({"references": "no such folder"}, "Expected a folder of images"),
        ({"device": "abacus"}, "Expected a device that this machine has, but got 'abacus'"),
        ({"prompts": PromptSet("none", ())}, "Expected at least one prompt"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        plan(**changes)


def test_a_prompt_outside_the_world_is_named_with_its_file_and_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na cat\n")
    with pytest.raises(ValueError, match=r"prompts\.txt:3: .*'a cat'"):
        plan(prompts=load_prompts(str(file)))
    prompts = PromptSet("prompts", (Prompt("a red circle"), Prompt("a cat")))
    with pytest.raises(ValueError, match="prompt 2 of prompts: "):
        plan(prompts=prompts)
    assert not plan(
        prompts=prompts, rewards=(("red", 1.0),), models=(ModelChoice.parse("some/model", {}),)
    ).of_shapes_world


def test_settings_tell_plans_apart():
    known = plan().settings("cpu")
    assert differences(known, plan().settings("cpu")) == []
    other = plan(seeds=3, models=(ModelChoice.parse("guided", {}),)).settings("cpu")
    assert [each for each in differences(known, other) if each.startswith("seeds")] == ["seeds was 2 and is 3"]
    assert any(each.startswith("models guided was None and is {") for each in differences(known, other))
    reordered = plan(prompts=PromptSet("two", PROMPTS.prompts[::-1])).settings("cpu")
    assert [each.partition(" was ")[0] for each in differences(known, reordered)] == ["prompts sha256"]


def test_names_of_folders_are_safe_and_distinct():
    texts = ["reno:a=[1]", "reno:a=(1)", "org/model", "reno", "../.."]
    names = [slug(text) for text in texts]
    assert len(set(names)) == len(texts) and names[3] == "reno"
    assert not any(set(name) & set('/\\:*?"<>| ') for name in names)


def test_the_embedded_towers_have_their_names_among_embedded_models_only():
    real = (ModelChoice.parse("some/model", {}),)
    assert all(map(plan().is_tower, ("dinov2", "clip")))
    assert not plan(models=real, rewards=(("red", 1.0),)).is_tower("dinov2")
    assert not any(map(plan().is_tower, ("dinov2_patch", "facebook/dinov2-base", None)))


def test_features_of_a_package_that_is_not_there_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    for asked in ({"features": "dreamsim"}, {"more_features": ("dreamsim",)}):
        with pytest.raises(ValueError, match=r"Expected the package `dreamsim`.*pip install noiseopt\[dreamsim\]"):
            plan(**asked)


def test_diversity_is_read_and_refused_before_anything_is_loaded():
    choice = MethodChoice.parse("never_too_late:diversity={'dpp': ('clip', 50.0)},steps=3")
    assert choice.diversity == {"dpp": ("clip", 50.0)} and choice.takes_rewards
    assert MethodChoice.parse("reno").diversity is None
    for text in ("diversity=dppp", "diversity={'dpp': -1.0}", "diversity={'dpp': ('dinov3', 1.0)}", "warm_up=-1"):
        with pytest.raises(ValueError, match="Expected"):
            MethodChoice.parse(f"never_too_late:{text}")


def test_on_embedded_models_diversity_is_that_of_the_embedded_towers():
    cpu = torch.device("cpu")
    built = MethodChoice.parse("never_too_late").build("red", cpu)
    other = MethodChoice.parse("never_too_late:diversity={'dpp_patch': 1.0, 'dpp': ('clip', 50.0)}")
    (_, patches, weight), (_, clip, _) = other.build("red", cpu).diversity
    assert (patches.kind, weight, clip.name) == ("patch", 1.0, "clip")
    ((reward, features, weight),) = built.diversity
    assert (reward, features.name, weight) == ("dpp", "dinov2", 150.0)
    assert features.model.config._name_or_path == shapes_world.path("dinov2")
    assert MethodChoice.parse("never_too_late").build("red", cpu).diversity[0][1] is features  # loaded once
    assert towers_of(other.diversity) == {"dinov2", "clip"}
    color = embedded_diversity({"dpp": ("color_histogram", 2.0)})
    assert color == [("dpp", "color_histogram", 2.0)]


@pytest.mark.parametrize(
    ("method", "features", "expected"),
    [
        ("never_too_late", "dinov2", True),
        ("never_too_late", "clip", True),  # the reward
        ("never_too_late:diversity=dpp_patch", "facebook/dinov2-base", True),  # of the same checkpoint
        ("never_too_late:diversity={'dpp': ('clip', 1.0)}", "dinov2", False),
        ("reno", "dinov2", False),
        ("never_too_late", None, False),
    ],
)
def test_features_whose_tower_is_optimized_are_known(method, features, expected):
    assert plan(methods=(MethodChoice.parse(method),)).optimizes(features) is expected


def test_a_callback_per_denoising_step_is_a_contender_without_rewards_or_control():
    choice = MethodChoice.parse("cads:tau2=0.8,conditions=('prompt_embeds','add_text_embeds')")
    assert not (choice.takes_rewards or choice.has_control or choice.diversity)
    callback = choice.make([3, 4])
    assert callback.tau2 == 0.8 and callback.tensor_inputs == ["prompt_embeds", "add_text_embeds"]
    assert [generator.initial_seed() for generator in callback.generator] == [3, 4]
    assert MethodChoice.parse("interval_guidance:low=1.0").make([3]).low == 1.0
    assert MethodChoice.parse("reno").drawing("the pipeline", "red", [3]) == "the pipeline"
    guided = plan(models=(ModelChoice.parse("guided", {}),), methods=(choice,))
    assert [contender.key for contender in guided.contenders] == ["plain", choice.label]
    json.dumps(guided.settings("cpu"))


def test_reward_guidance_is_a_contender_by_the_rewards_of_the_plan_with_a_control():
    choice = MethodChoice.parse("reward_guidance:strength=0.5,gradient=full,particles=2")
    assert choice.takes_rewards and choice.has_control
    guidance = choice.guidance("red")
    assert (guidance.rewards, guidance.strength, guidance.gradient, guidance.particles) == ("red", 0.5, "full", 2)
    assert isinstance(choice.build("red"), PlainSampling)
    guided = plan(models=(ModelChoice.parse("guided", {}),), methods=(choice,))
    assert [contender.control for contender in guided.contenders] == [False, True, False]
    with pytest.raises(ValueError, match="2 denoising steps for reward_guidance, .* got 1 on turbo"):
        plan(methods=(MethodChoice.parse("reward_guidance"),))


def test_a_callback_and_a_model_of_one_step_are_refused_before_anything_is_loaded():
    methods = (MethodChoice.parse("reno"), MethodChoice.parse("cads"))
    with pytest.raises(ValueError, match=r"2 denoising steps for cads, .* got 1 on turbo.*num_inference_steps=2"):
        plan(methods=methods)
    assert plan(methods=methods, models=(ModelChoice.parse("turbo", {"num_inference_steps": 2}),))
    assert plan(methods=methods, rewards=(("red", 1.0),), models=(ModelChoice.parse("some/model", {}),))


def test_tools_that_act_in_the_first_call_are_contenders_also_on_a_model_of_one_step():
    choice = MethodChoice.parse("embedding_noise:strength=2.0,protect_first=0.1")
    assert not (choice.takes_rewards or choice.has_control or choice.diversity)
    tool = choice.make([3, 4])
    assert (tool.strength, tool.protect_first) == (2.0, 0.1)
    assert [generator.initial_seed() for generator in tool.generator] == [3, 4]
    assert getattr(choice.drawing("the pipeline", "red", [3]), "args", None) == ("the pipeline",)
    sharp = MethodChoice.parse("diversity_boost:attenuation=0.0")
    assert [contender.key for contender in plan(methods=(choice, sharp)).contenders] == [
        "plain",
        choice.label,
        sharp.label,
    ]
    with pytest.raises(ValueError, match="2 denoising steps for diversity_boost, .* got 1 on turbo"):
        plan(methods=(MethodChoice.parse("diversity_boost"),))


def test_a_noise_sampler_is_a_setting_of_a_method_and_of_the_call():
    pink = MethodChoice.parse("reno:steps=3,noise_sampler={'name': 'pink', 'alpha': 0.3}")
    assert pink.build("red") == ReNO(rewards="red", steps=3)
    assert MethodChoice.parse("cads:noise_sampler=pink").make([3]).tau2 == 0.9
    assert ModelChoice.parse("turbo", {"noise_sampler": "pink"}).arguments == ModelChoice.parse("turbo", {}).call
    for text in ("reno:noise_sampler=pinc", "reno:noise_sampler={'name': 'pink', 'beta': 1}", "cads:noise_sampler=3"):
        with pytest.raises(ValueError, match="Expected a noise sampler in "):
            MethodChoice.parse(text)
    with pytest.raises(ValueError, match="Expected a noise sampler in '--call'.*Did you mean 'pink'"):
        ModelChoice.parse("turbo", {"noise_sampler": "pinc"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cads:tau=0.5", "Expected settings of cads out of tau1, tau2, .*, but got 'tau'"),
        ("cads:generator=1", "out of tau1, tau2"),
        ("cads:tau1=0.95", "Expected 0 <= tau1 < tau2"),
        ("cads:tau1=high", "Expected settings that cads takes"),
        ("embedding_noise:strength=-1", "Expected `strength` to be a number"),
        ("embedding_noise:generator=1", "out of strength, density, steps, protect_first, protect_last"),
        ("diversity_boost:clamp=0", "Expected `clamp` to be a number"),
        ("reward_guidance:steps=3", "Expected settings of reward_guidance out of strength, .*, but got 'steps'"),
        ("reward_guidance:strength=-1", "Expected `strength` to be a number"),
        ("reward_guidance:rewards=red", "Expected no rewards in"),
        ("reward_guidence", "Did you mean 'reward_guidance'"),
    ],
)
def test_settings_that_a_callback_does_not_take_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        MethodChoice.parse(text)


def test_noise_samplers_are_a_dimension_beside_plain_sampling_and_methods_as_they_are():
    asked = with_noise_samplers(["cno", "best_of_n:steps=2", "reno:noise_sampler=blue"], ["white", "pink"])
    labels = ["plain:noise_sampler=pink", "cno", "cno:noise_sampler=pink", "best_of_n:steps=2"]
    labels += ["best_of_n:steps=2,noise_sampler=pink", "reno:noise_sampler=blue"]
    assert [choice.label for choice in asked] == labels
    assert asked == tuple(map(MethodChoice.parse, labels))
    assert [choice.label for choice in with_noise_samplers(["reno"], ["white"])] == ["reno"]
    (plain, reno) = with_noise_samplers(["reno:steps=3"], ["pink:alpha=0.3"])
    assert plain.label == "plain:noise_sampler={'name': 'pink', 'alpha': 0.3}"
    assert reno.settings == {"steps": 3, "noise_sampler": {"name": "pink", "alpha": 0.3}}


def test_plain_sampling_from_another_distribution_is_a_contender_without_rewards_or_control():
    choice = MethodChoice.parse("plain:noise_sampler=pink")
    assert not (choice.takes_rewards or choice.has_control or choice.diversity or choice.features)
    assert (
        isinstance(choice.build("red"), PlainSampling) and choice.drawing("the pipeline", "red", [3]) == "the pipeline"
    )
    contenders = plan(methods=(choice,)).contenders  # of a model of one step
    assert contenders[0] == PLAIN and [each.key for each in contenders[1:]] == ["plain:noise_sampler=pink"]
    for text, expected in (("plain", "which is compared anyway"), ("plain:steps=2", "settings of plain out of noise_")):
        with pytest.raises(ValueError, match=expected):
            MethodChoice.parse(text)


@pytest.mark.parametrize("text", ["pinc", "pink:beta=1", "pink:alpha=x", "white:alpha=1", "band_limited:low=2,high=1"])
def test_a_noise_sampler_that_there_is_not_is_refused(text):
    with pytest.raises(ValueError, match="Expected a noise sampler in '--noise-sampler': Expected"):
        with_noise_samplers(["reno"], [text])


def test_the_first_features_that_are_compared_by_cosine_are_the_embedding():
    assert split_features(["dinov2"]) == ("dinov2", ())
    assert split_features(["lpips", "org/model", "clip"]) == ("org/model", ("lpips", "clip"))
    assert split_features(["lpips", "tiny_image"]) == (None, ("lpips", "tiny_image"))
    assert split_features(["none"]) == (None, ())
    with pytest.raises(ValueError, match="`--features none` alone, but got none, clip"):
        split_features(["none", "clip"])
    with pytest.raises(ValueError, match="Did you mean 'clip'"):
        split_features(["clipp"])


def test_folders_of_plans_with_one_embedding_keep_their_settings():
    settings = plan(features="dinov2").settings("cpu")
    assert settings["features"] == "dinov2" and "more features" not in settings
    more = plan(features="dinov2", more_features=("clip",)).settings("cpu")
    assert differences(settings, more) == ["more features was None and is ['clip']"]


def test_a_goal_in_place_of_a_method_is_told_where_it_belongs():
    with pytest.raises(
        ValueError, match="but got 'diverse'. It is a goal of `optimize_noise`: `noiseopt presets --goal"
    ):
        MethodChoice.parse("diverse")
