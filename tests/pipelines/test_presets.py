"""Presets: which one is picked, that a goal runs what it says, and what is said about it."""

import json
import logging
import statistics
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from problems import generator
from tiny_families import tiny_family
from tiny_pipelines import BUILDERS, SIZE, quiet, tiny_pipeline

import noiseopt
from noiseopt import BestOfN, ReNOStableDiffusionPipeline, find_preset, list_presets, optimize_noise, shapes_world
from noiseopt.pipelines import presets
from noiseopt.pipelines.preset_table import EmbeddedReward, letters
from noiseopt.pipelines.presets import GOALS, loadable
from noiseopt.pipelines.registry import as_method
from noiseopt.pipelines.sampling.first_call import stock_call
from noiseopt.pipelines.sampling.latent_space import drawing_function
from noiseopt.recipes import RECIPES
from noiseopt.schedulers.noise_samplers import as_noise_sampler

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
PROMPT = "two green circles"


@pytest.fixture(autouse=True)
def unsaid():
    """Forget what was said before."""
    presets.say_once.cache_clear()


@pytest.fixture(scope="module")
def turbo():
    pipe = shapes_world.load("turbo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def named(family: str, checkpoint: str, denoiser: str | None = None, **config):
    """Return a tiny pipeline that says that it was loaded from a checkpoint."""
    pipe = quiet(BUILDERS[family]())
    pipe.register_to_config(_name_or_path=checkpoint, **config)
    if denoiser is not None:
        (pipe.unet if family in ("sd", "sdxl") else pipe.transformer).register_to_config(_name_or_path=denoiser)
    return pipe


# the class that diffusers has, the name of a checkpoint, and the model, diverse, faithful and best of its presets
CHECKPOINTS = """
StableDiffusionPipeline stabilityai/sd-turbo | SD-Turbo | never_too_late reno best_of_n
StableDiffusionPipeline stable-diffusion-v1-5/stable-diffusion-v1-5 | Stable Diffusion 1.5 | cno noise_diffusion best_of_n
StableDiffusionPipeline stabilityai/stable-diffusion-2-1 | Stable Diffusion 2.1 | cno noise_diffusion best_of_n
StableDiffusionXLPipeline stabilityai/sdxl-turbo | SDXL-Turbo | never_too_late reno best_of_n
StableDiffusionXLPipeline /models/SDXL_Turbo | SDXL-Turbo | never_too_late reno best_of_n
StableDiffusionXLPipeline stabilityai/stable-diffusion-xl-base-1.0 | SDXL | cno best_of_n best_of_n
StableDiffusion3Pipeline stabilityai/stable-diffusion-3-medium-diffusers | Stable Diffusion 3 | cno best_of_n best_of_n
StableDiffusion3Pipeline stabilityai/stable-diffusion-3.5-medium | Stable Diffusion 3.5 | cno best_of_n best_of_n
StableDiffusion3Pipeline stabilityai/stable-diffusion-3.5-large-turbo | Stable Diffusion 3.5 Large Turbo | group_selection best_of_n best_of_n
FluxPipeline black-forest-labs/FLUX.1-schnell | FLUX.1 [schnell] | never_too_late best_of_n best_of_n
FluxPipeline black-forest-labs/FLUX.1-dev | FLUX.1 [dev] | cno best_of_n best_of_n
Flux2Pipeline black-forest-labs/FLUX.2-dev | FLUX.2 [dev] | cno best_of_n best_of_n
Flux2KleinPipeline black-forest-labs/FLUX.2-klein-4B | FLUX.2 [klein] | group_selection best_of_n best_of_n
Flux2KleinKVPipeline black-forest-labs/FLUX.2-klein-9b-kv | FLUX.2 [klein] | group_selection best_of_n best_of_n
Flux2KleinPipeline black-forest-labs/FLUX.2-klein-base-4B | FLUX.2 [klein] base | cno best_of_n best_of_n
Flux2KleinPipeline epfl-vita/flux2-klein-1step-rdm | FLUX.2 [klein] of one step (RDM) | never_too_late reno best_of_n
ZImagePipeline Tongyi-MAI/Z-Image-Turbo | Z-Image-Turbo | cno best_of_n best_of_n
ZImagePipeline Tongyi-MAI/Z-Image | Z-Image | cno best_of_n best_of_n
QwenImagePipeline Qwen/Qwen-Image | Qwen-Image | cno best_of_n best_of_n
QwenImagePipeline lightx2v/Qwen-Image-2512-Lightning | Qwen-Image-Lightning | cno best_of_n best_of_n
Krea2Pipeline krea/Krea-2-Turbo | Krea 2 Turbo | cno best_of_n best_of_n
SanaSprintPipeline Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers | Sana-Sprint | group_selection best_of_n best_of_n
SanaPipeline Efficient-Large-Model/Sana_1600M_1024px_diffusers | Sana | cno best_of_n best_of_n
PixArtAlphaPipeline PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512 | PixArt-α DMD | never_too_late reno best_of_n
PixArtAlphaPipeline PixArt-alpha/PixArt-XL-2-1024-MS | PixArt-α | cno best_of_n best_of_n
PixArtSigmaPipeline PixArt-alpha/PixArt-Sigma-XL-2-1024-MS | PixArt-Σ | cno best_of_n best_of_n
HiDreamImagePipeline HiDream-ai/HiDream-I1-Fast | HiDream-I1 Fast | cno best_of_n best_of_n
HunyuanImagePipeline hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers | HunyuanImage 2.1 Distilled | cno best_of_n best_of_n
HunyuanImagePipeline hunyuanvideo-community/HunyuanImage-2.1-Diffusers | HunyuanImage 2.1 | cno best_of_n best_of_n
PRXPipeline Photoroom/prx-512-t2i-sft-distilled | PRX distilled | cno best_of_n best_of_n
ChromaPipeline lodestones/Chroma1-HD | Chroma | cno best_of_n best_of_n
Lumina2Pipeline Alpha-VLLM/Lumina-Image-2.0 | Lumina 2 | cno best_of_n best_of_n
"""  # noqa: E501


def empty(cls: str, checkpoint: str):
    """Return a pipeline without parts that says that it was loaded from a checkpoint."""
    pipe = object.__new__(getattr(diffusers, cls))
    vars(pipe)["_internal_dict"] = FrozenDict(_name_or_path=checkpoint)
    return pipe


@pytest.mark.parametrize("line", CHECKPOINTS.strip().splitlines())
def test_the_name_of_a_checkpoint_tells_the_model(line):
    pipe, model, methods = line.split(" | ")
    cls, checkpoint = pipe.split()
    cached = f"/home/me/.cache/huggingface/hub/models--{checkpoint.replace('/', '--')}/snapshots/{'0' * 40}"
    for source in (checkpoint, *([] if checkpoint.startswith("/") else [cached, f"/data/{checkpoint}"])):
        found = [find_preset(empty(cls, source), goal) for goal in ("diverse", "faithful", "best")]
        assert [preset.model.title for preset in found] == [model] * 3, source
        assert [preset.method for preset in found] == methods.split()


def test_a_denoiser_of_another_checkpoint_tells_it_before_the_pipeline():
    lightning = named("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "ByteDance/SDXL-Lightning")
    assert find_preset(lightning, "diverse").model.title.startswith("SDXL of few steps")
    assert find_preset(named("sdxl", "/x/mine", "/x/sdxl-turbo/unet"), "best").model.title == "SDXL-Turbo"


@pytest.mark.parametrize(
    ("family", "call", "model"),
    [
        ("sd", {}, "Stable Diffusion 1.5"),
        ("sd", {"num_inference_steps": 1}, "SD-Turbo"),
        ("sd", {"num_inference_steps": 4}, "any model of 2 to 16 steps"),
        ("sdxl", {}, "SDXL"),
        ("sdxl", {"num_inference_steps": 1}, "SDXL-Turbo"),
        ("sdxl", {"timesteps": [999, 500]}, "SDXL of few steps (Lightning, Hyper-SD, LCM)"),
        ("sd3", {"num_inference_steps": 4}, "Stable Diffusion 3.5 Large Turbo"),
        ("flux", {"num_inference_steps": 28}, "FLUX.1 [schnell]"),  # by its configuration
    ],
)
def test_a_folder_of_another_name_is_told_by_class_configuration_and_steps(family, call, model):
    found = find_preset(named(family, "/models/mine"), "best", **call).model.title
    assert found == model


def test_hints_of_the_configuration_tell_a_distilled_model():
    pipe = tiny_family("flux2_klein")
    assert not pipe.config.is_distilled
    assert find_preset(pipe, "best").model.title == "FLUX.2 [klein] base"
    base = dict(pipe.config)
    try:
        pipe.register_to_config(is_distilled=True)
        assert find_preset(pipe, "best").model.title == "FLUX.2 [klein]"
    finally:
        pipe.register_to_config(**base)


def test_our_classes_have_the_presets_of_their_stock_class():
    stock = named("sd", "stabilityai/sd-turbo")
    ours = ReNOStableDiffusionPipeline(**stock.components)
    ours.register_to_config(_name_or_path="stabilityai/sd-turbo")
    assert find_preset(ours, "diverse") == find_preset(stock, "diverse")


def test_a_class_without_presets_has_those_of_its_number_of_steps():
    pipe = tiny_family("lcm")
    assert not {preset.model.title for preset in list_presets() if type(pipe).__name__ in preset.model.pipelines}
    titles = [find_preset(pipe, "diverse", num_inference_steps=steps).model.title for steps in (1, 16, 17)]
    assert titles == ["any model of one step", "any model of 2 to 16 steps", "any model of more steps"]
    assert find_preset(pipe, "diverse", num_inference_steps=1).method == "group_selection"


@pytest.mark.parametrize("name", ["turbo", "guided", "sdxl", "sdxl-turbo", "sd3"])
def test_embedded_models_have_presets_with_the_embedded_rewards(name):
    family = {"turbo": "sd", "guided": "sd", "sd3": "sd3"}.get(name, "sdxl")
    own = shapes_world.path("turbo").replace("turbo", name)
    for checkpoint in (own, f"noiseopt/shapes-{name}", f"./shapes-{name}"):
        found = find_preset(named(family, checkpoint), "best")
        assert found.model.title == f"shapes-{name}"
        assert dict(found.call) == shapes_world.MODELS[name].call
    rewards = {source: find_preset(named(family, source), "best").settings["rewards"] for source in (own, checkpoint)}
    assert rewards == {own: shapes_world.path("clip"), checkpoint: "noiseopt/shapes-clip"}
    hub = find_preset(named(family, f"me/shapes-{name}"), "best").settings["rewards"]
    assert hub == "me/shapes-clip"


def test_embedded_settings_are_those_of_the_demo():
    sets = next(preset for preset in list_presets() if (preset.model.title, preset.goal) == ("shapes-turbo", "diverse"))
    own = {name: value for name, value in sets.settings.items() if name not in ("rewards", "guard")}
    recipe = dict(RECIPES["never_too_late"].settings)
    assert list(sets.settings["guard"].values()) == list(recipe.pop("guard").values())
    assert own == recipe and sets.settings["rewards"] == EmbeddedReward("clip")
    cno = next(preset for preset in list_presets() if (preset.model.title, preset.goal) == ("shapes-guided", "diverse"))
    assert dict(cno.settings) == {"steps": 3, **RECIPES["cno"].settings}


@pytest.mark.parametrize("preset", list_presets(), ids=lambda preset: f"{preset.model.title} {preset.goal}")
def test_presets_build_and_name_what_exists(preset):
    settings = loadable(preset.settings, shapes_world.path("turbo"))
    assert as_method(preset.method, settings)  # checks the settings
    as_noise_sampler(preset.noise_sampler)
    assert preset.reason and not preset.reason.endswith(".") and not (preset.measured and preset.published)
    assert preset.measured or preset.evidence.startswith("not measured on this model")
    for name in preset.model.pipelines:
        cls = getattr(diffusers, name)
        assert drawing_function(cls) and "latents" in stock_call(cls).__annotations__  # not refused by name
        taken = stock_call(cls).__code__.co_varnames
        assert name == "Flux2KleinKVPipeline" or preset.call.keys() <= set(taken), name
    assert all(each == letters(each) for each in preset.model.checkpoints)


def test_every_model_has_each_goal_once():
    models = [preset.model for preset in list_presets()]
    assert sorted((preset.model.title, preset.goal) for preset in list_presets()) == sorted(
        (title, goal) for title in {model.title for model in models} for goal in GOALS
    )
    measured = {preset.model.title for preset in list_presets() if preset.measured}
    assert measured == {"shapes-turbo", "shapes-guided"}


def test_what_was_measured_is_in_the_results_of_the_benchmarks():
    """Best-of-N after the evaluations of the preset, by the file behind the table of the README."""
    preset = next(each for each in list_presets() if (each.model.title, each.goal) == ("shapes-turbo", "best"))
    path = Path(__file__).parents[2] / "benchmarks/results/per_second_turbo_held-out.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["rows"]["best-of-N"]

    def after(evaluations: int) -> tuple[float, float]:
        """Return the share of right images and the mean reward of the best of so many seeds."""
        rows = [problem for part in parts for problem in part["problems"]]
        best = [[seed for seed in problem if seed[0] < evaluations][-1] for problem in rows]
        return statistics.mean(each[2] for each in best), statistics.mean(each[1] for each in best)

    (plain, reward), (right, risen) = after(1), after(preset.settings["steps"])
    said = f"{right:.0%} of images right instead of {plain:.0%}, reward {risen:.1f} instead of {reward:.1f}"
    assert said in preset.measured


def test_a_goal_runs_what_its_preset_says(turbo, caplog):
    preset = find_preset(turbo, "best", **ONE_STEP)
    settings = {**preset.settings, "steps": 3}
    call = {"generator": generator(), **ONE_STEP}
    result = optimize_noise(turbo, PROMPT, "best", method_kwargs={"steps": 3}, **call)
    call["generator"] = generator()
    explicit = optimize_noise(turbo, PROMPT, BestOfN(**settings), **call)
    assert torch.equal(result.noise, explicit.noise) and torch.equal(result.losses, explicit.losses)
    assert result.provenance["call"] == explicit.provenance["call"]
    assert result.provenance["settings"]["steps"] == 3 and "preset" not in explicit.reports
    assert result.reports["preset"] == {
        "goal": "best",
        "model": "shapes-turbo",
        "method": "best_of_n:rewards='shapes_world/weights/clip',steps=3",
        "changed": ["steps"],
        "reason": preset.reason,
        "evidence": f"not with these settings; without them: {preset.measured}",
    }
    (said,) = caplog.messages
    assert said.startswith('"best" on StableDiffusionPipeline: the preset of shapes-turbo, best_of_n:rewards=')
    assert preset.reason in said and preset.measured in said and said.endswith("are without your steps.")
    assert caplog.records[0].levelno == logging.WARNING and caplog.records[0].name == "noiseopt"
    optimize_noise(turbo, PROMPT, "best", method_kwargs={"steps": 3}, **ONE_STEP)
    assert len(caplog.messages) == 1  # said once


def test_a_class_of_ours_takes_a_goal(turbo):
    ours = ReNOStableDiffusionPipeline(**turbo.components)
    ours.register_to_config(_name_or_path=shapes_world.path("turbo"))
    ours.set_progress_bar_config(disable=True)
    small, sets = {"steps": 4, "search": 2}, {"num_images_per_prompt": 2, **ONE_STEP}
    output = ours(PROMPT, method="diverse", method_kwargs=small, generator=generator(), output_type="pt", **sets)
    result = optimize_noise(turbo, PROMPT, "diverse", method_kwargs=small, generator=generator(), **sets)
    assert torch.equal(output.noise_result.noise, result.noise)
    assert output.noise_result.reports["preset"] == result.reports["preset"]
    with pytest.raises(ValueError, match='at least 2 images of each prompt for "diverse"'):
        ours(PROMPT, method="diverse", **ONE_STEP)


def test_other_rewards_and_noises_replace_those_of_the_preset(caplog):
    def redness(images, prompts):
        return images[:, 0].mean((1, 2))

    pipe = named("sdxl", "stabilityai/sdxl-turbo")
    own = {"rewards": {redness: 1.0}, "diversity": {"pairwise": ("tiny_image", 1.0)}, "steps": 2}
    call = {"num_images_per_prompt": 2, **ONE_STEP, **SIZE}
    result = optimize_noise(pipe, "a", "diverse", method_kwargs=own, **call)
    assert list(result.scores) == ["redness", "pairwise"]
    assert result.provenance["noise_sampler"]["name"] == "pink"
    assert (
        "noise_sampler='pink'" in caplog.messages[0] and "not measured on this model; published" in caplog.messages[0]
    )
    white = optimize_noise(pipe, "a", "diverse", method_kwargs=own, noise_sampler="white", **call)
    assert (white.provenance["noise_sampler"] or {}).get("name") != "pink"
    assert white.reports["preset"]["changed"] == [*own, "noise_sampler"]
    given = optimize_noise(pipe, "a", "diverse", method_kwargs=own, latents=white.latents, **call)
    assert torch.equal(given.initial_noise, white.noise)  # latents take the place of a noise sampler


def test_a_call_that_lacks_what_a_preset_is_made_for_is_told_and_left_alone(caplog):
    pipe = named("sd", "stabilityai/sd-turbo")
    own = {"rewards": lambda images, prompts: images.mean((1, 2, 3)), "steps": 1}
    result = optimize_noise(pipe, "a", "best", method_kwargs=own, num_inference_steps=2, **SIZE)
    assert "made for calls with `num_inference_steps=1, guidance_scale=0.0`, which this call does not" in caplog.text
    assert result.provenance["arguments"]["num_inference_steps"] == 2
    caplog.clear()
    optimize_noise(pipe, "a", "best", method_kwargs=own, **ONE_STEP, **SIZE)
    assert "made for" not in caplog.text


def test_a_model_without_a_preset_is_told_so(caplog):
    pipe = named("sd", "me/mine")
    own = {"rewards": lambda images, prompts: images.mean((1, 2, 3)), "steps": 1}
    optimize_noise(pipe, "a", "best", method_kwargs=own, num_inference_steps=2, **SIZE)
    assert "no preset for this model; that of any model of 2 to 16 steps, best_of_n" in caplog.text
    assert "Evidence: not measured on this model." in caplog.text


@pytest.mark.parametrize(
    ("prompt", "call"),
    [
        ("a", {}),
        ("a", {"num_images_per_prompt": 1}),
        (["a", "b"], {}),
        (["a", "a", "b"], {}),
        (["a", "a"], {"folder": "x"}),
    ],
)
def test_single_images_cannot_differ(turbo, tmp_path, prompt, call):
    call = {name: tmp_path if name == "folder" else value for name, value in call.items()}
    message = r"at least 2 images of each prompt for \"diverse\", but got 1 of '[ab]'.*num_images_per_prompt=4"
    with pytest.raises(ValueError, match=message):
        optimize_noise(turbo, prompt, "diverse", **call, **ONE_STEP)


def test_a_folder_of_sets_says_its_preset_once(turbo, tmp_path, caplog):
    own, call = {"steps": 4, "search": 2}, {"num_images_per_prompt": 2, "generator": 0, **ONE_STEP}
    results = optimize_noise(turbo, [PROMPT, "a red star"], "diverse", method_kwargs=own, folder=tmp_path, **call)
    assert [result.reports["preset"]["goal"] for result in results] == ["diverse"] * 2
    assert len(caplog.messages) == 1
    again = optimize_noise(turbo, [PROMPT, "a red star"], "diverse", method_kwargs=own, folder=tmp_path, **call)
    assert all(torch.equal(*(each.noise for each in pair)) for pair in zip(results, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "divers"}, ValueError, r"out of \['best_of_n'.*or a goal out of \['diverse', 'faith.*'diverse'\?"),
        ({"method": "best", "method_kwargs": {"stps": 3}}, TypeError, "settings of BestOfN .* 'stps'.*'steps'"),
        ({"method": "best", "method_kwargs": {"steps": 0}}, ValueError, "steps"),
        ({"method": "best", "method_kwargs": [3]}, TypeError, "`method_kwargs` to be a dict"),
        ({"method": "best", "steps": 3}, TypeError, r"It is a setting of BestOfN: .*method_kwargs"),
        ({"method": "best", "noise_sampler": "green"}, ValueError, "noise sampler"),
        ({"method": "best", "num_inference_steps": 0}, ValueError, "num_inference_steps"),
    ],
)
def test_mistakes_are_named_before_any_model_runs(turbo, monkeypatch, arguments, error, message):
    monkeypatch.setattr(turbo.text_encoder, "forward", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        optimize_noise(turbo, PROMPT, **arguments)


def test_unknown_goals_and_other_things_than_pipelines_are_refused(turbo):
    with pytest.raises(ValueError, match=r"a goal out of \['diverse', 'faithful', 'best'\], but got 'fast'"):
        find_preset(turbo, "fast")
    with pytest.raises(TypeError, match="a loaded diffusers pipeline"):
        find_preset("stabilityai/sd-turbo", "best")
    assert not set(GOALS) & set(noiseopt.list_methods())


def test_arguments_that_the_call_does_not_take_are_refused_when_a_preset_is_looked_for():
    pipe = tiny_pipeline("sd")
    with pytest.raises(TypeError, match="but got 'num_infrence_steps'. Did you mean 'num_inference_steps'"):
        find_preset(pipe, "best", num_infrence_steps=1)
    with pytest.raises(ValueError, match="Expected `num_inference_steps` to be an integer from 1"):
        find_preset(pipe, "best", num_inference_steps="x")


def test_the_report_has_the_settings_of_the_noise_sampler_and_says_what_its_evidence_is_of():
    pipe = shapes_world.load("turbo")
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "noise_sampler": {"name": "pink", "alpha": 0.1}}
    found = optimize_noise(pipe, "a red square", "best", method_kwargs={"steps": 2}, **call)
    report = found.reports["preset"]
    assert "noise_sampler={'name': 'pink', 'alpha': 0.1" in report["method"]
    assert report["changed"] == ["steps", "noise_sampler"]
    assert report["evidence"].startswith("not with these settings; without them: on 32 held-out prompts")
