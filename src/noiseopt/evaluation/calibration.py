"""Measuring the N at which best-of-N takes as long as a method."""

import math
import statistics
from typing import Any

from ..callbacks.early_stopping import TimeBudget
from .plan import Contender, MethodChoice, control_of
from .unit import Studio

REPEATS = 3
WITHOUT_END = 1_000_000


def calibrate(studio: Studio, choice: MethodChoice) -> dict[str, Any]:
    """Measure the N whose best-of-N takes at least as long as a method on the same images.

    The two alternate in going first, so that other load on the machine affects both. With `T` the seconds of the
    method, `f` the fixed seconds of best-of-N and `e` its seconds per noise, N is the median of `(T - f) / e` over the
    repeats, rounded up in favor of the control.

    Returns:
        "n", and lists over the repeats: "method seconds", "seconds per noise" and "ratio".
    """
    contender = Contender(choice.label, choice)
    found: dict[str, list[float]] = {"method seconds": [], "seconds per noise": [], "ratio": []}
    seconds = None
    for repeat in range(REPEATS):
        index = repeat % len(studio.plan.prompts.prompts)
        if seconds is None or repeat % 2 == 0:
            seconds = studio.run(contender, index, None).cost.seconds
            once, each = control_seconds(studio, choice, index, seconds)
        else:
            once, each = control_seconds(studio, choice, index, seconds)
            seconds = studio.run(contender, index, None).cost.seconds
        for name, value in zip(found, (seconds, each, (seconds - once) / each), strict=True):
            found[name].append(value)
    return {"n": max(1, math.ceil(statistics.median(found["ratio"]))), **found}


def control_seconds(studio: Studio, choice: MethodChoice, index: int, budget: float) -> tuple[float, float]:
    """Return the fixed seconds of best-of-N and its seconds per noise, from a run of about `budget` seconds."""
    ends: list[float] = []
    callbacks = [lambda state: ends.append(state.elapsed), TimeBudget(budget)]
    total = studio.run(control_of(choice), index, WITHOUT_END, callbacks).cost.seconds
    return total - ends[-1], ends[-1] / len(ends)
