"""Weights of rewards that depend on the kind of the prompt, and those of CARINOX."""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from .prompt_kind import PromptKind, prompt_kind


class WeightByKind(float):
    """A weight that depends on the kind of the prompt; as a number it is the weight of a "general" one.

    It is false, as a weight of 0 is, only if all are 0.

    Args:
        by_kind: The weight of each kind of prompt.

    Raises:
        TypeError: For anything but weights by kind.
        ValueError: For kinds that are missing or unknown, and for weights that are negative or not finite.
    """

    by_kind: dict[PromptKind, float]

    def __new__(cls, by_kind: Mapping[PromptKind, float]) -> "WeightByKind":
        if not isinstance(by_kind, Mapping):
            raise TypeError(f"Expected a dict of weights by the kind of the prompt, but got {by_kind!r}.")
        if set(by_kind) != set(get_args(PromptKind)):
            raise ValueError(
                f"Expected a weight for each of {get_args(PromptKind)}, but got {list(by_kind)}. Start from "
                "`dict.fromkeys(typing.get_args(PromptKind), 1.0)`."
            )
        for kind, each in by_kind.items():
            if not isinstance(each, int | float) or not 0 <= each < math.inf:
                raise ValueError(f"Expected a finite weight of at least 0 for the kind '{kind}', but got {each!r}.")
        weight = super().__new__(cls, by_kind["general"])
        weight.by_kind = dict(by_kind)
        return weight

    def __bool__(self) -> bool:
        return any(self.by_kind.values())

    def __reduce__(self) -> tuple[type, tuple[dict[PromptKind, float]]]:
        return WeightByKind, (self.by_kind,)

    def __mul__(self, factor: float) -> "float | WeightByKind":
        if not 0 <= factor < math.inf:  # a plain number, which a sum of rewards refuses by the name of the reward
            return float(self) * factor
        return WeightByKind({kind: weight * factor for kind, weight in self.by_kind.items()})

    __rmul__ = __mul__

    def of(self, prompts: str | Sequence[str] | None, count: int) -> list[float]:
        """Return the weights of `count` prompts, given as one for all, one each, or `None`, which is "general"."""
        texts = [prompts or ""] * count if prompts is None or isinstance(prompts, str) else prompts
        return [self.by_kind[prompt_kind(text)] for text in texts]


# What the released code of CARINOX, https://arxiv.org/abs/2509.17458, lists as weights of rewards by the category of a
# prompt: `assets/weights.json` of https://github.com/amirkasaei/carinox (MIT); "general" is its "overall". They are
# about the rank correlations with the scores that people gave 300 images of each category, divided by their mean (its
# `Compositional_Metric_Evaluation.ipynb`). The fourth reward there, DA score, is left out: a language model has to make
# its questions about each prompt.
CARINOX_FACTORS: dict[PromptKind, tuple[float, float, float]] = {
    # HPSv2.1, ImageReward, VQAScore
    "color": (0.40, 1.06, 1.14),
    "shape": (0.95, 1.12, 0.92),
    "texture": (0.90, 1.10, 0.93),
    "2d_spatial": (1.06, 1.02, 1.10),
    "3d_spatial": (0.96, 0.92, 1.43),
    "numeracy": (1.02, 1.05, 0.93),
    "non_spatial": (1.01, 0.96, 1.17),
    "complex": (0.67, 1.05, 1.06),
    "general": (0.59, 0.94, 1.34),
}
# What the factors multiply: the default weights 5, 5 and 1 of that code times the slopes of its maps of the rewards to
# about [0, 1], 2·hpsv2.1 and (imagereward + 3) / 6. It also clips the gradient of each reward, which a sum does not.
CARINOX_WEIGHTS = {"hpsv2.1": 5.0 * 2, "imagereward": 5.0 / 6, "clip_flant5": 1.0}
AUTO_REWARDS: dict[str, float] = {
    name: weight * WeightByKind({kind: factors[column] for kind, factors in CARINOX_FACTORS.items()})
    for column, (name, weight) in enumerate(CARINOX_WEIGHTS.items())
}
