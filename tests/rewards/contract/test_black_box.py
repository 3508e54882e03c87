"""Asking a function of one image: order, retries, time limits, and what is left when it fails."""

import random
import signal
import threading
import time

import numpy
import pytest
import torch
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import BestOfN, optimize_noise
from noiseopt.rewards import BlackBox, NonFiniteReward, RewardSum


def levels(count: int) -> torch.Tensor:
    """Images (B, 3, 4, 6) of one gray each: 0, 1, 2 ... of 255."""
    return torch.arange(count)[:, None, None, None].expand(-1, 3, 4, 6) / 255


def level(image, prompt: str) -> float:
    return float(numpy.asarray(image).mean())


def threads_of(box: BlackBox) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"black box {box.name}")]


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_a_score_gets_the_pixels_as_an_rgb_image_and_its_prompt():
    seen = []

    def look(image, prompt):
        seen.append((image.mode, image.size, numpy.asarray(image), prompt))
        return len(prompt)

    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    scores = BlackBox(look)(images, "abc")
    assert scores.dtype == torch.float32 and scores.tolist() == [3.0]
    ((mode, size, array, prompt),) = seen
    assert (mode, size, prompt) == ("RGB", (6, 4), "abc")
    expected = numpy.rint(images[0].permute(1, 2, 0).double().numpy() * 255)
    assert numpy.array_equal(array, expected)


def test_scores_keep_the_order_of_the_images_under_random_delays():
    delays = random.Random(0)

    def slow(image, prompt):
        time.sleep(delays.random() * 0.02)
        return level(image, prompt) + 1000 * int(prompt)

    prompts = [str(index % 3) for index in range(20)]
    scores = BlackBox(slow, workers=7)(levels(20), prompts)
    assert scores.tolist() == [index + 1000 * (index % 3) for index in range(20)]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_calls_than_workers_are_under_way(workers):
    lock, now, most = threading.Lock(), [0], [0]

    def busy(image, prompt):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return 0.0

    box = BlackBox(busy, workers=workers)
    box(levels(9), "a")
    assert most[0] == workers
    assert wait_until(lambda: not threads_of(box))


def test_what_was_answered_is_not_asked_again():
    asked = []

    def count(image, prompt):
        asked.append(prompt)
        return level(image, prompt)

    box, images = BlackBox(count), torch.cat([levels(2), levels(2)])
    assert box(images, "a").tolist() == [0, 1, 0, 1] and len(asked) == 2
    assert box(images, "a").tolist() == [0, 1, 0, 1] and len(asked) == 2
    assert box(images[:1], "b").tolist() == [0] and asked[2:] == ["b"]
    assert box(images[:1, :, :2], "a").tolist() == [0] and len(asked) == 4  # another size


def test_a_call_that_fails_twice_is_tried_again_after_growing_pauses(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(threading.Event, "wait", recording_wait(pauses))

    def failing(image, prompt):
        calls.append(1)
        if len(calls) <= 2:
            raise ConnectionError("busy")
        return 7

    assert BlackBox(failing, retries=2, backoff=0.25)(levels(1), "a").tolist() == [7]
    assert len(calls) == 3 and pauses == [0.25, 0.5]


def recording_wait(pauses: list[float]):
    """`Event.wait` that does not wait where a time is given, and keeps the times of the workers."""
    stock = threading.Event.wait

    def wait(self, timeout=None):
        if timeout is None or not threading.current_thread().name.startswith("black box"):
            return stock(self, timeout)
        pauses.append(timeout)
        return self.is_set()

    return wait


def test_the_last_failure_is_raised_with_its_image_and_prompt():
    calls = []

    def failing(image, prompt):
        if level(image, prompt) == 2:
            calls.append(1)
            raise ConnectionError("no route")
        return 0.0

    with pytest.raises(RuntimeError, match=r"'failing' for image 2 of the prompt 'a red cube'.*3 tries.*no route") as e:
        BlackBox(failing, retries=2, backoff=0.0)(levels(4), "a red cube")
    assert isinstance(e.value.__cause__, ConnectionError) and len(calls) == 3


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (float("nan"), NonFiniteReward, "finite number from 'odd' for image 0 of the prompt 'a', but got nan"),
        (float("inf"), NonFiniteReward, "but got inf"),
        ("good", TypeError, "number from 'odd' for image 0 of the prompt 'a', but got 'good'"),
        (None, TypeError, "but got None"),
    ],
)
def test_answers_that_are_no_scores_are_refused_and_not_asked_for_again(answer, error, message):
    calls = []

    def odd(image, prompt):
        calls.append(1)
        return answer

    with pytest.raises(error, match=message):
        BlackBox(odd, backoff=0.0)(levels(1), "a")
    assert len(calls) == 1


