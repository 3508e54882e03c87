"""The benchmark of interrupts and kills: it finds what is lost, and a short run finds nothing."""

import functools
import random
import signal
import time
from pathlib import Path

import pytest
import reliability  # pyright: ignore[reportMissingImports]

from noiseopt import BestOfN, optimize_noise
from noiseopt.demo import ONE_STEP, load_pipeline


def test_an_alarm_interrupts_and_is_taken_back():
    with pytest.raises(KeyboardInterrupt), reliability.Alarm(0.01) as alarm:
        time.sleep(5)
    assert alarm.rang
    with reliability.Alarm(5) as late:
        pass
    assert not late.rang and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.slow
def test_interrupts_of_every_kind_of_method_lose_nothing(tmp_path):
    counted = reliability.interrupts(12, tmp_path, random.Random(3))
    assert counted.events == 12 and counted.faults == []


@pytest.mark.slow
def test_what_is_lost_or_changed_is_counted(tmp_path, capsys):
    counted, pipe = reliability.Count("x", events=1), load_pipeline("turbo")
    path, method = tmp_path / "noise.safetensors", BestOfN(rewards="red", steps=2)
    result = optimize_noise(pipe, reliability.PROMPT, method, save_noise_to=path, **ONE_STEP)
    reliability.check_kept(counted, "x", result, path, 2, "here")
    assert not counted.faults
    reliability.check_kept(counted, "x", result, path, 3, "here")
    reliability.check_kept(counted, "x", None, tmp_path / "none", 1, "here")
    assert len(counted.faults) == 4
    other = optimize_noise(pipe, reliability.PROMPT, BestOfN(rewards="red", steps=2), **ONE_STEP)
    assert not reliability.differences(result, result) and "noise" in reliability.differences(result, other)
    before = reliability.fingerprint(pipe)
    next(pipe.vae.parameters()).requires_grad_(False)
    assert reliability.fingerprint(pipe) != before
    assert "lost" in capsys.readouterr().err


def writes(folder: Path, parts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(len(list(folder.glob("?"))), 5):
        with (folder / str(index)).open("w") as file:
            for part in parts:
                file.write(part)
                file.flush()
                time.sleep(0.02)


def count_whole(folder: Path) -> int:
    texts = [file.read_text() for file in folder.glob("?")]
    if set(texts) - {"whole"}:
        raise ValueError("half a file")
    return len(texts)


@pytest.mark.slow
def test_kills_find_files_that_are_written_in_two_parts(tmp_path, capsys):
    task = reliability.Task("t", functools.partial(writes, parts=["wh", "ole"]), count_whole, count_whole)
    counted = reliability.kills(task, 12, tmp_path, random.Random(0))
    assert counted.events == 12 and "cannot be loaded: half a file" in counted.faults[0]
