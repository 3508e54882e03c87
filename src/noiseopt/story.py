"""The subject of a demo: the method and model that were chosen, and the record of the run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from . import recipes, shapes_world
from .evaluation.instruments import load_reward
from .evaluation.metrics import layout_spread, mean_pairwise_similarity, vendi_score
from .evaluation.plan import MethodChoice, ModelChoice, SteeringChoice
from .pipelines import NoiseOptimizer, NoiseResult, list_methods
from .pipelines.registry import METHODS
from .recipes import RECIPES, SET, Recipe
from .shapes_world.embedded import EmbeddedModel
from .shapes_world.judge import Verdict


def first_of_each(prompts: Iterable[str], counts: Mapping[str, int]) -> list[str]:
    """Return the first `counts[category]` prompts of each category, grouped by category."""
    groups: dict[str, list[str]] = {name: [] for name in counts}
    for prompt in prompts:
        groups.get(shapes_world.category(prompt), []).append(prompt)
    return [prompt for name, count in counts.items() for prompt in groups[name][:count]]


# The first prompts of a list with a fixed shuffle, not picked by their results.
DEFAULT_PROMPTS = first_of_each(shapes_world.VALIDATION_PROMPTS, recipes.CATEGORIES)
LENGTH = ("steps", "budget")  # settings that are told apart from the others
RULERS = ("dinov2", "clip")  # towers that measure diversity, the first that the method does not use
ENDS = (0, 1)  # before and after


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered method on an embedded model.

    Attributes:
        method: A name in `list_methods()`.
        model: An embedded pipeline.
        settings: Settings of the method, with its `steps`, the evaluations of each noise.
    """

    method: str
    model: EmbeddedModel
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, method: str = "reno", model: str | None = None, steps: int | None = None) -> "Choice":
        """Look up a method, such as "reno" or "reno:views=4", and a model.

        Args:
            method: The method, with settings that replace those of its `Recipe`.
            model: An embedded pipeline. Defaults to that of the recipe.
            steps: Evaluations of each noise. Defaults to the method's own number, or as many as fit into a minute.

        Raises:
            ValueError: For an unknown name or setting.
        """
        asked = MethodChoice.parse(method)
        if isinstance(asked, SteeringChoice):
            raise ValueError(
                f"Expected a method that optimizes noise, one of {', '.join(list_methods())}, but got {asked.name!r}. "
                "`noiseopt evaluate` compares what steers it."
            )
        recipe = RECIPES.get(asked.name, Recipe())
        embedded = ModelChoice.parse(model or recipe.model, {})
        if not embedded.embedded:
            raise ValueError(f"Expected an embedded model, but got {model!r}. `noiseopt generate` runs others.")
        settings = {"steps": METHODS[asked.name].steps, **recipe.settings, **asked.settings}
        choice = cls(asked.name, shapes_world.MODELS[embedded.name], settings)
        if steps is not None:
            settings |= {"steps": steps, "budget": None}
        elif not asked.settings.keys() & LENGTH:
            settings["steps"] = recipes.fitting(choice.cost, choice.count, settings["steps"])
        if "search" in recipe.settings and "search" not in asked.settings:
            budget = settings.get("budget")
            evaluations = budget if isinstance(budget, int) else settings["steps"]
            settings["search"] = recipes.searched(recipe, evaluations)
        if settings.get("search") == 0 and "guard" in recipe.settings and "guard" not in asked.settings:
            del settings["guard"]  # it is about images that a search has chosen
        return dataclasses.replace(choice, settings=settings)

    @property
    def recipe(self) -> Recipe:
        return RECIPES.get(self.method, Recipe())

    @property
    def name(self) -> str:
        """The name of the method's class."""
        return METHODS[self.method].__name__

    @property
    def steps(self) -> int | None:
        """The planned evaluations of each noise; `None` for as many as a time budget allows."""
        budget = self.settings.get("budget")
        return self.settings["steps"] if budget is None else None if isinstance(budget, str) else budget

    @property
    def noise_sampler(self) -> Any:
        """The distribution of the initial noise; `None` for that of the pipeline."""
        return self.settings.get("noise_sampler")

    @property
    def asked(self) -> MethodChoice:
        """The method as other commands name it."""
        return MethodChoice(self.method, self.method, self.settings)

    @property
    def reward(self) -> str | None:
        """The embedded reward, if the method takes one."""
        return self.recipe.reward if self.asked.takes_rewards else None

    @property
    def single(self) -> bool:
        """Return whether each image is optimized for its own reward, rather than as part of a diverse set."""
        return self.asked.takes_rewards and self.asked.diversity is None and self.asked.features is None

    @property
    def count(self) -> int:
        """Images per prompt: 1, or `SET` for methods that optimize a set."""
        return 1 if self.single else SET

    @property
    def measure(self) -> str:
        """The name of the number that shows the effect beside the judge: "reward", "P(yes)" or "diversity"."""
        return "diversity" if not self.single else "P(yes)" if self.reward == "vqa" else "reward"

    @property
    def ruler(self) -> str | None:
        """The embedded tower whose features tell how much the images of a set differ; `None` for single images."""
        if self.single:
            return None
        return next((name for name in RULERS if name not in self.instruments), RULERS[0])

    @property
    def cost(self) -> float:
        """About the processor seconds of an evaluation of one noise."""
        method = self.asked.build(lambda images, prompts: images.mean((1, 2, 3)))
        step = recipes.cost(self.model, method.gradient_mode, method.previews)
        search = self.settings.get("search")
        if not isinstance(search, int) or not self.steps:
            return step
        share = min(1.0, search / self.steps)
        return share * recipes.cost(self.model, None, False) + (1 - share) * step

    @property
    def prompts(self) -> list[str]:
        """The default prompts: as many as fit into a minute, at equal distances in the list."""
        count = recipes.prompts_fitting(self.cost, self.count, self.steps or 1)
        return DEFAULT_PROMPTS[:: len(DEFAULT_PROMPTS) // count]

    def length(self, prompts: int) -> str:
        """Return in words what the method will do with a number of prompts, and about how long that takes."""
        unit, plan = self.recipe.unit, self.recipe.plan
        if self.steps is None:
            return f"{self.settings['budget']} of {unit}s {plan}".rstrip()
        seconds = recipes.seconds(self.cost, prompts * self.count, self.steps)
        return f"{plural(self.steps, unit)} {plan}".rstrip() + f", about {seconds} s on two idle cores"

    @property
    def keeps_best(self) -> bool:
        """Return whether the method returns its best step rather than its last."""
        return METHODS[self.method].returns == "best"

    def build(self) -> NoiseOptimizer:
        """Build the method with the embedded reward and features that it needs."""
        device = torch.device("cpu")
        return self.asked.build(load_reward(self.reward, device) if self.reward else None, device)

    @property
    def instruments(self) -> list[str]:
        """Names of the embedded models that the method evaluates with."""
        names = self.asked.towers | ({self.reward} if self.reward else set())
        return [name for name in shapes_world.MODELS if name in names]

    def weights(self) -> list[str]:
        """Return the folders of all required weights. Raises `FileNotFoundError` if some are unavailable."""
        names = dict.fromkeys((self.model.name, *self.instruments, *filter(None, [self.ruler])))
        return [shapes_world.path(name) for name in names]

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value!r}" for name, value in self.settings.items() if name not in LENGTH)
        return f"{self.name}{f'({changed})' * bool(changed)} on {self.model.name}, the {self.model.title}"


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """The record of optimizing `B` noises step by step.

    Attributes:
        choice: The method and the model.
        prompts: The prompt of each noise; the noises of one set are consecutive.
        results: The `NoiseResult`s: one for all prompts, or one per set.
        images: `(steps, B, 3, H, W)` in [0, 1], from the baseline on. A method that returns its last noise has one
            more than its steps.
        verdicts: The judge's verdict on each image, by step and sample.
        features: `(steps, B, D)`, by `choice.ruler`; `None` for single images.
        seconds: The time that all of it took.
    """

    choice: Choice
    prompts: Sequence[str]
    results: Sequence[NoiseResult]
    images: torch.Tensor
    verdicts: list[list[Verdict]]
    features: torch.Tensor | None = None
    seconds: float = 0.0

    @property
    def sets(self) -> list[range]:
        """The noises of each row: one for methods of single images, or those of a prompt."""
        count = self.choice.count
        return [range(first, first + count) for first in range(0, len(self.prompts), count)]

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """`(steps, sets)`, higher is better: the reward of each image, or the diversity of each set."""
        if self.features is None:
            return -torch.cat([result.losses for result in self.results], dim=1)
        return torch.stack([diversity(self.features[:, rows.start : rows.stop]) for rows in self.sets], dim=1)

    @functools.cached_property
    def so_far(self) -> torch.Tensor:
        """`(steps, sets)`, the values if the run ended with each step: for single images the best so far."""
        if self.features is not None or not self.choice.keeps_best:
            return self.values
        return self.values.nan_to_num(-torch.inf).cummax(0).values

    @property
    def right_so_far(self) -> list[int]:
        """The right images if the run ended with each step: for single images of the best so far."""
        if self.so_far is self.values:
            return [sum(verdict.correct for verdict in row) for row in self.verdicts]
        best = self.values.nan_to_num(-torch.inf).cummax(0).indices.tolist()
        return [sum(self.verdicts[at][sample].correct for sample, at in enumerate(row)) for row in best]

    def of_set(self, values: torch.Tensor, row: int, end: int) -> torch.Tensor:
        """Return what belongs to the images of a set before (`end=0`) or after (`end=1`), of `(steps, B, ...)`."""
        return torch.stack([values[self.ends(sample)[end], sample] for sample in self.sets[row]])

    def value(self, row: int, end: int) -> float:
        """Return the value of a row before or after."""
        if self.features is None:
            return float(self.values[self.ends(row)[end], row])
        return float(diversity(self.of_set(self.features, row, end)))

    def vendi(self, row: int, end: int) -> float:
        """Return the effective number of different images of a set before or after, in [1, `choice.count`]."""
        assert self.features is not None
        return float(vendi_score(self.of_set(self.features, row, end)))

    def layout(self, row: int, end: int) -> float:
        """Return the `layout_spread` of a set before or after, in pixels; NaN if undefined."""
        return layout_spread(self.of_set(self.images, row, end), self.prompts[self.sets[row].start])

    def right(self, row: int, end: int) -> int:
        """Count the right images of a row before or after."""
        return sum(self.verdicts[self.ends(sample)[end]][sample].correct for sample in self.sets[row])

    def mean(self, measure: Callable[[int, int], float], end: int) -> float:
        """Return the mean of a measure over the rows, before or after; NaN if it is undefined for all."""
        found = [value for row in range(len(self.sets)) if math.isfinite(value := measure(row, end))]
        return sum(found) / len(found) if found else math.nan

    @property
    def all_right(self) -> tuple[int, int]:
        """The right images before and after."""
        before, after = (sum(self.right(row, end) for row in range(len(self.sets))) for end in ENDS)
        return before, after

    def change(self, measure: Callable[[int, int], float], digits: int, row: int | None = None) -> str:
        """Return a measure before and after in words, of a row or its mean over all: ".12 → .45"."""
        values = [self.mean(measure, end) if row is None else measure(row, end) for end in ENDS]
        return arrow(*(decimal(value, digits) for value in values))

    @property
    def digits(self) -> int:
        """The decimals of a value."""
        return {"reward": 1, "P(yes)": 2, "diversity": 3}[self.choice.measure]

    @property
    def headline(self) -> str:
        """The outcome in the method's unit: "right 3 → 7 of 8", with what it is about first if that is not the judge's.

        The reward is no outcome, since it is optimized; P(yes) is the unit of its paper.
        """
        right = f"right {arrow(*map(str, self.all_right))} of {len(self.prompts)}"
        measure = self.choice.measure
        return right if measure == "reward" else f"{measure} {self.change(self.value, self.digits)}, {right}"

    @property
    def steps(self) -> int:
        """The steps that were taken; a last evaluation of what they chose, as in group selection, is none."""
        taken = max(len(result.losses) for result in self.results)
        return min(taken, self.choice.steps or taken)

    def best(self, sample: int) -> int:
        """Return the step whose image is returned."""
        if not self.choice.keeps_best:
            return len(self.images) - 1
        return int(torch.cat([result.best_step for result in self.results])[sample])

    def first_right(self, sample: int) -> int | None:
        """Return the first step whose image is correct according to the judge, or `None`."""
        return next((step for step, row in enumerate(self.verdicts) if row[sample].correct), None)

    def ends(self, sample: int) -> tuple[int, int]:
        """Return the steps to compare: the baseline and the returned image."""
        return 0, self.best(sample)

    def end_images(self, end: int) -> torch.Tensor:
        """Return the baselines (`end=0`) or the returned images (`end=1`), `(B, 3, H, W)`."""
        return torch.cat([self.of_set(self.images, row, end) for row in range(len(self.sets))])


def diversity(features: torch.Tensor) -> torch.Tensor:
    """Return 1 − MSS of sets `(..., N, D)`, `(...)` in [0, 2]: 0 if all features are alike, 1 if orthogonal."""
    return 1 - mean_pairwise_similarity(features)


def arrow(before: str, after: str) -> str:
    return f"{before} → {after}"


def decimal(value: float, digits: int) -> str:
    """Format a number without the zero before its point; a dash if it is undefined."""
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)
