"""Modular pipelines in `optimize_noise` and the other entry points, beyond the cells of the conformance suite."""

import diffusers
import pytest
import torch
from accelerate.hooks import add_hook_to_module
from conformance.checks import ModularCall, modular_call, on_white, state_of
from conformance.matrix import MODULAR
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.components_manager import CustomOffloadHook
from problems import generator, redness
from tiers import slow_except
from tiny_modular import build_modular, modular_arguments, tiny_modular
from tiny_pipelines import SIZE

from noiseopt import CNO, BestOfN, NoiseResult, ReNO, RewardGuidance, Vary, find_preset, grow_set, optimize_noise
from noiseopt.pipelines import DiversityBoost, EmbeddingNoise
from noiseopt.pipelines.modular import as_standard

FAMILIES = ("sdxl", "flux", "flux3_distilled", "qwen_image21_turbo", "krea2", "anima", "ernie_image")
SEVERAL = ("sdxl", "sd3", "flux", "z_image", "krea2", "anima", "ernie_image")  # take several prompts
RENO = ReNO(rewards=redness, steps=2, views=0)
families = pytest.mark.parametrize("family", slow_except(FAMILIES, "sdxl", "krea2"))


class Stopped(Exception):
    """Ends a run."""


def draw(family: str, prompt="a b", **changes) -> torch.Tensor:
    """Return the images of a plain call."""
    given = {**modular_arguments(family), "generator": generator(), "output_type": "pt", **changes}
    return on_white(tiny_modular(family)(prompt=prompt, output="images", **given))


def find(family: str, method=RENO, prompt="a b", **changes) -> NoiseResult:
    return optimize_noise(
        tiny_modular(family), prompt, method, **{**modular_arguments(family), "generator": generator(), **changes}
    )


@families
def test_blocks_before_the_latents_run_once(family):
    calls = []
    handle = tiny_modular(family).text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        draw(family)
        plain = len(calls)
        find(family)
    finally:
        handle.remove()
    assert len(calls) == 2 * plain > 0


@pytest.mark.parametrize("family", slow_except(SEVERAL, "sdxl", "ernie_image"))
def test_several_images_of_several_prompts_are_those_of_the_plain_call(family):
    call = {"num_images_per_prompt": 2}
    result = find(family, prompt=["a b", "a"], **call)
    assert result.provenance["prompts"] == ["a b", "a b", "a", "a"]
    assert torch.equal(result.initial_images, draw(family, ["a b", "a"], **call))
    again = draw(family, ["a b", "a"], latents=result.latents, generator=result.generator(), **call)
    assert torch.equal(again, result.images)


@families
def test_chunks_give_the_noise_of_the_whole_batch(family):
    whole, chunks = (
        find(family, ReNO(rewards=redness, steps=2, views=0, chunk_size=size), num_images_per_prompt=3)
        for size in (None, 2)
    )
    torch.testing.assert_close(chunks.noise, whole.noise, rtol=0, atol=1e-4)
    assert not torch.equal(whole.noise, whole.initial_noise)


@families
@pytest.mark.parametrize("policy", ["blocks", "steps"])
def test_checkpointing_gives_the_same_noise(family, policy):
    plain, checkpointed = (
        find(family, ReNO(rewards=redness, steps=2, views=0, checkpointing=each)) for each in ("none", policy)
    )
    torch.testing.assert_close(checkpointed.noise, plain.noise, rtol=0, atol=1e-5)


def test_a_set_is_contrasted_for_each_prompt_alone():
    def losses(prompt, count: int) -> torch.Tensor:
        streams = [torch.Generator().manual_seed(each) for each in range(count)]
        method = CNO(steps=2, window_size=4)
        return find("sd3", method, prompt=prompt, generator=streams, num_images_per_prompt=2).losses

    joint, alone = losses(["a b", "a"], 4), losses("a b", 2)
    torch.testing.assert_close(joint[:, :2], alone, rtol=1e-3, atol=1e-4)


@families
def test_an_exception_leaves_the_pipeline_as_it_was_and_carries_the_best(family):
    def stop(state):
        if state.step == 1:
            raise Stopped

    call = modular_call(family, 1)
    plain, before = call.plain, state_of(call.pipe)
    with pytest.raises(Stopped) as error:
        call.optimize(RENO, callbacks=stop)
    assert torch.equal(vars(error.value)["noise_result"].initial_images, plain)
    assert state_of(call.pipe) == before
    assert torch.equal(call.sample(), plain)


def test_an_exception_of_a_model_leaves_the_pipeline_as_it_was():
    pipe = build_modular("sdxl")
    call = ModularCall(pipe, modular_arguments("sdxl"))
    plain, before, calls = call.plain, state_of(pipe), []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1) or stop_at(calls, 5))
    with pytest.raises(Stopped):
        call.optimize(RENO)
    handle.remove()
    assert state_of(pipe) == before
    assert torch.equal(call.sample(), plain)


def stop_at(calls: list[int], count: int) -> None:
    if len(calls) == count:
        raise Stopped


