"""A reward that nobody optimises, watched while others are."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class HeldOutReward(NoiseCallback):
    """Score the images of each step with a reward that is not optimised, and report reward hacking.

    Reward hacking is here what a reward model cannot tell from progress: the optimised loss of an image fell, and a
    second opinion on its best image fell too. The result says so in `result.reports["held out <name>"]`, in plain
    values, each a list with one entry for each image: `initial` and `best`, the held-out scores of the plain image and
    of the best one; `loss_change`, what the optimisation gained (negative is better); and `reward_hacking`, true or
    false. A warning names the images. It costs one forward pass of the reward at each step.

    Args:
        reward: `(images, prompts) -> (B,)`, higher is better: a loaded reward, as `AutoReward.from_pretrained` gives
            it, a `RewardSum`, or any callable; best one that shares neither data nor model with those that are
            optimised.
        name: what the report calls it; by default the reward's own name.
        tolerance: how far the held-out score may fall before it counts, in its own units, at least 0.
        prompts: ask the reward about these instead of the pipeline's prompts: one, or one for each image. A pipeline
            that is called with embeddings has none of its own.

    Attributes:
        scores: `(steps, B)`, the held-out scores of the last run.

    Raises:
        TypeError: a name instead of a loaded reward.
        ValueError: a tolerance below 0; at the first step, a method that looks at no images, or a reward that does not
            return one score per image.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        name: str | None = None,
        tolerance: float = 0.0,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(
                f"Expected a loaded reward or a callable `(images, prompts) -> (B,)`, but got {reward!r}. Load it with "
                "`AutoReward.from_pretrained(...)`."
            )
        if tolerance < 0:
            raise ValueError(f"Expected a tolerance of at least 0, but got {tolerance}.")
        self.reward, self.tolerance, self.prompts = reward, tolerance, prompts
        self.name = name or getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
        self.rows: list[torch.Tensor] = []

    @property
    def scores(self) -> torch.Tensor:
        return torch.stack(self.rows)

    def on_run_start(self, state: NoiseState) -> None:
        self.rows = []

    def on_step_end(self, state: NoiseState) -> None:
        if state.images is None:
            raise ValueError(
                "Expected a method whose objective looks at images, but this one looks at noise or x0 alone. Score its "
                "result instead of watching it."
            )
        prompts = state.prompts if self.prompts is None else self.prompts
        with torch.no_grad():
            scores = self.reward(state.images, prompts)
        scores = getattr(scores, "total", scores)  # of a `RewardSum`
        if scores.shape != (len(state.images),):
            raise ValueError(
                f"Expected the held-out reward '{self.name}' to return a tensor of shape ({len(state.images)},), one "
                f"score per image, but got {tuple(scores.shape)}. Average over everything but the batch."
            )
        self.rows.append(scores.detach().float().to(state.noise.device))
        if state.step == 0:
            self.initial_loss = state.loss
        state.reports[f"held out {self.name}"] = self.report(state)

    def report(self, state: NoiseState) -> dict[str, Any]:
        initial, best = self.rows[0], self.scores.gather(0, state.best.step[None])[0]
        change = state.best.loss - self.initial_loss
        hacked = (change < 0) & (best < initial - self.tolerance)
        return {
            "initial": initial.tolist(),
            "best": best.tolist(),
            "loss_change": change.tolist(),
            "reward_hacking": hacked.tolist(),
        }

    def on_run_end(self, state: NoiseState) -> None:
        report = state.reports.get(f"held out {self.name}", {"reward_hacking": []})
        images = [index for index, hacked in enumerate(report["reward_hacking"]) if hacked]
        if images:
            warnings.warn(
                f"Reward hacking in images {images}: the optimised loss fell, and so did the held-out reward "
                f"'{self.name}'. Take fewer steps, a smaller learning rate, or more rewards that disagree.",
                stacklevel=2,
            )
