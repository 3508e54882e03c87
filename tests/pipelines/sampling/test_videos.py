"""Video pipelines: which frames rewards see, how a run is computed, and what is refused."""

import pytest
import torch
from conformance.checks import FRAMES, PROMPT, Call, video_call
from conformance.matrix import VIDEOS
from diffusers import LTXImageToVideoPipeline, WanVideoToVideoPipeline
from problems import generator, problem_of, redness
from tiers import slow_except
from tiny_videos import VIDEO_CALLS, ltx_pipeline, tiny_video

from noiseopt import BestOfN, GroupSelection, NoiseResult, PinkNoise, ReNO, RewardGuidance, grow_set, optimize_noise
from noiseopt.evaluation.noise_statistics import noise_statistics
from noiseopt.pipelines.memory.graph_size import SavedBytes
from noiseopt.pipelines.request import check_pipeline_class
from noiseopt.schedulers import CoupledNoise


def reno(**settings) -> ReNO:
    return ReNO(rewards=redness, steps=3, search=0, views=0, **settings)


def wan(**changes) -> Call:
    return Call(tiny_video("wan"), {**VIDEO_CALLS["wan"], **changes})


def all_frames(call: Call, **kwargs) -> torch.Tensor:
    return call.pipe(prompt=call.prompt, **{**given(call), **kwargs}).frames


@pytest.mark.parametrize(
    ("frames", "expected"),
    [("first", [0]), ("middle", [2]), ("last", [4]), ("all", [0, 1, 2, 3, 4]), (2, [0, 4]), ([3, 1], [3, 1])],
)
def test_rewards_see_the_chosen_frames_alone(frames, expected):
    call, seen = wan(), []

    def reward(images, prompts):
        seen.append((images.detach(), prompts))
        return redness(images, prompts)

    result = call.optimize(reno(frames=frames))
    plain = all_frames(call)[:, expected]
    assert torch.equal(result.initial_images, plain)
    torch.testing.assert_close(result.losses[0], -redness(plain[0], None).mean()[None])
    assert torch.equal(all_frames(call, latents=result.latents)[:, expected], result.images)
    call.optimize(BestOfN(rewards=reward, steps=1, frames=frames))
    assert torch.equal(seen[-1][0], plain[0]) and list(seen[-1][1]) == [PROMPT] * len(expected)
    assert result.provenance["settings"]["frames"] == frames


def test_only_the_chosen_frames_have_a_gradient():
    problem = problem_of(tiny_video("wan"), PROMPT, **VIDEO_CALLS["wan"])
    problem.sampler.frames = "all"
    noise = problem.noise.clone().requires_grad_()
    first, last = (problem.sampler.images(noise, "frozen")[:, each].sum() for each in (0, -1))
    (early,), (late,) = (torch.autograd.grad(each, noise) for each in (first, last))
    assert early[:, :, 0].any() and not early[:, :, 1:].any()  # the decoder is causal
    assert late[:, :, -1].any()


@pytest.mark.parametrize("settings", [{"chunk_size": 1}, {"checkpointing": "blocks"}, {"checkpointing": "steps"}])
@pytest.mark.parametrize("family", slow_except(VIDEOS, "wan"))
def test_how_a_run_is_computed_does_not_change_what_it_finds(family, settings):
    call = video_call(family, 2)
    expected, found = (call.optimize(reno(**each)) for each in ({}, settings))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.noise, expected.noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", VIDEOS)
def test_a_checkpointed_decoder_stores_a_fraction_of_the_activations(family):
    problem = problem_of(tiny_video(family), PROMPT, **VIDEO_CALLS[family])
    forward, sizes = vars(problem.pipe.vae.decoder).get("forward"), []
    for policy in ("none", "blocks"):
        with torch.enable_grad(), problem.sampler.checkpoints as checkpoints:
            checkpoints.take(policy)
            checkpoints.settle()
            with SavedBytes() as saved:
                problem.sampler.images(problem.noise.clone().requires_grad_(), "frozen")
        sizes.append(saved.peak)
    assert sizes[1] < sizes[0] / 3
    assert vars(problem.pipe.vae.decoder).get("forward") is forward


def test_a_tiled_decoder_is_differentiated_tile_by_tile():
    pipe = ltx_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = Call(pipe, VIDEO_CALLS["ltx"])
    whole = call.plain
    tiles = {f"tile_sample_{name}_{side}": 16 if name == "min" else 8 for name in ("min", "stride") for side in SIDES}
    pipe.vae.enable_tiling(**tiles)
    pipe.vae.requires_grad_(False)
    pipe.transformer.requires_grad_(False)
    tiled = Call(pipe, VIDEO_CALLS["ltx"])
    result = tiled.optimize(reno(gradient="frozen"))
    assert not torch.equal(tiled.plain, whole) and torch.equal(result.initial_images, tiled.plain)
    assert (result.best_loss < result.losses[0]).all()


