"""Turns of threads with sets of objects: whoever shares one waits, nobody else, and nobody for itself."""

import runpy
import threading

import pytest

from noiseopt.pipelines.sampling import turns as module
from noiseopt.pipelines.sampling.turns import TURNS, Turns


def waits(turns: Turns, things: list[object]) -> bool:
    """Return whether another thread waits for these objects."""
    done = threading.Event()

    def take():
        with turns.take(things):
            done.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return not done.wait(0.2)


def test_threads_that_share_an_object_wait():
    turns, (a, b, c) = Turns(), (object(), object(), object())
    with turns.take([a, b]):
        assert waits(turns, [b, c]) and not waits(turns, [c])
    assert not waits(turns, [a, b, c])


def test_turns_of_a_thread_are_nested():
    turns, thing = Turns(), object()
    with turns.take([thing]):
        with turns.take([thing]):
            pass
        assert waits(turns, [thing])
    assert turns.taken == [] or not waits(turns, [thing])


def test_an_error_and_an_interrupt_of_a_wait_leave_nothing_taken(monkeypatch):
    turns, thing = Turns(), object()
    with pytest.raises(KeyError), turns.take([thing]):
        raise KeyError
    assert turns.taken == []

    def interrupted(*_):
        raise KeyboardInterrupt

    with turns.take([thing]):
        monkeypatch.setattr(turns.changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.take([thing]):
            pass
        assert len(turns.taken) == 1
    assert turns.taken == []


def test_copies_of_the_code_share_one():
    """Each card of a pipeline has a copy."""
    assert runpy.run_path(module.__file__)["TURNS"] is TURNS