def test_callbacks_may_draw_with_the_pipeline():
    images = []
    find("sdxl", callbacks=lambda state: images.append(draw("sdxl")))
    assert len(images) == 2
    assert all(torch.equal(each, draw("sdxl")) for each in images)


@families
def test_noise_samplers_and_given_latents_choose_the_first_noise(family):
    pink, white = find(family, noise_sampler="pink"), find(family)
    assert not torch.equal(pink.initial_noise, white.initial_noise)
    varied = find(family, BestOfN(rewards=redness, steps=2), noise_sampler=Vary(seed=1), num_images_per_prompt=2)
    assert varied.losses.shape == (2, 2)
    given = find(family, latents=pink.latents, generator=pink.generator())
    assert torch.equal(given.initial_images, pink.images)


def test_generators_may_be_a_list_or_none():
    streams = lambda: [torch.Generator().manual_seed(each) for each in (1, 2)]  # noqa: E731
    result = find("sdxl", generator=streams(), num_images_per_prompt=2)
    assert torch.equal(result.initial_images, draw("sdxl", generator=streams(), num_images_per_prompt=2))
    result = find("sdxl", generator=None)
    assert torch.equal(draw("sdxl", latents=result.latents, generator=result.generator()), result.images)


@families
def test_a_result_is_saved_and_an_interrupted_run_goes_on(family, tmp_path):
    def stop(state):
        if state.step == 2:
            raise Stopped

    method, file = ReNO(rewards=redness, steps=4, views=0), tmp_path / "noise.safetensors"
    whole = find(family, method)
    with pytest.raises(Stopped):
        find(family, method, callbacks=stop, save_noise_to=file)
    resumed = find(family, method, save_noise_to=file, resume_from=file)
    assert torch.equal(resumed.noise, whole.noise)
    loaded = NoiseResult.load(file)
    assert torch.equal(draw(family, latents=loaded.latents, generator=loaded.generator()), whole.images)
    assert loaded.provenance["pipeline"] == type(tiny_modular(family)).__name__
    assert loaded.provenance["arguments"]["height"] == SIZE["height"]
    assert loaded.provenance["weights"].keys() >= {"vae", "text_encoder"}


def test_another_call_is_told_apart_from_the_interrupted_one(tmp_path):
    file = tmp_path / "noise.safetensors"
    find("sdxl", save_noise_to=file)
    with pytest.raises(ValueError, match="num_inference_steps"):
        find("sdxl", resume_from=file, num_inference_steps=3)


def test_the_prompts_of_the_user_stay_as_they_are():
    prompts = ["a b", "a"]
    find("z_image", prompt=prompts)
    assert prompts == ["a b", "a"]


def test_a_folder_has_a_result_for_each_prompt(tmp_path):
    results = find("sdxl", prompt=["a b", "a"], folder=tmp_path, generator=generator(3))
    assert [each.provenance["prompts"] for each in results] == [["a b"], ["a"]]  # pyright: ignore[reportGeneralTypeIssues]
    alone = find("sdxl", generator=generator(3))
    assert torch.equal(results[0].noise, alone.noise)  # pyright: ignore[reportIndexIssue]


def test_images_with_opacity_are_judged_on_white():
    pipe = tiny_modular("qwen_image21")
    images = pipe(
        prompt="a b", output="images", output_type="pt", generator=generator(), **modular_arguments("qwen_image21")
    )
    assert images.shape[1] == 4
    result = find("qwen_image21")
    expected = images[:, :3] * images[:, 3:] + (1 - images[:, 3:])
    assert torch.equal(result.initial_images, expected)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_workflow_from_an_image_optimizes_the_noise_on_it(family):
    image = torch.rand(1, 3, *SIZE.values(), generator=generator(4))
    call = {"image": image, "strength": 0.5, "num_inference_steps": 4}
    result = find(family, **call)
    assert torch.equal(result.initial_images, draw(family, **call))
    assert torch.equal(draw(family, latents=result.latents, generator=result.generator(), **call), result.images)


@pytest.mark.parametrize("gradient", ["frozen", "full"])
@pytest.mark.parametrize("family", slow_except(FAMILIES, "sdxl"))
def test_reward_guidance_raises_the_reward_and_is_the_plain_call_at_strength_zero(family, gradient):
    pipe, call = tiny_modular(family), {**modular_arguments(family), "output_type": "pt"}
    call |= {"sigmas": [1.0, 0.75, 0.5, 0.25]} if "sigmas" in call else {"num_inference_steps": 4}
    plain = on_white(pipe(prompt="a b", output="images", generator=generator(), **call))
    before = state_of(pipe)
    off, on = (
        on_white(
            RewardGuidance(rewards=redness, gradient=gradient, strength=strength).generate(
                pipe, "a b", generator=generator(), **call
            )[0]
        )
        for strength in (0.0, 0.1)
    )
    assert torch.equal(off, plain)
    assert (redness(on, None) > redness(plain, None)).all()
    assert state_of(pipe) == before
    assert torch.equal(on_white(pipe(prompt="a b", output="images", generator=generator(), **call)), plain)