SIDES = ("height", "width")


@pytest.mark.parametrize("family", slow_except(VIDEOS, "ltx"))
def test_a_saved_result_draws_its_video_again(family, tmp_path):
    call = video_call(family, 1)
    call.optimize(reno()).save(tmp_path / "video.safetensors")
    loaded = NoiseResult.load(tmp_path / "video.safetensors")
    again = call.sample(latents=loaded.latents, generator=loaded.generator())
    torch.testing.assert_close(-redness(again[0], None).mean()[None], loaded.best_loss)
    assert loaded.noise.ndim == 5 and not loaded.differences(call.pipe)


def test_a_result_shows_each_video_as_a_strip_of_its_frames():
    result = wan().optimize(reno())
    (strip,) = result.pil()
    assert strip.size == (32 * len(FRAMES), 32) and result._repr_html_().count("<img") == 2


@pytest.mark.parametrize(("family", "time_dim"), [("wan", 2), ("cogvideox", 1)])
def test_noise_is_sampled_in_space_and_time(family, time_dim):
    call = video_call(family, 2)
    sampler, method = PinkNoise(0.5, time_dim=time_dim), BestOfN(rewards=redness, steps=2)
    white, pink = call.optimize(method), call.optimize(method, noise_sampler=sampler)
    torch.testing.assert_close(pink.initial_noise, sampler.color(white.initial_noise))
    coupled = call.optimize(method, noise_sampler=CoupledNoise())
    torch.testing.assert_close(coupled.initial_noise[0], -coupled.initial_noise[1], rtol=0, atol=1e-5)


def test_noise_stays_white():
    result = wan().optimize(reno())
    before, after = (noise_statistics(each.flatten(1, 2)) for each in (result.initial_noise, result.noise))
    assert after.variance == pytest.approx(before.variance, abs=0.1)
    assert result.band_shares is not None and result.band_shares[-1].sum().item() == pytest.approx(1)


def test_the_videos_of_a_set_are_compared_frame_by_frame():
    method = GroupSelection(rewards=None, features="tiny_image", weight=1.0, steps=3)
    result = video_call("wan", 2).optimize(method)
    assert (result.best_loss <= result.losses[0]).all()
    one, other = result.images.flatten(2)
    expected = (one - other).square().mean().sqrt()
    torch.testing.assert_close(result.best_scores["distance"], expected.expand(2), rtol=1e-4, atol=1e-5)


def test_frames_beyond_the_last_one_are_refused_before_a_model_runs():
    with pytest.raises(ValueError, match="a video of 5, with indices up to 4, but got 7"):
        wan().optimize(reno(frames=[0, 7]))


def test_more_videos_than_the_pipeline_makes_of_a_prompt_are_refused():
    call = Call(tiny_video("cogvideox"), {**VIDEO_CALLS["cogvideox"], "num_videos_per_prompt": 2})
    with pytest.raises(ValueError, match="noise for 2 images.*CogVideoXPipeline draws.*one prompt for each"):
        call.optimize(reno())


def test_a_set_that_stores_images_refuses_videos_by_name():
    with pytest.raises(TypeError, match="WanPipeline generates videos.*`num_videos_per_prompt`"):
        grow_set(tiny_video("wan"), PROMPT, 2, **VIDEO_CALLS["wan"])


def test_rewards_guide_the_steps_of_a_video():
    call = wan()
    plain, guided = (
        RewardGuidance(rewards=redness, strength=strength).generate(call.pipe, PROMPT, **given(call)).frames
        for strength in (0.0, 0.2)
    )
    assert torch.equal(plain, all_frames(call))
    assert redness(guided[0], None).mean() > redness(plain[0], None).mean()


def given(call: Call) -> dict:
    return {"generator": generator(), "output_type": "pt", **call.arguments}


@pytest.mark.parametrize(("cls", "name"), [(LTXImageToVideoPipeline, "image"), (WanVideoToVideoPipeline, "video")])
def test_a_pipeline_that_starts_from_pictures_is_refused_by_name(cls, name):
    with pytest.raises(TypeError, match=f"the call of {cls.__name__} takes `{name}`: noise beside given pictures"):
        check_pipeline_class(cls)
    parts = {**tiny_video("ltx").components}
    if cls is LTXImageToVideoPipeline:
        with pytest.raises(TypeError, match=cls.__name__):
            optimize_noise(cls(**parts), PROMPT, reno())
