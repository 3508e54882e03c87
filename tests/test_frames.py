"""The frames of videos: which ones are chosen, and rewards and features of videos as those of their frames."""

import math

import pytest
import torch
from problems import generator

from noiseopt import BestOfN, HeldOutReward, RewardSum
from noiseopt.callbacks import NoiseState, StepImages
from noiseopt.frames import as_strips, check_frames, frame_numbers
from noiseopt.pipelines.reno.views import random_views
from noiseopt.rewards import PairwiseDistance, SetRewardSum, TinyImage

VIDEOS = torch.rand(2, 3, 3, 32, 32, generator=generator())


def brightness(images, prompts):
    return images.square().mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (4, 5, [0, 1, 3, 4]),
        (3, 9, [0, 4, 8]),
        (2, 81, [0, 80]),
        (1, 5, [2]),
        (9, 5, [0, 1, 2, 3, 4]),
        ("first", 5, [0]),
        ("middle", 5, [2]),
        ("last", 5, [4]),
        ("all", 3, [0, 1, 2]),
        ([4, 0], 5, [4, 0]),
        ((1,), 5, [1]),
    ],
)
def test_the_chosen_frames(frames, count, expected):
    check_frames(frames)
    assert frame_numbers(frames, count) == expected


@pytest.mark.parametrize("frames", [0, -1, "every", [], [-1], [0.5], 2.0, True, None])
def test_a_choice_that_no_video_has_is_refused(frames):
    with pytest.raises(ValueError, match="Expected `frames` to be a number of evenly spaced frames"):
        BestOfN(rewards=brightness, frames=frames).check()


def test_an_index_beyond_the_last_frame_is_refused():
    with pytest.raises(ValueError, match="a video of 5, with indices up to 4, but got 5"):
        frame_numbers([0, 5], 5)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("rewards", [{brightness: 2.0}, {brightness: 2.0, "red": 0.5}])
def test_the_reward_of_a_video_and_its_gradient_are_means_over_its_frames(rewards, chunk_size):
    videos, total = VIDEOS.clone().requires_grad_(), RewardSum(rewards)
    output = total(videos, ["a", "abc"], chunk_size)
    frames = [total(VIDEOS[:, each], ["a", "abc"]) for each in range(3)]
    torch.testing.assert_close(output.total, torch.stack([each.total for each in frames]).mean(0))
    for name, scores in output.components.items():
        torch.testing.assert_close(scores, torch.stack([each.components[name] for each in frames]).mean(0))
    (gradient,) = torch.autograd.grad(output.total.sum(), videos)
    leaf = VIDEOS.clone().requires_grad_()
    expected = torch.stack([total(leaf[:, each], ["a", "abc"]).total for each in range(3)]).mean(0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_no_more_frames_than_the_chunk_size_are_scored_at_a_time():
    sizes = []

    def seen(images, prompts):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    RewardSum(seen)(VIDEOS, "a", 2)
    assert sizes == [2, 2, 2]


def test_a_video_needs_one_prompt_not_one_for_each_frame():
    with pytest.raises(ValueError, match="2"):
        RewardSum(brightness)(VIDEOS, ["a"] * 6)


def test_the_distance_of_videos_is_the_root_mean_square_over_their_frames():
    distance = PairwiseDistance(TinyImage())
    frames = torch.stack([distance(VIDEOS[:, each])[0, 1] for each in range(3)])
    torch.testing.assert_close(distance(VIDEOS)[0, 1], frames.square().mean().sqrt())
    white, black = torch.ones(1, 4, 3, 32, 32), torch.zeros(1, 4, 3, 32, 32)
    torch.testing.assert_close(distance(white, black), torch.ones(1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_set_rewards_compare_frames_at_the_same_time(chunk_size):
    videos, total = VIDEOS.clone().requires_grad_(), SetRewardSum({"dpp": ("tiny_image", 1.0)})
    value = total(videos, chunk_size=chunk_size).total
    frames = [total(VIDEOS[:, each]).total for each in range(3)]
    torch.testing.assert_close(value, torch.stack(frames).mean())
    (gradient,) = torch.autograd.grad(value, videos)
    assert gradient.shape == videos.shape and gradient.flatten(2).any(2).all()


def test_all_frames_of_a_video_are_moved_by_the_same_view():
    still = VIDEOS[:, :1].expand(-1, 3, -1, -1, -1)
    (view,) = random_views(still, 1, seeds=[1, 2])
    assert view.shape == still.shape
    apart = (view[:, 0] - view[:, 1]).square().mean().sqrt()
    assert apart < 2 * math.sqrt(2) * 0.03 and (view - still).square().mean().sqrt() > 3 * apart


def test_callbacks_watch_and_store_videos(tmp_path):
    state, watch = NoiseState(None, ["a", "abc"], 1, torch.zeros(2, 1, 2, 2)), HeldOutReward(brightness)
    images = StepImages(folder=tmp_path)
    for callback in (watch, images):
        callback.on_run_start(state)
    state.step, state.loss, state.images = 0, torch.zeros(2), VIDEOS
    for callback in (watch, images):
        callback.on_step_end(state)
    torch.testing.assert_close(watch.scores[0], RewardSum(brightness)(VIDEOS, ["a", "abc"]).total)
    assert len(list(tmp_path.iterdir())) == 2 and as_strips(VIDEOS).shape == (2, 3, 32, 96)
    torch.testing.assert_close(as_strips(VIDEOS)[:, :, :, 32:64], VIDEOS[:, 1])
