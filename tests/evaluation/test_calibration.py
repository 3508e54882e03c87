"""N of best-of-N on a machine with known times."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from noiseopt.evaluation.calibration import calibrate
from noiseopt.evaluation.plan import MethodChoice


class Machine:
    """A studio whose methods take `method` seconds, times a factor per call, and best-of-N `once + each · N`."""

    plan = SimpleNamespace(prompts=SimpleNamespace(prompts=["a", "b"]))

    def __init__(self, method: float, once: float, each: float, load: list[float]) -> None:
        self.seconds, self.once, self.each, self.load = method, once, each, itertools.cycle(load)
        self.order: list[str] = []

    def run(self, contender, index, best_of, callbacks=()):
        load = next(self.load)
        if not contender.control:
            self.order.append("method")
            return SimpleNamespace(cost=SimpleNamespace(seconds=load * self.seconds))
        self.order.append("control")
        state = SimpleNamespace(elapsed=0.0, noise=torch.zeros(1), stopped=False)
        state.stop = lambda reason: vars(state).update(stopped=True)
        while not state.stopped:
            state.elapsed += load * self.each
            for callback in callbacks:
                getattr(callback, "on_step_end", callback)(state)
        return SimpleNamespace(cost=SimpleNamespace(seconds=load * self.once + state.elapsed))


@pytest.mark.parametrize(
    ("method", "once", "each", "expected"),
    [(10.0, 1.0, 0.5, 18), (10.0, 1.0, 0.51, 18), (10.0, 1.0, 0.49, 19), (1.0, 0.9, 5.0, 1), (0.5, 0.9, 5.0, 1)],
)
def test_the_control_takes_as_long_as_the_method_or_just_longer(method, once, each, expected):
    found = calibrate(Machine(method, once, each, [1.0]), MethodChoice.parse("reno"))
    assert found["n"] == expected
    assert once + each * found["n"] >= method or found["n"] == 1
    assert found["n"] == 1 or once + each * (found["n"] - 1) < method


def test_a_slow_moment_changes_nothing_and_turns_alternate():
    machine = Machine(10.0, 0.0, 0.5, [1, 1, 1, 3, 1, 1])  # the fourth call is slow: the method's second
    assert calibrate(machine, MethodChoice.parse("reno"))["n"] == 20
    assert machine.order == ["method", "control", "control", "method", "method", "control"]