@pytest.mark.parametrize("family", slow_except(MODULAR, "sdxl", "flux3"))
def test_diversity_boost_changes_the_images_reproducibly(family):
    pipe, call = tiny_modular(family), {**modular_arguments(family), "num_images_per_prompt": 2, "output_type": "pt"}
    plain = draw(family, num_images_per_prompt=2)
    boosts = [
        on_white(DiversityBoost(generator=generator(1)).generate(pipe, "a b", generator=generator(), **call)[0])
        for _ in range(2)
    ]
    assert torch.equal(*boosts)
    assert not torch.allclose(boosts[0], plain, atol=0.01)
    assert torch.equal(draw(family, num_images_per_prompt=2), plain)


def test_a_set_grows_and_presets_go_by_the_family():
    settings = {"diversity": {"dpp": ("tiny_image", 15.0)}, "steps": 2}
    found = grow_set(tiny_modular("sdxl"), "a b", 2, method_kwargs=settings, generator=0, **modular_arguments("sdxl"))
    assert len(found.pictures) == 2
    assert find_preset(tiny_modular("krea2"), "best", num_inference_steps=8).model.title == "Krea 2 Turbo"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_inference_step": 2}, TypeError, "got 'num_inference_step'. Did you mean 'num_inference_steps'"),
        ({"guidance_scale": 2.0}, TypeError, "'guidance_scale'. Its guider has one: `pipe.update_components"),
        ({"output": "images"}, TypeError, "got 'output'. The result is returned"),
        ({"state": None}, TypeError, "got 'state'. A run begins with the inputs"),
        ({"lr": 2}, TypeError, "Expected arguments of the call of StableDiffusionXLModularPipeline, but got 'lr'"),
        ({"num_inference_steps": "2"}, ValueError, "`num_inference_steps` to be an integer"),
        ({"latents": torch.ones(1, 4, 3, 3)}, ValueError, r"`latents` of shape \(1, 4, 16, 16\)"),
        ({"image": torch.ones(1, 3, 32, 32)}, TypeError, "has none for these inputs. Use a workflow from text"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        find("sdxl", **arguments)


def test_several_prompts_are_refused_where_the_blocks_take_one():
    with pytest.raises(ValueError, match="Flux3ModularPipeline accepts, .*batched prompts are not supported"):
        find("flux3", prompt=["a b", "a"])


def test_noise_without_height_and_width_is_refused():
    with pytest.raises(ValueError, match=r"but Ideogram4ModularPipeline draws some of shape \(1, 64, 16\)"):
        find("ideogram4")


def test_a_pipeline_that_is_not_loaded_is_refused():
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match=r"scheduler, vae, unet of .* are not loaded. Call `pipe.load_components"):
        optimize_noise(pipe, "a b", RENO)


def test_gradients_through_offloaded_components_are_refused():
    pipe = build_modular("sdxl")
    add_hook_to_module(pipe.unet, CustomOffloadHook(execution_device=torch.device("cpu")))
    call = {**modular_arguments("sdxl"), "generator": generator()}
    with pytest.raises(ValueError, match="Expected `unet` to stay on its device, but it is offloaded"):
        optimize_noise(pipe, "a b", RENO, **call)
    assert optimize_noise(pipe, "a b", BestOfN(rewards=redness, steps=2), **call).losses.shape == (2, 1)


@pytest.mark.parametrize(("left_out", "message"), [("decode", "end with latents"), ("text_encoder", "no `prompt`")])
def test_blocks_without_a_part_of_the_way_are_refused(left_out, message):
    blocks, stock = StableDiffusionXLAutoBlocks(), tiny_modular("sdxl")
    blocks.sub_blocks.pop(left_out)
    pipe, names = blocks.init_pipeline(), [each.name for each in blocks.expected_components]
    names = [name for name in names if name != "feature_extractor" and getattr(stock, name, None) is not None]
    pipe.update_components(**{name: getattr(stock, name) for name in names})
    with pytest.raises(TypeError, match=message):
        optimize_noise(pipe, "a b", RENO, **modular_arguments("sdxl"))


@pytest.mark.parametrize("name", ["WanBlocks", "LTXAutoBlocks"])
def test_videos_are_refused_before_a_model_runs(name):
    pipe = getattr(diffusers, name)().init_pipeline()
    for each in pipe.components:
        if getattr(pipe, each, None) is None:
            setattr(pipe, each, tiny_modular("sdxl").scheduler)
    with pytest.raises(TypeError, match=r"blocks return `images`, but those of \w+ end with videos"):
        as_standard(pipe).parts_of({"prompt": "a b"})


def test_embedding_noise_is_refused_since_blocks_keep_the_embedding():
    with pytest.raises(TypeError, match="with `encode_prompt`, but StableDiffusionXLModularPipeline has none"):
        EmbeddingNoise(steps=1.0).generate(tiny_modular("sdxl"), "a b", **modular_arguments("sdxl"))


def test_the_guider_of_the_pipeline_is_the_one_that_is_used():
    pipe = build_modular("sdxl")
    call = ModularCall(pipe, modular_arguments("sdxl"))
    images = {}
    for scale in (1.0, 5.0):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        images[scale] = call.optimize(RENO).initial_images
        assert torch.equal(images[scale], call.sample())
    assert not torch.equal(*images.values())
