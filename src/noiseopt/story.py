"""The subject of a demo: the method and model that were chosen, and the record of the run."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import shapes_world
from .evaluation.embedded_diversity import embedded_diversity, towers_of
from .evaluation.plan import MethodChoice
from .pipelines import NoiseOptimizer, NoiseResult, list_methods
from .pipelines.registry import METHODS
from .shapes_world.embedded import EmbeddedModel
from .shapes_world.judge import Verdict

SET = 4  # images of each prompt, for methods that compare the images of a set
STEPS, STEPS_OF_CHAINS = 50, 20  # keep eight prompts under a minute on two cores


def first_of_each(prompts: Iterable[str], counts: dict[str, int]) -> list[str]:
    """Return the first `counts[category]` prompts of each category, grouped by category."""
    groups: dict[str, list[str]] = {name: [] for name in counts}
    for prompt in prompts:
        groups.get(shapes_world.category(prompt), []).append(prompt)
    return [prompt for name, count in counts.items() for prompt in groups[name][:count]]


SCORE_RANGE = (0.0, 16.0)  # typical scores of wrong and right images under the embedded reward
# The first prompts of a list with a fixed shuffle, not picked by their results.
DEFAULT_PROMPTS = first_of_each(shapes_world.VALIDATION_PROMPTS, {"position": 4, "binding": 2, "counting": 2})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered method on an embedded model.

    Attributes:
        method: A name in `list_methods()`.
        model: An embedded pipeline.
        steps: Evaluations of each noise. Defaults to the method's own number, capped to suit the model.
    """

    method: str
    model: EmbeddedModel
    steps: int

    @classmethod
    def of(cls, method: str = "reno", model: str = "turbo", steps: int | None = None) -> "Choice":
        """Look up a method and a model by name. Raises `ValueError` for an unknown name."""
        pipelines = [name for name, known in shapes_world.MODELS.items() if known.is_pipeline]
        for what, name, names in (("method", method, list_methods()), ("model", model, pipelines)):
            if name not in names:
                raise ValueError(f"Expected a {what} out of {', '.join(names)}, but got {name!r}.")
        embedded = shapes_world.MODELS[model]
        limit = STEPS if embedded.call["num_inference_steps"] == 1 else STEPS_OF_CHAINS
        return cls(method, embedded, steps or min(METHODS[method].steps, limit))

    @property
    def takes_rewards(self) -> bool:
        return MethodChoice.parse(self.method).takes_rewards

    @property
    def diversity(self) -> Any:
        """The set rewards that the method maximizes, or `None`."""
        return MethodChoice.parse(self.method).diversity

    @property
    def single(self) -> bool:
        """Return whether each image is optimized for its own reward, rather than as part of a diverse set."""
        return self.takes_rewards and self.diversity is None

    @property
    def count(self) -> int:
        """Images per prompt: 1, or `SET` for methods that optimize a set."""
        return 1 if self.single else SET

    @property
    def prompts(self) -> list[str]:
        """The default prompts."""
        return DEFAULT_PROMPTS if self.count == 1 else DEFAULT_PROMPTS[::2]

    @property
    def keeps_best(self) -> bool:
        """Return whether the method returns its best step rather than its last."""
        return METHODS[self.method].returns == "best"

    def build(self) -> NoiseOptimizer:
        """Build the method with the embedded reward and features that it needs."""
        settings: dict[str, Any] = {"steps": self.steps}
        if self.takes_rewards:
            settings["rewards"] = shapes_world.path("clip")
        if hasattr(METHODS[self.method], "score_range"):
            settings["score_range"] = SCORE_RANGE
        if self.diversity is not None:
            settings["diversity"] = embedded_diversity(self.diversity)
        return METHODS[self.method](**settings)

    @property
    def instruments(self) -> list[str]:
        """Names of the embedded models that the method evaluates with."""
        names = {"clip"} if self.takes_rewards else set()
        names |= set() if self.diversity is None else towers_of(self.diversity)
        return [name for name in shapes_world.MODELS if name in names]

    def weights(self) -> list[str]:
        """Return the folders of all required weights. Raises `FileNotFoundError` if some are unavailable."""
        return [shapes_world.path(name) for name in (self.model.name, *self.instruments)]

    def __str__(self) -> str:
        return f"{METHODS[self.method].__name__} on {self.model.name}, the {self.model.title}"


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """The record of optimizing `B` noises step by step.

    Attributes:
        choice: The method and the model.
        prompts: The prompt of each noise; the noises of one set are consecutive.
        results: The `NoiseResult`s: one for all prompts, or one per set.
        images: `(steps, B, 3, 64, 64)` in [0, 1].
        verdicts: The judge's verdict on each image, by step and sample.
    """

    choice: Choice
    prompts: Sequence[str]
    results: Sequence[NoiseResult]
    images: torch.Tensor
    verdicts: list[list[Verdict]]

    @property
    def values(self) -> torch.Tensor:
        """`(steps, B)`: the weighted sum of rewards (higher is better), or the loss of a set (lower is better)."""
        return -self.direction * torch.cat([result.losses for result in self.results], dim=1)

    @property
    def direction(self) -> int:
        """1 if higher values are better, else -1."""
        return 1 if self.choice.single else -1

    @property
    def measure(self) -> str:
        """The name of `values`."""
        return "reward" if self.choice.single else "loss"

    def value(self, step: int, sample: int) -> str:
        """Format one entry of `values`."""
        return f"{self.values[step, sample]:.{1 if self.choice.single else 3}f}"

    @property
    def seconds(self) -> float:
        return sum(result.provenance["seconds"] for result in self.results)

    def best(self, sample: int) -> int:
        """Return the step whose image is returned."""
        return int(torch.cat([result.best_step for result in self.results])[sample])

    def first_right(self, sample: int) -> int | None:
        """Return the first step whose image is correct according to the judge, or `None`."""
        return next((step for step, row in enumerate(self.verdicts) if row[sample].correct), None)

    def ends(self, sample: int) -> tuple[int, int]:
        """Return the steps to compare: the baseline and the returned image."""
        return 0, self.best(sample)

    def end_images(self, end: int) -> torch.Tensor:
        """Return the baselines (`end=0`) or the returned images (`end=1`), `(B, 3, 64, 64)`."""
        return torch.stack([self.images[self.ends(sample)[end], sample] for sample in range(len(self.prompts))])
