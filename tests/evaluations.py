"""Evaluations made of numbers, without models."""

import dataclasses
from collections.abc import Callable

from noiseopt.evaluation.plan import MethodChoice, ModelChoice, Plan
from noiseopt.evaluation.prompt_sets import Prompt, PromptSet
from noiseopt.evaluation.table import Results


def results(
    count: int, *methods: str, category: str = "single", names: tuple[str, ...] = ("turbo",), text: str = "a red star"
) -> Results:
    """Return an evaluation of prompts whose plain images are all wrong, and all others right but for the last prompt.

    The optimized reward "red" rises by 0.5 with best-of-N and by 1 with each method, "blue" falls by as much. The first
    prompt has no score of "blue".
    """
    prompts = PromptSet("made", tuple(Prompt(text, category) for _ in range(count)), ("one problem",))
    choices = tuple(MethodChoice.parse(method) for method in methods or ("reno",))
    models = tuple(ModelChoice.parse(name, {}) for name in names)
    plan = Plan(models=models, methods=choices, prompts=prompts, seeds=2, rewards=(("red", 1.0),), watched=("blue",))
    units = []
    for model in models:
        for contender in plan.contenders:
            gain = 0.0 if contender.method is None else 0.5 if contender.control else 1.0
            units += [
                {
                    "model": model.name,
                    "method": contender.key,
                    "index": index,
                    "category": category,
                    "seeds": [0, 1],
                    "judge": {"right": [bool(gain) and index + 1 < count] * 2},
                    "rewards": {"red": [gain + 0.01 * index] * 2, "blue": [-gain, None if index == 0 else -gain]},
                    "set": {"layout spread": 1.5},
                    "noise": {"norm": 1.0, "spectrum": [0.9, 1.0, 1.1, 1.0, 0.9, 1.0, 1.1]},
                    "noise shape": [2, 8, 8, 8],
                    "cost": {"seconds": 2.0, "model_calls": 4, "memory": None},
                }
                for index in range(count)
            ]
    return Results(plan, units, {(name, choice.label): 7 for name in names for choice in choices})


def set_of(
    made: Results,
    mss: Callable[[float, int], float] | None,
    judge: bool = True,
    distance: Callable[[float, int], float] | None = None,
) -> Results:
    """Return an evaluation of `results` with features: values by the gain of "red" and the index of the prompt."""
    features = None if mss is None else "org/features"
    more = () if distance is None else ("tiny_image",)
    plan = dataclasses.replace(made.plan, features=features, more_features=more)
    units = []
    for unit in made.all_units():
        gain = -unit["rewards"]["blue"][0]
        measures = {"mss": mss, "distance tiny_image": distance}
        found = {name: value(gain, unit["index"]) for name, value in measures.items() if value}
        units.append({**unit, "set": {**unit["set"], **found}, "judge": unit["judge"] if judge else None})
    return Results(plan, units, made.best_of)