def test_a_call_that_hangs_is_given_up_and_tried_again():
    release, calls = threading.Event(), []

    def hanging(image, prompt):
        calls.append(1)
        if len(calls) == 1:
            release.wait(60)
        return 5.0

    box = BlackBox(hanging, timeout=0.2, retries=1, backoff=0.0)
    assert box(levels(1), "a").tolist() == [5.0] and len(calls) == 2
    calls.clear()
    with pytest.raises(RuntimeError, match="TimeoutError: no answer within 0.2 s"):
        BlackBox(hanging, timeout=0.2, retries=0)(levels(1), "a")
    release.set()


def test_after_a_failure_nothing_more_is_asked_and_it_is_raised_while_others_are_under_way():
    release, asked = threading.Event(), []

    def scores(image, prompt):
        asked.append(level(image, prompt))
        if asked[-1] == 1:
            raise ValueError("broken")
        release.wait(60)
        return 0.0

    box = BlackBox(scores, workers=2, retries=0)
    with pytest.raises(RuntimeError, match="image 1 "):
        box(levels(8), "a")
    release.set()
    assert wait_until(lambda: not threads_of(box)) and 1 in asked and set(asked) <= {0, 1}


def test_what_is_pausing_ends_when_another_fails():
    """The first image is in a pause of days when the second one has no score."""

    def scores(image, prompt):
        if level(image, prompt) == 0:
            raise TimeoutError("later")
        time.sleep(0.1)
        return "none"

    box = BlackBox(scores, workers=2, retries=1, backoff=1e6)
    with pytest.raises(TypeError, match="image 1 "):
        box(levels(2), "a")
    assert wait_until(lambda: not threads_of(box)) and not box.answers


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the process was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_raised_at_once_and_ends_the_asking():
    release, asked = threading.Event(), []

    def interrupting(image, prompt):
        asked.append(1)
        if len(asked) == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # pyright: ignore[reportArgumentType]
        release.wait(10)
        return 0.0

    box = BlackBox(interrupting, workers=2)
    with pytest.raises(KeyboardInterrupt):
        box(levels(8), "a")
    release.set()
    assert wait_until(lambda: not threads_of(box)) and len(asked) == 2


def test_what_was_answered_before_a_failure_is_kept():
    broken = [True]

    def scores(image, prompt):
        if broken[0] and level(image, prompt) == 3:
            raise ValueError("broken")
        asked.append(level(image, prompt))
        return asked[-1]

    asked = []
    box = BlackBox(scores, workers=1, retries=0)
    with pytest.raises(RuntimeError, match="image 3"):
        box(levels(4), "a")
    broken[0] = False
    assert box(levels(4), "a").tolist() == [0, 1, 2, 3] and asked == [0, 1, 2, 3]


def test_it_is_a_reward_with_the_facts_of_its_function_and_without_a_gradient():
    def stars(image, prompt):
        return 3

    stars.range, stars.requires_prompt = (0.0, 5.0), False  # pyright: ignore[reportFunctionMemberAccess]
    box = BlackBox(stars)
    assert (box.name, box.range, box.requires_prompt, box.differentiable) == ("stars", (0.0, 5.0), False, False)
    assert not box(levels(2).clone().requires_grad_(), None).requires_grad
    total = RewardSum({box: 0.5})
    assert total(levels(2)).total.tolist() == [1.5, 1.5] and total.without_gradient() == ["stars"]
    assert BlackBox(lambda image, prompt: 0, name="person").name == "person"


BAD_SETTINGS = [
    ({"workers": 0}, ValueError, "`workers` to be an integer of 1 or more"),
    ({"retries": -1}, ValueError, "`retries` to be an integer of 0 or more"),
    ({"retries": 1.5}, ValueError, "`retries` to be an integer"),
    ({"timeout": 0}, ValueError, "`timeout` to be more than 0"),
    ({"backoff": -1}, ValueError, "`backoff`"),
    ({"score": "url"}, TypeError, "function `score"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        BlackBox(**{"score": level, **settings})


def test_a_run_asks_about_its_own_images_only_and_a_failure_hands_out_the_best_so_far():
    """No random image is tried out, as with other functions: a call may cost money."""
    asked = []

    def api(image, prompt):
        asked.append(image.size)
        if len(asked) > 3:
            raise ConnectionError("over quota")
        return level(image, prompt)

    box, call = BlackBox(api, retries=0), {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    with pytest.raises(RuntimeError, match="over quota") as raised:
        optimize_noise(tiny_pipeline("sd"), "a", BestOfN(rewards=box, steps=5), **call)
    found = raised.value.noise_result  # pyright: ignore[reportAttributeAccessIssue]
    assert len(found.losses) == 3 and found.provenance["objective"] == {"api": 1.0}
    torch.testing.assert_close(found.best_scores["api"], found.scores["api"].max(0).values)
