"""Callback that evaluates a held-out reward while other rewards are optimized."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..frames import folded, for_each_frame, mean_of_frames
from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class HeldOutReward(NoiseCallback):
    """Score the images of each step with a reward that is not optimized, and report reward hacking.

    An image counts as reward hacking if its optimized loss decreased but the held-out score of its best image decreased
    too. `result.reports["held out <name>"]` holds lists with one entry per image: `initial` and `best`, the held-out
    scores of the baseline and of the best image; `loss_change`, the change of the optimized loss (negative is better);
    and `reward_hacking`, a bool. A warning names the affected images. The cost is one forward pass of the reward per
    step. With a `patience`, an image whose held-out score no longer rises is stopped.

    Args:
        reward: `(images, prompts) -> (B,)`, higher is better: a reward from `AutoReward.from_pretrained`, a
            `RewardSum`, or any callable. It should share neither data nor models with the optimized rewards.
        name: The name in the report; by default the reward's own name.
        tolerance: The decrease of the held-out score, in its own units, that is still accepted; at least 0.
        prompts: One prompt, or one per image, for the reward to use instead of the pipeline's prompts, which do not
            exist if the pipeline is called with embeddings.
        patience: Steps without a new highest held-out score after which an image is stopped, at least 1; `None` stops
            none. Each image of a batch is stopped independently. As in `EarlyStopping`, the steps of each start are
            counted anew, and those of a search not at all.

    Attributes:
        scores: `(steps, B)`, the held-out scores of the last run.

    Raises:
        TypeError: For a name instead of a loaded reward.
        ValueError: For a tolerance below 0 or a patience below 1; at the first step, for a method that evaluates no
            images, or a reward that does not return one score per image.
    """

    continues = ("rows", "initial_loss", "stage", "first")

    def __init__(
        self,
        reward: Callable[..., Any],
        name: str | None = None,
        tolerance: float = 0.0,
        prompts: str | Sequence[str] | None = None,
        patience: int | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(
                f"Expected a loaded reward or a callable `(images, prompts) -> (B,)`, but got {reward!r}. Load it with "
                "`AutoReward.from_pretrained(...)`."
            )
        if tolerance < 0:
            raise ValueError(f"Expected a tolerance of at least 0, but got {tolerance}.")
        if patience is not None and patience < 1:
            raise ValueError(f"Expected a patience of at least 1 step, but got {patience}.")
        self.reward, self.tolerance, self.prompts, self.patience = reward, tolerance, prompts, patience
        self.name = name or getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
        self.rows: list[torch.Tensor] = []
        self.initial_loss: torch.Tensor | None = None

    @property
    def scores(self) -> torch.Tensor:
        return torch.stack(self.rows)

    def on_run_start(self, state: NoiseState) -> None:
        self.rows, self.initial_loss, self.stage, self.first = [], None, state.stage, 0

    def on_step_end(self, state: NoiseState) -> None:
        if state.images is None:
            raise ValueError(
                "Expected a method whose objective evaluates images, but this one evaluates only noise or x0. Score "
                "its result instead."
            )
        prompts = state.prompts if self.prompts is None else self.prompts
        with torch.no_grad():
            scores = self.scores_of(state.images, prompts)
        if scores.shape != (len(state.images),):
            raise ValueError(
                f"Expected the held-out reward '{self.name}' to return a tensor of shape ({len(state.images)},), one "
                f"score per image, but got {tuple(scores.shape)}. Average over everything but the batch."
            )
        self.rows.append(scores.detach().float().to(state.noise.device))
        if state.step == 0:
            self.initial_loss = state.loss
        state.reports[f"held out {self.name}"] = self.report(state)
        if state.stage != self.stage:
            self.stage, self.first = state.stage, len(self.rows) - 1
        if self.patience is not None and state.stage != "search":
            scores = self.scores[self.first :].nan_to_num(-torch.inf, torch.inf, -torch.inf)  # NaN is no rise
            state.stop("held out", len(scores) - 1 - scores.argmax(0) >= self.patience)

    def scores_of(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        """Score images `(B, 3, H, W)`, or videos `(B, F, 3, H, W)` by the mean over their frames."""
        if images.ndim == 5:
            count = images.shape[1]
            return mean_of_frames(self.scores_of(folded(images), for_each_frame(prompts, count)), count)
        scores = self.reward(images, prompts)
        return getattr(scores, "total", scores)  # the output of a `RewardSum`

    def report(self, state: NoiseState) -> dict[str, Any]:
        assert self.initial_loss is not None
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
                f"Reward hacking in images {images}: the optimized loss decreased, and so did the held-out reward "
                f"'{self.name}'. Use fewer steps, a smaller learning rate, or more rewards that disagree.",
                stacklevel=2,
            )
